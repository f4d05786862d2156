"""What every candidate costs: milliseconds of a head by pattern, order and density, and of a layer by order.

A table is measured on the device that runs the plan, by running it (`methods.tuned`) on random activations: their
scores make random lists, which is what a kernel has to expect. Or it is modelled for Wan2.1-14B at 720p, from the times
that the comparison of methods was measured with, so that plans made on one machine are the same on every other.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..grid import TokenGrid
from ..kernels.attention import block_sparse_attention, dense_attention
from ..memory import Memory
from ..methods.base import Call
from ..methods.tuned import Tuned
from ..report import Stopwatch
from .candidates import DENSE, ORDERS, PATTERNS, Candidate, candidates_of
from .headplan import HeadPlan

__all__ = ["DENSITIES", "FORMAT", "CostTable", "measure", "timed"]

FORMAT = "dit-sparse cost table 1"
DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
WARM_UP, REPEATS, LEAST = 3, 10, 3
_MIXED = 1.05  # a launch of many candidates may cost so much more than their sum before the table is scaled
_BLOCK = 128  # tokens of a block of the modelled geometry

Curve = tuple[tuple[float, float], ...]
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class CostTable:
    """Times of one geometry on one device.

    Args:
        where: device and versions.
        grid: the tokens, as `str(TokenGrid)`.
        heads, head_dim: of the layer that was timed.
        dense: milliseconds of one head of dense attention.
        curves: by "pattern/order", (density, milliseconds of one head) by rising density, routing included.
        fixed: by order, milliseconds of a layer in which some head uses it, whatever their number.
        mixed: factor on `curves`: a launch of different candidates over the sum of its parts.

    Raises:
        ValueError: parts that are no times; one line.
    """

    where: dict[str, str]
    grid: str
    heads: int
    head_dim: int
    dense: float
    curves: dict[str, Curve] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)
    mixed: float = 1.0

    def __post_init__(self) -> None:
        numbers = [self.dense, self.mixed, *self.fixed.values(), *(t for c in self.curves.values() for _, t in c)]
        if any(not isinstance(x, (int, float)) or not 0 <= x < float("inf") for x in numbers):
            raise ValueError("cost table: times must be finite numbers from 0 on")
        for name, curve in self.curves.items():
            densities = [d for d, _ in curve]
            if len(curve) < 2 or densities != sorted(set(densities)):
                raise ValueError(f"cost table: {name!r} needs two or more densities, rising")

    def tau(self, candidate: Candidate, density: float | None = None) -> float:
        """Milliseconds of one head, on the line between the two timed densities around its own.

        Args:
            candidate: what the head computes.
            density: its share of the key blocks where that is known better than from its name.

        Raises:
            ValueError: the table has no such pattern and order; one line.
        """
        if candidate.is_dense:
            return self.dense
        name = f"{candidate.pattern}/{candidate.order}"
        if name not in self.curves:
            raise ValueError(f"cost table has no {name!r}; it has {', '.join(self.curves) or 'none'}")
        x, curve = candidate.density if density is None else density, self.curves[name]
        above = next((i for i, (d, _) in enumerate(curve) if d >= x), len(curve) - 1)
        (d0, t0), (d1, t1) = curve[max(above, 1) - 1], curve[max(above, 1)]
        return self.mixed * max(0.0, t0 + (t1 - t0) * (x - d0) / (d1 - d0))

    def times(self, candidates: Sequence[Candidate], densities: Iterable[float | None] | None = None
              ) -> NDArray[np.float64]:
        """Milliseconds of one head of every candidate; `densities` as in `tau`."""
        known = [None] * len(candidates) if densities is None else densities
        return np.array([self.tau(*pair) for pair in zip(candidates, known, strict=True)])

    def fix(self, order: str) -> float:
        """Milliseconds that an order costs a layer, once; 0 for one that costs none."""
        return self.fixed.get(order, 0.0)

    def layer(self, chosen: Mapping[Candidate, float] | Iterable[Candidate],
              density: Callable[[Candidate], float] | None = None) -> float:
        """Milliseconds of a layer.

        Args:
            chosen: the candidate of every head, or how many heads each has.
            density: share of the key blocks that a candidate keeps; None: the one it names.
        """
        counts = chosen if isinstance(chosen, Mapping) else Counter(chosen)
        orders = {c.order for c in counts if not c.is_dense}
        spent = sum(n * self.tau(c, None if density is None else density(c)) for c, n in counts.items())
        return float(spent + sum(self.fix(order) for order in orders))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` makes the very same table of it."""
        return {"format": FORMAT, "where": dict(self.where), "grid": self.grid, "heads": self.heads,
                "head_dim": self.head_dim, "dense": self.dense, "mixed": self.mixed, "fixed": dict(self.fixed),
                "curves": {name: [list(point) for point in curve] for name, curve in self.curves.items()}}

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> CostTable:
        """The table of `to_dict`.

        Raises:
            ValueError: something else; one line.
        """
        if not isinstance(held, Mapping) or held.get("format") != FORMAT:
            raise ValueError(f"costs are no table of the form {FORMAT!r}; make them with tune, or leave them out")
        try:
            curves = {str(k): tuple((float(d), float(t)) for d, t in curve) for k, curve in held["curves"].items()}
            return cls(dict(held["where"]), str(held["grid"]), int(held["heads"]), int(held["head_dim"]),
                       float(held["dense"]), curves, {str(k): float(v) for k, v in held["fixed"].items()},
                       float(held["mixed"]))
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"costs are incomplete: {type(error).__name__}: {error}") from error

    def save(self, file: str | Path) -> None:
        """Write the table as JSON; every number is read again as it is."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> CostTable:
        """The table of a file.

        Raises:
            ValueError: the file cannot be read, or holds something else; one line.
        """
        try:
            held = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"costs={str(file)!r} cannot be read: {error}") from error
        return cls.from_dict(held)

    @classmethod
    def modelled(cls) -> CostTable:
        """Times of one attention call of Wan2.1-14B at 720p (21x45x80 tokens, 40 heads of 128) on an H200.

        From the table that the comparison of methods models its times by. The kernel's curve is the base. Routing is
        that of `sol`. An order that is a permutation costs what RainFusion2.0, another one, adds to the kernel, and
        soft blocks what `sol` adds beyond that. Box tiles cost the kernel's time times what they cost `gna`. All of it
        grows with the heads that use it, so no order costs a layer anything besides.

        Raises:
            ValueError: the table is not there, or lacks these methods; one line.
        """
        # Only here: the library does not need the measuring programs otherwise.
        from ..eval.attention_time import read_times

        held = read_times()
        if held is None or len(held.kernels.get(_BLOCK, ())) < 2:
            raise ValueError("the table of attention times is missing; measure the costs on this device instead")

        def extra(method: str, number: Callable[[dict[str, Any], float], float]) -> float:
            rows = [row for row in held.rows if row["method"] == method]
            if not rows:
                raise ValueError(f"the table of attention times has no {method!r}; measure the costs on this device")
            return statistics.fmean(number(row, held.kernel(_BLOCK, row["density"]) or 0.0) for row in rows)

        plan = extra("sol", lambda row, _: row["plan_ms"])
        permute = extra("rainfusion2", lambda row, kernel: row["attention_ms"] - kernel)
        soft = extra("sol", lambda row, kernel: row["attention_ms"] - kernel) - permute
        boxes = extra("gna", lambda row, kernel: row["attention_ms"] / kernel)
        heads, head_dim = 40, 128
        curves = {}
        # The spread of keys and values comes with their means, from the same reading.
        for pattern, added in zip(PATTERNS[1:], (plan, plan + max(soft, 0.0), plan + max(soft, 0.0), 0.0), strict=True):
            for order, factor, moved in (("tile", boxes, 0.0), ("morton", 1.0, max(permute, 0.0))):
                curves[f"{pattern}/{order}"] = tuple(
                    (density, (ms * factor + added + moved) / heads) for density, ms in held.kernels[_BLOCK])
        return cls({**held.where, "modelled": "Wan2.1-14B at 720p"}, held.grid, heads, head_dim, held.dense_ms / heads,
                   curves, {})


def timed(table: CostTable, patterns: Sequence[str], *, chosen: bool) -> tuple[str, ...]:
    """The patterns that a table has times of in every order.

    Args:
        table: of any version.
        patterns: that are wanted.
        chosen: they were asked for by name: a table that lacks one is refused.

    Raises:
        ValueError: the table lacks one that was asked for, or has none; one line.
    """
    there = tuple(name for name in patterns if all(f"{name}/{order}" in table.curves for order in ORDERS))
    if not there or (chosen and there != tuple(patterns)):
        lacking = ", ".join(name for name in patterns if name not in there)
        raise ValueError(f"costs have no times of {lacking}; measure them again, or leave them out")
    return there


def measure(
    grid: TokenGrid, heads: int, head_dim: int, *, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, patterns: Iterable[str] = PATTERNS[1:], orders: Sequence[str] = ORDERS,
    densities: Sequence[float] = DENSITIES, batch: int = 1, seconds: float = 60.0, progress: Report | None = None,
) -> CostTable:
    """Time all candidates on a device, each with all heads in one launch: 3 calls to warm up, median of 10.

    Args:
        grid: the tokens of a call.
        heads, head_dim, batch: shape of the activations.
        device, dtype: of the activations.
        patterns, orders: whose curves are measured.
        densities: two or more; more repeats than 3 of each are left out once `seconds` are spent.
        seconds: about how long it may take.
        progress: called as progress(share done, what is timed).

    Returns:
        The table. Noise never makes a denser candidate cheaper: times rise with density.
    """
    bench = _Bench(grid, heads, head_dim, batch, device, dtype)
    patterns = [p for p in patterns if p != "dense"]
    share = seconds / (3 + len(orders) * (1 + len(patterns) * len(densities)))
    done, all_ = 0, len(orders) * len(patterns) * len(densities)
    dense = bench.time(lambda: dense_attention(*bench.qkv, scale=bench.scale), share)
    whole: dict[str, list[tuple[float, float]]] = {}
    fixed = {order: bench.fixed(order, share) for order in orders}
    for pattern in patterns:
        for order in orders:
            for density in sorted(set(densities)):
                if progress is not None:
                    progress(done / all_, f"{pattern} {density:g} ({order})")
                ms = bench.candidates([Candidate(pattern, order, density)] * heads, share)
                whole.setdefault(f"{pattern}/{order}", []).append((density, ms))
                done += 1
    least = min((ms for curve in whole.values() for _, ms in curve), default=0.0)
    # What an order costs once cannot be more than half of the cheapest call: the rest is noise.
    fixed = {order: min(ms, least / 2) for order, ms in fixed.items()}
    curves = {}
    for name, points in whole.items():
        per_head = np.maximum.accumulate([(ms - fixed[name.split("/")[1]]) / heads for _, ms in points])
        curves[name] = tuple((d, float(t)) for (d, _), t in zip(points, per_head, strict=True))
    where = {"device": bench.name, "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch.")}
    table = CostTable(where, str(grid), heads, head_dim, dense / heads, curves, fixed)
    factor = bench.mixed(table, patterns, orders, densities, share)
    return replace(table, mixed=factor) if factor > _MIXED else table


class _Bench:
    """Random activations of a layer, and the time of what runs on them."""

    def __init__(
        self, grid: TokenGrid, heads: int, head_dim: int, batch: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.device, self.grid, self.heads = torch.device(device), grid, heads
        cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if cuda else "CPU"
        generator = torch.Generator(device=self.device).manual_seed(0)
        shape = (batch, grid.tokens, heads, head_dim)
        query, key, value = (torch.randn(shape, generator=generator, device=self.device, dtype=dtype) for _ in range(3))
        self.qkv, self.scale, self.memory = (query, key, value), head_dim**-0.5, Memory()

    @torch.no_grad()
    def time(self, run: Callable[[], object], share: float) -> float:
        """Median milliseconds of a call after a warm-up; at least 3 calls, and 10 where `share` seconds allow it."""
        start = time.perf_counter()
        for _ in range(WARM_UP):
            run()
            if self._spent(start) > share / 2:
                break
        watches: list[Stopwatch] = []
        while len(watches) < REPEATS and (len(watches) < LEAST or self._spent(start) < share):
            watches.append(Stopwatch(self.device))
            run()
            watches[-1].mark()
        return 1e3 * statistics.median(watch.seconds() for watch in watches)

    def _spent(self, start: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def candidates(self, chosen: Sequence[Candidate], share: float) -> float:
        """Milliseconds of a call whose first heads compute these candidates, routing included."""
        kinds = tuple(dict.fromkeys(chosen))
        choices = np.array([kinds.index(c) for c in chosen], dtype=np.uint8)
        method = Tuned(HeadPlan(kinds, (0, 1), choices[None, None]))
        query, key, value = (x[:, :, : len(chosen)] for x in self.qkv)

        attend = functools.partial(block_sparse_attention, scale=self.scale)

        def run() -> None:
            call = Call(query, key, value, self.grid, self.scale, num_steps=1, cached=self.memory.static)
            plan = method.plan(call)
            if plan.mask is None:
                dense_attention(query, key, value, scale=self.scale)
            else:
                plan.operator.run(call, plan.mask, attend)

        return self.time(run, share)

    def fixed(self, order: str, share: float) -> float:
        """Milliseconds that do not depend on the number of heads: what all of them and half of them leave over."""
        if self.heads < 2:
            return 0.0
        half, one = self.heads // 2, Candidate("drop", order, 0.1)
        some, every = (self.candidates([one] * count, share / 2) for count in (half, self.heads))
        return max(0.0, (some * self.heads - every * half) / (self.heads - half))

    def mixed(
        self, table: CostTable, patterns: Sequence[str], orders: Sequence[str], densities: Sequence[float], share: float
    ) -> float:
        """Time of a launch whose heads all differ, over what the table says."""
        kinds = [c for c in candidates_of(patterns, orders, densities) if c != DENSE]
        if self.heads < 2 or not kinds:
            return 1.0
        chosen = [kinds[i * len(kinds) // self.heads] for i in range(self.heads)]
        said = table.layer(chosen)
        return self.candidates(chosen, share) / said if said > 0 else 1.0
