"""`tune`: from a quality (or speed) target to a preset, with the pipeline left as it was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..schedule import Schedule
from ..session import SparseFallbackError, one_line
from .cached import check_cache, verify_with_cache
from .candidates import patterns_of
from .cost import CostTable, timed
from .link import alpha_of, mse_of, next_error
from .preset import Preset, TunedPreset
from .run import Progress, as_found
from .solve import Problem, Solution
from .steps import MODES, ROUNDS, Clips, Steps, digest
from .targets import CAP, STATISTICS, Target, check_batch
from .writing import Verified, clip_entry, preset_of

__all__ = ["tune"]

ENOUGH = 0.3  # dB above what is aimed at: near enough
GROWTHS = 40  # doublings of an error that leaves no room for anything sparse
SPEED_SLACK = 0.97  # of the time that a missed speed asks for next

Run = tuple[Solution, float, float]  # a plan that was run, dB above what is aimed at, and the error of its clips


def tune(
    pipe: Any,
    target: str,
    prompts: Sequence[str] | None = None,
    mode: str = "standard",
    patterns: str | Sequence[str] = "auto",
    statistic: str = "mean",
    seed: int = 0,
    *,
    state: str | Path | None = None,
    progress: Progress | None = None,
    call: Mapping[str, Any] | None = None,
    costs: CostTable | str | Path | None = None,
    dense_steps: float | int | None = None,
    dense_layers: int = 0,
    step_cache: Any = None,
    batch: int = 1,
) -> Preset:
    """Choose for every head and stretch of a run what it computes, so that a target is reached at least cost.

    A dense run shows an oracle the queries, keys and values of a few steps; an allocation picks the plan; clips made
    with it correct the allocation until the target is met; unseen prompts verify it. docs/tuning.md says how.

    Args:
        pipe: a Diffusers pipeline; on return and on failure it is as it was found.
        target: "psnr>=30" (dB against the dense clip), "ssim>=0.9", "lpips<=0.1" or "speedup>=1.5".
        prompts: the last one (two in mode thorough) is held out; the closed loop runs all others, and the oracle sees
            the first 1, 2 or 4 of them. None: prompts of different motion.
        mode: "quick", "standard" or "thorough".
        patterns: "auto", or some of "drop", "soft", "spread", "band".
        statistic: "mean" or "min" over the clips.
        seed: of the clips and of the sampled rows.
        state: folder in which what was found is kept: the same call goes on where an earlier one was interrupted.
        progress: called as progress(share done, what goes on, seconds left or None).
        call: keyword arguments of the pipeline's call (height, width, num_frames, num_inference_steps, ...).
        costs: table of times, or its file; None: measured here. With a given table two runs give the same preset, and
            a speed-up is that of the attention by this table.
        dense_steps: leading steps that stay dense, as a share of the run (float) or a number (int); None: the first
            tenth of runs of more than 8 steps, and more where the plan wants it.
        dense_layers: leading layers that stay dense in every step.
        step_cache: a step cache, as `enable` takes it. Tuning goes without; the plan is verified once beside it, on the
            held-out clips, and the preset says what came of it.
        batch: clips that are made together, where memory allows; the oracle looks at them one by one.

    Returns:
        The preset, with its evidence; `met` says whether the clips of the loop and the held-out
        ones, taken together, reach the target.

    Raises:
        ValueError: an argument is not allowed, the target is above what rounding leaves, or the pipeline cannot be
            tuned; one line.
    """
    wanted = Target.parse(target)
    for name, value, allowed in (("mode", mode, tuple(MODES)), ("statistic", statistic, STATISTICS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not allowed; use one of {', '.join(allowed)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r} is not allowed; use a whole number of at least 0")
    if not hasattr(pipe, "components") or not callable(pipe):
        raise ValueError(f"pipe={type(pipe).__name__} is not allowed; use a Diffusers pipeline")
    check_batch(batch, wanted)
    Schedule(dense_steps=0.0 if dense_steps is None else dense_steps, dense_layers=dense_layers)  # checks both
    names = patterns_of(patterns)
    table = costs if isinstance(costs, CostTable) or costs is None else CostTable.load(costs)
    if table is not None:
        names = timed(table, names, chosen=patterns != "auto")
    with as_found(pipe):
        try:
            check_cache(pipe, step_cache)
            return _Tuning(pipe, wanted, mode, names, statistic, seed, prompts, state, progress, call, table,
                           dense_steps, dense_layers, step_cache, batch).preset()
        except SparseFallbackError as error:
            raise ValueError(f"tune: the pipeline cannot run sparse: {one_line(error)}") from error


class _Tuning(Steps):
    """One call of `tune`."""

    def preset(self) -> TunedPreset:
        """All steps, and the preset."""
        clips = self.clips_of(self.looped, "dense", self.mode.probed)
        probe = self.probed()
        self.problem = Problem(probe, self.cost_table(probe), self.dense_layers)
        if self.mode.ceiling:
            self.measure_ceiling(clips[0][0])
        if self.mode.weights:
            self.measure_weights()
        if self.mode.kappa:
            self.measure_kappa(clips[0][0])
        self.tracker.skip_to(self.planned() - self.planned_last() - ROUNDS * len(self.looped))
        best = self.loop_speed(clips) if self.target.by_time else self.loop(clips)
        self.tracker.skip_to(self.planned() - self.planned_last())
        found = self.verify(best, clips)
        self.tracker.finish()
        return preset_of(self, found)

    def measured(self, values: list[dict[str, Any]]) -> list[float]:
        """The target's measure of each clip.

        Raises:
            ValueError: the clips are too small for it; one line.
        """
        metric = self.target.metric
        if metric not in values[0]:
            raise ValueError(f"target={str(self.target)!r} cannot be measured on clips of this size; use psnr")
        return [v[metric] for v in values]

    # -- the closed loop -------------------------------------------------------------------------------------------

    def loop(self, clips: Clips) -> Solution:
        """Clips of the plan, their distance from the target, a corrected error; every plan that may be taken is run."""
        aim, error = self.target.wanted_db(), self._sparse_at(max(self.problem.start(), 1e-9))
        runs: list[Run] = []
        for number in range(ROUNDS):
            solution = self.problem.solve(limit=error)
            if number == 0:
                solution = self.teacher_forced(solution, error)
            if any(digest(solution.plan) == digest(other.plan) for other, _, _ in runs):
                break
            values = self.measured(self.values(solution.plan, clips, self.looped, f"round {number + 1}"))
            found = self.target.cautious_db(values, self.statistic)
            runs.append((solution, found - aim, mse_of(found)))
            if 0 <= found - aim <= ENOUGH:
                break
            error = self._next(runs, error)
        return _best(runs, aim - self.target.decibel(self.target.value))

    def _sparse_at(self, error: float) -> float:
        """An error, as near to this one as can be, that leaves room for something sparse where there is any."""
        for _ in range(GROWTHS):
            if not self.problem.solve(limit=error).plan.all_dense:
                break
            error *= 2
        return error

    def _next(self, runs: list[Run], error: float) -> float:
        """The predicted error to ask for next, by the link through what ran so far."""
        solution, _, distance = runs[-1]
        sparse = [(s.error, d) for s, _, d in runs if s.error > 0]
        below = max((r for r in runs if r[1] < 0 and r[0].error > 0), key=lambda r: r[1], default=None)
        if solution.error <= 0:  # dense: what lies between it and the best that was too sparse
            return self._sparse_at(error) if below is None else float((error * below[0].error) ** 0.5)
        above = min((r for r in runs if r[1] >= 0 and r[0].error > 0), key=lambda r: r[1], default=None)
        if below is not None and above is not None and above[0].error < below[0].error:
            # On the line through the two runs on either side, of decibels over the logarithm of the error.
            part = (above[1] - ENOUGH / 2) / (above[1] - below[1])
            return float(above[0].error * (below[0].error / above[0].error) ** part)
        alpha = alpha_of([e for e, _ in sparse], [d for _, d in sparse], self.floor)
        return next_error(self.target.wanted_db(), self.floor, solution.error, distance, alpha)

    def loop_speed(self, clips: Clips) -> Solution:
        """The plan of least error within the time that the speed leaves; measured, unless a cost table was given."""
        dense_ms, asked = self.problem.dense_time(), self.target.value
        if self.given_costs is not None or asked <= 1:
            budget = dense_ms / max(asked, 1.0)
            return self.teacher_forced(self.problem.solve(budget=budget), budget=budget)
        # What is not attention stays as it is.
        share = min(1.0, 1e-3 * dense_ms * self._branches() * len(clips) / sum(seconds for _, seconds in clips))
        budget = dense_ms * max(0.0, 1 - (1 - 1 / asked) / max(share, 1e-6))
        runs: list[tuple[float, Solution]] = []
        for number in range(ROUNDS):
            solution = self.problem.solve(budget=budget)
            if number == 0:
                solution = self.teacher_forced(solution, budget=budget)
            gained = self.speedup(solution, self.values(solution.plan, clips, self.looped, f"round {number + 1}"))
            runs.append((gained, solution))
            if gained >= asked:
                break
            budget *= SPEED_SLACK * gained / asked
        return max(runs, key=lambda run: run[0])[1]

    def _branches(self) -> int:
        """Forwards of a step: two with guidance."""
        scale = self.call.get("guidance_scale")
        return 1 if isinstance(scale, (int, float)) and scale <= 1 else 2

    # -- verification ----------------------------------------------------------------------------------------------

    def verify(self, solution: Solution, clips: Clips) -> Verified:
        """Held-out clips and those of the loop; a miss is answered once, with a smaller error, on all of them again."""
        dense = self.clips_of(self.held, "held-out dense")
        for attempt in (1, 2):
            held = self.values(solution.plan, dense, self.held, "held-out", every=True)
            # Of the round that chose the plan. A modelled speed runs no clips in the loop.
            modelled = self.target.by_time and self.given_costs is not None
            looped = [] if modelled else self.values(solution.plan, clips, self.looped, "the denser plan")
            met, miss = self._met(solution, [*looped, *held])
            if met or attempt == 2 or self.target.by_time:
                break
            # Of what is left after a miss of d dB, .3 dB in reserve.
            smaller = self.problem.solve(limit=solution.error * 10 ** (-(miss + ENOUGH) / 10))
            if digest(smaller.plan) == digest(solution.plan):
                break
            solution = smaller
        evidence = [self._evidence(solution, p, v) for p, v in zip(self.held, held, strict=True)]
        return Verified(solution.plan, evidence, self._loop_evidence(looped), met,
                        verify_with_cache(self, solution, dense))

    def _met(self, solution: Solution, values: list[dict[str, Any]]) -> tuple[bool, float]:
        """Whether clips meet the target, and by how many dB they miss it."""
        if self.target.by_time:
            return self.target.met(self.speedup(solution, values)), 0.0
        value = self.target.statistic(self.measured(values), self.statistic)
        return self.target.met(value), self.target.decibel(self.target.value) - self.target.decibel(value)

    def speedup(self, solution: Solution, values: list[dict[str, Any]]) -> float:
        """Of the whole run, measured; of the attention by the table when one was given; exactly 1 for a dense plan."""
        if solution.plan.all_dense:
            return 1.0
        if self.given_costs is not None:
            return self.problem.dense_time() / max(solution.time, 1e-9) + 1e-9  # a hair of rounding is no miss
        return float(sum(v["dense_seconds"] for v in values) / sum(v["seconds"] for v in values))

    def _evidence(self, solution: Solution, prompt: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved of a held-out clip; wall times only where the costs were measured here too."""
        found = clip_entry(prompt, self.seed_of(prompt), value)
        found["density"] = [round(d, 4) for d in self.problem.kept(solution.plan)]
        found["attention_speedup"] = round(self.problem.dense_time() / max(solution.time, 1e-9), 4)
        if self.given_costs is None:
            found["speedup"] = round(self.speedup(solution, [dict(value)]), 3)
        return found

    def _loop_evidence(self, values: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What is saved of the loop's clips: how many, mean, its standard error, and the worst; None without any."""
        if not values:
            return None
        target = Target("psnr", 0.0) if self.target.by_time else self.target
        each = [min(value[target.metric], CAP) for value in values]
        numbers = {"mean": target.statistic(each, "mean"), "standard_error": target.standard_error(each),
                   "worst": target.statistic(each, "min")}
        return {"clips": len(each), "measure": target.metric} | {name: round(x, 4) for name, x in numbers.items()}


def _best(runs: list[Run], reserve: float) -> Solution:
    """Of plans that were run the fastest sparse one that meets what is aimed at; else one that meets the target itself,
    `reserve` dB less; else the one that comes nearest, or the dense one."""
    for least in (0.0, -reserve):
        good = [solution for solution, gap, _ in runs if gap >= least and not solution.plan.all_dense]
        if good:
            return min(good, key=lambda solution: solution.time)
    return max(runs, key=lambda run: run[1])[0]
