"""Entities in tags: `B-x` begins one, `I-x` goes on with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["entities"]

Entity = tuple[str, int, int]
"""What it is, its first word, and the word behind its last."""


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities that tags mark, as the evaluation of CoNLL-2000 counts them.

    An `I-x` that follows no `x` begins one.

    >>> list(entities(["B-a", "I-a", "O", "I-b", "B-b"]))
    [('a', 0, 2), ('b', 3, 4), ('b', 4, 5)]
    """
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = prefix == "I" and name == kind
        if kind and not goes_on:
            yield kind, start, place
            kind = ""
        if not goes_on and prefix in ("B", "I"):
            kind, start = name, place
