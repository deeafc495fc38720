"""Atlas: the embedded language model, made here from nothing but GeoNames, and what it makes up."""
