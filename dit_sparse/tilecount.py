"""How many key tiles a neighbourhood rule visits: the upper bound on the speed-up of a tiled kernel.

The paper of Generalized Neighborhood Attention (arXiv 2504.16922) chooses windows and strides by such a
simulation.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from .grid import TokenGrid
from .methods.gna import GNA, Triple, axis_window


@dataclass(frozen=True)
class TileReport:
    """What a tiled kernel has to do for a rule.

    Args:
        grid, window, stride, dilation, causal, query_tile, key_tile: the question.
        density: kept fraction of the pairs.
        key_tiles: key tiles of the whole grid.
        fixed_most, fixed_mean: key tiles that a query tile visits, when key tiles lie on a fixed grid.
        moving_most, moving_mean: the same when key tiles start where the query tile's window starts.
    """

    grid: str
    window: Triple
    stride: Triple
    dilation: Triple
    causal: tuple[bool, bool, bool]
    query_tile: Triple
    key_tile: Triple
    density: float
    key_tiles: int
    fixed_most: int
    fixed_mean: float
    moving_most: int
    moving_mean: float

    @property
    def fixed_speedup(self) -> float:
        """All key tiles over the most that any query tile visits, on a fixed grid of key tiles."""
        return self.key_tiles / self.fixed_most

    @property
    def moving_speedup(self) -> float:
        """The same for key tiles that start with the window."""
        return self.key_tiles / self.moving_most

    @property
    def perfect(self) -> bool:
        """Whether no visited tile is computed in vain: density 1/n and n times fewer tiles."""
        return math.isclose(self.fixed_mean / self.key_tiles, self.density, rel_tol=1e-6)

    def rows(self) -> list[tuple[str, str]]:
        """The report as (what, value) pairs for a table."""

        def triple(value: tuple[Any, ...]) -> str:
            return " x ".join(str(v) for v in value)

        return [
            ("grid", self.grid),
            ("window", triple(self.window)),
            ("stride", triple(self.stride)),
            ("dilation, causal", f"{triple(self.dilation)}; {triple(self.causal)}"),
            ("query tile, key tile", f"{triple(self.query_tile)}; {triple(self.key_tile)}"),
            ("density", f"{self.density:.4f} (1/density = {1 / self.density:.2f})"),
            (
                "key tiles visited, of all",
                f"{self.fixed_mean:.1f} mean, {self.fixed_most} most, of {self.key_tiles}",
            ),
            ("speed-up at most, fixed tiles", f"{self.fixed_speedup:.2f} x"),
            ("speed-up at most, tiles from the window", f"{self.moving_speedup:.2f} x"),
            ("no work in vain", "yes" if self.perfect else "no"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """All fields and the three derived numbers, ready for JSON."""
        found = dataclasses.asdict(self)
        return {
            **found,
            "fixed_speedup": self.fixed_speedup,
            "moving_speedup": self.moving_speedup,
            "perfect": self.perfect,
        }


class _Axis(NamedTuple):
    """Along one axis: key tiles that each query tile visits, all key tiles, kept fraction of pairs."""

    fixed: list[int]
    moving: list[int]
    tiles: int
    kept: float


def _visits(
    size: int, window: int, stride: int, dilation: int, causal: bool, query_tile: int, key_tile: int
) -> _Axis:
    """Count along one axis."""
    place, low, high = (x.tolist() for x in axis_window(size, window, stride, dilation, causal))
    fixed: list[int] = []
    moving: list[int] = []
    tiles = 0
    for group in range(min(dilation, size)):
        members = range(group, size, dilation)
        base = place[group]
        tiles += -(-len(members) // key_tile)
        for start in range(0, len(members), query_tile):
            queries = members[start : start + query_tile]
            first, last = min(low[q] for q in queries) - base, max(high[q] for q in queries) - base
            fixed.append(last // key_tile - first // key_tile + 1)
            moving.append(-(-(last - first + 1) // key_tile))
    kept = sum(h - lo + 1 for lo, h in zip(low, high, strict=True)) / size**2
    return _Axis(fixed, moving, tiles, kept)


def simulate_gna(
    grid: TokenGrid,
    window: Triple,
    stride: Triple,
    query_tile: Triple,
    key_tile: Triple,
    *,
    dilation: Triple = (1, 1, 1),
    causal: tuple[bool, bool, bool] = (False, False, False),
) -> TileReport:
    """Count the key tiles that a neighbourhood rule visits on the video part of a grid.

    Args:
        grid: the token grid.
        window, stride, dilation, causal: the rule along (frames, rows, columns), see `methods.gna.GNA`.
        query_tile, key_tile: boxes of tokens that the kernel works on.

    Raises:
        ValueError: when the rule does not fit the grid.
    """
    GNA(window=window, stride=stride, dilation=dilation, causal=causal, tile=query_tile).check(grid)
    GNA(tile=key_tile)
    rules = zip(grid.sizes, window, stride, dilation, causal, query_tile, key_tile, strict=True)
    axes = [_visits(*rule) for rule in rules]

    def most_and_mean(counts: list[list[int]]) -> tuple[int, float]:
        # Axes are independent: the most of the product is the product of the mosts, and so is the mean.
        return math.prod(max(c) for c in counts), math.prod(sum(c) / len(c) for c in counts)

    return TileReport(
        str(grid),
        window,
        stride,
        dilation,
        causal,
        query_tile,
        key_tile,
        math.prod(axis.kept for axis in axes),
        math.prod(axis.tiles for axis in axes),
        *most_and_mean([axis.fixed for axis in axes]),
        *most_and_mean([axis.moving for axis in axes]),
    )
