"""Frozen weights that lie outside the device: in host memory, in files, on other processes."""
