"""A layer that a method acts on, with the numbers and verbs of HF PEFT's tuner layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.methods.base import LowRank, replaced
from inlay.methods.ia3 import IA3
from inlay.model.adapters.layer import AdaptedLayer
from inlay.peft.errors import AdapterError
from inlay.peft.layer import PeftLayer
from inlay.peft.views import Dropouts, Numbers, Scaling, low_rank_of
from inlay.storage.registry import kind

WIDTHS = ("in_features", "out_features")


class TunerLayer(PeftLayer):
    """A layer that a method acts on, with the numbers and verbs of HF PEFT's tuner layers."""

    lora_variant: ClassVar[Mapping[str, Any]] = {}
    quantization_backend = None
    fan_in_fan_out = False
    cast_input_dtype_enabled = True

    @property
    def r(self) -> Numbers:
        return self.low_rank_numbers(lambda method: method.rank)

    @property
    def lora_alpha(self) -> Numbers:
        return Numbers(self, lambda layer: dict(getattr(type(layer), "look").alphas))  # noqa: B009

    @property
    def scaling(self) -> Scaling:
        return Scaling(self)

    @scaling.setter
    def scaling(self, scales: Mapping[str, float]) -> None:
        live = Scaling(self)
        for name, scale in scales.items():
            live[name] = scale

    @property
    def lora_dropout(self) -> nn.ModuleDict:
        return Dropouts(self)

    @property
    def use_rslora(self) -> Numbers:
        return self.low_rank_numbers(lambda method: method.rslora)

    @property
    def use_dora(self) -> Numbers:
        return self.low_rank_numbers(lambda method: bool(method.peft_fixed.get("use_dora")))

    def low_rank_numbers(self, read: Callable[[LowRank], Any]) -> Numbers:
        return Numbers(self, lambda layer: {n: read(m) for n, m in low_rank_of(layer).items()})

    def __getattr__(self, name: str) -> Any:
        if name in WIDTHS:
            return widths_of(self)[WIDTHS.index(name)]
        return super().__getattr__(name)

    @property
    def is_feedforward(self) -> bool:
        """Whether an IA3 adapter scales this layer's input."""
        return any(isinstance(m, IA3) and m.scales_input for m in self.methods.values())

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().named_children()
        if len(self.lora_dropout):
            yield "lora_dropout", self.lora_dropout

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        return tuple(t for t in self.views() if t not in ("base_layer", "token_adapter"))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        return ("r", "lora_alpha", "scaling") if low_rank_of(self) else ()

    @property
    def base_layer(self) -> nn.Module:
        return self.views().get("base_layer") or self.get_base_layer()

    def get_base_weight(self) -> Tensor:
        """Return the frozen weight, (out, in), dense."""
        assert self.base is not None
        return self.base.dequantize()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what an adapter adds to the weight, in the layer's own layout."""
        method = low_rank_of(self).get(adapter)
        if method is None:
            raise AdapterError(f"this layer has no LoRA adapter named {adapter!r}")
        p = self.params(adapter)
        delta = method.scale * (p.B @ p.A)
        return delta if kind(self) == "linear" else delta.T

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's factor to `scale` times the configured one."""
        found = low_rank_of(self).get(adapter)
        if found is not None:
            configured = replaced(found, alpha=self.lora_alpha[adapter])
            assert isinstance(configured, LowRank)
            self.scaling[adapter] = scale * configured.scale

    def scale_layer(self, scale: float) -> None:
        live = self.scaling
        for name in self.active:
            if name in live:
                live[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters by a factor; None goes back to the configured one."""
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
