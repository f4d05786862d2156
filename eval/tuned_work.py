"""What `dit-sparse eval tune` makes: tunings of the included model, and held-out clips with the plans they gave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bed import Bed, held_out
from .density_search import Prior
from .method_speed import comparable, takes_density
from .methods import SCHEDULE
from .methods import Plan as MethodsPlan
from .methods import Work as MethodsWork
from .run import Job, Result

PRESETS, STATE = "presets", "state"
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"

Tuner = Callable[..., Any]


@dataclass(frozen=True)
class Plan:
    """What one evaluation makes.

    Args:
        frames, side, steps, guidance: of every clip.
        batch: clips of a batch.
        clips: held-out captions, from the first one on.
        calibration: captions after those that `tune` is given; it holds out the last two of them for itself.
        together: of these clips, as many are made in one batch.
        targets: PSNR in dB.
        statistics: of `tune`.
        mode: of `tune`. Thorough measures what an error of each stretch of the run does to the clip: the prior is
            another model's.
        rounds: most runs of a method for each target.
        methods: names; None takes all that have a density.
    """

    frames: int = 33
    side: int = 512
    steps: int = 10
    guidance: float = 3.0
    batch: int = 12
    clips: int = 12
    calibration: int = 30
    together: int = 14
    targets: tuple[float, ...] = (26.0, 30.0, 34.0)
    statistics: tuple[str, ...] = ("mean", "min")
    mode: str = "thorough"
    rounds: int = 4
    methods: tuple[str, ...] | None = None

    def names(self, prior: Prior) -> list[str]:
        """The methods that are compared, in the order of their rank."""
        every = [name for name in comparable() if takes_density(name)]
        chosen = every if self.methods is None else [name for name in every if name in self.methods]
        ranked = [name for name in prior.names if name in chosen]
        return ranked + [name for name in chosen if name not in ranked]

    def batches(self) -> list[tuple[int, int, int]]:
        """(first caption, end, seed) of every batch of held-out clips."""
        return [(first, min(first + self.batch, self.clips), 0) for first in range(0, self.clips, self.batch)]

    def prompts(self) -> list[str]:
        """The captions for tuning: none of those that are held out."""
        return held_out()[1][self.clips : self.clips + self.calibration]

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call while it is tuned."""
        return {"height": self.side, "width": self.side, "num_frames": self.frames,
                "num_inference_steps": self.steps, "guidance_scale": self.guidance}

    def bed(self) -> MethodsPlan:
        """The same as the comparison of methods knows it: what the batches of methods are made with."""
        return MethodsPlan(self.frames, self.side, self.steps, self.guidance, self.batch, captions=self.clips)


QUICK = Plan(frames=5, side=128, steps=3, batch=2, clips=2, calibration=3, targets=(24.0,), statistics=("mean",),
             mode="quick", rounds=2, methods=("sol", "svg"))


def earlier(folder: Path = RESULTS) -> Prior:
    """What the comparison of methods and an earlier run of this one found, where their tables are at hand."""
    def table(name: str) -> Any:
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    methods, tuned = table("methods.json"), table("tuned.json")
    prior = Prior() if methods is None else Prior.of_table(methods)
    return prior if tuned is None else prior.with_tuned(tuned)


class OutOfTimeError(Exception):
    """The seconds ran out inside a tuning; what it found is kept in its state."""


class Work(MethodsWork):
    """Makes the batch or the tuning of a job.

    Args:
        bed: with the transformer of `pipe`.
        plan: what is made.
        pipe: the whole pipeline, for `tune`.
        folder: of presets.
        state: where tunings keep what they found, dense clips included: 100 MB for each at the long size.
        stop: asked while a tuning runs, which then ends.
        tuner: `dit_sparse.tune`, or something that takes its arguments.

    All tunings share one state: dense clips and what the oracle said of them depend on no target.
    """

    def __init__(self, bed: Bed, plan: Plan, pipe: Any, folder: Path, *, state: Path | None = None,
                 stop: Callable[[], bool] = lambda: False, tuner: Tuner | None = None) -> None:
        super().__init__(bed, plan.bed())
        self.mine, self.pipe, self.folder, self.stop, self.tuner = plan, pipe, folder, stop, tuner
        self.state = folder / STATE if state is None else state

    def __call__(self, job: Job) -> Result:
        if job["kind"] == "clips":
            return super().__call__(job)
        self.made += 1
        try:
            return self._tune(job) if job["kind"] == "tune" else self._tuned(job)
        except OutOfTimeError:
            raise
        except Exception as error:
            return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200],
                    "lost": self._lost()}

    def _tune(self, job: Job) -> Result:
        from dit_sparse.tuning.cost import CostTable
        from dit_sparse.tuning.tune import tune

        def told(share: float, text: str, left: float | None) -> None:
            if self.stop():
                raise OutOfTimeError

        name = name_of(job["target"], job["statistic"])
        start = time.perf_counter()
        preset = (self.tuner or tune)(self.pipe, f"psnr>={job['target']:g}", job["prompts"], job["mode"],
                       statistic=job["statistic"], state=self.state, progress=told,
                       call=dict(job["call"]), costs=CostTable.modelled(), batch=self.mine.together, **SCHEDULE)
        seconds = time.perf_counter() - start
        (self.folder / PRESETS).mkdir(exist_ok=True)
        preset.save(self.folder / PRESETS / f"{name}.json")
        return {"preset": preset.to_dict(), "seconds": seconds}

    def _tuned(self, job: Job) -> Result:
        from dit_sparse import Preset, SparseProc

        preset = Preset.from_dict(dict(job["preset"]))
        proc = SparseProc(preset=preset, num_steps=self.mine.steps, strict=True)
        first, end, seed = job["batch"]
        return self._clips(proc, first, end, seed)


def name_of(target: float, statistic: str) -> str:
    """Of the preset's file."""
    return f"psnr-{target:g}-{statistic}"


@dataclass(frozen=True)
class Cost:
    """Modelled milliseconds of one attention call of Wan2.1-14B at 720p.

    Args:
        call: mean over the calls that are sparse, as in the comparison of methods.
        run: mean over all calls of the run, dense ones included.
    """

    call: float
    run: float


def plan_cost(table: Any, grid: Any, costs: Any) -> Cost:
    """What a head plan costs, its mixture of candidates spread over the heads of the table's layer.

    Args:
        table: a `HeadPlan`.
        grid: the tokens that it was made for: what a small budget keeps there in whole blocks is what counts.
        costs: a `CostTable`.
    """
    from dit_sparse.methods.tuned import kept_share
    from dit_sparse.tuning.oracle import ordered

    layouts = ordered(grid)

    def density(one: Any) -> float:
        return kept_share(one, layouts[one.order], grid)

    spent, sparse, calls, of_sparse = 0.0, 0.0, 0, 0
    for bucket in range(table.buckets):
        steps = len(table.steps_of(bucket))
        for layer in range(table.layers):
            chosen = table.of(bucket, layer)
            counts = {one: costs.heads * chosen.count(one) / len(chosen) for one in dict.fromkeys(chosen)}
            ms = costs.layer(counts, density)
            spent, calls = spent + steps * ms, calls + steps
            if any(not one.is_dense for one in chosen):
                sparse, of_sparse = sparse + steps * ms, of_sparse + steps
    return Cost(sparse / of_sparse if of_sparse else spent / calls, spent / calls)
