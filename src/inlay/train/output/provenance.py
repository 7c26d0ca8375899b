"""What a run was made of: versions, machine, and the hash of the base's files."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.files import sha256_of, size_of
from inlay.model.load.folder import located, weight_files
from inlay.train.output.events import peak_memory

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "safetensors", "inlay")


def versions() -> dict[str, str]:
    """Return the versions of everything that decides a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def base_files(model: str, revision: str | None) -> list[Path]:
    folder = located(model, revision)
    return [folder / "config.json", *weight_files(folder)]


def describe_base(files: Sequence[Path]) -> dict[str, Any]:
    return {"base_sha256": sha256_of(*files), "model_bytes": size_of(*files)}


def most_memory(model: nn.Module) -> int:
    """Return the most memory held so far, in bytes: on the GPU if the model is there."""
    device = next(model.parameters()).device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
