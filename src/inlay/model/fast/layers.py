"""Fast layers and blocks: products, norms, gates, and the last block at scored positions only."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels.gate import gated
from inlay.kernels.norm import rms_norm
from inlay.kernels.switches import is_on
from inlay.model.fast.base import Fast
from inlay.model.seams.transformers import SiLUActivation
from inlay.storage.dense import DenseLinear


class FastLinear(Fast):
    """`nn.Linear` in the dtype that this machine multiplies fastest."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_on("products"):
            return super().forward(input)
        return DenseLinear(self).linear(input)


class FastNorm(Fast):
    """An RMS norm as one operator."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not is_on("norms") or self.weight.requires_grad or not self.training:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]


class FastGate(Fast):
    """A gated feed-forward block with activation and product as one operator."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return `down(act(gate(x)) * up(x))`."""
        act = name_of_activation(self.act_fn)
        if not is_on("gates") or act is None or not self.training:
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype:  # as where one of them is not cast by autocast
            return self.down_proj(self.act_fn(gate) * up)
        h = gated(gate, up, act)
        with made_again(h, lambda: gated(gate, up, act)):
            return self.down_proj(h)


@contextmanager
def made_again(product: Tensor, make: Callable[[], Tensor]) -> Generator[None]:
    """Keep nothing of `product` for the gradient of what reads it here: `make` makes it again.

    Where others decide what is kept, as activation checkpointing does, it is left to them.
    """
    if torch.compiler.is_compiling() or others_decide_what_is_kept():
        yield
        return
    storage, shape = product.untyped_storage()._cdata, product.shape

    def pack(saved: Tensor) -> Tensor | None:
        same = saved.shape == shape and saved.untyped_storage()._cdata == storage
        return None if same else saved

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return make()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def others_decide_what_is_kept() -> bool:
    hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return hooks._top_saved_tensors_default_hooks(False) is not None


def name_of_activation(act: nn.Module) -> str | None:
    if isinstance(act, nn.SiLU | SiLUActivation):
        return "silu"
    tanh = isinstance(act, nn.GELU) and act.approximate == "tanh"
    return "gelu_tanh" if tanh or type(act).__name__ == "GELUTanh" else None


class FastLastBlock(Fast):
    """The last Transformer block: behind attention it computes scored positions only."""

    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    self_attn: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output at all positions, or (1, n, d) at the `scored` ones."""
        scored: Tensor | None = kwargs.pop("scored", None)
        if scored is None:
            return super().forward(hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(*args, hidden_states=normed, **kwargs)
        here = (hidden_states + attended).flatten(0, 1).index_select(0, scored).unsqueeze(0)
        return here + self.mlp(self.post_attention_layernorm(here))
