"""Evaluation: losses, generation, metrics, statistics and the report of a run."""
