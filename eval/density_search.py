"""The density at which a method reaches a PSNR, from few runs: where to look next, and what the runs so far say.

PSNR is taken to rise with the logarithm of the density, in a straight line between two runs. Where a method was run
before, at another time or on other captions, that curve says where to begin; only the runs of now count in the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TOLERANCE = 0.15  # dB from the goal that end a search
LOWEST, HIGHEST = 0.02, 1.0
SLOPE = 19.6  # dB for ten times the density, where nothing is known; sol on the included model
GAP, REACH = 3.0, 1.6  # factors of density that a line is believed across two runs, and beyond the last one
STEP = 1.2  # and beyond the last one while the search goes on: further the earlier curve leads
FEWEST = "fewest"  # however few blocks are asked for, a method is better than the goal: its fastest run
_APART = 1.03  # two densities nearer than this factor make the same masks

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Found:
    """What the runs say of a method at a PSNR.

    Args:
        density: that has it.
        psnr: of the nearest run, where it counts as the goal; else the goal.
        how: "measured" (a run within the tolerance), "interpolated" (between two runs), "extrapolated", "guessed"
            (the runs lie too far apart, or away, for a line: see `GAP` and `REACH`), or `FEWEST`.
    """

    density: float
    psnr: float
    how: str


@dataclass(frozen=True)
class Prior:
    """Earlier runs of all methods.

    Args:
        names: of the methods, the best first.
        curves: (density, PSNR) of each, by rising density.
    """

    names: tuple[str, ...] = ()
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    @classmethod
    def of_table(cls, content: Mapping[str, object]) -> Prior:
        """From the content of `methods.json`, as `dit-sparse eval methods` writes it.

        Methods are ranked by their mean PSNR at the densities of the first table; one that misses a density comes
        after those that have all.
        """
        points: dict[str, dict[float, float]] = {}
        places: dict[str, list[float]] = {}
        first = set(content["plan"]["densities"])  # type: ignore[index]
        for section in content["sections"]:  # type: ignore[attr-defined]
            for row in section["rows"]:
                value = (row.get("values") or {}).get("psnr")
                if value is None or row.get("density") is None or not isinstance(row["asked"], float):
                    continue
                points.setdefault(row["label"], {})[float(row["density"])] = float(value["mean"])
                if row["asked"] in first and not row["why"] and f"{row['asked']:g}" in section["title"].split():
                    places.setdefault(row["label"], []).append(float(value["mean"]))
        names = sorted(places, key=lambda name: (-len(set(places[name])), -sum(places[name]) / len(places[name])))
        return cls(tuple(names), {name: tuple(sorted(found.items())) for name, found in points.items()})

    def with_tuned(self, content: Mapping[str, object]) -> Prior:
        """With the curves of `tuned.json`, as `dit-sparse eval tune` writes it, in the place of its own wherever a
        method has two figures there that are no guesses."""
        points: dict[str, set[tuple[float, float]]] = {}
        for section in content["sections"]:  # type: ignore[attr-defined]
            for row in section["rows"]:
                if row["how"] not in ("", "guessed") and row["density"] and row["psnr"]:
                    points.setdefault(row["method"], set()).add((float(row["density"]), float(row["psnr"])))
        curves = {name: tuple(sorted(found)) for name, found in points.items() if len(found) > 1}
        return Prior(self.names, {**self.curves, **curves})


def on_line(points: Points, density: float) -> float:
    """PSNR at a density, on the line through the two runs around it, or the nearest two."""
    (d0, p0), (d1, p1) = _pair(points, 0, density)
    slope = (p1 - p0) / math.log(d1 / d0) if d1 != d0 else SLOPE / math.log(10)
    return p0 + slope * math.log(density / d0)


def at_psnr(points: Points, psnr: float) -> float:
    """Density at a PSNR on the same line; where two runs do not rise, the usual slope is taken."""
    (d0, p0), (d1, p1) = _pair(points, 1, psnr)
    slope = (p1 - p0) / math.log(d1 / d0) if d1 != d0 else 0.0
    if slope * math.log(10) < SLOPE / 10:
        slope = SLOPE / math.log(10)
        d0, p0 = _nearest(points, psnr)
    # Far beyond all runs nothing can be told.
    return min(max(d0 * math.exp(min(max((psnr - p0) / slope, -20.0), 20.0)), 1e-6), 1e6)


def _pair(points: Points, by: int, x: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The two runs around x by density (0) or PSNR (1), or the two nearest ones on its side."""
    ordered = sorted(points, key=lambda point: point[by])
    above = next((i for i, point in enumerate(ordered) if point[by] >= x), len(ordered) - 1)
    return ordered[max(above, 1) - 1], ordered[min(max(above, 1), len(ordered) - 1)]


def next_density(points: Points, goal: float, prior: Points = (), *, tolerance: float = TOLERANCE) -> float | None:
    """Where to run next, or None when nothing is left to learn.

    Args:
        points: (density, PSNR) of the runs so far.
        goal: PSNR that is looked for.
        prior: the same of earlier runs elsewhere.
        tolerance: a run so near ends the search, in dB.

    Returns:
        A density between .02 and 1, in steps of .0001.
    """
    if any(abs(psnr - goal) <= tolerance for _, psnr in points):
        return None
    if not points:
        wanted = at_psnr(prior, goal) if prior else 0.2
    elif len(prior) > 1 and (len(points) == 1 or not (_spans(points, goal) or _leads_near(points, goal))):
        # The earlier curve, moved to what the nearest run showed: a line beyond all runs leads far off.
        density, psnr = _nearest(points, goal)
        moved = psnr - on_line(prior, density)
        wanted = at_psnr([(d, p + moved) for d, p in prior], goal)
    else:
        (low, _), (high, _) = _pair(points, 1, goal)
        # Far apart no line says anything: the middle does.
        wanted = math.sqrt(low * high) if _is_wide(low, high) else at_psnr(points, goal)
    wanted = round(min(max(wanted, LOWEST), HIGHEST), 4)
    tried = [d for d, _ in points]
    if any(max(d, wanted) / min(d, wanted) < _APART for d in tried):
        return None
    return wanted


def _nearest(points: Points, psnr: float) -> tuple[float, float]:
    """The run whose PSNR is nearest."""
    return min(points, key=lambda point: abs(point[1] - psnr))


def _is_wide(low: float, high: float) -> bool:
    """Whether two densities lie too far apart for a line between them."""
    return max(low, high) > GAP * min(low, high)


def _spans(points: Points, psnr: float) -> bool:
    """Whether runs lie on both sides of a PSNR."""
    return min(p for _, p in points) <= psnr <= max(p for _, p in points)


def _leads_near(points: Points, psnr: float) -> bool:
    """Whether the line of the runs reaches a PSNR hardly beyond the nearest of them."""
    density, _ = _nearest(points, psnr)
    wanted = at_psnr(points, psnr)
    return max(wanted / density, density / wanted) <= STEP


def found_at(points: Points, goal: float, *, tolerance: float = TOLERANCE) -> Found | None:
    """What the runs say of the density at a PSNR; None without runs."""
    if not points:
        return None
    density, psnr = _nearest(points, goal)
    if abs(psnr - goal) <= tolerance:
        return Found(density, psnr, "measured")
    wanted = min(max(at_psnr(points, goal), 0.001), HIGHEST)
    if _spans(points, goal):
        (low, _), (high, _) = _pair(points, 1, goal)
        return Found(wanted, goal, "guessed" if _is_wide(low, high) else "interpolated")
    away = min(max(d / wanted, wanted / d) for d, _ in points)
    return Found(wanted, goal, "extrapolated" if away <= REACH else "guessed")


def is_far(density: float, known: Sequence[float]) -> bool:
    """Whether the runs on both sides of a density lie too far apart for a line between them."""
    below, above = [d for d in known if d <= density], [d for d in known if d >= density]
    return bool(below and above) and _is_wide(max(below), min(above))
