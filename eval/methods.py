"""`dit-sparse eval methods`: every method on the included model, at the same densities, under one schedule.

    results.jsonl    one line for each finished batch; killed at any moment, the next run goes on behind the last line
    run.json         settings, command, versions, device, date
    methods.json     the tables' rows with intervals
    methods.md       the tables
    pareto.png       PSNR against density

Work comes in the order of its weight: all methods at the first density, at the second, with their authors' own
settings, then the best ones at more densities, captions and seeds. A run that is cut still makes the tables.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import fidelity
from .attention import means
from .attention_time import Times
from .bed import Bed, Captured, Clips, Replay
from .bootstrap import Interval, interval
from .config import CEILING, DENSE
from .measures.reference import latent_error
from .method_speed import OWN, comparable, takes_density
from .random_blocks import RandomBlocks
from .run import Job, Result, run

RESULTS, RUN, ROWS, TABLES, PICTURE = "results.jsonl", "run.json", "methods.json", "methods.md", "pareto.png"
MARK = "<!-- made by dit-sparse eval methods -->"
SCHEDULE: dict[str, Any] = {"dense_steps": 0.2, "dense_layers": 1}  # one for all
WAN_STEPS = 50  # of the authors' runs: a whole number of dense steps means so many of these
FLOOR = "random"
MEASURES = ("psnr", "ssim", "latent_error", "accuracy")


def near(asked: float, found: float) -> bool:
    """Whether a measured density counts as the asked one: within .03, or 15 % of it."""
    return abs(found - asked) <= max(0.03, 0.15 * asked) + 1e-9


@dataclass(frozen=True)
class Plan:
    """What one comparison makes.

    Args:
        frames, side, steps, guidance: of every clip.
        batch: clips of a batch.
        densities, captions: of the first table, with seed 0.
        best, more, more_captions, seeds: of the second: how many methods, at which densities.
        looked: captions whose attention is looked into.
        methods: names; None takes all that need no trained weights.
    """

    frames: int = 33
    side: int = 512
    steps: int = 10
    guidance: float = 3.0
    batch: int = 8
    densities: tuple[float, ...] = (0.3, 0.15)
    captions: int = 8
    best: int = 6
    more: tuple[float, ...] = (0.2, 0.1, 0.5, 0.3)
    more_captions: int = 16
    seeds: int = 2
    looked: int = 2
    methods: tuple[str, ...] | None = None

    def names(self) -> list[str]:
        """The methods that are compared."""
        return list(self.methods) if self.methods is not None else comparable()

    def batches(self, captions: int, seeds: int) -> list[tuple[int, int, int]]:
        """(first caption, end, seed) of every batch, those of seed 0 first."""
        return [(first, min(first + self.batch, captions), seed)
                for seed in range(seeds) for first in range(0, captions, self.batch)]


QUICK = Plan(frames=5, side=128, steps=3, densities=(0.5,), captions=2, best=1, more=(0.7,), more_captions=2, seeds=1,
             looked=1, methods=("svg", "sol"))


@dataclass(frozen=True)
class Entry:
    """One row: a method with its settings.

    Args:
        label: the method's name, or `DENSE`, `FLOOR` or the ceiling's.
        asked: the density asked for, or `OWN`, or "" where there is none.
        options: of the method and the schedule.
    """

    label: str
    asked: float | str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def proc(self, steps: int) -> Any:
        """The SparseProc, or None for the dense run; whatever cannot run sparse raises.

        Raises:
            ValueError: an option that the method does not take.
        """
        from dit_sparse import SparseProc

        if self.label == DENSE:
            return None
        common = {**SCHEDULE, "num_steps": steps, "strict": True}
        if self.label == FLOOR:
            return SparseProc(RandomBlocks(**self.options), **common)
        method = CEILING.name if self.label == CEILING.label else self.label
        return SparseProc(method, **{**common, **self.options})


def entry_of(label: str, asked: float | str) -> Entry:
    """The row of a method at a density, or with its authors' own settings for Wan."""
    from dit_sparse.methods import family_options

    if asked == OWN:
        own = family_options(label, "wan")
        steps = {name: own[name] / WAN_STEPS for name in ("dense_steps", "dense_last_steps")
                 if isinstance(own.get(name), int)}
        return Entry(label, OWN, own | steps)
    if label == CEILING.label:
        return Entry(label, "", dict(CEILING.options))
    return Entry(label, asked, {} if asked == "" else {"density": asked})


class Work:
    """Makes and measures the batch of a job; dense clips and captured calls are kept for the jobs that follow.

    Attributes:
        dead: the device no longer answers: nothing new can be begun.
        made: jobs that it was given.
    """

    def __init__(self, bed: Bed, plan: Plan) -> None:
        self.bed, self.plan, self.dead, self.made = bed, plan, False, 0
        self._dense: dict[tuple[int, int, int], Clips] = {}
        self._captured: Captured | None = None

    def __call__(self, job: Job) -> Result:
        entry = entry_of(job["label"], job["asked"])
        self.made += 1
        try:
            proc = entry.proc(self.plan.steps)
            return self._look(proc) if job["kind"] == "look" else self._clips(proc, *job["batch"])
        except Exception as error:  # a method that fails has a row that says why; the others go on
            return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200],
                    "lost": self._lost()}

    def _lost(self) -> bool:
        """Whether the GPU gave up with the failed batch; then every later one would fail too."""
        try:
            if self.bed.device.type == "cuda":
                torch.cuda.synchronize(self.bed.device)
        except Exception:
            self.dead = True
        return self.dead

    def dense(self, first: int, end: int, seed: int) -> Clips:
        """The dense clips of a batch, made once."""
        key = (first, end, seed)
        if key not in self._dense:
            self._dense[key] = self.bed.sample(range(first, end), seed)
        return self._dense[key]

    def _clips(self, proc: Any, first: int, end: int, seed: int) -> Result:
        rows = range(first, end)
        reference = self.dense(first, end, seed)
        made = reference if proc is None else self.bed.sample(rows, seed, proc)
        checks = self.bed.check(made.clips, rows)
        values = []
        for i, seen in enumerate(checks):
            value: Result = {"checks": seen, "accuracy": float(all(v for v in seen.values() if v is not None))}
            if proc is not None:
                pair = reference.clips[i], made.clips[i]
                value |= {"psnr": fidelity.psnr(*pair), "ssim": fidelity.ssim(*pair),
                          "latent_error": latent_error(reference.latents[i], made.latents[i])}
            values.append(value)
        report = made.summary
        cost: Result = {"density": 1.0, "run_density": 1.0} if report is None else {
            "density": report.sparse_density, "run_density": report.density, "calls": report.calls,
            "sparse_calls": report.sparse_calls, "backends": report.backends,
            "attention_seconds": report.attention_seconds, "routing_seconds": report.routing_seconds,
        }  # fmt: skip
        return {"values": values, "seconds": made.seconds, **cost}

    def _look(self, proc: Any) -> Result:
        if self._captured is None:
            rows = range(self.plan.looked)
            self._captured = self.bed.capture(self.bed.tables(self.bed.spec(rows)), self.bed.noise(rows, 0))
        with torch.no_grad():
            calls = Replay(proc, self._captured.layers).replay(self._captured)
        failed = [call["reason"] for call in calls if call["kind"] == "fallback"]
        if failed:
            raise RuntimeError(failed[0])
        return {"means": means(calls), "sparse_calls": sum(call["kind"] == "sparse" for call in calls)}


class Comparison:
    """Jobs and results of one folder.

    Args:
        plan: what is made.
        folder: exists.
        weights: digest of the model's files.
    """

    def __init__(self, plan: Plan, folder: Path, weights: str = "") -> None:
        self.plan, self.folder, self.weights = plan, folder, weights
        self.results: dict[tuple[Any, ...], Result] = {}

    def make(self, work: Work, *, stop: Callable[[], bool] = lambda: False,
             bar: Callable[[int, int], None] = lambda done, count: None) -> bool:
        """Do what has no result yet, in the order of its weight.

        Args:
            work: makes the batches; one of the same plan.
            stop: nothing new is begun once it says so.
            bar: called as bar(done, planned) after every batch.

        Returns:
            Whether everything is there.
        """
        def over() -> bool:
            return work.dead or stop()

        for stage in (self.first, self.second):
            jobs = [self.job(*words) for words in stage()]
            for done, job in enumerate(jobs, 1):
                if not self._known(job):
                    found = run([job], work, self.folder / RESULTS, enough=lambda _: over())
                    if not found:
                        return False
                    self.results[self._key(job)] = found[0]
                bar(done, len(jobs))
        return True

    def complete(self) -> bool:
        """Whether every job of both tables has a result."""
        return all(self._known(self.job(*words)) for stage in (self.first, self.second) for words in stage())

    def load(self) -> None:
        """Take the results that the folder has."""
        from .run import finished

        for entry in finished(self.folder / RESULTS).values():
            try:
                now = self.job(*self._words(entry["job"]))
            except LookupError:  # of a method that is gone, or of another command
                continue
            if now == entry["job"]:
                self.results[self._key(now)] = entry["result"]

    def job(self, kind: str, entry: Entry, batch: tuple[int, int, int]) -> Job:
        """All that a result depends on."""
        try:
            options = "" if entry.label == DENSE else repr(entry.proc(self.plan.steps))
        except ValueError as error:
            options = f"refused: {error}"
        names = ("frames", "side", "steps", "guidance", *(["looked"] if kind == "look" else []))
        return {"kind": kind, "label": entry.label, "asked": entry.asked, "options": options, "batch": list(batch),
                "weights": self.weights, **{name: getattr(self.plan, name) for name in names}}

    @staticmethod
    def _words(job: Job) -> tuple[str, Entry, tuple[int, int, int]]:
        first, end, seed = job["batch"]
        return job["kind"], entry_of(job["label"], job["asked"]), (first, end, seed)

    @staticmethod
    def _key(job: Job) -> tuple[Any, ...]:
        return job["kind"], job["label"], job["asked"], *job["batch"]

    def _known(self, job: Job) -> bool:
        return self._key(job) in self.results

    def first(self) -> Iterator[tuple[str, Entry, tuple[int, int, int]]]:
        """(kind, row, batch) of the first table: by density, then with the authors' own settings."""
        batches, names = self.plan.batches(self.plan.captions, 1), self.plan.names()
        entries = [entry_of(DENSE, ""), entry_of(CEILING.label, "")]
        for density in self.plan.densities:
            entries += [entry_of(FLOOR, density), *(entry_of(n, density) for n in names if takes_density(n))]
        entries += [entry_of(name, OWN) for name in names]
        for entry in entries:
            yield from (("clips", entry, batch) for batch in batches)
            if entry.label != DENSE:
                yield "look", entry, (0, self.plan.looked, 0)

    def second(self) -> Iterator[tuple[str, Entry, tuple[int, int, int]]]:
        """The same of the second table: the best methods, every density with some captions before more captions."""
        names = self.ranked()[: self.plan.best]
        for batch in self.plan.batches(self.plan.more_captions, self.plan.seeds):
            yield "clips", entry_of(DENSE, ""), batch
            for density in self.plan.more:
                yield from (("clips", entry_of(name, density), batch) for name in names)
            if batch[0] == batch[2] == 0:
                yield from (("look", entry_of(name, density), (0, self.plan.looked, 0))
                            for density in self.plan.more for name in names)

    def ranked(self) -> list[str]:
        """The methods by mean PSNR over the densities of the first table; who misses one comes after who has all."""
        places = []
        for name in self.plan.names():
            rows = [self.row(name, density) for density in self.plan.densities]
            found = [row.values["psnr"].mean for row in rows if not row.why and "psnr" in row.values]
            if found:
                places.append((-len(found), -sum(found) / len(found), name))
        return [name for *_, name in sorted(places)]

    def row(self, label: str, asked: float | str, captions: int | None = None, seeds: int = 1) -> Row:
        """A row of a table, from what is there.

        Args:
            label, asked: as in `Entry`.
            captions, seeds: which batches count; None: those of the first table.
        """
        if isinstance(asked, float) and label not in (FLOOR, DENSE) and not takes_density(label):
            return Row(label, asked, why="has no option density")
        batches = self.plan.batches(captions or self.plan.captions, seeds)
        found = [self.results.get(("clips", label, asked, *batch)) for batch in batches]
        there = [(batch, x) for batch, x in zip(batches, found, strict=True) if x is not None]
        if broken := next((x["error"] for _, x in there if "error" in x), ""):
            return Row(label, asked, why=broken)
        if not there:
            return Row(label, asked, why="not run")
        row = Row(label, asked, _values(there), missing=len(batches) - len(there))
        row.density, row.run_density, row.seconds = (
            _mean(x[name] for _, x in there) for name in ("density", "run_density", "seconds"))
        look = self.results.get(("look", label, asked, 0, self.plan.looked, 0), {})
        row.recall, row.relative_error = (look.get("means", {}).get(name) for name in ("recall", "relative_error"))
        row.unseen = look.get("error", "")
        if row.density is None:
            row.why = "no call ran sparse"
        elif isinstance(asked, float) and not near(asked, row.density):
            row.why = f"its density is {row.density:.3f}"
        return row


@dataclass
class Row:
    """One method at one density.

    Args:
        label, asked: as in `Entry`.
        values: mean and interval over the captions by name of `MEASURES`.
        why: why the row is not to be compared; empty when it is.
        missing: batches that are not there yet.
        density, run_density: of the sparse calls, and of all.
        seconds: of the denoising of a batch of the included model, mean.
        recall, relative_error: of single calls, mean over calls and heads.
        unseen: why single calls could not be looked into; empty when they were, or were not asked for.
        modelled_ms: attention of one call of Wan2.1-14B at 720p, routing and kernel, see `attention_time`.
    """

    label: str
    asked: float | str
    values: dict[str, Interval] = field(default_factory=dict)
    why: str = ""
    missing: int = 0
    density: float | None = None
    run_density: float | None = None
    seconds: float | None = None
    recall: float | None = None
    relative_error: float | None = None
    unseen: str = ""
    modelled_ms: float | None = None

    def with_time(self, times: Times | None) -> Row:
        """The same with the modelled time where there is a table of times."""
        if times is None or self.density is None or self.label == DENSE:
            return self
        return dataclasses.replace(self, modelled_ms=times.milliseconds(self.label, self.asked, self.density))


def _values(there: Sequence[tuple[tuple[int, int, int], Mapping[str, Any]]]) -> dict[str, Interval]:
    """Intervals over the captions; seeds of one caption are averaged first."""
    found: dict[str, Interval] = {}
    for name in MEASURES:
        by_caption: dict[int, list[float]] = {}
        for (first, _, _), result in there:
            for i, value in enumerate(result["values"]):
                if name in value:
                    by_caption.setdefault(first + i, []).append(value[name])
        if by_caption:
            found[name] = interval([sum(x) / len(x) for x in by_caption.values()])
    return found


def _mean(values: Iterator[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def deadline(seconds: float | None) -> Callable[[], bool]:
    """Says so once this many seconds have gone by; None: never."""
    start = time.monotonic()
    return lambda: seconds is not None and time.monotonic() - start > seconds
