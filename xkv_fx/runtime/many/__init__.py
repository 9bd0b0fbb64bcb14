"""Many requests through the fixed rows of one program."""
