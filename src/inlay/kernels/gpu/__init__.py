"""Triton kernels for GPUs; the pure-torch paths beside them define the values."""
