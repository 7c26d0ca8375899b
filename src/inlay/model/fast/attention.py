"""A decoder whose attention is given segments in place of a mask.

The decoder's arguments are not changed. While it runs, transformers asks for the masks of its
layers (`mask_of_layers`); where the call's segments replace a mask they are returned in its place,
and `attention` recognises them.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels.attention import segment_attention, segments_of
from inlay.kernels.loss import IGNORED
from inlay.kernels.switches import is_on
from inlay.model.fast.base import Fast, by_name
from inlay.model.seams.transformers import attention_of, cache_in, sdpa_attention_forward, sdpa_mask

ATTENTION = "inlay"
"""The name under which transformers finds our attention."""
BIASES = ("position_bias", "softcap")
"""What an attention may do to its logits that segments cannot express."""
CASES = ("whole", "padded", "packed")
"""The rows of a call: without padding, with an attention mask, or packed with positions."""
KNOWN = frozenset({
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "use_cache",
    "return_dict", "output_hidden_states", "scored", "logits_to_keep", "visual_pos_masks",
    "deepstack_visual_embeds", "per_layer_inputs",
})  # fmt: skip
"""The arguments of a decoder that do not change which tokens attend to which."""


@dataclass(frozen=True)
class Rows:
    """The segments of the present call, (n, 3)."""

    segments: Tensor
    shape: tuple[int, int]
    """Rows and tokens of the call."""
    longest: int
    divided: bool
    """Whether a row holds several segments. Such rows are divided only where transformers does so
    too: it does not where the call makes a cache, and then its mask may be left out."""

    def replace_mask(
        self, rows: int, queries: int, keys: int, window: int | None, **more: Any
    ) -> bool:
        return (
            self.shape == (rows, queries)
            and keys == queries
            and isinstance(more.get("q_offset", 0), int)
            and more.get("q_offset", 0) == more.get("kv_offset", 0) == 0
            and not more.get("use_vmap")
            and "allow_is_bidirectional_skip" not in more
            and self.divided != bool(more.get("allow_is_causal_skip"))
            and (window is None or self.longest <= window)
        )


class Running(threading.local):
    """The segments of the decoder's present call in this thread."""

    rows: Rows | None = None
    whole: bool = False
    """Whether padding attends too, as its outputs are scored."""


running = Running()


@contextmanager
def given(rows: Rows | None) -> Generator[None]:
    before, running.rows = running.rows, rows
    try:
        yield
    finally:
        running.rows = before


def attending(call: dict[str, Any]) -> AbstractContextManager[None]:
    """Return a context for a call; in it padding attends too if the labels score it."""
    return padding_too() if labels_padding(call) else nullcontext()


@contextmanager
def padding_too() -> Generator[None]:
    """Let padding attend to its row inside the `with` block, as it does without segments."""
    before, running.whole = running.whole, True
    try:
        yield
    finally:
        running.whole = before


def labels_padding(call: dict[str, Any]) -> bool:
    mask = call.get("attention_mask")
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.device.type != "cpu":
        return False
    given = (call.get("labels"), call.get("shift_labels"))
    labels = [t for t in given if isinstance(t, Tensor) and t.shape == mask.shape]
    return any(bool(((t != IGNORED) & (mask == 0)).any()) for t in labels)


class Labelled(Fast):
    """A model that is given labels, around a decoder whose attention is given segments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with attending(by_name(type(self).plain, args, kwargs)):
            return super().forward(*args, **kwargs)


class FastBackbone(Fast):
    """A decoder whose attention is given segments in place of a mask."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.training:
            return super().forward(*args, **kwargs)
        with given(self.rows(by_name(type(self).plain, args, kwargs))):
            return super().forward(*args, **kwargs)

    def rows(self, call: dict[str, Any]) -> Rows | None:
        """Return the segments of a call's rows, or None where they do not replace its mask."""
        tokens = call.get("input_ids")
        tokens = call.get("inputs_embeds") if tokens is None else tokens
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        case = "padded" if mask is not None else "whole" if positions is None else "packed"
        if (
            not is_on("attention")
            or attention_of(self.config) != ATTENTION
            or sees_both_ways(self.config)
            or not isinstance(tokens, Tensor)
            or case not in self.proven
            or (running.whole and case == "padded")
            or says_more(call)
            or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
            or (mask is None and positions is not None and positions.ndim != 2)
        ):
            return None
        rows, length = tokens.shape[0], tokens.shape[1]
        without_values = tokens.device.type == "meta" and case == "whole"
        readable = tokens.device.type == "cpu" or without_values
        found = segments_of(positions, mask, rows, length) if readable else None
        if found is None:
            return None
        longest = length if without_values else int((found[:, 2] - found[:, 1]).max())
        return Rows(found, (rows, length), longest, divided=len(found) > rows)


def says_more(call: dict[str, Any]) -> bool:
    """Return whether a call holds a cache, or an argument that may act as a mask."""
    others = [v for name, v in call.items() if name not in KNOWN and v is not None]
    return cache_in(call.values()) is not None or any(v is not False for v in others)


def sees_both_ways(config: Any) -> bool:
    causal = getattr(config, "is_causal", True)
    return not causal or bool(getattr(config, "use_bidirectional_attention", None))


def mask_of_layers(
    batch_size: int, q_length: int, kv_length: int, *args: Any, **more: Any
) -> Tensor | None:
    """Return what transformers' layers get as their mask: the running call's segments, or sdpa's.

    Segments are (1, 1, n, 3) integers, which transformers passes on as they are.
    """
    rows = None if torch.compiler.is_compiling() else running.rows
    window = more.get("local_size")
    if (
        rows is not None
        and not args
        and rows.replace_mask(batch_size, q_length, kv_length, window, **more)
    ):
        return rows.segments[None, None]
    return sdpa_mask(batch_size, q_length, kv_length, *args, **more)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    segments = attention_mask[0, 0]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not dropout and not any(kwargs.get(name) is not None for name in BIASES):
        return segment_attention(query, key, value, segments, scale)[0], None
    mask = dense_mask(segments, query.shape[0], query.shape[2])
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )


def dense_mask(segments: Tensor, rows: int, length: int) -> Tensor:
    """Return segments as a mask, (rows, 1, length, length)."""
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row, start, stop in segments.tolist():
        mask[row, 0, start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    return mask | torch.eye(length, dtype=torch.bool)
