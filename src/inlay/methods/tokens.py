"""Trained rows of an embedding, or of the head, for some tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.methods.base import Kind, Params, WeightMethod
from inlay.storage.base import FrozenLinear

Rows = Literal["kept_rows", "token_rows"]
"""Rows that came with an adapter and stay, and rows that it trains; the later ones count."""
ROWS: tuple[Rows, ...] = ("kept_rows", "token_rows")
TOKENS, PLACES = "tokens", "token_places"
"""The attributes of an adapter's tensors that keep whose rows they are."""


@dataclass(frozen=True, kw_only=True)
class TokenRows(WeightMethod):
    """Rows in place of the base's: `W'[i] = r_i` for some tokens i, in an embedding or a head.

    A part of an adapter that goes with its method, not a method that users name.
    """

    rows: Rows
    kind: Kind

    def weight(self, p: Params, w: Tensor) -> Tensor:
        ids, _, _ = places(p, self.rows, w.device)
        rows = getattr(p, self.rows).to(w.dtype)
        if self.kind == "embedding":
            return w.index_copy(1, ids, rows.T)
        return w.index_copy(0, ids, rows)

    def forward(self, p: Params, x: Tensor, base: FrozenLinear, training: bool) -> Tensor:
        if self.kind == "embedding":
            return self.looked_up(p, x, base)
        y = base.linear(x)
        ids, _, _ = places(p, self.rows, x.device)
        rows = F.linear(x, getattr(p, self.rows).to(x.dtype)).to(y.dtype)
        if base.bias is not None:
            rows = rows + base.bias.to(y.dtype)[ids]
        return y.index_copy(-1, ids, rows)

    def looked_up(self, p: Params, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return the embeddings of ids; the row of the padding id gets no gradient."""
        if x.is_floating_point():
            return F.linear(x, self.weight(p, base.dequantize()))
        _, ordered, row = places(p, self.rows, x.device)
        at = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
        y = base.linear(x)
        found = F.embedding(row[at], getattr(p, self.rows)).to(y.dtype)
        if base.padding is not None:
            found = torch.where((x == base.padding).unsqueeze(-1), found.detach(), found)
        return torch.where((ordered[at] == x).unsqueeze(-1), found, y)


def give_tokens(p: Params, rows: Rows, ids: Sequence[int]) -> None:
    vars(p).setdefault(TOKENS, {})[rows] = tuple(ids)
    vars(p)[PLACES] = {}


def tokens_of(p: Params, rows: Rows) -> tuple[int, ...]:
    return vars(p).get(TOKENS, {}).get(rows, ())


def places(p: Params, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids in the order of the rows, the ids sorted, and the row of each sorted id."""
    known: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = vars(p)[PLACES]
    key = (rows, str(device))
    if key not in known:
        ids = torch.tensor(tokens_of(p, rows), device=device)
        ordered, row = torch.sort(ids)
        known[key] = (ids, ordered, row)
    return known[key]
