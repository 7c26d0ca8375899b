"""Load a model, put adapters on it, make it fast, merge: the only code that changes a model."""
