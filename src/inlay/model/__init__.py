"""Load, find layers, attach, detach, merge: the only code that changes a model."""
