"""Merge adapters into the base weights, check the result, write it."""
