"""Pieces of a page: figures as they are written, cells, tiles, sections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from inlay.evaluate.record import Score

NOT_MEASURED = "not measured"


def tile(name: str, value: str, note: str) -> str:
    """One figure with its name above and a note below."""
    style = ' class="missing"' if value == NOT_MEASURED else ""
    return (
        f'<div class="tile"><span>{escape(name)}</span><b{style}>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
    )


def cell(column: str, content: str, style: str = "") -> str:
    """A cell that knows its column's name, for screens too narrow to have columns."""
    return f'<td data-column="{column}" class="{style}">{content}</td>'


def interval(score: Score, *, signed: bool = False) -> str:
    """A value with its interval below it."""
    low, high = score["low"], score["high"]
    value = figure(score["value"], signed=signed)
    if low is None or high is None:
        return value
    return f"{value}<small>{figure(low, signed=signed)} to {figure(high, signed=signed)}</small>"


def text(name: str, style: str, content: str) -> str:
    """A named text, kept as it is written."""
    shown = escape(content) or '<span class="soft">(nothing)</span>'
    caption = f"<figcaption>{escape(name)}</figcaption>"
    return f'<figure class="{style}">{caption}<pre>{shown}</pre></figure>'


def pictures(addresses: Sequence[str]) -> str:
    """Images side by side, each a data: address; nothing where there are none."""
    if not addresses:
        return ""
    shown = (
        f'<img src="{escape(address)}" alt="image {number}">'
        for number, address in enumerate(addresses, start=1)
    )
    return f'<div class="pictures">{"".join(shown)}</div>'


def plain(values: Mapping[str, object]) -> dict[str, str]:
    """Write values as text: strings as they are, all else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in values.items()
    }


def facts_list(facts: Mapping[str, str]) -> str:
    """Names and values side by side."""
    items = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def section(title: str, content: str) -> str:
    """A titled part of the page."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def figure(value: float | None, *, signed: bool = False) -> str:
    """A number to three decimals or four figures; a dash where it is not known."""
    if value is None:
        return "–"
    decimals = next((d for d, limit in ((3, 10), (2, 100), (1, 1000)) if abs(value) < limit), 0)
    spelt = ",.4g" if abs(value) >= 1e6 else f",.{decimals}f"
    return f"{value:{'+' if signed else ''}{spelt}}".replace("-", "−")


def p_text(p: float | None, *, short: bool = False) -> str:
    """A p-value, never as zero."""
    if p is None:
        return "–" if short else "one row proves nothing"
    written = "< 0.001" if p < 0.001 else f"{p:.3f}"
    return written if short else f"p {written}" if p < 0.001 else f"p = {written}"


def size(count: float) -> str:
    """Bytes in the largest unit that gives at least 1: 1,536 is 1.5 KiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds in words: 3,725 is 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
