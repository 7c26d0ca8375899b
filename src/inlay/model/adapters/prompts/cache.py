"""Key-value caches that begin with a prompt's virtual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from inlay.errors import AdapterError
from inlay.model.adapters.prompts.call import text_of
from inlay.model.seams.transformers import ModelOutput


class ReadOnly(DynamicCache):
    """The virtual tokens alone: blocks read it and add nothing, so each may be computed again."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        held: Any = self.layers[layer_idx]
        keys = torch.cat([held.keys, key_states], dim=-2)
        return keys, torch.cat([held.values, value_states], dim=-2)


class BehindPrompt(DynamicCache):
    """A cache that begins with virtual tokens; between calls its length is that of the text.

    `generate` skips as many tokens of a text as the cache of an earlier generation holds.
    """

    virtual = 0
    """The number of virtual tokens before the text."""
    adapter: str | None = None
    """The prompt adapter that they belong to."""
    in_call = False
    """Whether the model runs now; its calls count the virtual tokens too."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens of the text, and in a call of the virtual ones too."""
        held = super().get_seq_length(layer_idx)
        return held if self.in_call else max(held - self.virtual, 0)


def decoders_part(cache: Any) -> Any:
    return getattr(cache, "self_attention_cache", cache)


def mark_prompt(cache: Any, adapter: str, tokens: int) -> None:
    """Note in a cache, where its class allows it, that it begins with a prompt's virtual tokens."""
    if type(cache) is DynamicCache:
        cache.__class__ = BehindPrompt
    if isinstance(cache, BehindPrompt):
        cache.virtual, cache.adapter = tokens, adapter


def taken_out(call: dict[str, Any], name: str) -> Any:
    """Take the cache, argument `name`, out of a call; raise `AdapterError` for a fixed size."""
    under = next((n for n, v in call.items() if isinstance(v, Cache)), name)
    cache = call.pop(under, None)
    own = decoders_part(cache)
    if isinstance(own, StaticCache):
        raise AdapterError(
            f"a {type(own).__name__} has room for the text alone, and a prompt's virtual tokens "
            "stand before it; leave cache_implementation out, which gives a cache that grows"
        )
    return cache


def check_same_prompt(cache: Any, adapter: str | None) -> None:
    own = decoders_part(cache)
    by = own.adapter if isinstance(own, BehindPrompt) else None
    known = isinstance(own, BehindPrompt) or type(own) is DynamicCache
    if known and by != adapter and own.get_seq_length():
        raise AdapterError(
            f"the cache holds text behind {named(by)}, and {named(adapter)} acts now; leave "
            "the cache out, so that the text is read again"
        )


def check_no_prompt(*given: Any) -> None:
    for value in given:
        check_same_prompt(value, None)


def named(prompt: str | None) -> str:
    return "no prompt" if prompt is None else f"the prompt {prompt!r}"


def check_continues(cache: Cache, call: dict[str, Any], tokens: int) -> None:
    """Raise unless a call goes on where its cache ends, by the length of its attention mask.

    A cache of a class that is not ours counts virtual tokens as text, so that `generate` skips as
    many tokens of a later text.
    """
    mask = call.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    text = text_of(call)
    held, brings = cache.get_seq_length() - tokens, 0 if text is None else text.shape[1]
    if held + brings != mask.shape[1]:
        raise AdapterError(
            f"the cache holds {held} tokens of text after {tokens} virtual ones and the call "
            f"brings {brings}, expected {mask.shape[1] - held}, as the attention mask has "
            f"{mask.shape[1]}; to go on from an earlier generation leave the cache out"
        )


def wants_cache(model: Any, call: dict[str, Any]) -> bool:
    asked = call.get("use_cache")
    if asked is not None:
        return bool(asked)
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    return bool(getattr(text, "use_cache", True))


def without_cache(output: Any) -> Any:
    if isinstance(output, ModelOutput):
        for name in [name for name, value in output.items() if isinstance(value, Cache)]:
            output[name] = None
        return output
    if isinstance(output, tuple):
        return tuple(value for value in output if not isinstance(value, Cache))
    return output


def read_only(cache: Cache, own: bool) -> Cache:
    """Return a read-only cache of the same keys and values; raise for a cache of the caller's."""
    if not own:
        raise AdapterError(
            "gradient checkpointing computes blocks again, which cannot go on from a cache that "
            "is given; turn it off (gradient_checkpointing=False), or leave the cache out"
        )
    found = ReadOnly()
    found.layers = cache.layers
    return found
