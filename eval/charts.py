"""Small charts as SVG text, for a page that loads nothing: scatter with whiskers, heat map, bars, lines.

Colours come from the page's style (classes c0, c1, ...), so that they follow its light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .bootstrap import Interval

_COLOURS = 8  # classes c0 to c7 of the page's style


@dataclass(frozen=True)
class Point:
    """One method in a scatter: its name and two intervals."""

    name: str
    x: Interval
    y: Interval


def colour(index: int) -> str:
    """Class of the n-th method."""
    return f"c{index % _COLOURS}"


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers that cover a range; `whole` ones where halves mean nothing."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(k for k in (1, 2, 5, 10) if span / (step * k) <= count)
    step = max(step, 1) if whole else step
    first = math.floor(low / step + 1e-9) * step
    return [round(first + i * step, 12) for i in range(math.ceil((high - first) / step - 1e-9) + 1)]


class _Frame:
    """A plot area with axes, grid lines and the places of numbers."""

    def __init__(self, width: int, height: int, x: Sequence[float], y: Sequence[float]) -> None:
        self.width, self.height, self.left, self.bottom = width, height, 56, 40
        self.x, self.y = x, y
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / ((self.x[-1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[-1] - self.y[0]) or 1)
        return (self.left + across * (self.width - self.left - 16),
                self.height - self.bottom - up * (self.height - self.bottom - 14))

    def axes(self, x_name: str, y_name: str) -> None:
        for value in self.x:
            px, bottom = self.at(value, self.y[0])
            self.line((px, bottom), (px, self.at(value, self.y[-1])[1]), "grid")
            self.text(px, bottom + 15, f"{value:g}", "middle")
        for value in self.y:
            left, py = self.at(self.x[0], value)
            self.line((left, py), (self.at(self.x[-1], value)[0], py), "grid")
            self.text(left - 6, py + 4, f"{value:g}", "end")
        self.text((self.left + self.width) / 2, self.height - 6, x_name, "middle")
        self.parts.append(f'<text transform="translate(12 {self.height / 2:.0f}) rotate(-90)" '
                          f'text-anchor="middle">{escape(y_name)}</text>')

    def line(self, a: tuple[float, float], b: tuple[float, float], kind: str) -> None:
        self.parts.append(f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" class="{kind}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def svg(self, title: str) -> str:
        return _svg(self.width, self.height, title, self.parts)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{''.join(parts)}</svg>")


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both directions, from left to right."""
    return sorted(
        (p for p in points if not any(
            q.x.mean >= p.x.mean and q.y.mean >= p.y.mean and (q.x.mean, q.y.mean) != (p.x.mean, p.y.mean)
            for q in points
        )),
        key=lambda p: p.x.mean,
    )


def scatter(points: Sequence[Point], x_name: str, y_name: str) -> str:
    """Methods as points with their intervals as whiskers; those on the Pareto front joined by a line."""
    xs = [v for p in points for v in (p.x.low, p.x.high, p.x.mean)] + [1.0]
    ys = [v for p in points for v in (p.y.low, p.y.high, p.y.mean)]
    frame = _Frame(620, 360, ticks(min(xs), max(xs)), ticks(min(ys), max(ys)))
    frame.axes(x_name, y_name)
    front = [frame.at(p.x.mean, p.y.mean) for p in pareto_front(points)]
    for a, b in zip(front[:-1], front[1:], strict=True):
        frame.line(a, b, "front")
    for index, point in enumerate(points, 1):
        place = frame.at(point.x.mean, point.y.mean)
        kind = f"whisker {colour(index)}"
        frame.line(frame.at(point.x.low, point.y.mean), frame.at(point.x.high, point.y.mean), kind)
        frame.line(frame.at(point.x.mean, point.y.low), frame.at(point.x.mean, point.y.high), kind)
        note = escape(f"{point.name}: {x_name} {point.x}, {y_name} {point.y}")
        frame.parts.append(f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="5" class="{colour(index)}">'
                           f"<title>{note}</title></circle>")
        right = place[0] > frame.width * 0.75
        # above and below by turns: neighbours seldom hide each other's names
        above = -8 if index % 2 else 16
        frame.text(place[0] + (-8 if right else 8), place[1] + above, point.name, "end" if right else "start")
    return frame.svg(f"{y_name} against {x_name}")


def heat_map(
    rows: Mapping[str, Mapping[int, float]], *, columns: str = "layer", value: str = "density", title: str = "",
    compact: bool = False,
) -> str:
    """Shares by row and column, from pale (0) to full (1), with the number in each cell where it fits.

    Args:
        rows: by name, the value of each column, which are numbered.
        columns: what the columns are.
        value: what the shares are.
        title: of the picture, for those who cannot see it; else put together from the others.
        compact: low rows without numbers, for maps of many layers.
    """
    layers = sorted({layer for row in rows.values() for layer in row})
    left, cell = 130, max(3 if compact else 18, min(20 if compact else 44, 900 // max(len(layers), 1)))
    high = 13 if compact else 26
    parts = []
    for i, (name, row) in enumerate(rows.items()):
        y = 22 + i * high
        parts.append(f'<text x="{left - 8}" y="{y + high - 9 + 6 * compact}" text-anchor="end">'
                     f"{escape(name[:18])}</text>")
        for k, layer in enumerate(layers):
            if layer not in row:
                continue
            share, x = row[layer], left + k * cell
            parts.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{high - 1}" class="heat" '
                         f'fill-opacity="{0.08 + 0.92 * min(max(share, 0), 1):.3f}">'
                         f"<title>{escape(name)}, {columns} {layer}: {value} {share:.3f}</title></rect>")
            if cell >= 30:
                dark = " class='onheat'" if share > 0.5 else ""
                parts.append(f'<text x="{x + cell / 2}" y="{y + 17}" text-anchor="middle"{dark}>{share:.2f}</text>')
    step = 1 if cell >= 22 else 5 if cell > 5 else 20
    parts += [f'<text x="{left + k * cell + cell / 2}" y="14" text-anchor="middle">{layer}</text>'
              for k, layer in enumerate(layers) if k % step == 0]
    parts.append(f'<text x="{left - 8}" y="14" text-anchor="end" class="faint">{escape(columns)}</text>')
    title = title or f"{value} by method and {columns}"
    return _svg(left + len(layers) * cell + 8, 30 + len(rows) * high, title, parts)


def bars(groups: Mapping[str, Mapping[str, Interval]], labels: Sequence[str], notes: Mapping[str, str]) -> str:
    """Horizontal bars with whiskers: a group for each measure, a bar for each method, each group on its own scale."""
    left, right, high, y = 236, 150, 14, 8.0
    width, parts = 760, []
    for name, row in groups.items():
        low = min(0.0, *(i.low for i in row.values()))
        top = max(1e-9, *(i.high for i in row.values()), 1.0 if all(i.high <= 1 for i in row.values()) else 0.0)

        def place(value: float, low: float = low, top: float = top) -> float:
            return left + (value - low) / (top - low) * (width - left - right)

        parts.append(f'<text x="{left - 10}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
                     f'<text x="{left - 10}" y="{y + 25}" text-anchor="end" class="faint">{escape(notes[name])}</text>')
        for label, value in row.items():
            start, end = sorted((place(0.0), place(value.mean)))
            parts.append(f'<rect x="{start:.1f}" y="{y:.1f}" width="{max(end - start, 1):.1f}" height="{high - 3}" '
                         f'class="{colour(labels.index(label))}"><title>{escape(f"{label}: {value}")}</title></rect>'
                         f'<line x1="{place(value.low):.1f}" x2="{place(value.high):.1f}" y1="{y + 5.5:.1f}" '
                         f'y2="{y + 5.5:.1f}" class="error"/>'
                         f'<text x="{width - right + 8}" y="{y + 10:.1f}">'
                         f'{escape(f"{label}: {value.mean:.4g}")}</text>')
            y += high
        y += max(12.0, 34.0 - high * len(row))
    return _svg(width, y, "measures by method", parts)


def lines(series: Mapping[str, Sequence[float]], labels: Sequence[str], x_name: str, y_name: str) -> str:
    """One line for each method over the steps, counted from 1."""
    longest = max(len(values) for values in series.values())
    highest = max(max(values) for values in series.values())
    frame = _Frame(620, 300, ticks(1, max(longest, 2), whole=True), ticks(0, highest or 1.0))
    frame.axes(x_name, y_name)
    for label, values in series.items():
        kind = colour(labels.index(label))
        places = [frame.at(step, value) for step, value in enumerate(values, 1)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        frame.parts.append(f'<polyline points="{path}" class="line {kind}"/>')
        frame.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" class="{kind}"/>' for x, y in places]
    for place, (label, values) in enumerate(series.items()):
        # a legend in the corner: at the last step the lines lie close to each other
        frame.parts.append(f'<rect x="70" y="{18 + 16 * place}" width="10" height="10" '
                           f'class="{colour(labels.index(label))}"/>')
        frame.text(86, 27 + 16 * place, f"{label}: {values[-1]:.3g} at the end")
    return frame.svg(f"{y_name} by {x_name}")
