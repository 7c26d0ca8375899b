"""IA3: W' = diag(l) W, or W' = W diag(l) on feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.methods.base import Kind, Params, WeightMethod, matches_name, replaced, stored
from inlay.storage.base import FrozenLinear

FEEDFORWARD = (
    "down_proj", "fc2", "w2", "mlp.c_proj", "dense_4h_to_h", "lin2", "wo", "fc_out",
    r"(?<!attention\.)output\.dense",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IA3(WeightMethod):
    """Scale keys, values and feed-forward activations by learned vectors: `W' = diag(l) W`.

    Layers that `feedforward` names (names, suffixes or regexes) are scaled at their input,
    `W' = W diag(l)`, the bias as it is; the others at their output, with the bias.
    Shapes: l (1, in) at the input, (out, 1) at the output; so in, or out, parameters a layer.
    l starts at one. Its learning rate is 16 times LoRA's (5e-3 against 3e-4).
    Paper: arXiv 2205.05638.

    >>> IA3().for_layer("layers.0.k_proj").count((64, 32))
    64
    >>> IA3().for_layer("layers.0.down_proj").count((64, 32))
    32
    """

    feedforward: tuple[str, ...] = FEEDFORWARD

    name = "ia3"
    paper = "2205.05638"
    learning_rate_factor = 16.0
    default_targets = "ia3"
    peft_type = "IA3"
    peft_keys = {"feedforward": "feedforward_modules"}

    @property
    def scales_input(self) -> bool:
        """Whether the input is scaled, not the output, at the layer this was made for."""
        return bool(self.feedforward)

    def for_layer(self, layer_name: str) -> IA3:
        named = tuple(f for f in self.feedforward if matches_name(f, layer_name))
        layer = replaced(self, feedforward=named)
        assert isinstance(layer, IA3)
        return layer

    def init(self, base: FrozenLinear, kind: Kind, seed: torch.Generator) -> Params:
        shape = (1, base.channels) if self.scales_input else (base.shape[0], 1)
        return Params({"l": stored(base, *shape).fill_(1)})

    def count(self, shape: tuple[int, int]) -> int:
        return shape[1] if self.scales_input else shape[0]

    def count_on(self, base: FrozenLinear) -> int:
        return base.channels if self.scales_input else base.shape[0]

    def weight(self, p: Params, w: Tensor) -> Tensor:
        scales = p.l.to(w.dtype)
        columns = w.shape[-1] // scales.shape[-1] if self.scales_input else 1
        return w * (scales if columns == 1 else scales.repeat_interleave(columns, -1))

    def bias(self, p: Params, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.scales_input else b * p.l[..., 0].to(b.dtype)

    def forward(self, p: Params, x: Tensor, base: FrozenLinear, training: bool) -> Tensor:
        if self.scales_input:
            return base.linear(x * p.l.flatten().to(x.dtype))
        y = base.linear(x)
        return y * p.l.flatten().to(y.dtype)

    def to_peft(self) -> dict[str, object]:
        """Return HF PEFT's keys; one regex, as a list would have to be part of the targets."""
        return {"feedforward_modules": rf"(.*\.)?({'|'.join(self.feedforward)})"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> IA3:
        """Build the method from HF PEFT's keys, where the layers are a regex, a list or None."""
        named = config.get("feedforward_modules") or ()
        return cls(feedforward=(named,) if isinstance(named, str) else tuple(named))

    def peft_tensors(self, kind: Kind) -> Mapping[str, str]:
        return {"l": "ia3_l"}
