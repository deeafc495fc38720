"""How good a probe is beside everything it must beat, and what its scores promise."""
