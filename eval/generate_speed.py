"""Seconds of a whole generation from the measured time of each kind of step: `dit-sparse bench generate`.

    dit-sparse bench generate --out generate     # Wan2.1-14B, 81 frames of 1280x720, 50 steps with guidance

No clip is made: the weights are random. Each kind of step is timed once at the real geometry (`step_speed`), and the
steps of a schedule are added up, two forwards a step (guidance) on every rung:

    dense           N dense
    + sparse        W dense                + (N - W) sparse
    + fp8           W dense with 8-bit     + (N - W) sparse, linear layers and attention in 8 bits
                      linear layers
    + step cache    W as before            + (N - W - K) as before + K skipped

A sparse step whose first L layers stay dense is put together from the layers' times. Dense attention stays bf16. A
skipped step is timed under Diffusers' MagCache, no block runs; what a cache adds to a step that it computes (one
subtraction) is not counted. K is what the cache's authors report: N (1 - cached / dense time of their runs), none of
them in the warm-up or where the cache itself always computes. Text encoder, VAE and scheduler are not counted.

The warm-up is the floor. With times as shares of a dense step (warm-up step w, other computed step s), a speed-up X
allows a share of warm-up steps of at most

    (1 / X - s) / (w - s)                                    without a step cache
    (1 / X - s (1 - K / N) - skipped K / N) / (w - s)        with one

A dense step of Wan2.1-14B at 720p takes 11.35 s on an H200, a sparse one at density .2 takes 4.58, both parts in 8 bits
3.32, a dense one with 8-bit linear layers about 10.3 (docs/benchmarks/step-h200.md; the last is calculated): 2.1 allows
6 dense steps of 50, 3 allows 3, and 6 with 32 steps skipped allows 4. At density .13 about 9, 6 and 5. The ten dense
steps of most authors leave no room for 3 and 6. So the schedule asked for is 5 dense steps of 50, what Rectified
SpaAttn takes for Wan2.1-14B (arXiv 2511.19835, its code), no layer dense, as RainFusion 2.0 does, at density .13, what
SVG2-Turbo reports at this size (.129; SVG2 .295; arXiv 2505.18875). The warm-up of the method's own authors is printed
beside it, at the same density.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_sparse.eval import ladder, step_speed
from dit_sparse.eval.speed import DTYPES, environment, median_ms
from dit_sparse.eval.step_models import GEOMETRIES, Geometry, build
from dit_sparse.eval.step_speed import LONG_RUN, RUNGS, StepRow, Variant
from dit_sparse.eval.tables import Table
from dit_sparse.methods import family_options
from dit_sparse.pipelines.video_io import finished_file
from dit_sparse.schedule import Schedule

COLUMNS = ("warm-up", "rung", "steps", "seconds", "x dense", "wanted", "dense steps that allow it")
STEPS, FORWARDS = 50, 2
METHOD, DENSITY, DENSE_STEPS, DENSE_LAYERS = "svg", 0.13, 0.1, 0
TARGETS = {"sparse": 2.1, "fp8": 3.0, "cache": 6.0}
# Whose published skip rates a model takes; on the tiny one they rehearse the sums.
RATES_OF = {"wan-14b-720p": "wan-14b-720p", "wan-1.3b-480p": "wan-1.3b-480p", "tiny": "wan-14b-720p"}
CACHES = ("magcache", "teacache")
RATES = pathlib.Path(__file__).resolve().parent / "data" / "step_caches.json"
FAMILY = "wan"


@dataclass(frozen=True)
class Rate:
    """What a step cache's paper or code reports for a model: seconds of a whole run without and with it.

    Args:
        cache, title, model, settings: what ran.
        kept: share of the steps, the first ones, that the cache always computes.
        dense_seconds, cached_seconds, steps: of the runs reported.
        source: where that stands.
    """

    cache: str
    title: str
    model: str
    settings: str
    kept: float
    dense_seconds: float
    cached_seconds: float
    steps: int
    source: str

    @property
    def share(self) -> float:
        """Share of the steps that is skipped, as if a skipped one and all beside the steps took no time."""
        return 1 - self.cached_seconds / self.dense_seconds

    def skipped(self, steps: int, warmup: int) -> int:
        """Whole steps of a run that are skipped, none of them among the first."""
        return max(0, min(round(steps * self.share), steps - max(warmup, math.ceil(steps * self.kept - 1e-9))))

    def __str__(self) -> str:
        times = " to ".join(f"{int(t // 60)}:{int(t % 60):02}" for t in (self.dense_seconds, self.cached_seconds))
        return f"{self.title}, {self.settings}: {times} min for {self.model} ({self.source})"


def published_rate(model: str, cache: str) -> Rate:
    """The published skip rate of a cache ("magcache", "teacache") for a model of `RATES_OF`."""
    found = [Rate(**entry) for entry in json.loads(RATES.read_text())["rates"]]
    return next(rate for rate in found if (rate.model, rate.cache) == (RATES_OF[model], cache))


@dataclass(frozen=True)
class Warmup:
    """The part of a schedule that stays dense: whose it is, the first steps, and the first layers of all others."""

    whose: str
    steps: int
    layers: int


@dataclass(frozen=True)
class Kinds:
    """What each kind of step takes.

    Args:
        geometry: the model.
        dense, sparse: rows of `step_speed`, bf16.
        dense8, sparse8: the same with 8-bit floats; None where they cannot run.
        parts: what of them is in 8 bits, as printed; without them the reason.
        skipped: seconds of a forward that the step cache skips.
        rate: how many steps it skips.
        compiled: whether the repeated blocks were, dense and sparse alike.
    """

    geometry: Geometry
    dense: StepRow
    sparse: StepRow
    dense8: StepRow | None
    sparse8: StepRow | None
    parts: str
    skipped: float
    rate: Rate
    compiled: bool = True


@dataclass(frozen=True)
class GenerateRow:
    """A rung of the ladder: one generation's steps and seconds.

    Args:
        warmup: whose dense steps and layers these are.
        rung: what is switched on, beside all before it.
        dense_steps, sparse_steps, skipped_steps: of the run.
        seconds: of all of its forwards.
        speedup: seconds of the dense run over these.
        target: the speed-up wanted; None: none is named for this rung.
        most_dense: the largest number of dense steps with which the target is reached; None: not even without.
    """

    warmup: str
    rung: str
    dense_steps: int
    sparse_steps: int
    skipped_steps: int
    seconds: float
    speedup: float
    target: float | None = None
    most_dense: int | None = None

    def cells(self) -> list[str]:
        """The row as printed."""
        steps = f"{self.dense_steps} + {self.sparse_steps}" + f" + {self.skipped_steps} skipped" * bool(
            self.skipped_steps)
        wanted = "" if self.target is None else f"{self.target:g}"
        allowed = "" if self.target is None else "none" if self.most_dense is None else f"{self.most_dense} or fewer"
        return [self.warmup, self.rung, steps, f"{self.seconds:.{1 if self.seconds >= 10 else 3}f}",
                f"{self.speedup:.2f}", wanted, allowed]

    def words(self) -> str:
        """What is written beside its bar."""
        return f"{self.speedup:.2f}x   {self.seconds:.0f} s"


def measure(geometry: Geometry, method: str = METHOD, *, density: float = DENSITY, device: str = "cuda",
            dtype: str = "bf16", compiled: bool = True, seconds: float = 0.4, cache: str = CACHES[0],
            on_row: Callable[[str], None] = lambda what: None) -> Kinds:
    """Times every kind of step.

    Args:
        geometry: one of `GEOMETRIES` that has published skip rates.
        method, density: of the sparse steps.
        device, dtype, compiled, seconds: as in `step_speed.bench_step`.
        cache: whose skip rate is taken, of `CACHES`.
        on_row: called with the name of each kind of step once it is timed.

    Raises:
        SparseFallbackError: a call could not run sparse.
    """
    why = {rung: step_speed.fp8_missing([rung], device) for rung in ("both", "linear")}
    rung = next((rung for rung, reason in why.items() if not reason), None)
    chosen = [Variant(None), Variant(method)]
    if rung is not None:
        chosen += [Variant(None, RUNGS["linear"]), Variant(method, RUNGS[rung])]
    rows = step_speed.time_variants(geometry, chosen, density=density, device=device, dtype=dtype, compiled=compiled,
                                    seconds=seconds, on_row=lambda row: on_row(row.what))
    skipped = skipped_ms(geometry, device, DTYPES[dtype], seconds) / 1e3
    on_row("skipped")
    dense8, sparse8 = rows[2:] or (None, None)
    parts = {"both": "attention and linear layers", "linear": "linear layers", None: why["linear"]}[rung]
    return Kinds(geometry, rows[0], rows[1], dense8, sparse8, parts, skipped, published_rate(geometry.name, cache),
                 compiled)


@torch.no_grad()
def skipped_ms(geometry: Geometry, device: str, dtype: torch.dtype, seconds: float) -> float:
    """Milliseconds of a forward whose blocks a step cache skips: Diffusers' MagCache, told that nothing changes.

    The number of layers does not matter and none is compiled: no block runs after the first forward, which is checked.
    """
    from diffusers import MagCacheConfig

    step_speed.release(device, compiled=True)
    model, inputs = build(geometry, dict.fromkeys(geometry.kinds, 2), device, dtype), geometry.inputs(device, dtype)
    model.enable_cache(MagCacheConfig(  # type: ignore[operator]
        threshold=1.0, max_skip_steps=LONG_RUN, retention_ratio=0.0, num_inference_steps=LONG_RUN,
        mag_ratios=[1.0] * LONG_RUN))
    ran = [0]

    def count(_module: torch.nn.Module, _inputs: Any) -> None:
        ran[0] += 1

    next(m for m in model.modules() if hasattr(m, "processor")).register_forward_pre_hook(count)
    took = median_ms(lambda: model(**inputs, return_dict=False), device, seconds=seconds, least=5)
    if ran[0] != 1:
        raise RuntimeError(f"the step cache computed {ran[0]} forwards where it should compute the first alone")
    return took


def warmups(method: str, dense_steps: float | int = DENSE_STEPS, dense_layers: int = DENSE_LAYERS) -> list[Warmup]:
    """The warm-up asked for, then that of the method's authors for Wan, where they name one and it is another.

    Args:
        method: a name.
        dense_steps: a share or a whole number; dense_layers: a whole number.

    Raises:
        ValueError: a value that is not allowed.
    """
    schedule = Schedule(dense_steps, dense_layers)
    found = [Warmup("asked for", schedule.count(schedule.dense_steps, STEPS), schedule.dense_layers)]
    own = family_options(method, FAMILY)
    if "dense_steps" in own:
        theirs = Warmup(f"{method}'s authors", Schedule.count(own["dense_steps"], STEPS), own.get("dense_layers", 0))
        found += [theirs] * ((theirs.steps, theirs.layers) != (found[0].steps, found[0].layers))
    return found


def rungs(kinds: Kinds, warmup: Warmup) -> list[GenerateRow]:
    """The ladder of one schedule, dense first."""
    whole = STEPS * FORWARDS * kinds.dense.step_seconds
    named = _named(kinds, warmup)
    rows = [GenerateRow(warmup.whose, named["dense"], STEPS, 0, 0, whole, 1.0)]
    for name in TARGETS:
        if name not in named:
            continue
        target = TARGETS[name] if kinds.geometry.name == "wan-14b-720p" else None
        took, skipped = _seconds(kinds, name, warmup.steps, warmup.layers)
        reached = [] if target is None else [
            n for n in range(STEPS + 1) if whole / _seconds(kinds, name, n, warmup.layers)[0] >= target]
        rows.append(GenerateRow(warmup.whose, named[name], warmup.steps, STEPS - warmup.steps - skipped, skipped, took,
                                whole / took, target, max(reached, default=None)))
    return rows


def _named(kinds: Kinds, warmup: Warmup) -> dict[str, str]:
    """The rungs that were measured, and their names for people."""
    rate = kinds.rate
    names = {"dense": "dense" + ", compiled" * kinds.compiled,
             "sparse": f"+ sparse: {kinds.sparse.what}, density {kinds.sparse.density:.3f}"}
    if kinds.sparse8 is not None:
        names["fp8"] = f"+ fp8: {kinds.parts}"
    skips = f"{rate.skipped(STEPS, warmup.steps)} of {STEPS} steps, as reported ({rate.source.split(';')[0]})"
    return names | {"cache": f"+ step cache: {rate.title} skips {skips}"}


def _seconds(kinds: Kinds, rung: str, warmup: int, layers: int) -> tuple[float, int]:
    """Seconds of a generation on a rung with so many dense steps and layers, and its skipped steps."""
    eight = rung != "sparse" and kinds.dense8 is not None and kinds.sparse8 is not None
    dense, sparse = (kinds.dense8, kinds.sparse8) if eight else (kinds.dense, kinds.sparse)
    assert dense is not None and sparse is not None  # as asked
    skipped = kinds.rate.skipped(STEPS, warmup) if rung == "cache" else 0
    step = sparse_step(sparse, dense, layers, kinds.geometry)
    return FORWARDS * (warmup * dense.step_seconds + (STEPS - warmup - skipped) * step
                       + skipped * kinds.skipped), skipped


def sparse_step(sparse: StepRow, dense: StepRow, layers: int, geometry: Geometry) -> float:
    """Seconds of a sparse step whose first layers stay dense."""
    kind = next(iter(sparse.layer_ms))
    more = (dense.layer_ms[kind] - sparse.layer_ms[kind]) / 1e3
    return sparse.step_seconds + min(layers, geometry.kinds[kind]) * more


def notes(kinds: Kinds, ladders: Sequence[Sequence[GenerateRow]]) -> list[str]:
    """What the reader must know: the times that were measured, what is not in them, and where the skip rate is from."""
    kind_of = {"dense": kinds.dense, "sparse": kinds.sparse, "dense, 8-bit linear layers": kinds.dense8,
               f"sparse, 8-bit {kinds.parts}": kinds.sparse8}
    times = [f"{name} {row.step_seconds:.3f}" for name, row in kind_of.items() if row is not None]
    times.append(f"skipped {kinds.skipped:.3f}")
    lines = [f"{kinds.geometry.title}. Seconds of a forward: {', '.join(times)}.",
             f"{STEPS} steps of {FORWARDS} forwards (guidance) added up; text encoder, VAE and scheduler not counted.",
             f"Random weights; steps timed with {step_speed.FEW} and {step_speed.MORE} layers and scaled to the "
             f"model's own, the plan included. Skip rate: {kinds.rate}."]
    if any(row.short for row in kind_of.values() if row is not None):
        lines.append("--seconds is too short to tell a layer's time.")
    if kinds.geometry.name != kinds.rate.model:
        lines.append(f"The skip rate is that of {kinds.rate.model}: a rehearsal.")
    if kinds.sparse8 is None:
        lines.append(f"Not measured: {kinds.parts}.")
    for row in ladders[0]:
        if row.target is not None:
            lines.append(f"{row.rung}: {row.speedup:.2f}, wanted {row.target:g}, "
                         f"{'reached' if row.speedup >= row.target else 'missed'}.")
    return lines


def title_of(kinds: Kinds, warmup: Warmup) -> str:
    """What the ladder shows, in one line."""
    return f"{kinds.geometry.title}, {STEPS} steps, of them {warmup.steps} dense, {warmup.layers} dense layers"


def write(kinds: Kinds, asked: Sequence[Warmup], ladders: Sequence[Sequence[GenerateRow]], folder: pathlib.Path,
          device: str) -> list[pathlib.Path]:
    """Writes generate.md (all tables and notes) and, of the first ladder, generate.csv, .json and .png to a folder.

    The picture needs matplotlib; the JSON also has the other ladders and the rows that they were added up from.

    Returns:
        The files written.
    """
    where = environment(device)
    footer = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = notes(kinds, ladders)
    measured = [row for row in (kinds.dense, kinds.sparse, kinds.dense8, kinds.sparse8) if row is not None]
    more = {"environment": where, "notes": lines, "warmups": [asdict(warmup) for warmup in asked],
            "others": [[asdict(row) for row in rows] for rows in ladders[1:]],
            "steps": [asdict(row) for row in measured], "skipped_seconds": kinds.skipped, "rate": asdict(kinds.rate)}
    written = ladder.write(ladders[0], folder, title_of(kinds, asked[0]), footer, stem="generate", more=more)
    table = Table(list(COLUMNS), [list(row.cells()) for rows in ladders for row in rows])
    text = "\n".join([f"# {title_of(kinds, asked[0])}\n", f"{footer}.\n", table.markdown(), *(f"- {x}" for x in lines)])
    with finished_file(folder / "generate.md") as path:
        path.write_text(text + "\n")
    return [folder / "generate.md", *written]


def models() -> list[str]:
    """Models with published skip rates."""
    return [name for name in GEOMETRIES if name in RATES_OF]
