"""What is shown of rows as tokens: counts, lengths, lines to look at, a row token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inlay.data.rows import Rows
from inlay.data.tokens import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lengths:
    """Tokens a row, before anything was cut."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class Summary:
    """What training will see of the rows."""

    rows: int
    tokens: int
    """Tokens of all rows, after cutting."""
    trained_tokens: int
    lengths: Lengths
    truncated: list[int]
    """Lines of the rows that were cut."""
    unended: list[int]
    """Lines of the uncut rows that do not train the token at which generation stops."""
    unlike_prompt: list[int]
    """Lines of the rows whose prompt is tokenised otherwise on its own, as in generation."""
    skipped: list[int]
    """Lines of the rows that were left out because a field was empty."""

    @property
    def ends_trained(self) -> int:
        """How many rows train the token at which generation stops."""
        return self.rows - len(self.truncated) - len(self.unended)


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several that share a character."""

    text: str
    trained: bool


def summarise(encoded: Sequence[Encoded], rows: Rows) -> Summary:
    """Return the counts, lengths and lines a user should know before training."""

    def lines(chosen: Iterator[bool]) -> list[int]:
        return [line for line, is_chosen in zip(rows.lines, chosen, strict=True) if is_chosen]

    return Summary(
        rows=len(encoded),
        tokens=sum(len(row.input_ids) for row in encoded),
        trained_tokens=sum(row.trained_tokens for row in encoded),
        lengths=lengths([row.length for row in encoded]),
        truncated=lines(row.truncated for row in encoded),
        unended=lines(not row.truncated and not row.ends for row in encoded),
        unlike_prompt=lines(not row.prompt_kept for row in encoded),
        skipped=list(rows.skipped),
    )


def lengths(counts: Sequence[int]) -> Lengths:
    """Return the nearest-rank quantiles of token counts."""
    ordered = sorted(counts)

    def rank(q: float) -> int:
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]

    return Lengths(ordered[0], rank(0.5), rank(0.95), ordered[-1])


def pieces(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Return a row's text token by token, to be coloured by whether it is trained on.

    Tokens that hold only part of a character are shown together with the rest of it.
    """
    found: list[Piece] = []
    before: list[int] = []
    pending: list[int] = []
    for position, (token, trained) in enumerate(zip(row.input_ids, row.trained, strict=True)):
        pending.append(token)
        text = text_after(tokenizer, before, pending)
        following = row.trained[position + 1 : position + 2]
        if text.endswith("\ufffd") and following == [trained]:
            continue
        found.append(Piece(text, trained))
        before, pending = pending, []
    return found


def text_after(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """Return the text of tokens that follow others: some tokenizers drop a leading space."""
    whole, first = str(tokenizer.decode(before + ids)), str(tokenizer.decode(before))
    return whole.removeprefix(first)
