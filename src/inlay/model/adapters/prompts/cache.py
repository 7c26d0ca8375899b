"""Key-value caches that begin with a prompt's virtual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from inlay.errors import AdapterError
from inlay.model.seams.transformers import ModelOutput


class ReadOnly(DynamicCache):
    """The virtual tokens alone: blocks read it and add nothing, so each may be computed again."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values with the virtual tokens before them."""
        held: Any = self.layers[layer_idx]
        keys = torch.cat([held.keys, key_states], dim=-2)
        return keys, torch.cat([held.values, value_states], dim=-2)


class BehindPrompt(DynamicCache):
    """A cache that begins with virtual tokens; between calls its length is that of the text.

    `generate` leaves out as many tokens of a text as the cache of an earlier generation holds.
    """

    virtual = 0
    """Virtual tokens before the text."""
    adapter: str | None = None
    """Whose they are."""
    in_call = False
    """Whether the model runs now, which must know of the virtual tokens."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the text, and in a call the virtual ones too."""
        held = super().get_seq_length(layer_idx)
        return held if self.in_call else max(held - self.virtual, 0)


def decoders_part(cache: Any) -> Any:
    """Return the part of a cache that holds the decoder's own text."""
    return getattr(cache, "self_attention_cache", cache)


def mark_begun(cache: Any, adapter: str, tokens: int) -> None:
    """Note in a cache that it begins with a prompt's virtual tokens, where its class allows it."""
    if type(cache) is DynamicCache:
        cache.__class__ = BehindPrompt
    if isinstance(cache, BehindPrompt):
        cache.virtual, cache.adapter = tokens, adapter


def taken_out(call: dict[str, Any], name: str) -> Any:
    """Take the key-value cache out of a call; a forward calls it by this name.

    Raises:
        AdapterError: it is of a fixed size, for the text alone.
    """
    under = next((n for n, v in call.items() if isinstance(v, Cache)), name)
    cache = call.pop(under, None)
    own = decoders_part(cache)
    if isinstance(own, StaticCache):
        raise AdapterError(
            f"a {type(own).__name__} has room for the text alone, and a prompt's virtual tokens "
            "stand before it; leave cache_implementation out, which gives a cache that grows"
        )
    return cache


def check_begun(cache: Any, adapter: str | None) -> None:
    """Raise unless a cache with text was begun by the prompt that acts now, or by none.

    Raises:
        AdapterError: naming both.
    """
    own = decoders_part(cache)
    by = own.adapter if isinstance(own, BehindPrompt) else None
    known = isinstance(own, BehindPrompt) or type(own) is DynamicCache
    if known and by != adapter and own.get_seq_length():
        raise AdapterError(
            f"the cache holds text behind {named(by)}, and {named(adapter)} acts now; leave "
            "the cache out, so that the text is read again"
        )


def check_without(*given: Any) -> None:
    """Raise where an argument of a call without a prompt is a cache that a prompt began."""
    for value in given:
        check_begun(value, None)


def named(prompt: str | None) -> str:
    """Return what a sentence calls a prompt."""
    return "no prompt" if prompt is None else f"the prompt {prompt!r}"


def check_continues(cache: Cache, call: dict[str, Any], tokens: int) -> None:
    """Raise unless a call goes on where its cache ends, by the length of its mask.

    A cache of a class that is not ours counts virtual tokens as text, by which `generate` leaves
    as many tokens of a later text out.

    Raises:
        AdapterError: tokens between them are missing.
    """
    mask = call.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    given = call.get("input_ids")
    given = call.get("inputs_embeds") if given is None else given
    held, brings = cache.get_seq_length() - tokens, 0 if given is None else given.shape[1]
    if held + brings != mask.shape[1]:
        raise AdapterError(
            f"the cache holds {held} tokens of text after {tokens} virtual ones and the call "
            f"brings {brings}, expected {mask.shape[1] - held}, as the attention mask has "
            f"{mask.shape[1]}; to go on from an earlier generation leave the cache out"
        )


def wants_cache(model: Any, call: dict[str, Any]) -> bool:
    """Say whether a call asks for a key-value cache, or its model's configuration does."""
    asked = call.get("use_cache")
    if asked is not None:
        return bool(asked)
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    return bool(getattr(text, "use_cache", True))


def without_cache(output: Any) -> Any:
    """Return an output without its key-value cache."""
    if isinstance(output, ModelOutput):
        for name in [name for name, value in output.items() if isinstance(value, Cache)]:
            output[name] = None
        return output
    if isinstance(output, tuple):
        return tuple(value for value in output if not isinstance(value, Cache))
    return output


def read_only(cache: Cache, own: bool) -> Cache:
    """Return a cache of the same keys and values that blocks do not write to.

    Raises:
        AdapterError: it is a cache of the caller's, which must be written to.
    """
    if not own:
        raise AdapterError(
            "gradient checkpointing computes blocks again, which cannot go on from a cache that "
            "is given; turn it off (gradient_checkpointing=False), or leave the cache out"
        )
    found = ReadOnly()
    found.layers = cache.layers
    return found
