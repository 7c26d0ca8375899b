"""Entities in BIO tags: `B-x` begins an entity, `I-x` continues it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Entity = tuple[str, int, int]
"""(kind, index of the first word, index after the last word)."""


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities of some tags, as the CoNLL-2000 evaluation counts them.

    An `I-x` that does not follow an `x` begins an entity.

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
