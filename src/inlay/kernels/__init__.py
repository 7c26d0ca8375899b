"""The same mathematics, faster: opaque operators. Never needed for correctness."""
