"""Adapters in torch's own format (`adapter_model.bin`): tensors are read, and never any code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.errors import CheckpointError

NESTED = ("state_dict", "model")
"""Under which a training script may have put the tensors."""


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Read the tensors by name in a file of torch.save, with torch's reader of tensors alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of protocols that its reader may not know.
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is a pickle that holds more than tensors: it could run any code when opened, "
            "so it is not opened. Where you trust it, write its tensors as safetensors: "
            f"{command(path)}"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is a pickle that is truncated or corrupt ({reason}); copy it again"
        ) from None
    for key in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(
            f"{path} is a pickle that does not hold tensors by name, as an adapter's file does"
        )
    return {str(key): value for key, value in found.items()}


def command(path: Path) -> str:
    new = path.with_name("adapter_model.safetensors")
    return (
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{path}', weights_only=False), '{new}')\""
    )
