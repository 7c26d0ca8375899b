"""Divide rows into train, validation and test, equal or related rows on one side."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.data.rows import Rows
from inlay.errors import DataError

NAMES = ("train", "validation", "test")


def split(
    rows: Rows, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> tuple[Rows, ...]:
    """Return a part of the rows for each fraction, in the rows' order.

    Rows of one group (of `normalise(group=...)`), or equal rows where there are no groups, are
    never parted. The same rows and seed give the same parts on every machine.

    Raises:
        DataError: the fractions do not add up to 1, or a part that should have rows gets none.
    """
    if any(not 0 <= f <= 1 for f in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(f"the split {shown(fractions)} must be fractions that add up to 1")
    members: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys(rows)):
        members[key].append(index)
    parts: list[list[int]] = [[] for _ in fractions]
    done = 0
    for key in sorted(members, key=lambda key: hashed(key, seed)):
        group = members[key]
        parts[part_at((done + len(group) / 2) / len(rows), fractions)] += group
        done += len(group)
    check(rows, parts, fractions, len(members))
    return tuple(rows.take(sorted(part)) for part in parts)


def keys(rows: Rows) -> list[str]:
    if rows.groups is not None:
        return rows.groups
    return [content(row) for row in rows.rows]


def content(row: Mapping[str, Any]) -> str:
    """Return the key that equal rows share; an image counts by its content."""
    return json.dumps(row, sort_keys=True, default=lambda x: getattr(x, "sha256", None) or repr(x))


def hashed(key: str, seed: int) -> str:
    return hashlib.sha256(json.dumps([seed, key]).encode()).hexdigest()


def part_at(position: float, fractions: Sequence[float]) -> int:
    end, found = 0.0, 0
    for number, fraction in enumerate(fractions):
        if fraction and position >= end - 1e-9:
            found = number
        end += fraction
    return found


def check(rows: Rows, parts: list[list[int]], fractions: Sequence[float], groups: int) -> None:
    """Raise when a part that should have rows has none."""
    for number, (part, fraction) in enumerate(zip(parts, fractions, strict=True)):
        if fraction and not part:
            name = NAMES[number] if len(fractions) == len(NAMES) else f"part {number + 1}"
            what = "different groups" if rows.groups is not None else "different rows"
            raise DataError(
                f"{rows.source}: {groups} {what} are too few for the split {shown(fractions)}: "
                f"{name} would be empty; give more rows or other fractions"
            )


def shown(fractions: Sequence[float]) -> str:
    return "/".join(f"{fraction:g}" for fraction in fractions)
