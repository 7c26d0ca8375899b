"""Mixed batches: each row of a batch goes through the adapter named for it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.methods.base import PromptMethod
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.adapters.registry import adapters
from inlay.peft.errors import AdapterError, KindError
from inlay.storage.convolution import is_convolution
from inlay.storage.registry import kind

BASE = "__base__"
"""The name of no adapter, as HF PEFT spells it."""
APART = "run the rows of each adapter in a batch of their own"


@contextmanager
def routed(model: nn.Module, names: Sequence[str], copies: int = 1) -> Generator[None]:
    """Run each row of a batch through the adapter named for it; `__base__` is none."""
    check_names(model, names)
    layers = [(n, m) for n, m in own_modules(model) if isinstance(m, AdaptedLayer)]
    used = [(n, m) for n, m in layers if set(names) & set(m.methods)]
    for name, layer in used:
        check_rowwise(name, layer)
    groups = {len(names) * n: grouped(names, n) for n in {1, copies}}
    for name, layer in used:
        vars(layer)["forward"] = partial(forward, layer, name, groups)
    try:
        yield
    finally:
        for _, layer in used:
            del vars(layer)["forward"]


def grouped(names: Sequence[str], copies: int) -> dict[str, Tensor]:
    """Return the rows of each adapter where the model holds every row `copies` times."""
    rows = [name for name in names for _ in range(copies)]
    return {each: torch.tensor([r == each for r in rows]).nonzero()[:, 0] for each in set(rows)}


def forward(
    layer: AdaptedLayer, name: str, groups: dict[int, dict[str, Tensor]], *args: Any, **kwargs: Any
) -> Tensor:
    """`groups`: rows of each adapter by batch size; a decoder reads each row once a beam."""
    call = [*args, *kwargs.values()]
    x: Tensor = call[0]
    rows = x.shape[0]
    if len(call) != 1 or rows not in groups:
        expected = " or ".join(map(str, sorted(groups)))
        raise AdapterError(
            f"layer {name} reads {rows} rows where adapter_names gives {expected}: this model "
            f"does not keep one row a sequence there; {APART}"
        )
    check_batched(name, layer, x)
    active, found = layer.active, dict[str, Tensor]()
    try:
        for each, here in groups[rows].items():
            layer.active = (each,) if each in layer.methods else ()
            found[each] = type(layer).forward(layer, x[here.to(x.device)])
    finally:
        layer.active = active
    first = next(iter(found.values()))
    y = first.new_empty(rows, *first.shape[1:])
    for each, here in groups[rows].items():
        y[here.to(y.device)] = found[each]
    return y


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    if model.training:
        raise AdapterError(
            "Cannot pass `adapter_names` when the model is in training mode; call model.eval()"
        )
    known = adapters(model)
    wrong = sorted(set(names) - set(known) - {BASE})
    if wrong:
        raise AdapterError(
            f"Trying to infer with non-existing adapter(s): {', '.join(wrong)}; the model has "
            f"{', '.join(known)}, and {BASE} for none"
        )
    methods = {name: known[name].method for name in names if name != BASE}
    prompts = [name for name, method in methods.items() if isinstance(method, PromptMethod)]
    if prompts:
        raise AdapterError(
            f"adapter {prompts[0]!r} is a prompt before every row of a batch, so adapter_names "
            f"cannot give it to some; {APART}"
        )


def check_rowwise(name: str, layer: AdaptedLayer) -> None:
    shown = type(layer).__name__
    if layer.part_views and not isinstance(layer, nn.MultiheadAttention):
        raise KindError(
            f"lora.ParamWrapper does not support mixed adapter batches yet. {name}, a {shown}, has "
            f"adapters on single parameters; {APART}"
        )
    if isinstance(layer, nn.MultiheadAttention):
        raise KindError(
            f"lora.MultiheadAttention does not support mixed adapter batches: {name} reads several "
            f"inputs; {APART}"
        )
    if not is_convolution(layer) and kind(layer) is None and "norm" not in shown.lower():
        raise KindError(
            "Mixed batching is only supported for the following modules: Linear, Embedding, "
            f"Conv1d, Conv2d, Conv3d. adapter_names cannot split the rows of {name}, a {shown}; "
            f"{APART}"
        )


def check_batched(name: str, layer: AdaptedLayer, x: Tensor) -> None:
    """Raise where a convolution reads one sample without a batch dimension."""
    kernel: tuple[int, ...] = getattr(layer, "kernel_size", ())
    if is_convolution(layer) and x.ndim != len(kernel) + 2:
        raise AdapterError(
            f"{name} reads a tensor of {x.ndim} dimensions, one sample without a batch, so "
            "adapter_names cannot split its rows; give it a batch of one"
        )
