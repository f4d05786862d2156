"""The teacher-forced check: what was measured corrects the weights, and patterns that are predicted alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from dit_sparse.grid import TokenGrid
from dit_sparse.tuning.candidates import DENSE, Candidate
from dit_sparse.tuning.cost import CostTable
from dit_sparse.tuning.forced import RATIO, settle
from dit_sparse.tuning.headplan import HeadPlan
from dit_sparse.tuning.probe import ProbeResult
from dit_sparse.tuning.solve import Problem, Solution

GRID = TokenGrid(8, 16, 16)
KINDS = (DENSE, *(Candidate(p, "tile", d) for p in ("drop", "soft") for d in (0.1, 0.2, 0.4)))
LIMIT = 0.05


def problem(soft_ms: float = 1.0) -> Problem:
    """Two layers of four heads, ten steps; half of the heads do a little better by `drop`, half by `soft`.

    Args:
        soft_ms: what `soft` takes beside `drop`.
    """
    shape = (5, 2, 4, len(KINDS))
    errors = np.zeros(shape)
    for number, one in enumerate(KINDS[1:], 1):
        better = np.arange(4) % 2 == (one.pattern == "soft")
        errors[1:, :, :, number] = 1e-3 * (1 / one.density - 1) * np.where(better, 0.98, 1.0)
    tables = {name: errors for name in ("mass", "err", "a")} | {"a_error": np.zeros(shape)}
    curve = {d: d for d in (0.01, 0.1, 1.0)}
    curves = {"drop/tile": tuple(curve.items()), "soft/tile": tuple((d, soft_ms * t) for d, t in curve.items())}
    costs = CostTable({"device": "a GPU"}, "8x16x16", 4, 64, 1.0, curves, {"tile": 0.0}, 1.0)
    return Problem(ProbeResult(GRID, 10, KINDS, tables, 64), costs)


class Forwards:
    """Forwards whose error is the predicted one times a factor of the pattern that most heads of the plan take."""

    def __init__(self, of: Problem, factors: Mapping[str, float]) -> None:
        self.of, self.factors, self.plans = of, factors, list[HeadPlan]()

    def __call__(self, plan: HeadPlan) -> dict[int, float]:
        self.plans.append(plan)
        patterns = {plan.candidates[i].pattern for i in np.unique(plan.choices)} - {"dense"}
        factor = self.factors["all" if len(patterns) > 1 else patterns.pop()] if patterns else 1.0
        return {b: factor * self.of.velocity(plan, b) for b in range(1, plan.buckets)}


def patterns_of(plan: HeadPlan) -> set[str]:
    return {plan.candidates[i].pattern for i in np.unique(plan.choices)} - {"dense"}


def settled(made: Problem, factors: Mapping[str, float], **asked: float) -> tuple[Problem, Solution, Any, Forwards]:
    forwards = Forwards(made, factors)
    return *settle(made, made.solve(**asked), forwards, **asked), forwards


@pytest.mark.parametrize("asked", [{"limit": LIMIT}, {"budget": 30.0}], ids=str)
@pytest.mark.parametrize(("factors", "taken"), [
    ({"all": 1, "drop": 1, "soft": 1}, "all"), ({"all": 2, "drop": 2, "soft": 1}, "soft"),
    ({"all": 2, "drop": 1, "soft": 3}, "drop"), ({"all": 1, "drop": 2, "soft": 2}, "all")], ids=str)
def test_patterns_that_are_predicted_alike_are_decided_by_forwards(
    factors: dict[str, float], taken: str, asked: dict[str, float]
) -> None:
    made = problem()
    found, plan, told, _ = settled(made, factors, **asked)
    assert [one["patterns"] for one in told] == ["all", "drop", "soft"]
    heads = [plan.plan.candidates[i].pattern for i in plan.plan.choices[1:].reshape(-1)]
    drop, soft = heads.count("drop"), heads.count("soft")
    assert min(drop, soft) > 3 if taken == "all" else (soft > 3 * drop if taken == "soft" else drop > 3 * soft)
    for number, one in enumerate(KINDS[1:], 1):
        beside = factors[one.pattern] / factors["all"]
        ratios = found.errors[1:, ..., number] / made.errors[1:, ..., number]
        # Of buckets that the plan leaves dense nothing is known.
        assert np.minimum(abs(ratios - beside), abs(ratios - 1)).max() < 0.01 and abs(ratios - beside).min() < 0.01
    assert found.allowed is made.allowed, "no pattern is ruled out"
    for one in told:
        assert one["measured"] == pytest.approx([factors[one["patterns"]] * x for x in one["predicted"]], rel=1e-3)
    assert patterns_of(made.solve(limit=LIMIT).plan) == {"drop", "soft"} and (made.weights == 1).all(), "not changed"


@pytest.mark.parametrize("soft_ms", [1.0, 1.5])
def test_a_pattern_that_takes_over_5_percent_longer_is_not_measured(soft_ms: float) -> None:
    made = problem(soft_ms)
    mixed, alone = made.solve(limit=LIMIT), {name: made.only(name).solve(limit=LIMIT) for name in ("drop", "soft")}
    _, _, told, forwards = settled(made, dict.fromkeys(("all", "drop", "soft"), 1.0), limit=LIMIT)
    near = [name for name, one in alone.items() if one.time <= 1.05 * mixed.time and one.error != mixed.error]
    assert [one["patterns"] for one in told] == ["all", *near] and len(forwards.plans) == 1 + len(near)
    assert ("soft" in near) == (soft_ms == 1.0)


@pytest.mark.parametrize(("factor", "weight"), [(3.0, 3.0), (0.5, 0.5), (100.0, RATIO[1]), (1e-3, RATIO[0])])
def test_weights_are_corrected_and_held(factor: float, weight: float) -> None:
    found, plan, _, _ = settled(problem(), dict.fromkeys(("all", "drop", "soft"), factor), limit=LIMIT)
    assert found.weights[1:] == pytest.approx(weight) and (found.weights[0] == 1).all()
    assert plan.error <= LIMIT * (1 + 1e-9), "solved once more with them"


def test_without_forwards_nothing_is_compared() -> None:
    made = problem()
    start = made.solve(limit=LIMIT)
    found, plan, told = settle(made, start, lambda plan: {}, limit=LIMIT)
    assert told == [] and (found.weights == made.weights).all()
    assert np.array_equal(plan.plan.choices, start.plan.choices)
    dense = made.solve(limit=0.0)
    assert dense.plan.all_dense and settle(made, dense, lambda plan: {}, limit=0.0)[1].plan.all_dense


def test_what_is_not_finite_corrects_nothing() -> None:
    made = problem()
    start = made.solve(limit=LIMIT)
    found, plan, told = settle(made, start, lambda plan: {b: float("nan") for b in range(1, 5)}, limit=LIMIT)
    assert told == [] and (found.weights == 1).all() and plan.error <= LIMIT * (1 + 1e-9)


def test_within_a_budget_patterns_are_near_by_their_error() -> None:
    made = problem()
    made.errors[..., [one.pattern == "soft" for one in KINDS]] *= 50
    _, _, told, _ = settled(made, dict.fromkeys(("all", "drop", "soft"), 1.0), budget=30.0)
    assert "soft" not in [one["patterns"] for one in told]
