"""Pairs of a preferred and a rejected answer as tokens: one prompt before each."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.data.answers import answer_from, answer_start, shortened
from inlay.data.preference import SIDES, Side, side_of
from inlay.data.rows import Rows
from inlay.data.tokens import Encoded, Reader, check_trained, common_prefix, encode_whole
from inlay.errors import DataError


@dataclass(frozen=True)
class Pair:
    """A row as tokens: the same prompt before each answer, and only the answer counts."""

    chosen: Encoded
    rejected: Encoded

    @property
    def start(self) -> int:
        """The number of the prompt's tokens."""
        return self.chosen.trained.index(True)

    @property
    def whole(self) -> Encoded:
        """The chosen side with its prompt trained, too."""
        return self.chosen.everywhere()

    @property
    def length(self) -> int:
        """Tokens of the longer side, after cutting."""
        return max(len(self.chosen.input_ids), len(self.rejected.input_ids))


def encode_pairs(rows: Rows, reader: Reader, max_length: int) -> list[Pair]:
    """Return the rows as tokens, each side cut at the end to `max_length`.

    An answer begins where prompt and row differ on either side, as TRL's DPOTrainer has it.
    """
    sides = encode_whole([side_of(rows, side) for side in SIDES], reader, max_length)
    whole = [joint(chosen, rejected) for chosen, rejected in zip(*sides, strict=True)]
    for side in SIDES:
        check_trained([side_tokens(pair, side) for pair in whole], rows, max_length)
    cut = [Pair(shortened(p.chosen, max_length), shortened(p.rejected, max_length)) for p in whole]
    for index, (pair, before) in enumerate(zip(cut, whole, strict=True)):
        if pair.chosen.input_ids == pair.rejected.input_ids:
            needed = 1 + common_prefix(before.chosen.input_ids, before.rejected.input_ids)
            raise DataError(
                f"{rows.where(index)}: cut at max_length {max_length}, 'chosen' and 'rejected' are "
                f"the same; they differ from max_length {needed} on"
            )
    return cut


def side_tokens(pair: Pair, side: Side) -> Encoded:
    return pair.chosen if side == "chosen" else pair.rejected


def joint(chosen: Encoded, rejected: Encoded) -> Pair:
    """Return two sides with one prompt: the tokens before the first that either side trains."""
    start = min(
        answer_start(chosen),
        answer_start(rejected),
        common_prefix(chosen.input_ids, rejected.input_ids),
    )
    return Pair(answer_from(chosen, start), answer_from(rejected, start))
