"""Tuning goes without step caches; a finished plan is verified once beside one, on the held-out clips."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choicefile import reason_of
from ..stepcache.coefficients import kind_of_file
from ..stepcache.names import CALIBRATED, as_text, name_of
from .solve import Solution
from .steps import Clips, Steps, compared, digest
from .store import Parts
from .writing import clip_entry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cache_title", "check_cache", "verify_with_cache"]


def check_cache(pipe: Any, step_cache: Any) -> None:
    """Refuse a step cache that cannot run on a pipeline before any clip is made; the pipeline is left dense.

    Raises:
        ValueError: what `enable` refuses; one line.
    """
    from ..processor import disable, enable

    if step_cache is not None:
        enable(pipe, "dense", step_cache=step_cache)
        disable(pipe)


def cache_title(step_cache: Any) -> str:
    """How a preset names a step cache: "teacache", or "teacache:SET"; of a file or a configuration the kind."""
    given = as_text(step_cache)
    if not isinstance(given, str):
        return name_of(given)
    kind = given.partition(":")[0]
    if not given.endswith(".json"):
        return given
    return kind if kind in CALIBRATED else kind_of_file(given)


def verify_with_cache(run: Steps, solution: Solution, dense: Clips) -> dict[str, Any] | None:
    """The held-out clips of a plan with the run's step cache on.

    Args:
        run: the tuning run.
        solution: its plan.
        dense: the held-out clips, dense and without a cache.

    Returns:
        "name" of the cache, "met" (whether these clips reach the target) and "clips"; with "refused", the reason, in
        the place of both where the cache stopped a run; None where no cache was named.
    """
    if run.step_cache is None:
        return None
    name, plan = cache_title(run.step_cache), solution.plan

    def make() -> Parts:
        values = []
        for number, (prompt, (clip, seconds)) in enumerate(zip(run.held, dense, strict=True)):
            run.tracker.begin(f"held-out with {name}, clip {number + 1} of {len(run.held)}")
            made, took, did = _clip(run, solution, prompt)
            values.append({**compared(clip, made, None, run.device()), **did, "seconds": took,
                           "dense_seconds": seconds})
        return {"values": values}, {}

    try:
        place = f"cached-{_identity(run.step_cache)}-{digest(plan)}-{_short(run.held)}"
        values = list(run.store.once(place, make)[0]["values"])
    except Exception as error:  # whatever it is: the plan stands without the cache, its preset is not lost
        reason = "".join(letter if letter.isprintable() else " " for letter in reason_of(error))
        return {"name": name, "refused": " ".join(reason.split())[:200] or type(error).__name__}
    entries = [_entry(run, prompt, value) for prompt, value in zip(run.held, values, strict=True)]
    return {"name": name, "met": _met(run, solution, values), "clips": entries}


def _clip(run: Steps, solution: Solution, prompt: str) -> tuple[Tensor, float, dict[str, Any]]:
    """A clip, its seconds, and how much the cache answered."""
    from ..processor import summary

    def work() -> tuple[Tensor, float, dict[str, Any]]:
        clip, seconds = run.runner.clip(prompt, run.seed_of(prompt))
        told = summary(run.pipe)
        calls = told.calls + told.skipped_calls
        return clip, seconds, {"answered": told.skipped_calls / max(1, calls), "skipped_steps": told.skipped_steps}

    found: tuple[Tensor, float, dict[str, Any]] = run.runner.with_proc(
        run.proc(solution.plan, step_cache=run.step_cache), work)
    return found


def _met(run: Steps, solution: Solution, values: list[dict[str, Any]]) -> bool:
    """Whether clips with a cache reach the target; a modelled speed is that of the plan, which a cache only raises."""
    target = run.target
    if not target.by_time:
        return target.met(target.statistic([value[target.metric] for value in values], run.statistic))
    if run.given_costs is not None:
        return target.met(run.problem.dense_time() / max(solution.time, 1e-9) + 1e-9)
    return target.met(sum(v["dense_seconds"] for v in values) / sum(v["seconds"] for v in values))


def _entry(run: Steps, prompt: str, value: dict[str, Any]) -> dict[str, Any]:
    """What is saved of a clip; wall times only where the costs were measured here too, clips one at a time."""
    found = clip_entry(prompt, run.seed_of(prompt), value)
    found |= {"answered": round(value["answered"], 4), "skipped_steps": value["skipped_steps"]}
    if run.given_costs is None and run.batch == 1:
        found["speedup"] = round(value["dense_seconds"] / value["seconds"], 3)
    return found


def _identity(step_cache: Any) -> str:
    """Eight digits that tell caches apart; a file by what it holds."""
    given = as_text(step_cache)
    if not isinstance(given, str) or not given.endswith(".json"):
        return _short(given)
    kind, _, named = given.partition(":")
    return _short(Path(named if kind in CALIBRATED else given).read_text(encoding="utf-8"))


def _short(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
