"""The generators of Inlay's demo data."""
