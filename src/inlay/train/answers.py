"""What is said of answers before training on them: that one ends, and which were cut or left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inlay.data.summary import Summary
from inlay.errors import DataError

NoteLines = Callable[[Sequence[int], str], None]
"""Tells what holds of the rows of some lines, if of any."""


def check_answers(
    good: Summary, bad: Summary, kinds: tuple[str, str], longest: int, source: str, note: NoteLines
) -> None:
    """Tell of answers that were cut, left out or do not end.

    Args:
        good: the answers that are to become likelier.
        bad: the others.
        kinds: what the two are called.
        longest: the tokens that rows were cut at.
        source: where the rows come from.
        note: told of the lines.
    """
    if good.ends_trained == 0:
        raise DataError(
            f"{source}: no {kinds[0]} answer trains the token at which generation stops, so the "
            f"tuned model would never stop: {len(good.truncated)} of {good.rows} are cut at "
            f"max_length {longest}; the longest row has {good.lengths.max} tokens"
        )
    for found, kind in zip((good, bad), kinds, strict=True):
        note(found.truncated, f"whose {kind} answer is cut at max_length {longest}")
    note(good.skipped, "left out: a field is empty")
    note(good.unended, f"whose {kinds[0]} answer trains no end token")
    unlike = sorted({*good.unlike_prompt, *bad.unlike_prompt})
    note(unlike, "with a prompt that is tokenised otherwise on its own")
