"""What frozen layers give for the rows, kept so that they run once."""
