"""Which heads carry signal, and on which rows that may be asked."""
