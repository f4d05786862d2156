"""Candidates: what one head may compute in a stretch of a run. A plan picks one of them per bucket, layer and head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BUDGETS", "DENSE", "KINDS", "ORDERS", "PATTERNS", "Candidate", "candidates_of", "patterns_of"]

PATTERNS = ("dense", "drop", "soft", "spread", "band")
# What a pattern ranks key blocks by, and what becomes of those that are not kept.
KINDS = {"drop": ("pooled", "drop"), "soft": ("pooled", "soft"), "spread": ("spread", "soft"), "band": ("band", "drop")}
ORDERS = ("tile", "morton")
# Kept fractions that the oracle judges; 1 is there to check it.
BUDGETS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.30, 0.40, 0.60, 1.0)


@dataclass(frozen=True)
class Candidate:
    """One way to compute the attention of a head.

    Args:
        pattern: "dense" (all pairs), "drop" (the best key blocks of every query block by pooled scores), "soft" (the
            same, and the other blocks enter as their means), "spread" (as soft, ranked by what a block loses as its
            mean: its score and how far its keys and values spread) or "band" (the key blocks nearest along the order).
        order: what makes neighbours contiguous: "tile" (box tiles, or raster blocks where the tile is one) or "morton".
        density: kept fraction of the key blocks, forced ones included, in (0, 1]; 1 for dense.

    Raises:
        ValueError: a value that is not allowed; one line.
    """

    pattern: str
    order: str = "tile"
    density: float = 1.0

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"candidate: pattern={self.pattern!r} is not allowed; use one of {', '.join(PATTERNS)}")
        if self.order not in ORDERS:
            raise ValueError(f"candidate: order={self.order!r} is not allowed; use one of {', '.join(ORDERS)}")
        density = self.density
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            raise ValueError(f"candidate: density={density!r} is not allowed; use a number in (0, 1]")
        if self.pattern == "dense" and density != 1:
            raise ValueError(f"candidate: density={density!r} is not allowed with dense; use 1")

    @property
    def is_dense(self) -> bool:
        """Whether all pairs are computed."""
        return self.pattern == "dense"

    @property
    def ranking(self) -> str:
        """What blocks are ranked by, a name in `KINDS`; dense is the band that is as wide as the video."""
        return "band" if self.is_dense else KINDS[self.pattern][0]

    @property
    def is_soft(self) -> bool:
        """Whether blocks that are not kept enter as their means."""
        return not self.is_dense and KINDS[self.pattern][1] == "soft"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; dense has neither order nor density."""
        if self.is_dense:
            return {"pattern": "dense"}
        return {"pattern": self.pattern, "order": self.order, "density": self.density}

    def __str__(self) -> str:
        return "dense" if self.is_dense else f"{self.pattern} {self.density:g} ({self.order})"


DENSE = Candidate("dense")


def candidates_of(
    patterns: Iterable[str] = PATTERNS[1:],
    orders: Iterable[str] = ORDERS,
    budgets: Iterable[float] = BUDGETS,
) -> tuple[Candidate, ...]:
    """All candidates of these patterns, orders and budgets; dense comes first, budgets rise inside a pattern and order.

    Args:
        patterns: of `PATTERNS`; dense is always there.
        orders: of `ORDERS`.
        budgets: kept fractions; 1 is left out, which dense is.
    """
    densities = sorted({float(b) for b in budgets if b < 1})
    found = [Candidate(pattern, order, density) for pattern in dict.fromkeys(patterns) if pattern != "dense"
             for order in dict.fromkeys(orders) for density in densities]
    return (DENSE, *found)


def patterns_of(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Read the `patterns` option: "auto" means all.

    Raises:
        ValueError: an unknown name, or none that is sparse; one line.
    """
    if patterns == "auto":
        return PATTERNS[1:]
    names = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for name in names:
        if name not in PATTERNS:
            raise ValueError(f"patterns={name!r} is not allowed; use 'auto' or some of {', '.join(PATTERNS)}")
    sparse = tuple(n for n in dict.fromkeys(names) if n != "dense")
    if not sparse:
        raise ValueError(f"patterns={patterns!r} leaves nothing sparse; add some of {', '.join(PATTERNS[1:])}")
    return sparse
