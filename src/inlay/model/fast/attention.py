"""A decoder whose attention is given segments in place of a mask."""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from inlay.kernels.attention import segment_attention, segments_of
from inlay.kernels.switches import is_on
from inlay.model.fast.base import Fast, by_name

ATTENTION = "inlay"
"""The name under which transformers finds our attention."""


class FastBackbone(Fast):
    """A decoder whose attention is given segments in place of a mask."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder; segments are worked out once for all its layers."""
        call = by_name(type(self).plain, args, kwargs)
        segments = self.segments(call)
        if segments is not None:
            call["attention_mask"] = segments
        return super().forward(**call)

    def segments(self, call: dict[str, Any]) -> Tensor | None:
        """Return the segments as a mask that is passed on as it is, (1, 1, n, 3), or None."""
        given = call.get("input_ids")
        given = call.get("inputs_embeds") if given is None else given
        mask = call.get("attention_mask")
        if (
            torch.compiler.is_compiling()
            or not is_on("attention")
            or self.config._attn_implementation != ATTENTION
            or not isinstance(given, Tensor)
            or call.get("past_key_values") is not None
            or not self.training
            or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
            or any(reads_mask(type(m)) for m in self.children() if isinstance(m, nn.Embedding))
        ):
            return None
        positions = call.get("position_ids")
        if mask is None and positions is not None and positions.ndim != 2:
            return None
        readable = given.device.type == "cpu" or (
            given.device.type == "meta" and mask is None and positions is None
        )
        found = segments_of(positions, mask, *given.shape[:2]) if readable else None
        return None if found is None else found[None, None]


@cache
def reads_mask(embedding: type[nn.Module]) -> bool:
    """Say whether positions are counted along the mask, as OPT's are: it must stay a mask."""
    return "attention_mask" in signature(embedding.forward).parameters


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
    """Attend within segments where they were worked out, else by torch's own attention."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    segments = attention_mask[0, 0]
    window = kwargs.get("sliding_window")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    near = window is None or int((segments[:, 2] - segments[:, 1]).max()) <= window
    if near and not dropout and "position_bias" not in kwargs:
        return segment_attention(query, key, value, segments, scale)[0], None
    mask = dense_mask(segments, query.shape[0], query.shape[2], window)
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )


def dense_mask(segments: Tensor, rows: int, length: int, window: int | None) -> Tensor:
    """Return the mask that says what segments say, (rows, 1, length, length)."""
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row, start, stop in segments.tolist():
        inside = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        mask[row, 0, start:stop, start:stop] = inside if window is None else inside.triu(1 - window)
    return mask | torch.eye(length, dtype=torch.bool)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
