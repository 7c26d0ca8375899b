"""Rows of texts that belong together: pairs, triplets, or pairs with a score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from inlay.data.fields import columns, filled, number_field
from inlay.data.raw import RawRow
from inlay.data.rows import Kind, Rows, group_of, shaped
from inlay.errors import DataError, did_you_mean

SIMILAR: dict[Kind, tuple[str, ...]] = {
    "pairs": ("anchor", "positive"),
    "triplets": ("anchor", "positive", "negative"),
    "scored_pairs": ("anchor", "positive"),
}
"""The kinds of rows -> the texts of each."""
SENTENCES = {"anchor": "sentence1", "positive": "sentence2"}
"""What pairs with a score are usually called."""


def normalise_similar(
    raw: Sequence[RawRow],
    *,
    anchor: str | None = None,
    positive: str | None = None,
    negative: str | None = None,
    score: str | None = None,
    group: str | None = None,
    skip_empty: bool = False,
) -> Rows:
    """Return rows of `anchor` and `positive`, with a `negative` or a `score`, every one checked.

    Unless a group says otherwise, rows of one anchor stay on one side of a split.

    Args:
        raw: the rows as read; at least one.
        anchor: a column or template; default: `anchor`, or `sentence1`.
        positive: what belongs to it; default: `positive`, or `sentence2`.
        negative: what does not; default: `negative`, if there is one.
        score: the column that says how alike the two are; default: `score`, if there is one.
        group: a column whose equal values `split` keeps together, such as a patient's id.
        skip_empty: leave out rows with an empty field and list their lines in `skipped`.
    """
    if not raw:
        raise DataError("there are no rows; training needs at least one")
    first = raw[0]
    named = columns_of(first, anchor, positive, negative, score)
    kind = kind_of(named)

    def shape(row: RawRow) -> dict[str, Any]:
        texts = {name: filled(row, named[name], first) for name in SIMILAR[kind]}
        if kind == "scored_pairs":
            return {**texts, "score": number_field(row, named["score"])}
        check_different(row, texts)
        return texts

    groups = same_anchor if group is None else lambda row, _: group_of(row, group)
    rows = shaped(raw, kind, shape, groups, skip_empty)
    if kind == "pairs" and len({row["positive"] for row in rows.rows}) == 1:
        raise DataError(
            f"{rows.source}: all {len(rows)} rows have the same positive, so that there is nothing "
            "to tell it from; give other rows, or negatives"
        )
    if kind == "scored_pairs" and len({row["score"] for row in rows.rows}) == 1:
        raise DataError(
            f"{rows.source}: every row has the same score, {rows.rows[0]['score']:g}, so that "
            "none is more alike than another; give other scores, or leave score out"
        )
    return rows


def columns_of(
    first: RawRow,
    anchor: str | None,
    positive: str | None,
    negative: str | None,
    score: str | None,
) -> dict[str, str]:
    """Return the columns to read by what they are, those that are there by themselves included."""
    found = {"anchor": anchor, "positive": positive, "negative": negative, "score": score}
    for name in found:
        usual = (name, SENTENCES.get(name, name))
        there = next((column for column in usual if column in first.values), None)
        found[name] = found[name] or there
    named = {name: column for name, column in found.items() if column is not None}
    for name in ("anchor", "positive"):
        if name not in named:
            near = did_you_mean(name, first.values)
            raise DataError(
                f"{first.where}: no field {name!r}; the row has {columns(first)}. Name the column "
                f"with {name}.{near}"
            )
    if "negative" in named and "score" in named:
        raise DataError(
            f"{first.where}: rows have both a negative and a score; name the columns of one of them"
        )
    return named


def kind_of(named: dict[str, str]) -> Kind:
    if "score" in named:
        return "scored_pairs"
    return "triplets" if "negative" in named else "pairs"


def same_anchor(row: RawRow, found: dict[str, Any]) -> str:
    del row
    return json.dumps(found["anchor"])


def check_different(row: RawRow, texts: dict[str, str]) -> None:
    for name in ("anchor", "positive"):
        if "negative" in texts and texts["negative"].strip() == texts[name].strip():
            raise DataError(
                f"{row.where}: 'negative' is the same text as {name!r}, so that it cannot be told "
                "apart; take the row out"
            )
