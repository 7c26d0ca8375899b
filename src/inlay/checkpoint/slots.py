"""An adapter's tensors, each with its key in HF PEFT's file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inlay.checkpoint.embeddings import PREFIX
from inlay.checkpoint.fingerprint import whole_tensor
from inlay.checkpoint.key_conversion import plainly
from inlay.checkpoint.layouts import AS_IT_IS, TWICE, Layout, layout_of
from inlay.checkpoint.placement import saved_roots, under_any
from inlay.methods.base import Kind, Method, PromptMethod, SelectMethod
from inlay.methods.params import Params
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.adapters.places import module_at, view_at
from inlay.model.adapters.registry import (
    Attached,
    adapter_tensors,
    adapters,
    check_known,
    required_registry,
)
from inlay.model.adapters.wrappers import looks_through
from inlay.storage.parameters import JOINED

TOKEN_KEY = "token_adapter.trainable_tokens_delta"
"""HF PEFT's key of the rows of tokens that train."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter: its key in the file, and where it lives."""

    key: str
    home: Params
    name: str
    layout: Layout = AS_IT_IS

    value: Tensor | None = None
    """The value to write, where the tensor here is only a process's part of it."""

    @property
    def tensor(self) -> Tensor:
        return getattr(self.home, self.name) if self.value is None else self.value

    @property
    def written(self) -> Tensor:
        return self.layout.written(whole_tensor(self.tensor.detach()))


OF_PROMPTS = "base_model."
"""The prefix of the keys of a model's own modules where its adapter is a prompt."""


@looks_through
def slots(model: nn.Module, name: str) -> list[Slot]:
    """Return every tensor of an adapter under its key; a shared one once for each module."""
    attached = known(model, name)
    saved = saved_roots(model, attached)
    found: list[Slot] = []
    for place, params, method, kind in adapter_tensors(model, name):
        prefix = prefix_of(model, name, place)
        if isinstance(attached.method, PromptMethod):  # HF PEFT puts no tuner around the model
            prefix = prefix.replace(PREFIX, OF_PROMPTS, 1)
        view = view_at(model, place) if method is not None and place else None
        for tensor in params.names():
            if tensor == "kept_rows":  # part of a whole matrix in the file
                continue
            module, parameter = module_at(model, place)
            own = () if parameter else module._parameters
            key = key_of(attached, saved, own, place, prefix, tensor, method, kind)
            layout = layout_of(view, key.removeprefix(prefix), getattr(params, tensor).shape)
            if ".base_layer.out_proj.lora_B" in key and prefix != f"{PREFIX}{place}.":
                layout = TWICE
            found.append(Slot(key, params, tensor, layout))
    return found


def prefix_of(model: nn.Module, name: str, place: str) -> str:
    """HF PEFT wraps a module once a parameter, and attention around its output projection."""
    module, parameter = module_at(model, place)
    if not place:
        return PREFIX
    owner, _, leaf = place.rpartition(".")
    above = model.get_submodule(owner)
    if parameter is None:
        joined = isinstance(above, nn.MultiheadAttention) and JOINED in parts_at(above, name)
        return f"{PREFIX}{owner}.base_layer.{leaf}." if joined else f"{PREFIX}{place}."
    parts = parts_at(module, name)
    inside = [p for p in module._parameters if p in parts]
    depth = len(inside) - 1 - inside.index(parameter)
    return f"{PREFIX}{owner}." + "base_layer." * depth


def parts_at(module: nn.Module, name: str) -> Mapping[str, Params]:
    if not isinstance(module, AdaptedLayer) or name not in module.adapters:
        return {}
    return module.params(name).parts


def known(model: nn.Module, name: str) -> Attached:
    """Return one of the model's adapters; raise when it has none of this name."""
    check_known(name, required_registry(model))
    return adapters(model)[name]


def key_of(
    attached: Attached,
    saved: Sequence[str],
    own: Collection[str],
    place: str,
    prefix: str,
    tensor: str,
    method: Method | None,
    kind: Kind | None,
) -> str:
    """`own` are the names of the place's own parameters."""
    if isinstance(method, PromptMethod):
        return method.peft_tensors("linear").get(tensor, tensor)
    if tensor == "token_rows":
        return prefix + TOKEN_KEY
    if method is not None and tensor not in own:
        return prefix + method.peft_tensors(kind or "linear").get(tensor, tensor)
    if under_any(place, saved):
        return prefix + tensor
    if isinstance(attached.method, SelectMethod):
        return prefix + attached.method.peft_tensors(kind or "linear").get(tensor, tensor)
    return prefix + ("base_layer." if method is not None else "") + tensor


def computed(
    model: nn.Module, name: str, found: Sequence[Slot], values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors that HF PEFT computes from others; none where one of `values` lacks."""
    method = known(model, name).method
    if not isinstance(method, PromptMethod):
        return {}
    own = {key: tensor for tensor, key in method.peft_tensors("linear").items()}
    held = {own[s.key]: whole_tensor(s.tensor.detach()) for s in found if s.key in own}
    if values is not None:
        held = {
            tensor: values[key].to(held[tensor]) for key, tensor in own.items() if key in values
        }
    if len(held) < len(own):
        return {}
    with torch.no_grad():
        return dict(method.computed(Params(held)))


def gathered(model: nn.Module, found: list[Slot], state: Mapping[str, Tensor] | None) -> list[Slot]:
    if not state:
        return found
    names = {id(m): name for name, m in model.named_modules() if isinstance(m, Params)}
    held = {plainly(key): value for key, value in state.items()}
    keys = [plainly(f"{names[id(s.home)]}.{s.name}") if id(s.home) in names else "" for s in found]
    return [replace(s, value=held.get(key)) for s, key in zip(found, keys, strict=True)]


def first_of_shared(found: list[Slot]) -> list[Slot]:
    return list({id(slot.tensor): slot for slot in reversed(found)}.values())


def without_tied_rows(found: list[Slot]) -> list[Slot]:
    """Leave out the rows of a tied head: HF PEFT saves those of the embedding alone."""
    once = first_of_shared(found)
    return [slot for slot in found if slot.name != "token_rows" or slot in once]
