"""One file an operation: its autograd.Function, functional and Module."""
