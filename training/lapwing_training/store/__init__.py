"""Features of answers on disk, and the table that is read out of them."""
