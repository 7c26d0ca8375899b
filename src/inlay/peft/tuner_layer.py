"""A layer that a method acts on: what HF PEFT's own tuner layers have besides names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.methods.base import LowRank, replaced
from inlay.methods.ia3 import IA3
from inlay.model.adapters.layer import AdaptedLayer
from inlay.peft.errors import AdapterError
from inlay.peft.layer import Presented
from inlay.peft.views import Dropouts, Numbers, Scaling, low_rank_of, which_dora
from inlay.storage.registry import kind

WIDTHS = ("in_features", "out_features")


class TunerLayer(Presented):
    """A layer that a method acts on: what HF PEFT's tuner layers have besides."""

    lora_variant: ClassVar[Mapping[str, Any]] = {}
    quantization_backend = None
    fan_in_fan_out = False
    cast_input_dtype_enabled = True

    @property
    def r(self) -> Numbers:
        """Each adapter's rank."""
        return Numbers(self, lambda layer: {n: m.rank for n, m in low_rank_of(layer).items()})

    @property
    def lora_alpha(self) -> Numbers:
        """Each adapter's alpha, as it was configured."""
        return Numbers(self, lambda layer: dict(getattr(type(layer), "look").alphas))  # noqa: B009

    @property
    def scaling(self) -> Scaling:
        """What each adapter's product B A is multiplied by; to set it has effect."""
        return Scaling(self)

    @scaling.setter
    def scaling(self, wanted: Mapping[str, float]) -> None:
        live = Scaling(self)
        for name, scale in wanted.items():
            live[name] = scale

    @property
    def lora_dropout(self) -> nn.ModuleDict:
        """Each adapter's dropout; to set its `p` has effect."""
        return Dropouts(self)

    @property
    def use_rslora(self) -> Numbers:
        """Which adapters are rank-stabilised."""
        return Numbers(self, lambda layer: {n: m.rslora for n, m in low_rank_of(layer).items()})

    @property
    def use_dora(self) -> Numbers:
        """Which adapters are DoRA."""
        return Numbers(self, which_dora)

    def __getattr__(self, name: str) -> Any:
        """Return a layer's width where it is not called so itself, or what it has."""
        if name in WIDTHS:
            return widths_of(self)[WIDTHS.index(name)]
        return super().__getattr__(name)

    @property
    def is_feedforward(self) -> bool:
        """Whether an IA3 adapter scales this layer's input."""
        return any(isinstance(m, IA3) and m.scales_input for m in self.methods.values())

    def low_rank(self) -> dict[str, LowRank]:
        """Return the adapters here that are a low-rank product, with their method."""
        return low_rank_of(self)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Every child by name, and the dropout that TRL looks for to turn it off."""
        yield from super().named_children()
        if len(self.lora_dropout):
            yield "lora_dropout", self.lora_dropout

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The names of the tables of tensors here."""
        further_in = ("base_layer", "token_adapter")
        return tuple(t for t in self.views() if t not in further_in)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The names of what else is kept for each adapter."""
        return ("r", "lora_alpha", "scaling") if self.low_rank() else ()

    @property
    def base_layer(self) -> nn.Module:
        """The layer without adapters, on the same tensors; or what HF PEFT wraps further in."""
        return self.views().get("base_layer") or self.get_base_layer()

    def get_base_weight(self) -> Tensor:
        """Return the frozen weight, (out, in), dense."""
        assert self.base is not None
        return self.base.dequantize()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what an adapter adds to the weight, in the layer's own layout.

        Raises:
            AdapterError: it is not a product of two matrices.
        """
        method = self.low_rank().get(adapter)
        if method is None:
            raise AdapterError(f"this layer has no LoRA adapter named {adapter!r}")
        p = self.params(adapter)
        delta = method.scale * (p.B @ p.A)
        return delta if kind(self) == "linear" else delta.T

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter by `scale` times what its configuration says."""
        found = self.low_rank().get(adapter)
        if found is not None:
            configured = replaced(found, alpha=self.lora_alpha[adapter])
            assert isinstance(configured, LowRank)
            self.scaling[adapter] = scale * configured.scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters by a factor."""
        live = self.scaling
        for name in self.active:
            if name in live:
                live[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters by a factor; without one, go back to what is configured."""
        for name in self.active:
            if scale is None:
                self.set_scale(name, 1.0)
            elif name in self.scaling:
                self.scaling[name] /= scale


def widths_of(layer: AdaptedLayer) -> tuple[int | None, int | None]:
    """Return a layer's widths in and out as HF PEFT counts them; None where there are none."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, 3 * layer.embed_dim
    if layer.base is None:
        return None, None
    return layer.base.channels, layer.base.shape[0]
