"""Parts of the page: figures, cells, tables, tiles and sections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from inlay.evaluate.record import Score

NOT_MEASURED = "not measured"


def tile(name: str, value: str, note: str = "") -> str:
    style = ' class="missing"' if value == NOT_MEASURED else ""
    return (
        f'<div class="tile"><span>{escape(name)}</span><b{style}>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
    )


def table(columns: Sequence[str], rows: str) -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def cell(column: str, content: str, style: str = "") -> str:
    """Return a cell; narrow screens show its column's name beside it."""
    return f'<td data-column="{column}" class="{style}">{content}</td>'


def interval(score: Score, *, signed: bool = False) -> str:
    low, high = score["low"], score["high"]
    value = figure(score["value"], signed=signed)
    if low is None or high is None:
        return value
    return f"{value}<small>{figure(low, signed=signed)} to {figure(high, signed=signed)}</small>"


def text(name: str, style: str, content: str) -> str:
    shown = escape(content) or '<span class="soft">(nothing)</span>'
    caption = f"<figcaption>{escape(name)}</figcaption>"
    return f'<figure class="{style}">{caption}<pre>{shown}</pre></figure>'


def pictures(addresses: Sequence[str]) -> str:
    if not addresses:
        return ""
    shown = (
        f'<img src="{escape(address)}" alt="image {number}">'
        for number, address in enumerate(addresses, start=1)
    )
    return f'<div class="pictures">{"".join(shown)}</div>'


def plain(values: Mapping[str, object]) -> dict[str, str]:
    """Return strings unchanged, and all other values as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in values.items()
    }


def facts_list(facts: Mapping[str, str]) -> str:
    items = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def figure(value: float | None, *, signed: bool = False) -> str:
    """Return a number to three decimals or four digits; a dash where it is not known."""
    if value is None:
        return "–"
    decimals = next((d for d, limit in ((3, 10), (2, 100), (1, 1000)) if abs(value) < limit), 0)
    spelt = ",.4g" if abs(value) >= 1e6 else f",.{decimals}f"
    return f"{value:{'+' if signed else ''}{spelt}}".replace("-", "−")


def p_text(p: float | None, *, short: bool = False) -> str:
    if p is None:
        return "–" if short else "no p-value from one row"
    written = "< 0.001" if p < 0.001 else f"{p:.3f}"
    return written if short else f"p {written}" if p < 0.001 else f"p = {written}"
