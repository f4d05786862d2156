"""`dit-sparse eval caches`: every step cache on the included model, alone and beside the default sparse method.

    results.jsonl    one line for each finished clip; killed at any moment, the next run goes on behind the last line
    run.json         command, versions, device, date
    caches.json      the tables' rows with intervals
    caches.md        the tables

Clips are made one at a time by the pipeline itself: a cache decides by what it sees in a forward, so clips that share
one would share their decisions. Work goes caption by caption, so that a run that is cut has the same captions in every
row.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import fidelity
from .bed import held_out
from .bootstrap import Interval, interval
from .compare import timed, warm_up
from .config import DENSE
from .run import Job, Result, finished, job_key, run
from .tables import Table

RESULTS, RUN, ROWS, TABLES = "results.jsonl", "run.json", "caches.json", "caches.md"
MARK = "<!-- made by dit-sparse eval caches -->"
SPARSE = "default"  # the default method, as `generate` and `compare` ask it of the included model
NO_CACHE = "none"
COLUMNS = ["step cache", "attention", "PSNR dB", "SSIM", "calls answered", "steps with answers", "run density",
           "transformer s", "speed-up", "held MB"]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What one evaluation makes.

    Args:
        size: its name: "preview", "long" or "quick".
        height, width, frames, steps, guidance_scale: of every clip.
        captions: held-out captions, from the first one on, each with seed 0.
        caches: names; None takes all.
        sparse: options of the default method.
    """

    size: str
    height: int
    width: int
    frames: int
    steps: int
    guidance_scale: float
    captions: int = 8
    caches: tuple[str, ...] | None = None
    sparse: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def rows(self) -> list[tuple[str, str]]:
        """(step cache, attention) of every row, the reference first."""
        from dit_sparse.stepcache import NAMES

        names = (NO_CACHE, *(NAMES if self.caches is None else self.caches))
        return [(cache, attention) for attention in (DENSE, SPARSE) for cache in names]

    def shape(self) -> dict[str, Any]:
        """Arguments of `text_to_video`."""
        return {name: getattr(self, name) for name in ("height", "width", "frames", "steps", "guidance_scale")}

    def proc(self, cache: str, attention: str) -> Any:
        """The SparseProc of a row; None for the reference."""
        from dit_sparse import SparseProc

        chosen = {} if cache == NO_CACHE else {"step_cache": cache}
        if attention == SPARSE:
            return SparseProc(strict=True, **self.sparse, **chosen)
        return SparseProc(DENSE, **chosen) if chosen else None


def plan_of(size: str, captions: int | None = None) -> Plan:
    """The plan of a size.

    Args:
        size: "preview" and "long" are the included model's own (`pipelines.embedded`), "quick" one for tests.
        captions: in place of the plan's own.

    Raises:
        ValueError: another size; one line.
    """
    from dit_sparse.commands.settings import PREVIEW
    from dit_sparse.pipelines.embedded import DEFAULTS, LONG

    sizes: dict[str, dict[str, Any]] = {
        "preview": DEFAULTS, "long": LONG,
        "quick": DEFAULTS | {"height": 64, "width": 64, "frames": 5, "steps": 12}}
    if size not in sizes:
        raise ValueError(f"--size {size!r} is unknown; use one of {', '.join(sizes)}")
    names = ("height", "width", "frames", "steps", "guidance_scale")
    plan = Plan(size, **{name: sizes[size][name] for name in names}, sparse=PREVIEW)
    if size == "quick":
        plan = dataclasses.replace(plan, captions=1, caches=("magcache", "fastercache"))
    return plan if captions is None else dataclasses.replace(plan, captions=captions)


@contextmanager
def watching(model: torch.nn.Module) -> Iterator[Callable[[], float]]:
    """Yields a function that gives the seconds of all forwards of a module so far, by its device's own clock."""
    from dit_sparse.report import Stopwatch

    watches: list[Stopwatch] = []
    device = next(model.parameters()).device
    handles = [model.register_forward_pre_hook(lambda *_: watches.append(Stopwatch(device)), prepend=True),
               model.register_forward_hook(lambda *_: watches[-1].mark())]
    try:
        yield lambda: sum(watch.seconds() for watch in watches)
    finally:
        for handle in handles:
            handle.remove()


class Work:
    """Makes and measures the clip of a job; the dense clip without a cache is kept for the jobs of its caption.

    Args:
        pipe: the included pipeline, with nothing switched on.
        plan: of the jobs.

    Attributes:
        made: clips that it was asked for.
    """

    def __init__(self, pipe: Any, plan: Plan) -> None:
        self.pipe, self.plan, self.made = pipe, plan, 0
        self._reference: tuple[int, Tensor, Result] | None = None
        self._warm: set[str] = set()

    def __call__(self, job: Job) -> Result:
        self.made += 1
        from dit_sparse import SparseFallbackError

        proc = self.plan.proc(job["cache"], job["attention"])
        if proc is None:
            return self._dense(job)[1]
        reference, _ = self._dense(job)
        self._warm_up(job["attention"])
        try:
            clip, cost = self._clip(job, proc)
        except (ValueError, SparseFallbackError) as error:
            return {"refused": (str(error).strip().splitlines() or [type(error).__name__])[0]}
        pair = [x.to(self.pipe.device) for x in (reference, clip)]  # a GPU is many times as fast at SSIM
        return {"psnr": fidelity.psnr(*pair), "ssim": fidelity.ssim(*pair), **cost}

    def _dense(self, job: Job) -> tuple[Tensor, Result]:
        """The reference of the job's caption."""
        if self._reference is None or self._reference[0] != job["caption"]:
            self._warm_up(DENSE)
            self._reference = (job["caption"], *self._clip(job, None))
        return self._reference[1:]

    def _clip(self, job: Job, proc: Any) -> tuple[Tensor, Result]:
        """A clip and what it cost."""
        from dit_sparse import disable, enable, summary

        disable(self.pipe)
        try:
            if proc is not None:
                enable(self.pipe, proc)
            with watching(self.pipe.transformer) as seconds:
                clip, whole = timed(self.pipe, job["prompt"], 0, self.plan.shape(), nullcontext())
                cost: Result = {"transformer_seconds": seconds(), "seconds": whole}
            if proc is not None:
                report = summary(self.pipe)
                cost |= {name: getattr(report, name) for name in (
                    "calls", "skipped_calls", "skipped_steps", "steps", "density", "step_cache_bytes")}
        finally:
            disable(self.pipe)
        return clip, cost

    def _warm_up(self, attention: str) -> None:
        """Kernels of dense and of sparse attention are compiled before either is timed."""
        if attention not in self._warm:
            self._warm.add(attention)
            warm_up(self.pipe, held_out()[1][0], self.plan.proc(NO_CACHE, attention), self.plan.shape())


class Caches:
    """Jobs and results of one folder and size.

    Args:
        plan: what is made.
        folder: exists.
        weights: digest of the model's files.
        device: "cpu" or "cuda": clips of another are not taken for these, nor are their seconds.
    """

    def __init__(self, plan: Plan, folder: Path, weights: str = "", device: str = "cpu") -> None:
        self.plan, self.folder, self.weights, self.device = plan, folder, weights, device
        self._results: dict[str, Result] = {job_key(e["job"]): e["result"]
                                            for e in finished(folder / RESULTS).values()}

    def job(self, cache: str, attention: str, caption: int) -> Job:
        """All that a result depends on."""
        proc = self.plan.proc(cache, attention)
        return {"size": self.plan.size, **self.plan.shape(), "cache": cache, "attention": attention,
                "options": "" if proc is None else repr(proc), "caption": caption,
                "prompt": held_out()[1][caption], "weights": self.weights, "device": self.device}

    def jobs(self) -> Iterator[Job]:
        """Jobs in their order, caption by caption; what was refused for the first is not tried for the others."""
        rows = self.plan.rows()
        for caption in range(self.plan.captions):
            for row in rows:
                job = self.job(*row, caption)
                yield job
                if "refused" in self._results.get(job_key(job), {}):
                    rows = [each for each in rows if each != row]

    def make(self, work: Callable[[Job], Result], *, stop: Callable[[], bool] = lambda: False,
             bar: Callable[[int, int], None] = lambda done, count: None) -> bool:
        """Do what has no result yet.

        Args:
            work: makes the clip of a job.
            stop: no caption is begun once it says so; one that was begun is finished for every row.
            bar: called as bar(done, planned) after every clip.

        Returns:
            Whether everything is there.
        """
        caption = None
        for done, job in enumerate(self.jobs(), 1):
            if job_key(job) not in self._results:
                if job["caption"] != caption and stop():
                    return False
                caption = job["caption"]
                self._results[job_key(job)] = run([job], work, self.folder / RESULTS)[0]
            bar(done, len(list(self.jobs())))
        return True

    @property
    def complete(self) -> bool:
        """Whether every job has a result."""
        return all(job_key(job) in self._results for job in self.jobs())

    def captions(self) -> list[int]:
        """The captions that every row has: all rows stand on the same."""
        missing = {job["caption"] for job in self.jobs() if job_key(job) not in self._results}
        return [caption for caption in range(self.plan.captions) if caption not in missing]

    def rows(self) -> list[Row]:
        """All rows in the plan's order, over `captions`; none when there is no such caption."""
        captions, found = self.captions(), list[Row]()
        dense: list[Result] = []
        for cache, attention in self.plan.rows() if captions else ():
            keys = [job_key(self.job(cache, attention, caption)) for caption in captions]
            clips = [self._results[key] for key in keys if key in self._results]
            dense = dense or clips
            if why := next((clip["refused"] for clip in clips if "refused" in clip), ""):
                found.append(Row(cache, attention, why=why))
            else:
                found.append(Row.of(cache, attention, clips, dense))
        return found


@dataclass
class Row:
    """One step cache with one kind of attention, means over the captions.

    Args:
        cache, attention: its names.
        why: why it was refused; empty when it ran.
        captions: how many there are.
        psnr, ssim: to the dense clip without a cache, of the same seed; None for that clip itself.
        answered: share of the self-attention calls that the cache answered.
        steps: share of the steps that have such calls.
        density: of the calls that were computed, dense ones as 1.
        seconds: of all forwards of the transformer, median over the captions.
        speedup: of the dense transformer without a cache over it, median by median.
        held: bytes that the cache held at most.
    """

    cache: str
    attention: str
    why: str = ""
    captions: int = 0
    psnr: Interval | None = None
    ssim: Interval | None = None
    answered: float | None = None
    steps: float | None = None
    density: float | None = None
    seconds: float | None = None
    speedup: float | None = None
    held: int | None = None

    @classmethod
    def of(cls, cache: str, attention: str, clips: list[Result], dense: list[Result]) -> Row:
        """The row of results of several captions."""
        seconds, usual = (statistics.median(x["transformer_seconds"] for x in each) for each in (clips, dense))
        row = cls(cache, attention, captions=len(clips), seconds=seconds, speedup=usual / seconds)
        if "psnr" not in clips[0]:
            return dataclasses.replace(row, answered=0.0, steps=0.0, density=1.0, held=0)
        calls = sum(x["calls"] + x["skipped_calls"] for x in clips)
        return dataclasses.replace(
            row, psnr=interval([x["psnr"] for x in clips]), ssim=interval([x["ssim"] for x in clips]),
            answered=sum(x["skipped_calls"] for x in clips) / calls,
            steps=sum(x["skipped_steps"] for x in clips) / sum(x["steps"] for x in clips),
            density=statistics.fmean(x["density"] for x in clips), held=max(x["step_cache_bytes"] for x in clips))

    def cells(self) -> list[Any]:
        """The row in the order of `COLUMNS`."""
        if self.why:
            return [self.cache, self.attention, "refused", *[None] * (len(COLUMNS) - 3)]
        return [self.cache, self.attention, self.psnr, self.ssim, _percent(self.answered), _percent(self.steps),
                self.density, self.seconds, self.speedup, None if self.held is None else self.held / 1e6]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def table(rows: list[Row]) -> Table:
    """The rows as a table."""
    return Table(COLUMNS, [row.cells() for row in rows])


def write(every: list[Caches], folder: Path, *, command: str, environment: dict[str, Any]) -> list[Path]:
    """Write rows and tables of all sizes that have results.

    Args:
        every: one of each size.
        folder: exists.
        command: that makes it.
        environment: versions, device and date.

    Returns:
        The files.
    """
    from dit_sparse.pipelines.video_io import finished_file

    parts = [f"{MARK}\n# Step caches on the included model\n\n`{command}`\n", _preface(environment)]
    content: dict[str, Any] = {"command": command, "environment": environment, "sizes": {}}
    for one in every:
        rows = one.rows()
        if not rows:
            continue
        plan = one.plan
        parts.append(f"## {plan.size}: {plan.width}x{plan.height}x{plan.frames}, {plan.steps} steps, guidance "
                     f"{plan.guidance_scale:g}, {rows[0].captions} captions\n\n{table(rows).markdown()}")
        refused = dict.fromkeys((row.cache, row.why) for row in rows if row.why)
        parts += [f"`{cache}` was refused: {why}\n" for cache, why in refused]
        content["sizes"][plan.size] = {"plan": dataclasses.asdict(plan),
                                       "rows": [dataclasses.asdict(row) for row in rows]}
    head = {"command": command, "environment": environment}
    for name, text in ((ROWS, json.dumps(content, indent=1) + "\n"), (TABLES, "\n".join(parts)),
                       (RUN, json.dumps(head, indent=1) + "\n")):
        with finished_file(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return [folder / TABLES, folder / ROWS]


def _preface(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{key} {environment[key]}" for key in ("torch", "cuda", "triton", "diffusers")
                         if environment.get(key))
    return (
        f"{environment.get('date', '')}, {environment.get('device', '')}; {versions}.\n\n"
        "Held-out captions, seed 0, one clip at a time by the pipeline itself; each cache by name, with its defaults. "
        "`default` is the default sparse method as `generate` asks it of this model. PSNR and SSIM are to the dense "
        "clip without a cache of the same noise; brackets are 95 % bootstrap intervals over the captions; 100 dB is "
        "where the measure ends. `calls answered` is the share of self-attention calls that were not computed, `steps "
        "with answers` the share of steps that have such calls, `run density` that of the computed calls. "
        "`transformer s` is the time of all forwards of a clip, median over the captions: so small a model waits for "
        "launches on a GPU, so it says little about the speed of a large one.\n"
    )
