"""The command's output: Rich on a terminal, plain text elsewhere, JSON for a machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from inlay.evaluate.units import duration, size

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "as_json", "bracketed", "duration", "facts", "heading", "listing", "masked", "number",
    "on_terminal", "plain_table", "seconds", "size", "table",
]  # fmt: skip


def on_terminal() -> bool:
    return sys.stdout.isatty()


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def heading(text: str) -> None:
    if on_terminal():
        from rich.text import Text

        console().print(Text("\n" + text, style="bold"))
    else:
        print(f"\n{text}")


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Write `name  value` lines with aligned values."""
    rows = [(name, str(value)) for name, value in pairs]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if on_terminal():
        rich_table(columns, rows)
        return
    for line in plain_table(columns, rows):
        print(line)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = f"  {cells[0]:<{widths[0]}}"
        rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    return [line(columns), line(["-" * width for width in widths]), *map(line, rows)]


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        drawn.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console().print(drawn)


def listing(columns: tuple[str, str], rows: Iterable[tuple[str, str]]) -> None:
    pairs = [columns, *rows]
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        print(f"  {name:<{width}}  {text}".rstrip())


def masked(pieces: Sequence[str], trained: Sequence[bool]) -> None:
    """Write a row's tokens; trained tokens in colour, or in brackets without a terminal."""
    if on_terminal():
        from rich.text import Text

        line = Text()
        shades = {True: ("black on green", "black on bright_green"), False: ("dim", "dim")}
        for number, (piece, counts) in enumerate(zip(pieces, trained, strict=True)):
            line.append(piece, style=shades[counts][number % 2])
        console().print(line)
        return
    print(bracketed(pieces, trained))


def bracketed(pieces: Sequence[str], trained: Sequence[bool]) -> str:
    """Return the tokens as text, with each run of trained tokens in brackets."""
    runs = groupby(zip(pieces, trained, strict=True), key=lambda pair: pair[1])
    texts = [(counts, "".join(piece for piece, _ in run)) for counts, run in runs]
    return "".join(f"[{text}]" if counts else text for counts, text in texts)


def as_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def number(value: float, digits: int = 4) -> str:
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def seconds(value: float) -> str:
    return duration(value) if value >= 60 else f"{number(value, 3)} s"
