"""Version 1 of the wire: the .proto files and the stubs that `proto/generate.py` makes of them."""
