"""The layouts of an adapter's tensors in HF PEFT's files that differ from Inlay's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.storage.base import FrozenLinear
from inlay.storage.convolution import Convolution
from inlay.storage.own import ScaledEmbedding
from inlay.storage.parameters import Parameter

Turn = Callable[[Tensor], Tensor]


def same(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Layout:
    """The conversion of one tensor to its layout in the file, and back."""

    written: Turn = same
    read: Turn = same


AS_IT_IS = Layout()
TWICE = Layout(lambda t: t / 2, lambda t: t * 2)
"""B of an attention module's output projection: HF PEFT adds the update of it twice."""


def layout_of(view: FrozenLinear | None, key: str, shape: torch.Size) -> Layout:
    if isinstance(view, Convolution):
        return of_convolution(view, key, shape)
    if isinstance(view, Parameter) and view.stack is not None:
        return of_stack(key, shape)
    if isinstance(view, ScaledEmbedding) and key == "lora_embedding_B":
        return of_scaled(view)
    return AS_IT_IS


def of_scaled(view: ScaledEmbedding) -> Layout:
    """B: HF PEFT scales what it adds only where the layer calls its number `embed_scale`."""
    known = getattr(view.layer, "embed_scale", None)
    if isinstance(known, int | float) or (isinstance(known, Tensor) and known.numel() == 1):
        return AS_IT_IS
    factor = view.scale(view.dtype)
    return Layout(lambda t: t * factor, lambda t: t / factor) if factor else AS_IT_IS


def of_convolution(view: Convolution, key: str, shape: torch.Size) -> Layout:
    """A: (r, in, k, …), B: (out, r, 1, …); magnitudes and scales: (1, channels, 1, …)."""
    ones = (1,) * len(view.kernel)
    turned = {
        "lora_A.weight": (shape[0], -1, *view.kernel),
        "lora_B.weight": (*shape, *ones),
        "lora_magnitude_vector": (1, -1, *ones),
        "ia3_l": (1, -1, *ones),
    }.get(key)
    if turned is None:
        return AS_IT_IS
    return Layout(lambda t: t.reshape(turned), lambda t: t.reshape(shape))


def of_stack(key: str, shape: torch.Size) -> Layout:
    """A: (stack, r, in) is (stack * r, in); B: (stack, out, r) is (out, r * stack), rank first."""
    if key == "lora_A.weight":
        return Layout(lambda t: t.flatten(0, 1), lambda t: t.reshape(shape))
    if key == "lora_B.weight":
        stack, out, rank = shape
        return Layout(
            lambda t: t.permute(1, 2, 0).reshape(out, rank * stack),
            lambda t: t.reshape(out, rank, stack).permute(2, 0, 1),
        )
    return AS_IT_IS
