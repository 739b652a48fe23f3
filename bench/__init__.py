"""`python -m bench`: check every provider of an operation, then time them against each other."""
