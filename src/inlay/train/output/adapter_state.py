"""An adapter's tensors as a checkpoint holds them, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.errors import CheckpointError
from inlay.model.adapters.registry import adapter_places


def tensors_of(model: nn.Module, adapter: str) -> dict[str, dict[str, Tensor]]:
    return {
        place: {name: getattr(params, name) for name in params.names()}
        for place, params in adapter_places(model, adapter)
    }


def load_tensors(
    model: nn.Module, adapter: str, saved: Mapping[str, Mapping[str, Tensor]], source: Path
) -> None:
    """Put saved values into an adapter's tensors."""
    have = tensors_of(model, adapter)
    shapes = {p: {n: t.shape for n, t in ts.items()} for p, ts in have.items()}
    if shapes != {p: {n: t.shape for n, t in ts.items()} for p, ts in saved.items()}:
        raise CheckpointError(
            f"the checkpoint {source} holds an adapter of other layers or shapes than this run's; "
            "give another output folder, or --overwrite"
        )
    with torch.no_grad():
        for place, tensors in have.items():
            for name, tensor in tensors.items():
                tensor.copy_(saved[place][name])
