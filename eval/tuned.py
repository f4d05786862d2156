"""`dit-sparse eval tune`: plans of `tune` on the included model, and every method brought to the same PSNR.

    results.jsonl    one line for each finished tuning or batch; killed at any moment, the next run goes on behind it
    run.json         command, versions, device, date
    tuned.json       the tables' rows
    tuned.md         the tables
    presets/         what `tune` returned

Work comes in the order of its weight: for each target a tuning and its held-out clips, and those of the other
statistics; the methods, the best of the earlier comparison first, one run for each target; a run of each method at the
modelled time of each plan; further runs towards its PSNR, first where the runs say nothing certain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .attention_time import Times
from .density_search import FEWEST, LOWEST, TOLERANCE, Found, Prior, found_at, is_far, next_density, on_line
from .methods import SCHEDULE, Comparison, entry_of
from .run import Job, Result, finished, job_key, run
from .tuned_work import Cost, OutOfTimeError, Plan, plan_cost

RESULTS, RUN, ROWS, TABLES = "results.jsonl", "run.json", "tuned.json", "tuned.md"
NEAR = 1.15  # factor beyond the outermost run of a method within which its line is believed
MARK = "<!-- made by dit-sparse eval tune -->"


@dataclass
class Point:
    """One run of a method: what was asked for and found, the clips' PSNR, and the cost where there is a table."""

    asked: float
    density: float
    psnr: float
    cost: Cost | None


@dataclass
class Outcome:
    """One tuning and its held-out clips, as far as they are there.

    Args:
        target, statistic: what was asked of `tune`.
        why: why it is not there; empty when it is.
        psnr: of every held-out clip.
        density: of the sparse calls, and run_density of all.
        cost: modelled, where there is a table of times.
        met: what `tune` itself says of its own held-out clips.
        seconds: of the tuning.
    """

    target: float
    statistic: str
    why: str = ""
    psnr: list[float] = field(default_factory=list)
    density: float | None = None
    run_density: float | None = None
    cost: Cost | None = None
    met: bool | None = None
    seconds: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean PSNR of the held-out clips."""
        return sum(self.psnr) / len(self.psnr) if self.psnr else None

    @property
    def reached(self) -> int:
        """Held-out clips at the target or above."""
        return sum(value >= self.target for value in self.psnr)


class Evaluation:
    """Jobs and results of one folder.

    Args:
        plan: what is made.
        folder: exists.
        weights: digest of the model's files.
        times, costs: tables of times of methods and of candidates; None where there is none.
        prior: earlier runs of the methods.

    Attributes:
        names: of the methods, in the order of their rank.
    """

    def __init__(self, plan: Plan, folder: Path, weights: str = "", *, times: Times | None = None, costs: Any = None,
                 prior: Prior | None = None) -> None:
        self.plan, self.folder, self.weights, self.times, self.costs = plan, folder, weights, times, costs
        self.prior = Prior() if prior is None else prior
        self.names = plan.names(self.prior)
        self._jobs = Comparison(plan.bed(), folder, weights)
        self._results: dict[str, Result] = {}
        self._batches: list[tuple[Job, Result]] = []  # of methods, of this very plan and model
        self._costs: dict[str, Cost] = {}
        self._tries: dict[str, int] = {}  # of tunings that failed in earlier calls
        self._failed: dict[str, str] = {}  # why

    def load(self) -> None:
        """Take the results that the folder has."""
        for entry in finished(self.folder / RESULTS).values():
            job, result = entry["job"], entry["result"]
            if job["kind"] == "tune" and "error" in result:
                self._tries[job_key(job | {"try": 0})] = job.get("try", 0) + 1
                self._failed[job_key(job | {"try": 0})] = result["error"]
            else:
                self._keep(job, result)

    def _keep(self, job: Job, result: Result) -> None:
        self._results[job_key(job)] = result
        same = all(job.get(name) == getattr(self.plan, name) for name in ("frames", "side", "steps", "guidance"))
        if job["kind"] == "clips" and same and job["weights"] == self.weights:
            self._batches.append((job, result))

    @property
    def count(self) -> int:
        """Finished jobs."""
        return len(self._results)

    def make(self, work: Callable[[Job], Mapping[str, Any]], *, stop: Callable[[], bool] = lambda: False,
             bar: Callable[[int, int], None] = lambda done, count: None,
             kept: Callable[[], object] = lambda: None) -> bool:
        """Do what has no result yet, in the order of its weight.

        Args:
            work: makes a job.
            stop: nothing new is begun once it says so.
            bar: called as bar(done, done and known to be left) after every job.
            kept: called after every job that was made.

        Returns:
            Whether everything is there.
        """
        while (job := self.next_job()) is not None:
            if stop() or getattr(work, "dead", False):
                return False
            try:
                found = run([job], work, self.folder / RESULTS)
            except OutOfTimeError:
                return False
            self._keep(job, found[0])
            bar(self.count, self.count + len(self.missing()))
            kept()
        return True

    def next_job(self) -> Job | None:
        """The weightiest job without a result, or None when nothing is left. A tuning that failed in an earlier call
        is made once more."""
        return next((job for job in self._wanted() if job_key(job) not in self._results), None)

    def _wanted(self) -> Iterator[Job]:
        """Jobs in their order; later ones depend on the results of earlier ones."""
        plan = self.plan
        first, *others = plan.statistics
        yield from (job for target in plan.targets for job in self._tuning(target, first))
        yield from (job for target in plan.targets for other in others for job in self._tuning(target, other))
        yield from self._round(1)
        yield from self._equal()
        for rough in (True, False):
            for runs in range(2, plan.rounds + 1):
                yield from self._round(runs, rough=rough)

    def _tuning(self, target: float, statistic: str) -> Iterator[Job]:
        """A tuning and its held-out batches."""
        job = self._tune_job(target, statistic)
        yield job
        found = self._results.get(job_key(job), {})
        if "preset" in found:
            yield from (self._tuned_job(found["preset"], batch) for batch in self.plan.batches())

    def _round(self, runs: int, *, rough: bool = False) -> Iterator[Job]:
        """One more run of every method for every target that has had fewer than so many, where one is still needed;
        rough: only where what the runs say is not certain."""
        for name in self.names:
            for target in self.plan.targets:
                goal = self.goal(target)
                if goal is None or self.failure(name) or self._runs_for(name, target) >= runs:
                    continue
                if rough and not self._is_rough(name, goal):
                    continue
                density = next_density(self._line(name), goal, self.prior.curves.get(name, ()))
                if density is not None:
                    yield from (self._jobs.job("clips", entry_of(name, density), b) for b in self.plan.batches())

    def _equal(self) -> Iterator[Job]:
        """A run of every method at the modelled time of every plan, where it can be so fast."""
        for name in self.names:
            for target in self.plan.targets:
                cost = self.outcome(target, self.plan.statistics[0]).cost
                if cost is None or self.goal(target) is None or self.failure(name):
                    continue
                density = self.density_at(name, cost.run)
                if density is not None and not is_near(density, [point.density for point in self.points(name)]):
                    yield from (self._jobs.job("clips", entry_of(name, density), b) for b in self.plan.batches())

    def density_at(self, name: str, run_ms: float) -> float | None:
        """Density at which a method's calls take so long, modelled; None where it never is so fast, or not known."""
        points = self.points(name)
        if not points:
            return None
        share = self.sparse_share(name)

        def spent(density: float) -> float:
            nearest = min(points, key=lambda point: abs(point.density - density))
            cost = self.method_cost(name, nearest.asked, density, share)
            return float("inf") if cost is None else cost.run

        low, high = LOWEST, 1.0
        if spent(low) > run_ms:
            return None
        for _ in range(40):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if spent(middle) <= run_ms else (low, middle)
        return round(low, 4)

    def _is_rough(self, name: str, goal: float) -> bool:
        """Whether the runs say nothing certain of a method at a PSNR."""
        at, _ = at_psnr(self, name, goal)
        return at is None or at.how in ("extrapolated", "guessed")

    def goal(self, target: float) -> float | None:
        """PSNR of the plan for a target, which the methods are brought to."""
        return self.outcome(target, self.plan.statistics[0]).mean

    def _runs_for(self, name: str, target: float) -> int:
        """Runs of a method that lie nearer to this target's PSNR than to the others'."""
        goals = {other: goal for other in self.plan.targets if (goal := self.goal(other)) is not None}
        nearest = [min(goals, key=lambda other: abs(goals[other] - point.psnr)) for point in self.points(name)]
        return nearest.count(target)

    def _line(self, name: str) -> list[tuple[float, float]]:
        return [(point.asked, point.psnr) for point in self.points(name)]

    def failure(self, name: str) -> str:
        """Why a method could not be run; empty when it could."""
        return next((r["error"] for job, r in self._batches if job["label"] == name and "error" in r), "")

    def points(self, name: str) -> list[Point]:
        """The finished runs of a method on all held-out clips, by rising density."""
        batches = {tuple(batch) for batch in self.plan.batches()}
        by_density: dict[float, dict[tuple[int, ...], Result]] = {}
        for job, result in self._batches:
            if job["label"] == name and "error" not in result and tuple(job["batch"]) in batches:
                by_density.setdefault(job["asked"], {})[tuple(job["batch"])] = result
        found = []
        for asked, there in sorted(by_density.items()):
            if set(there) == batches and all(result["density"] is not None for result in there.values()):
                found.append(self._point(name, asked, list(there.values())))
        return found

    def _point(self, name: str, asked: float, there: Sequence[Result]) -> Point:
        values = [value["psnr"] for result in there for value in result["values"]]
        density = sum(result["density"] for result in there) / len(there)
        share = sum(r["sparse_calls"] for r in there) / max(1, sum(r["calls"] for r in there))
        return Point(asked, density, sum(values) / len(values), self.method_cost(name, asked, density, share))

    def method_cost(self, name: str, asked: float, density: float, share: float) -> Cost | None:
        """Modelled cost of a method at a density of its sparse calls, which are `share` of all."""
        ms = None if self.times is None else self.times.milliseconds(name, asked, density)
        if ms is None or self.times is None:
            return None
        return Cost(ms, share * ms + (1 - share) * self.times.dense_ms)

    def sparse_share(self, name: str) -> float:
        """Share of a method's calls that are sparse, over all its runs."""
        there = [result for job, result in self._batches if job["label"] == name and "error" not in result]
        return sum(r["sparse_calls"] for r in there) / max(1, sum(r["calls"] for r in there))

    def outcome(self, target: float, statistic: str) -> Outcome:
        """What is there of a tuning."""
        row = Outcome(target, statistic)
        found = self._results.get(job_key(self._tune_job(target, statistic)))
        if found is None or "error" in found:
            first = job_key({**self._tune_job(target, statistic), "try": 0})
            row.why = self._failed.get(first, "not run") if found is None else found["error"]
            return row
        there = [self._results.get(job_key(self._tuned_job(found["preset"], batch))) for batch in self.plan.batches()]
        row.seconds, row.met = found["seconds"], found["preset"].get("met")
        row.cost = self._preset_cost(found["preset"])
        results = [result for result in there if result is not None and "error" not in result]
        row.why = next((result["error"] for result in there if result is not None and "error" in result), "")
        if len(results) < len(there):
            row.why = row.why or "its held-out clips were not run"
            return row
        row.psnr = [value["psnr"] for result in results for value in result["values"]]
        for name in ("density", "run_density"):
            numbers = [result[name] for result in results if result[name] is not None]
            setattr(row, name, sum(numbers) / len(numbers) if numbers else None)
        return row

    def _preset_cost(self, content: Mapping[str, Any]) -> Cost | None:
        if self.costs is None:
            return None
        key = str(content["plan"]) + str(content["candidates"])
        if key not in self._costs:
            from dit_sparse.grid import TokenGrid
            from dit_sparse.tuning.preset import Preset

            preset: Any = Preset.from_dict(dict(content))
            self._costs[key] = plan_cost(preset.table, TokenGrid(*preset.grid), self.costs)
        return self._costs[key]

    def missing(self) -> list[str]:
        """What is not there yet, in words."""
        plan, found = self.plan, []
        for statistic in plan.statistics:
            for target in plan.targets:
                why = self.outcome(target, statistic).why
                found += [f"psnr>={target:g} ({statistic}): {why}"] * bool(why)
        for name in self.names:
            for target in plan.targets:
                goal = self.goal(target)
                if goal is None or self.failure(name):
                    continue
                at, _ = at_psnr(self, name, goal)
                further = next_density(self._line(name), goal, self.prior.curves.get(name, ()))
                if self._is_rough(name, goal) and (at is None or further is not None):
                    found.append(f"{name} at {goal:.2f} dB: {'not run' if at is None else f'only {at.how}'}")
        return found

    def _tune_job(self, target: float, statistic: str) -> Job:
        plan = self.plan
        job = {"kind": "tune", "target": target, "statistic": statistic, "mode": plan.mode, "prompts": plan.prompts(),
               "call": plan.call(), "weights": self.weights, "schedule": SCHEDULE}
        # The file has one line for each job: a further try is another one.
        tried = self._tries.get(job_key(job | {"try": 0}), 0)
        return job | {"try": tried} if tried else job

    def _tuned_job(self, preset: Mapping[str, Any], batch: tuple[int, int, int]) -> Job:
        return {"kind": "tuned", "preset": dict(preset), "batch": list(batch), "weights": self.weights,
                "guidance": self.plan.guidance}


def is_near(density: float, others: Sequence[float]) -> bool:
    """Whether a density lies among others, or hardly beyond the last of them: what its PSNR can be told from."""
    return bool(others) and min(others) / NEAR <= density <= max(others) * NEAR


def at_time(run: Evaluation, name: str, run_ms: float) -> tuple[float | None, str]:
    """PSNR of a method at a modelled time of all calls, on the line of its runs.

    Returns:
        The PSNR and "", or None and why it is not there.
    """
    points = run.points(name)
    if not points or points[0].cost is None:
        return None, "not run" if not points else "no times"
    density = run.density_at(name, run_ms)
    if density is None:
        return None, "never so fast"
    known = [point.density for point in points]
    if not is_near(density, known) or is_far(density, known):
        return None, f"not run near density {density:.3f}"
    return on_line([(point.density, point.psnr) for point in points], density), ""


def at_psnr(run: Evaluation, name: str, goal: float) -> tuple[Found | None, Cost | None]:
    """Density and cost of a method at a PSNR: what the runs say, and the cost there."""
    points = run.points(name)
    if points and min(p.asked for p in points) <= LOWEST and all(p.psnr > goal + TOLERANCE for p in points):
        fastest = min(points, key=lambda point: float("inf") if point.cost is None else point.cost.run)
        return Found(fastest.density, fastest.psnr, FEWEST), fastest.cost
    found = found_at([(point.density, point.psnr) for point in points], goal)
    if found is None:
        return None, None
    nearest = min(points, key=lambda point: abs(point.density - found.density))
    if found.how == "measured":
        return found, nearest.cost
    return found, run.method_cost(name, nearest.asked, found.density, run.sparse_share(name))
