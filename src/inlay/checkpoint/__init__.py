"""Adapters on disk, in HF PEFT's layout, in and out."""
