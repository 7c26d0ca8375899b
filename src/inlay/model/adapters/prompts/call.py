"""The arguments and outputs of a model's call, with room for a prompt's virtual tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError
from inlay.methods.models import input_embedding
from inlay.model.recomputed import Recomputed, recomputed
from inlay.storage.registry import layer_class

EMBEDDINGS = "inputs_embeds"
ONE_PER_TOKEN = ("start_logits", "end_logits")
"""Outputs with one number a token."""


def own_forward(module: nn.Module) -> Any:
    """Return the forward of a module's class: the instance may have another for a call."""
    return layer_class(module).forward.__get__(module)


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(own_forward(module)).bind_partial(*args, **kwargs).arguments
    call: dict[str, Any] = {**bound, **bound.get("kwargs", {})}
    call.pop("kwargs", None)
    return call


def text_of(call: dict[str, Any]) -> Tensor | None:
    """Return a call's ids (batch, tokens) or embeddings (batch, tokens, width), if it has any."""
    ids = call.get("input_ids")
    return call.get(EMBEDDINGS) if ids is None else ids


def batch_size(call: dict[str, Any]) -> int:
    text = text_of(call)
    if text is None:
        raise AdapterError("a prompt adapter needs input_ids or inputs_embeds in the call")
    return len(text)


def decoder_batch_size(call: dict[str, Any]) -> int:
    keys = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", EMBEDDINGS)
    found = next((call[key] for key in keys if call.get(key) is not None), None)
    if found is None:
        raise AdapterError("a prompt adapter needs decoder_input_ids or labels in the call")
    return len(found)


def embedded(call: dict[str, Any], module: Any) -> torch.Size:
    ids = call.pop("input_ids", None)
    if call.get(EMBEDDINGS) is None:
        if ids is None:
            raise AdapterError("a prompt adapter needs input_ids or inputs_embeds in the call")
        call[EMBEDDINGS] = input_embedding(module)(ids)
    text: Tensor = call[EMBEDDINGS]
    if text.dim() != 3:
        raise AdapterError(
            f"a prompt stands before one text a row, (batch, tokens), and this call brings "
            f"{tuple(text.shape[:-1])}; give each text a row of its own"
        )
    return text.shape[:2]


def widen(call: dict[str, Any], key: str, tokens: int, value: int) -> None:
    """Put a value for each virtual token before an argument of (batch, tokens), if it is given."""
    given = call.get(key)
    if given is None:
        return
    if not isinstance(given, Tensor) or given.dim() != 2:
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise AdapterError(
            f"{key} is {found}, and a prompt needs (batch, tokens), to which its virtual tokens "
            "are added"
        )
    call[key] = torch.cat([given.new_full((len(given), tokens), value), given], dim=1)


def without_prompt(value: Any, name: str, read: torch.Size, tokens: int) -> Any:
    """Return an output part without virtual tokens; `read`: (batch, tokens), these included."""
    if isinstance(value, tuple):
        return tuple(without_prompt(each, name, read, tokens) for each in value)
    by_token = isinstance(value, Tensor) and (value.dim() == 3 or name in ONE_PER_TOKEN)
    return value[:, tokens:] if by_token and value.shape[:2] == read else value


def recomputed_in_call(model: nn.Module) -> Recomputed:
    """Return what checkpointing recomputes now; raise `AdapterError` where it drops the cache."""
    found = recomputed(model) if model.training else Recomputed((), ())
    if found is None:
        raise AdapterError(
            "gradient checkpointing, as it is set, drops the key-value cache that prompt methods "
            "use; ask for it with use_reentrant=False, turn it off (gradient_checkpointing=False) "
            "or choose a weight method such as LoRA"
        )
    return found


def is_checkpointed(model: nn.Module) -> bool:
    found = recomputed(model)
    return found is None or bool(found.blocks)
