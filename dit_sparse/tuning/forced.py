"""The teacher-forced check: what forwards with a plan do to the velocity, against what was predicted for it.

The weights are corrected by the ratio, and the plan is solved once more. Where one pattern alone is predicted to take
hardly longer than the plan that mixes all of them, both are measured, and what was measured decides, not the oracle:
the errors of the pattern's candidates are corrected by how much better or worse than the mix it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .headplan import HeadPlan
from .solve import Problem, Solution

__all__ = ["ALL", "NEAR", "Check", "Measure", "settle"]

ALL = "all"  # the plan that may mix all patterns
NEAR = 0.05  # of the predicted time or error: patterns that are as near as that are compared by forwards
RATIO = (0.2, 5.0)  # what the check may change the weights by

Measure = Callable[[HeadPlan], Mapping[int, float]]


@dataclass(frozen=True)
class Check:
    """A plan that forwards were made with.

    Args:
        patterns: `ALL`, or the one pattern that heads may take beside dense.
        problem: what errors are predicted with.
        solution: the plan.
        measured: squared error of the velocity over its square, by bucket.
    """

    patterns: str
    problem: Problem
    solution: Solution
    measured: Mapping[int, float]

    def predicted(self, bucket: int) -> float:
        """What `measured` should be."""
        return self.problem.velocity(self.solution.plan, bucket)

    def ratios(self) -> dict[int, float]:
        """Measured over predicted, by bucket."""
        return {bucket: error / said for bucket, error in self.measured.items()
                if (said := self.predicted(bucket)) > 0 and math.isfinite(error)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data: milliseconds of attention, and velocity errors of the buckets that were measured."""
        buckets = sorted(self.measured)
        return {"patterns": self.patterns, "milliseconds": _short(self.solution.time), "buckets": buckets,
                "predicted": [_short(self.predicted(b)) for b in buckets],
                "measured": [_short(self.measured[b]) for b in buckets]}


def settle(
    problem: Problem, solution: Solution, measure: Measure, *, limit: float | None = None, budget: float | None = None
) -> tuple[Problem, Solution, list[dict[str, Any]]]:
    """Correct weights and errors by what forwards do, with the plan and with patterns that are predicted alike.

    Args:
        problem: what the plan comes from; it is not changed.
        solution: the plan.
        measure: squared error of the velocity over its square with a plan, by bucket; only of buckets that it does
            not leave dense, and of which a forward was kept.
        limit, budget: what the plan was solved for, as in `Problem.solve`.

    Returns:
        The problem to go on with: its weights are corrected by the plan's ratios of measured to predicted errors, held
        to `RATIO`, and the errors of a pattern that was measured alone by how its ratios compare with these, held to
        the same. The plan, solved once more. And what was measured, as plain data.
    """
    checks = [Check(ALL, problem, solution, measure(solution.plan))]
    if checks[0].measured:
        rivals = _rivals(problem, solution, limit=limit, budget=budget)
        checks += [Check(name, problem, plan, measure(plan.plan)) for name, plan in rivals.items()]
    common = checks[0].ratios()
    found = problem.corrected({bucket: _held(ratio) for bucket, ratio in common.items()})
    for check in checks[1:]:
        beside = {bucket: _held(ratio / common[bucket]) for bucket, ratio in check.ratios().items()
                  if common.get(bucket, 0.0) > 0}
        found = found.corrected(beside, check.patterns)
    told = [one.to_dict() for one in checks if one.measured and all(map(math.isfinite, one.measured.values()))]
    return found, found.solve(limit=limit, budget=budget), told


def _rivals(
    problem: Problem, solution: Solution, *, limit: float | None, budget: float | None
) -> dict[str, Solution]:
    """The plans of one pattern alone that are predicted to take at most 5 % longer (within a budget of time: to make
    an error of at most 5 % more), where they are other plans."""
    found: dict[str, Solution] = {}
    for name in dict.fromkeys(c.pattern for c in problem.probe.candidates if not c.is_dense):
        plan = problem.only(name).solve(limit=limit, budget=budget)
        more = plan.time / solution.time if budget is None else plan.error / max(solution.error, 1e-30)
        near = more <= 1 + NEAR and not plan.plan.all_dense
        if near and not any(_same(plan.plan, other.plan) for other in (solution, *found.values())):
            found[name] = plan
    return found


def _same(one: HeadPlan, other: HeadPlan) -> bool:
    return one.candidates == other.candidates and np.array_equal(one.choices, other.choices)


def _held(ratio: float) -> float:
    return min(max(ratio, RATIO[0]), RATIO[1])


def _short(value: float) -> float:
    return float(f"{value:.4g}")
