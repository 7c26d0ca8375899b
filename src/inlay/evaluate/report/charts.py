"""Line charts as inline SVG; the page's style sheet colours them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 44
TICKS = 5
MOST_POINTS = 600


@dataclass(frozen=True)
class Line:
    """One series: its name, the style sheet's class for it, and its (x, y) points."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear scale from data to pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float

    def pixel(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        step = round_step((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(rough: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `rough`."""
    power = 10 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(low - margin, high + margin, start, end)


def line_chart(lines: Sequence[Line], x_label: str) -> str:
    """Return one SVG element; ValueError where no line has a point."""
    drawn = [Line(ln.name, ln.style, thinned(ln.points), ln.dots) for ln in lines if ln.points]
    if not drawn:
        raise ValueError("a chart needs at least one point")
    steps = [x for ln in drawn for x, _ in ln.points]
    x = Axis(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    y = axis([v for ln in drawn for _, v in ln.points], HEIGHT - BOTTOM, TOP)
    names = ", ".join(ln.name for ln in drawn)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{names} by {x_label}")}">',
        *x_axis(x, x_label),
        *y_axis(y),
        *(path(ln, x, y) for ln in drawn),
        "</svg>",
        legend(drawn) if len(drawn) > 1 else "",
    ]
    return "".join(parts)


def x_axis(axis: Axis, label: str) -> list[str]:
    base, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    parts = [f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>']
    for tick in axis.ticks():
        at = axis.pixel(tick)
        parts.append(f'<path class="axis" d="M{at:.1f} {base}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{base + 18}" class="x">{number(tick)}</text>')
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="x label">{escape(label)}</text>')
    return parts


def y_axis(axis: Axis) -> list[str]:
    parts: list[str] = []
    for tick in axis.ticks():
        at = axis.pixel(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" class="y">{number(tick)}</text>')
    return parts


def path(line: Line, x: Axis, y: Axis) -> str:
    at = [(x.pixel(a), y.pixel(b)) for a, b in line.points]
    drawn = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in at)
    dots = [
        f'<circle class="{line.style}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
        f"<title>{escape(line.name)}: {step:g}, {value:.5g}</title></circle>"
        for (a, b), (step, value) in zip(at, line.points, strict=True)
    ]
    shown = dots if line.dots or len(at) == 1 else []
    return f'<path class="line {line.style}" d="{drawn}"/>{"".join(shown)}'


def legend(lines: Sequence[Line]) -> str:
    names = "".join(f'<span><i class="{ln.style}"></i>{escape(ln.name)}</span>' for ln in lines)
    return f'<p class="legend">{names}</p>'


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    kept = np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)
    return [points[i] for i in kept.tolist()]


def number(value: float) -> str:
    """Return a tick's label: 0.30000000000000004 is 0.3, 0.00015 is 1.5e-4."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
