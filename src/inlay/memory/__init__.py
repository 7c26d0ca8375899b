"""Memory: the plan of a run, activation policies, and measurements."""
