"""Prompt adapters: virtual tokens before every sequence of a model."""
