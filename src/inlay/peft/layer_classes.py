"""The classes that adapted layers get, so that `isinstance` finds HF PEFT's layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, cast

from torch import nn

from inlay.checkpoint.placement import saved_roots, under_any
from inlay.checkpoint.slots import TOKEN_KEY
from inlay.methods.base import LowRank, SelectMethod
from inlay.methods.tokens import ROWS
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.adapters.registry import Attached, active, adapters, required_registry
from inlay.model.pickling import MADE_BY
from inlay.peft.auxiliary import SavedLayer, TokenLayer, become_wrapper
from inlay.peft.layer import Look, PeftLayer
from inlay.peft.seam import (
    LNTuningLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    ia3,
    lora,
)
from inlay.peft.tuner_layer import TunerLayer
from inlay.peft.views import PeftName
from inlay.storage.registry import kind

LORA: Mapping[str, Any] = {"linear": lora.Linear, "conv1d": lora.Linear,
                           "embedding": lora.Embedding}  # fmt: skip
"""HF PEFT's class of a LoRA layer, by the layer's kind."""
TUNERS = {"lora": "lora", "ia3": "ia3", "ln": "ln_tuning"}
"""HF PEFT's tuner of a layer, by the prefix of its tensors' names."""
BELOW = {"lora_magnitude_vector": "weight"}
"""What HF PEFT has below the adapter's name and leaves out in its file."""


def set_classes(model: nn.Module, merged: Collection[str] = (), enabled: bool = True) -> None:
    there, chosen = adapters(model), active(model)
    roots = {name: saved_roots(model, attached) for name, attached in there.items()}
    whole = {root for each in roots.values() for root in each}
    for place, layer in own_modules(model):
        if isinstance(layer, AdaptedLayer):
            plain: Any = type(layer).plain if isinstance(layer, PeftLayer) else type(layer)
            here = {n: there[n] for n in layer.methods if n in there}
            names = tuple(
                (n, peft_names(layer, n, each, under_any(place, roots[n])))
                for n, each in here.items()
            )
            methods = {n: a.method.for_layer(place) for n, a in here.items()}
            alphas = tuple((n, m.alpha) for n, m in methods.items() if isinstance(m, LowRank))
            now = tuple(name for name in merged if name in layer.methods)
            look = Look(kind(layer), names, alphas, place in whole, chosen, now, enabled)
            layer.__class__ = peft_layer_class(plain, look)
        elif place in whole:
            become_wrapper(layer, required_registry(model).classes)


def peft_names(
    layer: AdaptedLayer, adapter: str, attached: Attached, saved: bool
) -> tuple[PeftName, ...]:
    """Return HF PEFT's names of one adapter's tensors at a layer, of those that it has."""
    method, found = layer.methods[adapter], list[PeftName]()
    parts = layer.params(adapter).parts
    inside = [name for name in layer._parameters if name in parts]
    for depth, name in enumerate(reversed(inside)):  # HF PEFT wraps once for each parameter
        acts = layer.part_methods[adapter][name]
        for tensor in parts[name]._parameters:
            table, _, below = acts.peft_tensors("linear").get(tensor, "").partition(".")
            if table:
                nested = "base_layer." * depth + table
                found.append(PeftName(tensor, nested, below or BELOW.get(table, ""), name))
    for tensor in layer.params(adapter)._parameters:
        if tensor == ROWS[-1]:
            found.append(PeftName(tensor, TOKEN_KEY, ""))
            continue
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
            found.append(PeftName(tensor, table, below or BELOW.get(table, "")))
    return tuple(found)


@cache
def peft_layer_class(plain: type[AdaptedLayer], look: Look) -> type[PeftLayer]:
    tops = {name.table.split(".")[-1] for _, names in look.names for name in names}
    acts = [prefix for prefix in TUNERS if any(top.startswith(f"{prefix}_") for top in tops)]
    ours: tuple[Any, ...] = (TunerLayer,) if acts else (PeftLayer,)
    theirs: tuple[Any, ...] = ()
    if look.whole and not acts:
        ours, theirs = (SavedLayer,), (ModulesToSaveWrapper,)
    elif "trainable_tokens_delta" in tops and not acts:
        ours, theirs = (TokenLayer,), (TrainableTokensWrapper,)
    body: dict[str, Any] = {"plain": plain, "look": look, "made": staticmethod(peft_layer_class)}
    body |= {"original": plain.original, MADE_BY: (peft_layer_class, plain, look)}
    own = theirs[0].__name__ if theirs else plain.original.__name__
    if acts[:1] == ["lora"] and look.kind == "conv1d":
        own = "Linear"  # With LoRA, HF PEFT calls a Conv1D a Linear.
    body["shown"] = ".".join([TUNERS[prefix] for prefix in acts[:1]] + [own])
    body |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    cls: Any = type(plain.__name__, (*ours, plain, *theirs), body)
    for base in (peft_class(prefix, look.kind) for prefix in acts):
        base.register(cls)
    return cast("type[PeftLayer]", cls)


def peft_class(prefix: str, layer_kind: str | None) -> Any:
    if prefix == "lora":
        return LORA.get(layer_kind or "", lora.LoraLayer)
    return {"ia3": ia3.IA3Layer, "ln": LNTuningLayer}[prefix]
