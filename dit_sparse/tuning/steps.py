"""The measuring steps of one `tune`: dense runs with the oracle, costs, ceiling, weights. Each is kept in the store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import __version__
from ..bridge import transformers_of
from ..methods.tuned import Tuned
from ..modelid import config_hash
from ..processor import SparseProc, disable, enable
from .cost import DENSITIES, CostTable
from .cost import measure as measure_costs
from .forced import settle
from .headplan import HeadPlan
from .preset import model_identity
from .probe import Forward, Probe, ProbeResult, Streams, Watcher
from .prompts import EMBEDDED, GENERAL
from .run import Progress, Runner, Tracker, default_call
from .solve import Problem, Solution, layer_groups
from .store import Parts, Store, weights_digest
from .targets import Target, measure

__all__ = ["MODES", "ROUNDS", "Clips", "Mode", "Steps", "compared", "digest"]

ROUNDS = 4  # of the closed loop: three corrections, so that the last guess is run as well
_MOST = 1e6  # stands for infinite in JSON

Clips = list[tuple[Tensor, float]]  # clips (F, 3, H, W), and the seconds that they took


@dataclass(frozen=True)
class Mode:
    """How thorough a run is.

    Args:
        probed, held: prompts that the oracle sees, and held-out ones.
        ceiling, weights, kappa: whether rounding, layer groups and buckets are measured.
    """

    probed: int
    held: int
    ceiling: bool = False
    weights: bool = False
    kappa: bool = False


MODES = {"quick": Mode(1, 1), "standard": Mode(2, 1, True, True), "thorough": Mode(4, 2, True, True, True)}


class Steps:
    """What one call of `tune` works with, and the steps before the closed loop.

    Args:
        pipe, target, mode, patterns, statistic, seed, prompts, state, progress, call, costs, dense_steps,
            dense_layers, step_cache, batch: as in `tune`, checked.

    Attributes:
        checks: what the teacher-forced check measured.
    """

    step_cache: Any = None
    batch: int = 1

    def __init__(
        self, pipe: Any, target: Target, mode: str, patterns: tuple[str, ...], statistic: str, seed: int,
        prompts: Sequence[str] | None, state: str | Path | None, progress: Progress | None,
        call: Mapping[str, Any] | None, costs: CostTable | None, dense_steps: float | int | None = None,
        dense_layers: int = 0, step_cache: Any = None, batch: int = 1,
    ) -> None:
        defaults, embedded = default_call(pipe)
        self.pipe, self.target, self.patterns, self.statistic = pipe, target, patterns, statistic
        self.mode, self.given_costs, self.seed = MODES[mode], costs, seed
        self.dense_steps, self.dense_layers = dense_steps, dense_layers
        self.step_cache, self.batch = step_cache, batch
        self.model: Any = transformers_of(pipe)[0][1]
        self.call = {**defaults, **(call or {})}
        self.looped, self.held = _split(prompts, EMBEDDED if embedded else GENERAL, self.mode)
        about = {"version": __version__, "model": model_identity(self.model), "dtype": str(self.model.dtype),
                 "weights": "" if state is None else weights_digest(m for _, m, _ in transformers_of(pipe)),
                 "scheduler": f"{type(pipe.scheduler).__name__} {config_hash(pipe.scheduler)}", "mode": mode,
                 "patterns": list(patterns), "seed": seed, "prompts": [self.looped, self.held],
                 "call": {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in self.call.items()}}
        if dense_steps is not None or dense_layers:
            about["dense"] = [dense_steps, dense_layers]
        if batch > 1:
            about["batch"] = batch
        self.store = Store(state, about)
        self.tracker = Tracker(self.planned(), progress)
        self.runner = Runner(pipe, self.call, self.tracker)
        self.forwards: dict[int, Forward] = {}
        self.floor = 0.0
        self.ceiling_db: float | None = None
        self.checks: list[dict[str, Any]] = []
        self.problem: Problem

    def planned(self) -> float:
        """Generations that this run takes at most, roughly."""
        loop, mode = len(self.looped), self.mode
        first = loop + 0.5 + mode.ceiling + 0.5 * mode.weights + 4 * mode.kappa
        return first + ROUNDS * loop + self.planned_last()

    def planned_last(self) -> float:
        """Of these, the generations of the verification, which may run a second plan on all clips."""
        return (3 + (self.step_cache is not None)) * len(self.held) + len(self.looped)

    def seed_of(self, prompt: str) -> int:
        """Seed of a prompt's clip."""
        return self.seed + [*self.looped, *self.held].index(prompt)

    def device(self) -> Any:
        """Where the pipeline computes, whatever is offloaded."""
        return getattr(self.pipe, "_execution_device", None) or self.model.device

    def proc(self, plan: HeadPlan, **options: Any) -> SparseProc:
        """A SparseProc that runs a plan, and nothing else unless options say so."""
        return SparseProc(Tuned(plan), dense_steps=0, dense_layers=0, strict=True, num_steps=plan.steps, **options)

    def run_plan(self, plan: HeadPlan, prompts: Sequence[str]) -> Clips:
        """The clips of a batch of prompts with a plan, and their seconds."""
        clips: Clips = self.runner.with_proc(self.proc(plan), lambda: self.clips_now(prompts))
        return clips

    def clips_now(self, prompts: Sequence[str]) -> Clips:
        """The clips of a batch of prompts with what is switched on now, and their seconds."""
        return self.runner.clips(prompts, [self.seed_of(prompt) for prompt in prompts])

    def batches(self, prompts: Sequence[str]) -> Iterator[Sequence[str]]:
        """The prompts, as many at a time as are made together."""
        return (prompts[first : first + self.batch] for first in range(0, len(prompts), self.batch))

    # -- dense runs ------------------------------------------------------------------------------------------------

    def clips_of(self, prompts: list[str], name: str, probed: int = 0) -> Clips:
        """The dense clips of prompts, the first ones with the oracle looking on."""
        places = {prompt: f"{name.replace(' ', '-')}-{number}" for number, prompt in enumerate(prompts)}
        missing = [prompt for prompt in prompts if places[prompt] not in self.store]
        self.tracker.add(len(prompts) - len(missing), resumed=True)
        looked = [prompt for prompt in missing if prompt in prompts[:probed]]
        others = [prompt for prompt in missing if prompt not in looked]
        for group in (*([prompt] for prompt in looked), *self.batches(others)):
            number = prompts.index(group[0])
            which = f"clip {number + 1}" if len(group) == 1 else f"clips {number + 1} and {len(group) - 1} more"
            look = group[0] in looked
            self.tracker.begin(f"{name} {which} of {len(prompts)}" + (", with the oracle" if look else ""))
            made = [self._look(group[0], number)] if look else self.clips_now(group)
            for prompt, (clip, seconds) in zip(group, made, strict=True):
                self.store.put(places[prompt], {"seconds": seconds}, {"clip": clip})
        found = []
        for prompt in prompts:
            parts = self.store.get(places[prompt])
            assert parts is not None  # made above
            found.append((parts[1]["clip"], float(parts[0]["seconds"])))
        return found

    def _look(self, prompt: str, number: int) -> tuple[Tensor, float]:
        """A dense clip under the probe; what the oracle says is kept first, so that a clip never lacks it."""
        with ExitStack() as left:
            streams = Streams(self.pipe)
            left.callback(streams.remove)
            probe = Probe(self.patterns, streams, seed=self.seed, dense_steps=self.dense_steps)
            watcher: Watcher | None = None
            left.callback(disable, self.pipe)
            enable(self.pipe, probe, dense_steps=0, dense_layers=0, check="off", strict=True)
            if number == 0:
                watcher = Watcher(self.pipe, self.dense_steps)
                left.callback(watcher.remove)
            clip, seconds = self.runner.clip(prompt, self.seed_of(prompt))
        if watcher is not None:
            self.forwards = watcher.forwards
            for bucket, forward in watcher.forwards.items():
                if forward.plain():
                    self.store.put(f"forward-{bucket}", *forward.to_parts())
        self.store.put(f"probe-{number}", *probe.result().to_parts())
        return clip, max(1e-6, seconds - probe.seen.get("seconds", 0.0))

    def probed(self) -> ProbeResult:
        """What the oracle says, the mean over the probed prompts."""
        held = [self.store.get(f"probe-{number}") for number in range(min(self.mode.probed, len(self.looped)))]
        result = ProbeResult.mean([ProbeResult.of_parts(*parts) for parts in held if parts is not None])
        for bucket in range(len(result.edges) - 1):
            if bucket not in self.forwards and (parts := self.store.get(f"forward-{bucket}")) is not None:
                self.forwards[bucket] = Forward.of_parts(*parts)
        return result

    # -- measurements ----------------------------------------------------------------------------------------------

    def cost_table(self, probe: ProbeResult) -> CostTable:
        """Times of the candidates: given, kept from before, or measured now."""
        if self.given_costs is not None:
            return self.given_costs

        def make() -> Parts:
            device = self.device()
            cuda = str(device).startswith("cuda")

            def tell(share: float, text: str) -> None:
                self.tracker.tell(0.5 * share)

            densities = DENSITIES if cuda else DENSITIES[1::2]
            table = measure_costs(probe.grid, probe.tables["a"].shape[2], probe.head_dim, device=device,
                                  dtype=self.model.dtype, patterns=self.patterns, densities=densities,
                                  seconds=60.0 if cuda else 15.0, progress=tell)
            return table.to_dict(), {}

        self.tracker.begin("timing the candidates")
        return CostTable.from_dict(self.store.once("costs", make)[0])

    def measure_ceiling(self, dense: Tensor) -> None:
        """What rounding alone does: our kernel with all blocks. A target above it is refused.

        Raises:
            ValueError: the target is less than 1 dB below what rounding leaves, or above it; one line.
        """
        metric = "psnr" if self.target.by_time else self.target.metric

        def make() -> Parts:
            clip, _ = self.run_plan(self.problem.ceiling(), self.looped[:1])[0]
            found = {name: min(_MOST, measure(name, dense, clip)) for name in dict.fromkeys(("psnr", metric))}
            return found, {}

        self.tracker.begin("ceiling: the sparse kernel at density 1")
        values = self.store.once(f"ceiling-{metric}", make)[0]
        self.ceiling_db = values["psnr"]
        if self.target.by_time:
            return
        self.floor = max(0.0, self.target.distance(values[metric]))
        if self.target.decibel(values[metric]) - 1 < self.target.decibel(self.target.value):
            raise ValueError(f"target={str(self.target)!r} is infeasible: rounding alone gives {values['psnr']:.1f} dB")

    def measure_weights(self) -> None:
        """How strongly each group of layers acts on the velocity, bucket by bucket."""

        def make() -> Parts:
            problem, found = self.problem, self.problem.weights.copy()
            for bucket, forward in sorted(self.forwards.items()):
                for group in layer_groups(problem.layers):
                    plan = problem.group_plan(group)
                    said = 0.0 if plan is None else problem.group_error(plan, bucket)
                    if plan is not None and said > 0:
                        found[bucket, list(group)] = max(1e-6, self.velocity(plan, forward) / said)
            return {"weights": found.tolist()}, {}

        self.tracker.begin("weights of the layers")
        self.problem.weights = np.array(self.store.once("weights", make)[0]["weights"])

    def measure_kappa(self, dense: Tensor) -> None:
        """How strongly a velocity error acts on the clip: runs that are sparse inside of one bucket only.

        A run that is dense before the bucket equals one restarted from the latents at its begin.
        """

        start = self.problem.solve(limit=self.problem.start()).plan  # another table of times, another plan

        def make() -> Parts:
            problem, found = self.problem, self.problem.kappa.copy()
            for bucket in range(problem.forced, problem.buckets):
                self.tracker.begin(f"weight of steps {problem.edges[bucket]} to {problem.edges[bucket + 1] - 1}")
                choices = np.zeros_like(start.choices)
                choices[bucket] = start.choices[bucket]
                alone = HeadPlan(start.candidates, start.edges, choices)
                said = problem.velocity(alone, bucket) * problem.lengths[bucket]
                clip, _ = self.run_plan(alone, self.looped[:1])[0]
                if said > 0:
                    found[bucket] = max(1e-9, float((dense.double() - clip.double()).square().mean())) / said
            free = found[problem.forced :]
            found[problem.forced :] = free / free.max()
            return {"kappa": found.tolist()}, {}

        self.problem.kappa = np.array(self.store.once(f"kappa-{digest(start)}", make)[0]["kappa"])

    def velocity(self, plan: HeadPlan, forward: Forward) -> float:
        """Velocity error of a plan of one bucket, on a kept forward."""
        error: float = self.runner.with_proc(self.proc(plan), lambda: forward.error(self.pipe))
        return error

    def teacher_forced(
        self, solution: Solution, limit: float | None = None, *, budget: float | None = None
    ) -> Solution:
        """Compare predicted with measured velocity errors, correct the weights, and solve once more; see `settle`.

        Args:
            solution: the plan.
            limit, budget: what it was solved for; one of the two.
        """
        self.tracker.begin("teacher-forced check")
        self.problem, found, self.checks = settle(self.problem, solution, self._velocities, limit=limit, budget=budget)
        return found

    def _velocities(self, plan: HeadPlan) -> dict[int, float]:
        """Velocity errors of a plan by bucket; of a dense bucket nothing is asked."""

        def make() -> Parts:
            alone = {bucket: plan.only(bucket) for bucket in sorted(self.forwards)}
            return {"errors": {str(bucket): self.velocity(one, self.forwards[bucket]) for bucket, one in alone.items()
                               if not one.all_dense}}, {}

        errors = self.store.once(f"velocity-{digest(plan)}", make)[0]["errors"]
        return {int(bucket): float(error) for bucket, error in errors.items()}

    def values(
        self, plan: HeadPlan, clips: Clips, prompts: list[str], name: str, *, every: bool = False
    ) -> list[dict[str, Any]]:
        """What is aimed at, and seconds, of the clips of a plan; those of an all-dense plan are known without a run.

        Args:
            every: all measures that there are: SSIM of a long clip takes a core longer than the clip takes a GPU.
        """
        only = None if every else "psnr" if self.target.by_time else self.target.metric

        def make() -> Parts:
            found: list[dict[str, Any]] = []
            for group in self.batches(prompts):
                references = clips[len(found) : len(found) + len(group)]
                self.tracker.begin(f"{name}, clip {len(found) + 1} of {len(prompts)}")
                made = references if plan.all_dense else self.run_plan(plan, group)
                found += [{**compared(dense, clip, only, self.device()), "seconds": seconds,
                           "dense_seconds": dense_seconds}
                          for (dense, dense_seconds), (clip, seconds) in zip(references, made, strict=True)]
            return {"values": found}, {}

        # The name of the round is no part of it: a plan that ran is never run again.
        place = f"clips-{only or 'all'}-{digest(plan)}-{hashlib.sha256(repr(prompts).encode()).hexdigest()[:8]}"
        if place in self.store:
            self.tracker.add(len(prompts), resumed=True)
        return list(self.store.once(place, make)[0]["values"])


def compared(dense: Tensor, clip: Tensor, only: str | None, device: Any) -> dict[str, float]:
    """One measure, or all that there are here: psnr; ssim of frames that are not too small; lpips with its network."""
    from ..eval.measures.reference import without_lpips

    if only is not None:
        return {only: min(_MOST, measure(only, dense, clip))}
    dense, clip = dense.to(device), clip.to(device)
    names = ["psnr"] + (["ssim"] if min(dense.shape[-2:]) > 5 else []) + ([] if without_lpips() else ["lpips"])
    return {name: min(_MOST, measure(name, dense, clip)) for name in names}


def _split(prompts: Sequence[str] | None, default: Sequence[str], mode: Mode) -> tuple[list[str], list[str]]:
    """Prompts of the loop, and those held out.

    Raises:
        ValueError: too few, or not a list of texts; one line.
    """
    if prompts is None:
        return list(default[: mode.probed]), list(default[mode.probed : mode.probed + mode.held])
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if any(not isinstance(p, str) or not p.strip() for p in given) or len(set(given)) != len(given):
        raise ValueError("prompts hold an empty or a repeated text; give different ones")
    if len(given) <= mode.held:
        raise ValueError(f"prompts: {len(given)} are too few; give at least {mode.held + 1}, of which the last "
                         f"{mode.held} are held out")
    return given[: -mode.held], given[-mode.held :]


def digest(plan: HeadPlan) -> str:
    """Twelve digits that tell plans apart."""
    text = repr([str(c) for c in plan.candidates]) + repr(plan.edges)
    return hashlib.sha256(text.encode() + plan.choices.tobytes()).hexdigest()[:12]
