"""Small pictures for the docs, written as SVG by hand: bars and curves, on white."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

INK, FAINT = "#1f2328", "#d0d7de"
COLOURS = ("#0969da", "#bf8700", "#8250df", "#1a7f37", "#cf222e", "#57606a")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """Return a whole picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" {FONT} fill="{INK}">'
    )
    paper = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    return "\n".join([head, paper, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    """Return a line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str = FAINT, width: float = 1) -> str:
    """Return a straight line."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"/>'
    )


@dataclass(frozen=True)
class Bar:
    """One bar: its value, and the range drawn across its end."""

    label: str
    value: float
    low: float
    high: float
    colour: str = COLOURS[0]


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], unit: str, mark: float | None = None) -> str:
    """Draw groups of horizontal bars on one scale from 0, with a mark across all of them."""
    left, right, step, gap = 270.0, 80.0, 20.0, 34.0
    count = sum(len(group) for _, group in groups)
    height = count * step + len(groups) * gap + 34
    longest = max([b.high for _, group in groups for b in group] + [mark or 0])
    scale = (860 - left - right) / longest
    parts, y = [], 8.0
    if mark is not None:
        x = left + mark * scale
        parts += [
            line(x, 8, x, height - 26, INK),
            text(x, height - 8, f"{mark:g} {unit}", "middle"),
        ]
    for title, group in groups:
        y += gap - 12
        parts.append(text(12, y, title, weight="bold"))
        y += 8
        for bar in group:
            parts += drawn_bar(bar, left, y, scale, unit)
            y += step
        y += 4
    return svg(860, height, parts)


def drawn_bar(bar: Bar, left: float, y: float, scale: float, unit: str) -> list[str]:
    """Return the pieces of one bar."""
    end = left + bar.value * scale
    return [
        text(left - 8, y + 12, bar.label, "end"),
        f'<rect x="{left:.1f}" y="{y + 2:.1f}" width="{max(end - left, 1):.1f}" height="13" '
        f'fill="{bar.colour}"/>',
        line(left + bar.low * scale, y + 8.5, left + bar.high * scale, y + 8.5, INK, 1.5),
        text(max(end, left + bar.high * scale) + 6, y + 12, f"{bar.value:.3g} {unit}"),
    ]


@dataclass(frozen=True)
class Curve:
    """Measured points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes, both logarithmic, and what is drawn on them."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


def panels(shown: Sequence[Panel], across: int = 2) -> str:
    """Draw panels side by side."""
    width, height = 430.0, 280.0
    parts: list[str] = []
    for number, panel in enumerate(shown):
        x, y = number % across * width, number // across * height
        parts += [f'<g transform="translate({x:g} {y:g})">', *drawn_panel(panel), "</g>"]
    return svg(across * width, -(-len(shown) // across) * height, parts)


def drawn_panel(panel: Panel) -> list[str]:
    """Return the pieces of one panel: grid of powers, curves, points, labels."""
    left, top, right, bottom = 62.0, 34.0, 400.0, 226.0
    across = Logarithmic([v for c in panel.curves for v in c.x], left, right)
    up = Logarithmic([v for c in panel.curves for v in c.y], bottom, top)
    parts = [text(left, 20, panel.title, weight="bold")]
    for value in up.ticks():
        parts += [line(left, up(value), right, up(value))]
        parts += [text(left - 6, up(value) + 4, f"{value:g}", "end")]
    for value in panel.curves[0].x:
        parts += [line(across(value), bottom, across(value), bottom + 4, INK)]
        parts += [text(across(value), bottom + 17, f"{value:g}", "middle")]
    parts += [line(left, bottom, right, bottom, INK), line(left, top, left, bottom, INK)]
    parts += [text((left + right) / 2, bottom + 34, panel.x_label, "middle")]
    parts += [text(right, 20, panel.y_label, "end")]
    for curve, colour in zip(panel.curves, COLOURS, strict=False):
        parts += drawn_curve(curve, colour, across, up)
    if len(panel.curves) > 1:
        for number, curve in enumerate(panel.curves):
            parts += [
                text(left + 10, top + 14 + 15 * number, curve.label).replace(
                    "<text", f'<text fill="{COLOURS[number]}"'
                )
            ]
    return parts


def drawn_curve(curve: Curve, colour: str, across: Logarithmic, up: Logarithmic) -> list[str]:
    """Return a line through the points, and the points."""
    places = [(across(x), up(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>', *dots]


class Logarithmic:
    """A logarithmic scale that holds the values, rounded out a little."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        """Return where a value lies on the picture."""
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values in range: 1, 2 and 5 times powers of ten, or the powers alone."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [s * 10.0**p for p in powers for s in steps]
            inside = [v for v in found if self.low <= math.log10(v) <= self.high]
            if len(inside) <= 7:
                return inside
        return inside
