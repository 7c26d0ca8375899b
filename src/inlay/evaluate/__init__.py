"""How good is it: metrics, base against tuned with their uncertainty, and the report of a run."""
