"""What every test runs under: one thread each, as two run at a time; no network, no deadline."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("inlay", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("inlay")

collect_ignore_glob = ["unit/gpu_*.py"]
"""Run by test_kernels_gpu.py in processes of their own."""
