"""The closed loop and the verification without a pipeline: clips whose PSNR falls with the predicted error."""

import math
from typing import Any

import numpy as np
import pytest

from dit_sparse.tuning.candidates import DENSE, Candidate
from dit_sparse.tuning.headplan import HeadPlan
from dit_sparse.tuning.run import Tracker
from dit_sparse.tuning.solve import Solution
from dit_sparse.tuning.steps import ROUNDS, digest
from dit_sparse.tuning.targets import Target
from dit_sparse.tuning.tune import _best, _Tuning

LOOPED = [f"loop {n}" for n in range(10)]
SPREAD = np.linspace(-6, 6, len(LOOPED))  # dB around the mean: a standard error of 1.28
RESERVE = 2.136  # what is taken off the mean of these
LOW = 9.68  # how far below their mean the worst clip counts


class Problem:
    """Solves for any error: of less than `least` only the dense plan is left. Larger errors take less time."""

    def __init__(self, least: float = 1e-6) -> None:
        self.least = least

    def start(self) -> float:
        return 1.0

    def solve(self, limit: float = 0.0, budget: float | None = None) -> Solution:
        kinds = (DENSE, Candidate("soft", "tile", 0.2))
        if budget is not None or limit < self.least:
            return Solution(HeadPlan(kinds, (0, 1), np.zeros((1, 3, 8), dtype=np.uint8)), 0.0, 100.0)
        # Sixteen binary digits of the error, so that plans of different errors differ.
        digits = [int(x) for x in f"{min(2**24 - 1, int((math.log10(limit) + 10) * 1e6)):024b}"]
        choices = np.array(digits, dtype=np.uint8).reshape(1, 3, 8)
        return Solution(HeadPlan(kinds, (0, 1), choices), limit, 50 - 10 * math.log10(limit))

    def kept(self, plan: HeadPlan) -> list[float]:
        return plan.densities()

    def dense_time(self) -> float:
        return 100.0


class Fake(_Tuning):
    """A tuning whose clips have `level - 10 log10(error)` dB, more or less by the prompt."""

    def __init__(self, target: str, statistic: str = "mean", *, held: tuple[float, ...] = (0.0, 0.0),
                 level: float = 20.0, bend: float = 1.0, least: float = 1e-6) -> None:
        self.target, self.statistic, self.floor = Target.parse(target), statistic, 0.0
        self.looped, self.held, self.seed, self.given_costs = LOOPED, [f"held {n}" for n in range(len(held))], 0, None
        self.problem: Any = Problem(least)
        self.level, self.bend, self.offsets = level, bend, dict(zip(self.held, held, strict=True))
        self.offsets |= dict(zip(LOOPED, SPREAD, strict=True))
        self.tracker = Tracker(1.0, None)
        self.ran: list[tuple[str, int]] = []  # plan, clips

    def teacher_forced(
        self, solution: Solution, limit: float | None = None, *, budget: float | None = None
    ) -> Solution:
        return solution

    def clips_of(self, prompts: list[str], name: str, probed: int = 0) -> Any:
        return [(None, 1.0) for _ in prompts]

    def values(self, plan: HeadPlan, clips: Any, prompts: list[str], name: str, *, every: bool = False) -> Any:
        assert len(clips) == len(prompts)
        self.ran.append((digest(plan), len(prompts)))
        error = 0.0 if plan.all_dense else 10 ** (int("".join(map(str, plan.choices.reshape(-1))), 2) / 1e6 - 10)
        level = 1e6 if error == 0 else self.level - 10 * self.bend * math.log10(error)
        return [{"psnr": level + self.offsets[p], "seconds": 1.0, "dense_seconds": 1.0} for p in prompts]

    def mean_of(self, solution: Solution) -> float:
        return float(np.mean([v["psnr"] for v in self.values(solution.plan, LOOPED, LOOPED, "")]))


@pytest.mark.parametrize("count", [10, 16, 22])
@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_other_clips_reach_the_target_in_19_of_20_cases(count: int, shape: str) -> None:
    """Plans that just meet what is aimed at: the mean over 12 other clips, again and again."""
    target, rng, rounds = Target.parse("psnr>=30"), np.random.default_rng(0), 3000
    size = (rounds, count + 12)
    clips = 3.5 * (rng.standard_normal(size) if shape == "normal" else (rng.gamma(4.0, size=size) - 4) / 2)
    good, above = 0, 0.0
    for row in clips:
        seen, others = 30 + row[:count], 30 + row[count:]
        moved = target.wanted_db() - target.cautious_db(list(seen), "mean")  # the loop moves all clips alike
        good, above = good + (others.mean() + moved >= 29.5), above + moved / rounds
    assert good / rounds >= (0.945 if shape == "normal" else 0.92)
    assert above < 2.6, "the reserve of a spread of 3.5 dB"
    # The worst of n clips: one of 12 others may miss.
    worst = [sorted(row[count:])[1] + target.wanted_db() - target.cautious_db(list(30 + row[:count]), "min") >= 0
             for row in clips]
    assert np.mean(worst) >= 0.945


def test_there_is_a_reserve_for_other_clips() -> None:
    target = Target.parse("psnr>=30")
    values = [30.0 + float(x) for x in SPREAD]
    assert target.cautious_db(values, "mean") == pytest.approx(30 - RESERVE, abs=0.01)
    assert target.cautious_db([30.0, 30.1, 30.2], "mean") == pytest.approx(30.1), "the margin covers a small spread"
    assert target.cautious_db(values[:2], "mean") == pytest.approx(np.mean(values[:2])), "two say nothing of a spread"
    assert target.cautious_db(values, "min") == pytest.approx(30 - LOW, abs=0.01)
    assert target.cautious_db([30.0, 40.0, 40.1], "min") <= 30, "the worst of them is no better than it is"
    assert target.cautious_db([1e6] * 4, "mean") == math.inf and target.standard_error([30.0]) == 0
    ssim = Target.parse("ssim>=0.9")
    assert ssim.cautious_db([0.9, 0.9, 0.9], "mean") == pytest.approx(10.0)
    assert ssim.cautious_db([0.99, 0.9, 0.8], "mean") < ssim.decibel((0.99 + 0.9 + 0.8) / 3)
    assert ssim.cautious_db([1.0, 1.0, 1.0], "mean") == math.inf


@pytest.mark.parametrize("bend", [0.4, 1.0, 1.5])
@pytest.mark.parametrize("target", ["psnr>=26", "psnr>=34"])
def test_the_loop_aims_above_the_target_by_the_standard_error(target: str, bend: float) -> None:
    run = Fake(target, bend=bend)
    found = run.loop([(None, 1.0)] * len(LOOPED))
    assert (digest(found.plan), len(LOOPED)) in run.ran, "the plan that is taken was run"
    assert len(run.ran) <= ROUNDS
    taken_off = float(np.mean(SPREAD)) + 30 - run.target.cautious_db([30 + x for x in SPREAD], "mean")
    above = run.mean_of(found) - float(target.removeprefix("psnr>=")) - taken_off
    assert 0.45 < above < 0.9


def test_for_the_worst_clip_the_loop_aims_at_that_of_others() -> None:
    run = Fake("psnr>=30", "min")
    found = run.loop([(None, 1.0)] * len(LOOPED))
    assert 30.45 < run.mean_of(found) - LOW < 30.9


def test_dense_is_the_last_resort() -> None:
    run = Fake("psnr>=30", level=-50.0, least=1e-3)  # nothing sparse reaches it
    assert run.loop([(None, 1.0)] * len(LOOPED)).plan.all_dense


def test_a_sparse_plan_that_meets_the_target_itself_comes_before_the_dense_one() -> None:
    problem = Problem()
    dense, slow, fast, wrong = (problem.solve(limit=x) for x in (0.0, 1e-3, 1e-2, 1e-1))
    runs = [(wrong, -3.0, 1.0), (dense, math.inf, 0.0), (slow, -0.2, 1.0)]
    assert _best(runs, reserve=0.5) is slow
    assert _best([*runs, (fast, 0.1, 1.0)], reserve=0.5) is fast
    assert _best(runs, reserve=0.1) is dense
    assert _best([(wrong, -3.0, 1.0), (fast, -1.0, 1.0)], reserve=0.5) is fast, "the one that comes nearest"


def test_it_is_judged_by_all_clips_and_both_are_told() -> None:
    run = Fake("psnr>=30", held=(-4.0, -3.0))
    clips = [(None, 1.0)] * len(LOOPED)
    found = run.verify(run.loop(clips), clips)
    assert found.met and found.loop is not None
    assert [entry["psnr"] < 30 for entry in found.evidence] == [True, True], "two clips decide nothing"
    assert found.loop["clips"] == 10 and found.loop["standard_error"] == pytest.approx(1.2766, abs=1e-3)
    assert 32.5 < found.loop["mean"] < 33.1 and found.loop["worst"] == pytest.approx(found.loop["mean"] - 6, abs=1e-3)


def test_a_miss_is_answered_on_all_clips() -> None:
    run = Fake("psnr>=30", held=(-20.0, -20.0))
    clips = [(None, 1.0)] * len(LOOPED)
    first = run.loop(clips)
    found = run.verify(first, clips)
    assert digest(found.plan) != digest(first.plan) and found.met
    assert {count for plan, count in run.ran if plan == digest(found.plan)} == {2, 10}


def test_a_missed_speed_takes_the_fastest_plan_that_was_run() -> None:
    class Slow(Fake):
        def _branches(self) -> int:
            return 1

    run = Slow("speedup>=2")
    found = run.loop_speed([(None, 1.0)] * len(LOOPED))
    assert digest(found.plan) in {plan for plan, _ in run.ran}
