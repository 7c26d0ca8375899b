"""Adapters on a model: where they go, what they train, how they come off."""
