"""One file for each operation, with its autograd.Function, functional and Module."""
