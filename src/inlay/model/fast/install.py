"""Put the fast paths on a model's modules, those that prove themselves there, and take them off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inlay.model import process
from inlay.model.fast.attention import ATTENTION, FastBackbone, Labelled
from inlay.model.fast.base import Fast, become_fast, become_plain, parameters_of
from inlay.model.fast.causal_lm import FEW_SCORED, FastCausalLM
from inlay.model.fast.hints import (
    is_gate,
    is_norm,
    is_plain_head,
    makes_causal_masks,
    names_attention,
)
from inlay.model.fast.layers import FastGate, FastLastBlock, FastLinear, FastNorm
from inlay.model.fast.proof import Trial, note, tell, verdict
from inlay.model.fast.shrink import small_configuration
from inlay.model.fast.trials import BackboneTried, HeadTried, LayerTried
from inlay.model.seams.transformers import SDPA, attention_of, set_attention
from inlay.storage.registry import frozen, kind, layer_class


def install(model: nn.Module) -> tuple[str, ...]:
    """Put the fast paths on a model's modules, in place; return notes on paths that are unused."""
    process.enter(model)
    notes: list[str] = []
    for name, module, candidate in list(candidates(model)):
        found = verdict(candidate.key, candidate.trials)
        about = note(name, module, candidate.fast, found)
        if about is not None:
            notes.append(about)
            if not found.proven:
                tell(about, f"{candidate.fast.__name__} {layer_class(module)}")
        if found.proven:
            put(module, candidate.fast, found.proven)
    watch_labels(model)
    return tuple(dict.fromkeys(notes))


def put(module: nn.Module, fast: type[Fast], proven: frozenset[str]) -> None:
    become_fast(module, fast, proven)
    own: Any = module
    if fast is FastBackbone:
        process.lease(module, "attention")
        set_attention(own.config, ATTENTION)
    if fast is FastCausalLM and FEW_SCORED in proven:
        become_fast(own.base_model.layers[-1], FastLastBlock, proven)


def watch_labels(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Fast) or "forward" in vars(module):
            continue
        takes = "labels" in parameters_of(type(module))
        if takes and any(isinstance(m, FastBackbone) for m in module.modules()):
            become_fast(module, Labelled, frozenset())


def uninstall(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FastBackbone):
            set_attention(module.config, SDPA)
            process.end_lease(module)
        if isinstance(module, Fast):
            become_plain(module)
    process.end_lease(model)


@dataclass(frozen=True)
class Candidate:
    """A fast path that may fit a module."""

    fast: type[Fast]
    key: Any
    """What the verdict depends on."""
    trials: Callable[[], Iterable[Trial]]


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Candidate]]:
    attends_by_name = names_attention(model)
    where = device_of(model)
    for name, module in model.named_modules():
        cls = type(module)
        if isinstance(module, Fast) or "forward" in vars(module):  # its own, or a hook's, runs
            continue
        if cls is nn.Linear:
            yield name, module, layer(module, FastLinear, where)
        elif is_norm(cls):
            yield name, module, layer(module, FastNorm, where)
        elif is_gate(cls):
            yield name, module, layer(module, FastGate, where)
        elif is_plain_head(module):
            yield name, module, whole_model(module, FastCausalLM, HeadTried, where)
        elif makes_causal_masks(module) and not attends_by_name and attends_by_sdpa(module):
            yield name, module, whole_model(module, FastBackbone, BackboneTried, where)


def layer(module: nn.Module, fast: type[Fast], where: torch.device) -> Candidate:
    """Return a fast path for a layer; its verdict is for one class, dtype and attributes."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    linears = [m for m in module.modules() if kind(m) == "linear"]
    dtype = frozen(linears[0]).dtype if linears else dtype
    key = (fast, type(module), dtype, where.type, *attributes(module))
    return Candidate(fast, key, lambda: LayerTried(module, fast, where, dtype).trials())


def attributes(module: nn.Module) -> Iterator[str]:
    """Yield the flags, numbers and children that a layer's computation may depend on."""
    for name, value in vars(module).items():
        if isinstance(value, bool | float | str):
            yield f"{name}={value}"
    for name, p in module._parameters.items():
        yield f"{name}: {p is not None}"
    for name, child in module._modules.items():
        yield f"{name}: {None if child is None else layer_class(child).__name__}"


def whole_model(
    module: nn.Module, fast: type[Fast], tried: type[Any], where: torch.device
) -> Candidate:
    """Return a fast path for a whole model; its verdict is for one configuration."""
    model: Any = module

    def settings() -> str:
        try:
            return repr(sorted(small_configuration(model.config).to_dict().items(), key=repr))
        except Exception as error:
            return repr(error)

    key = (fast, layer_class(module), model.dtype, where.type, settings())
    return Candidate(fast, key, lambda: tried(module, where).trials())


def attends_by_sdpa(module: nn.Module) -> bool:
    """Return whether a model's attention is torch's, which ours stands for.

    It is ours already where another model has the same configuration object.
    """
    model: Any = module
    return attention_of(model.config) in (SDPA, ATTENTION)


def device_of(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
