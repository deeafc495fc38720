"""The wire of Lapwing, by version; it knows nothing else."""
