"""What a method computed from the base weight is computed again once that weight has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from inlay.methods.base import Params, WeightMethod
from inlay.storage.base import FrozenLinear

SEEN = "seen_base"
"""The attribute of an adapter's tensors that says which state of the weight they follow from."""


def note(method: WeightMethod, params: Params, base: FrozenLinear) -> None:
    if method.reads_base and is_concrete(params):
        vars(params)[SEEN] = base.state()


@torch.no_grad()
def follow(method: WeightMethod, params: Params, base: FrozenLinear) -> None:
    if not method.reads_base or not is_concrete(params):
        return
    now = base.state()
    if now is not None and now == vars(params).get(SEEN):
        return
    method.follow(params, base, restart=now is not None)
    vars(params)[SEEN] = now


def follow_loaded(layer: nn.Module, keys: object) -> None:
    """Follow the weights that `load_state_dict` put in: a compiled layer looks no further."""
    del keys
    adapted: Any = layer
    adapted.update_derived(adapted.weight_methods())


def is_concrete(params: Params) -> bool:
    """Return whether tensors can be looked at: not while a graph is traced, nor fake ones."""
    return not torch.compiler.is_compiling() and not any(map(is_fake, params.parameters()))
