"""What a run will need, which activations it keeps, and what it takes on the way."""
