"""An adapted layer as HF PEFT's own looks from outside: its names, its numbers, its class.

TRL, `peft.optimizers` and `peft.helpers` find adapters by `isinstance` of HF PEFT's layers, by
names such as `lora_B.default.weight`, by `r` and `scaling`. The tensors stay where Inlay has them;
what is seen here are views (views.py), through which they are read and set.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from inlay.checkpoint.placement import saved_roots, under_any
from inlay.methods.base import LowRank, SelectMethod, replaced
from inlay.model.attach import Attached, adapters, own_modules
from inlay.model.layer import AdaptedLayer
from inlay.peft.errors import AdapterError
from inlay.peft.seam import LNTuningLayer, ia3, lora
from inlay.peft.views import Dropout, Scaling, Word, low_rank_of, tables
from inlay.storage.registry import kind

Words = tuple[tuple[str, tuple[Word, ...]], ...]
"""What HF PEFT calls the tensors of each adapter."""
Alphas = tuple[tuple[str, float], ...]
"""The alpha that each adapter's configuration says, whatever its scale is now."""

LORA: Mapping[str, Any] = {"linear": lora.Linear, "conv1d": lora.Linear,
                           "embedding": lora.Embedding}  # fmt: skip
"""HF PEFT's class of a LoRA layer, by the layer's kind."""
BELOW = {"lora_magnitude_vector": "weight"}
"""What HF PEFT has below the adapter's name and leaves out in its file."""


class Presented(AdaptedLayer):
    """An adapted layer with HF PEFT's names beside its own."""

    plain: ClassVar[type[AdaptedLayer]]
    words: ClassVar[Words]
    alphas: ClassVar[Alphas]
    merged_in: ClassVar[tuple[str, ...]]
    disable_adapters: ClassVar[bool]

    def __getattr__(self, name: str) -> Any:
        """Return a table of tensors by HF PEFT's name, or the layer's attribute."""
        tops = (word.table.partition(".")[0] for _, words in type(self).words for word in words)
        if name in tops:
            return tables(self, type(self).words)[name]
        return super().__getattr__(name)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Every child by name, adapters first by HF PEFT's."""
        yield from tables(self, type(self).words).items()
        yield from super().named_children()

    def children(self) -> Iterator[nn.Module]:
        """Every child once: what moves, casts and trains the tensors need not see them twice."""
        yield from dict.fromkeys(m for m in self._modules.values() if m is not None)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        """Every module below by name, adapters first by HF PEFT's."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self.named_children():
            below = f"{prefix}.{name}" if prefix else name
            yield from child.named_modules(memo, below, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state with HF PEFT's names of adapters."""
        found: Any = super().state_dict(*args, **kwargs)
        for ours, theirs in self.spelled(kwargs.get("prefix", args[1] if len(args) > 1 else "")):
            if ours in found:
                found[theirs] = found.pop(ours)
        return found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for ours, theirs in self.spelled(prefix):
            if theirs in state_dict:
                state_dict[ours] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def spelled(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Every adapter tensor's name in the state, Inlay's and HF PEFT's."""
        for adapter, words in type(self).words:
            for word in words:
                theirs = ".".join(part for part in (word.table, adapter, word.below) if part)
                at = f"{word.part}.{word.tensor}" if word.part else word.tensor
                yield f"{prefix}adapters.{adapter}.{at}", prefix + theirs


class PresentedTuner(Presented):
    """A layer that a method acts on: what HF PEFT's tuner layers have besides."""

    lora_variant: ClassVar[Mapping[str, Any]] = {}
    quantization_backend = None
    fan_in_fan_out = False
    cast_input_dtype_enabled = True

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are merged into the weight now."""
        return list(type(self).merged_in)

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the weight now."""
        return bool(type(self).merged_in)

    @property
    def r(self) -> dict[str, int]:
        """Each adapter's rank."""
        return {name: method.rank for name, method in self.low_rank().items()}

    @property
    def lora_alpha(self) -> dict[str, float]:
        """Each adapter's alpha, as it was configured."""
        return dict(type(self).alphas)

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
        found = {n: Dropout(self, n) for n, m in self.low_rank().items() if m.dropout > 0}
        return nn.ModuleDict(found).train(self.training)

    @property
    def use_rslora(self) -> dict[str, bool]:
        """Which adapters are rank-stabilised."""
        return {name: method.rslora for name, method in self.low_rank().items()}

    @property
    def use_dora(self) -> dict[str, bool]:
        """Which adapters are DoRA."""
        return {n: bool(m.peft_fixed.get("use_dora")) for n, m in self.low_rank().items()}

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
        return tuple(tables(self, type(self).words))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The names of what else is kept for each adapter."""
        return ("r", "lora_alpha", "scaling") if self.low_rank() else ()

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act here."""
        return list(self.active)

    @property
    def active_adapter(self) -> list[str]:
        """The names of the adapters that act here."""
        return list(self.active)

    def get_base_layer(self) -> nn.Module:
        """Return the layer without adapters, on the same tensors."""
        original = type(self).original
        bare = original.__new__(original)
        vars(bare).update(vars(self))
        bare._modules = {k: m for k, m in self._modules.items() if k != "adapters"}
        return bare

    @property
    def base_layer(self) -> nn.Module:
        """The layer without adapters, on the same tensors; or what HF PEFT wraps further in."""
        return tables(self, type(self).words).get("base_layer") or self.get_base_layer()

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


def present(model: nn.Module, merged: Collection[str] = (), enabled: bool = True) -> None:
    """Give every adapted layer of a model HF PEFT's look, as its adapters are now."""
    there = adapters(model)
    roots = {name: saved_roots(model, attached) for name, attached in there.items()}
    for place, layer in own_modules(model):
        if isinstance(layer, AdaptedLayer):
            plain: Any = type(layer).plain if isinstance(layer, Presented) else type(layer)
            words = tuple(
                (n, words_of(layer, n, there[n], under_any(place, roots[n])))
                for n in layer.methods if n in there
            )  # fmt: skip
            methods = {n: there[n].method.for_layer(place) for n in layer.methods if n in there}
            alphas = tuple((n, m.alpha) for n, m in methods.items() if isinstance(m, LowRank))
            now = tuple(name for name in merged if name in layer.methods)
            layer.__class__ = presented(plain, words, alphas, kind(layer), now, enabled)


def words_of(
    layer: AdaptedLayer, adapter: str, attached: Attached, saved: bool
) -> tuple[Word, ...]:
    """Return what HF PEFT calls one adapter's tensors at a layer; no word for those it lacks."""
    method, found = layer.methods[adapter], list[Word]()
    parts = layer.params(adapter).parts
    inside = [name for name in layer._parameters if name in parts]
    for depth, name in enumerate(reversed(inside)):  # HF PEFT wraps once for each parameter
        acts = layer.part_methods[adapter][name]
        for tensor in parts[name]._parameters:
            table, _, below = acts.peft_tensors("linear").get(tensor, "").partition(".")
            if table:
                nested = "base_layer." * depth + table
                found.append(Word(tensor, nested, below or BELOW.get(table, ""), name))
    for tensor in layer.params(adapter)._parameters:
        copied = method is None or tensor in layer._parameters
        if not copied and method is not None:
            key = method.peft_tensors(kind(layer) or "linear").get(tensor, "")
        elif saved:
            key = f"modules_to_save.{tensor}"
        elif isinstance(attached.method, SelectMethod):
            key = attached.method.peft_tensors(kind(layer) or "linear").get(tensor, "")
        else:
            key = ""
        table, _, below = key.partition(".")
        if table:
            found.append(Word(tensor, table, below or BELOW.get(table, "")))
    return tuple(found)


@cache
def presented(
    plain: type[AdaptedLayer],
    words: Words,
    alphas: Alphas,
    layer_kind: str | None,
    merged: tuple[str, ...],
    enabled: bool,
) -> type[Presented]:
    """Return the subclass of an adapted class that has HF PEFT's look."""
    found = {word.table.rpartition(".")[2].partition("_")[0] for _, each in words for word in each}
    acts = found & {"lora", "ia3", "ln"}
    body: dict[str, Any] = {"plain": plain, "words": words, "alphas": alphas}
    body |= {"merged_in": merged, "disable_adapters": not enabled}
    body |= {
        "original": plain.original,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    cls: Any = type(plain.__name__, (PresentedTuner if acts else Presented, plain), body)
    for prefix in acts:
        theirs: Any = {"ia3": ia3.IA3Layer, "ln": LNTuningLayer}.get(prefix)
        if prefix == "lora":
            theirs = LORA.get(layer_kind or "", lora.LoraLayer)
        theirs.register(cls)
    return cast("type[Presented]", cls)
