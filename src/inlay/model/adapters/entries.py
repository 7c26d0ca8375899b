"""Entries of a target specification: names, dotted suffixes, regexes, and block numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from inlay.errors import TargetError, UsageError, did_you_mean
from inlay.model.load.vision import is_within


class Entry(str):
    """One entry: a whole name, a dotted suffix of names, or a regex for whole names.

    >>> entry = Entry.exactly(["norm", "1.norm"])
    >>> [entry.matches(name) for name in ("norm", "1.norm", "2.norm")]
    [True, True, False]
    >>> entry.spells("1.norm"), Entry(".*norm").spells("1.norm")
    (True, False)
    """

    __slots__ = ()

    @classmethod
    def exactly(cls, names: Iterable[str]) -> Entry:
        return cls("|".join(map(re.escape, names)))

    def matches(self, name: str) -> bool:
        if is_suffix(self, name):
            return True
        try:
            return re.fullmatch(self, name) is not None
        except re.error as error:
            problem = f"target {str(self)!r} is neither a name nor a valid regex: {error}"
            raise TargetError(problem) from None

    def spells(self, name: str) -> bool:
        words = (re.sub(r"\\(.)", r"\1", word) for word in re.split(r"(?<!\\)\|", self))
        return any(is_suffix(word, name) for word in words)


def is_suffix(word: str, name: str) -> bool:
    return name == word or name.endswith("." + word)


def entries(targets: str | Iterable[str]) -> tuple[Entry, ...]:
    return tuple(map(Entry, (targets,) if isinstance(targets, str) else targets))


def under(names: Sequence[str], targets: str | Sequence[str]) -> Iterator[str]:
    """Yield every name that an entry matches, or that lies below one that it matches."""
    for entry in entries(targets):
        roots = [n for n in names if n and entry.matches(n)]
        if not roots:
            raise TargetError(f"{entry!r} matches no module of the model{nearest(entry, names)}")
        for root in roots:
            yield from (n for n in names if is_within(n, root))


def nearest(entry: str, names: Iterable[str]) -> str:
    """Return a hint: the nearest last name component, or some that exist."""
    last = sorted({n.rsplit(".", 1)[-1] for n in names if n and not n.split(".")[-1].isdigit()})
    return "." + (did_you_mean(entry, last) or f" It has {', '.join(last[:12])}.")


def in_layers(names: Iterable[str], layers: str | Iterable[int] | None) -> set[str]:
    if layers is None:
        return set(names)
    blocks = parsed_layers(layers) if isinstance(layers, str) else set(layers)
    numbers = {n: block_number(n) for n in names}
    have = {number for number in numbers.values() if number is not None}
    if missing := sorted(blocks - have):
        span = f"{min(have)}-{max(have)}" if have else "no numbered blocks"
        raise TargetError(f"layers {missing} match nothing; the targets lie in blocks {span}")
    return {n for n, number in numbers.items() if number in blocks}


def grouped(names: Iterable[str]) -> Counter[str]:
    """Count the names that differ only in their block numbers, which become `*`."""
    return Counter(".".join("*" if w.isdigit() else w for w in n.split(".")) for n in names)


def block_number(name: str) -> int | None:
    """Return the first number in a dotted name: the Transformer block."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parsed_layers(text: str) -> set[int]:
    """Read `0-3,8` as {0, 1, 2, 3, 8}."""
    numbers: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not span:
            raise UsageError(f"layers must look like '0-3,8', not {text!r}")
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise UsageError(f"layers {part.strip()!r} runs backwards; write '{last}-{first}'")
        numbers |= set(range(first, last + 1))
    return numbers
