"""The allocation of one tuning run: what candidates cost and do, and the head plans that come of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..methods.tuned import kept_share
from .allocate import allocate, allowed_by
from .candidates import DENSE, Candidate
from .cost import CostTable
from .headplan import HeadPlan
from .oracle import ordered
from .probe import ProbeResult, forced_buckets

__all__ = ["Problem", "Solution", "kappa_of", "layer_groups"]

GROUPS = 8  # layers are weighted in so many groups
START = 0.03  # error of a head's output that the first plan of the closed loop allows
FIXED = ("soft", "tile", 0.15)  # what a group of layers computes while its weight is measured
_KAPPA = ((0.25, 1.0), (0.4, 0.077), (0.75, 0.023), (1.0, 0.0046))  # until which share of the run


def kappa_of(edges: tuple[int, ...]) -> NDArray[np.float64]:
    """Prior of the final error per step and unit of velocity error, for every bucket.

    Source: the sweep of dense steps of vLLM-Omni's pull request 5851, one prompt; early steps dominate.
    """
    starts = [edge / edges[-1] for edge in edges[:-1]]
    return np.array([next(value for end, value in _KAPPA if start < end - 1e-9) for start in starts])


def layer_groups(layers: int) -> list[range]:
    """At most 8 groups of neighbouring layers, as equal as can be."""
    count = min(GROUPS, layers)
    cuts = [round(i * layers / count) for i in range(count + 1)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


@dataclass(frozen=True)
class Solution:
    """A plan with what is predicted for it.

    Args:
        plan: the candidate of every head.
        error: predicted error, in the unit of the limit.
        time: predicted milliseconds of attention of one guidance branch over the whole run, dense steps included.
    """

    plan: HeadPlan
    error: float
    time: float


class Problem:
    """Errors, times and weights of one model and size.

    Args:
        probe: what the oracle says.
        costs: times of candidates.
        dense_layers: leading layers that stay dense.

    Attributes:
        kappa: (buckets,), weight of a step's velocity error; the prior at first.
    """

    def __init__(self, probe: ProbeResult, costs: CostTable, dense_layers: int = 0) -> None:
        self.probe, self.costs, self.edges = probe, costs, probe.edges
        self.kappa = kappa_of(self.edges)
        self.forced = forced_buckets(probe.steps, probe.dense)
        self.errors = probe.tables["a"] + probe.tables["a_error"]
        self.buckets, self.layers, self.heads = self.errors.shape[:3]
        self.weights = np.ones((self.buckets, self.layers))
        self.lengths = np.diff(self.edges)
        layouts = ordered(probe.grid)
        self.shares = np.array([kept_share(c, layouts[c.order], probe.grid) for c in probe.candidates])
        self.times = costs.times(probe.candidates, self.shares)
        self.allowed = allowed_by(probe.tables["err"], np.array([c.density for c in probe.candidates]))
        self.dense_layers = dense_layers
        self.allowed[:, :dense_layers] = [c.is_dense for c in probe.candidates]

    def solve(self, *, limit: float | None = None, budget: float | None = None) -> Solution:
        """The plan of least time within a predicted error, or of least error within a time (milliseconds in all)."""
        free, candidates = slice(self.forced, None), self.probe.candidates
        orders = ["" if c.is_dense else c.order for c in candidates]
        left = None if budget is None else max(0.0, budget - self.forced_time())
        found = allocate(
            self.times, self.errors[free], (self.kappa * self.lengths)[free, None] * self.weights[free],
            {order: self.costs.fix(order) for order in dict.fromkeys(orders) if order}, limit=limit, budget=left,
            orders=orders, steps=self.lengths[free], allowed=self.allowed[free])
        choices = np.zeros((self.buckets, self.layers, self.heads), dtype=np.uint8)
        choices[free] = found.choice
        plan = HeadPlan(candidates, self.edges, choices)
        return Solution(plan.remapped(candidates), found.error, found.time + self.forced_time())

    def only(self, pattern: str) -> Problem:
        """The same problem where heads may take one pattern alone, or dense."""
        found = copy.copy(self)
        found.allowed = self.allowed & np.array([c.is_dense or c.pattern == pattern for c in self.probe.candidates])
        return found

    def corrected(self, factors: Mapping[int, float], pattern: str | None = None) -> Problem:
        """The same problem with the weights of some buckets times a factor; with a pattern, the errors of its
        candidates there."""
        found = copy.copy(self)
        if pattern is None:
            found.weights = self.weights.copy()
        else:
            found.errors = self.errors.copy()
        these = np.array([c.pattern == pattern for c in self.probe.candidates])
        for bucket, factor in factors.items():
            if pattern is None:
                found.weights[bucket] *= factor
            else:
                found.errors[bucket, :, :, these] *= factor
        return found

    def forced_time(self) -> float:
        """Milliseconds of the steps that are dense in any case."""
        return float(self.lengths[: self.forced].sum() * self.layers * self.heads * self.costs.dense)

    def dense_time(self) -> float:
        """Milliseconds of attention of the dense run."""
        return float(self.lengths.sum() * self.layers * self.heads * self.costs.dense)

    def velocity(self, plan: HeadPlan, bucket: int) -> float:
        """Predicted squared error of the velocity over its square, at a step of the bucket."""
        numbers = [self.probe.candidates.index(c) for c in plan.candidates]
        chosen = np.array(numbers)[plan.choices[bucket]]
        each = np.take_along_axis(self.errors[bucket], chosen[..., None], -1)[..., 0]
        return float((self.weights[bucket] * each.sum(-1)).sum())

    def start(self) -> float:
        """The predicted error of the plan in which every head takes its cheapest candidate of error up to 3 %."""
        err, free = self.probe.tables["err"], slice(self.forced, None)
        cost = np.where((err <= START) & self.allowed, self.times, np.inf)
        each = np.take_along_axis(self.errors, cost.argmin(-1)[..., None], -1)[..., 0].sum(-1)
        return float(((self.kappa * self.lengths)[free, None] * self.weights[free] * each[free]).sum())

    def group_plan(self, group: range) -> HeadPlan | None:
        """A plan for any bucket with only this group of layers at a fixed candidate; None where there is none."""
        wanted = Candidate(*FIXED)
        sparse = [i for i, c in enumerate(self.probe.candidates) if not c.is_dense]
        if not sparse:
            return None

        def distance(i: int) -> tuple[bool, bool, float]:
            c = self.probe.candidates[i]
            return c.pattern != wanted.pattern, c.order != wanted.order, abs(c.density - wanted.density)

        choices = np.zeros((1, self.layers, self.heads), dtype=np.uint8)
        choices[0, list(group)] = 1
        chosen = self.probe.candidates[min(sparse, key=distance)]
        return HeadPlan((DENSE, chosen), (0, self.probe.steps), choices)

    def group_error(self, plan: HeadPlan, bucket: int) -> float:
        """Sum of the heads' errors of such a plan, unweighted."""
        number = self.probe.candidates.index(plan.candidates[1])
        return float(self.errors[bucket][..., number][plan.choices[0] == 1].sum())

    def ceiling(self) -> HeadPlan:
        """The sparse kernel with all blocks, wherever a step is not forced dense."""
        choices = np.zeros((self.buckets, self.layers, self.heads), dtype=np.uint8)
        choices[self.forced :, self.dense_layers :] = 1
        return HeadPlan((DENSE, Candidate("drop", "tile", 1.0)), self.edges, choices)

    def kept(self, plan: HeadPlan) -> list[float]:
        """Share of the key blocks that every bucket keeps, on this grid."""
        share: Mapping[Candidate, float] = dict(zip(self.probe.candidates, self.shares, strict=True))
        each = np.array([share[c] for c in plan.candidates])
        return [float(each[chosen].mean()) for chosen in plan.choices]
