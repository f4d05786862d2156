"""What a job of the Tune tab computes: the checks of a request, and the preset. No Gradio here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..commands.console import UserError, refusing
from ..commands.request import parse_options
from ..pipelines.hosts import host_arguments
from ..schedule import Schedule
from ..tuning.steps import MODES
from ..tuning.targets import SIGNS, STATISTICS, Target
from . import forms, wanted
from .job import Job
from .models import Shelf
from .wanted import Wanted
from .work import forget_run

if TYPE_CHECKING:
    from ..tuning.preset import TunedPreset

MOST_PROMPTS = 8


@dataclass(frozen=True)
class Asked:
    """One checked request: sizes and seed are those of `clip`; without prompts those that come along are taken.

    `more` holds what is beside the defaults of dense_steps, dense_layers and step_cache.
    """

    clip: Wanted
    target: str
    prompts: tuple[str, ...] | None
    mode: str
    statistic: str
    more: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came out: the preset, and the seconds that it took."""

    asked: Asked
    preset: TunedPreset
    seconds: float


def check(
    shelf: Shelf, *, metric: Any, value: Any, mode: Any, statistic: Any, prompt: Any = "", dense_steps: Any = "",
    dense_layers: Any = 0, step_cache: Any = "none", **shape: Any
) -> Asked:
    """Check everything that can be known before the model runs.

    Args:
        shelf: the models of the page.
        metric, value: the target; the metric is one of `targets.SIGNS`.
        mode: of `steps.MODES`.
        statistic: "mean" or "min" over the clips.
        prompt: one a line, or none.
        dense_steps: text of a share or a number of steps; empty: the usual ones.
        dense_layers: leading layers that stay dense.
        step_cache: one of `forms.STEP_CACHES`, to verify the plan beside it, or "none".
        shape: model, width, height, frames, steps, seed and guidance, as in `wanted.check`.

    Raises:
        UserError: one line that names what is allowed.
    """
    from ..pipelines.embedded import EXAMPLES

    for name, given, allowed in (("metric", metric, SIGNS), ("mode", mode, MODES),
                                 ("statistic", statistic, STATISTICS)):
        if given not in allowed:
            raise UserError(f"{name}={str(given)[:40]!r} is not allowed; use one of {', '.join(allowed)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"target={str(value)[:40]!r} is not allowed; use a number")
    lines = [line for line in str(prompt or "").splitlines() if line.strip()]
    if len(lines) > MOST_PROMPTS:
        raise UserError(f"prompts: {len(lines)} are not allowed; use up to {MOST_PROMPTS}, one a line")
    prompts = tuple(map(wanted.read_prompt, lines)) or None
    with refusing():
        target = str(Target.parse(f"{metric}{SIGNS[metric]}{value:.6g}"))
    clip = wanted.check(shelf, **shape, prompt=prompts[0] if prompts else EXAMPLES[0], mode="both")
    return Asked(clip, target, prompts, mode, statistic, _more(dense_steps, dense_layers, step_cache))


def _more(dense_steps: Any, dense_layers: Any, step_cache: Any) -> dict[str, Any]:
    """The further options of `tune`, checked; those left at their defaults are left out.

    Raises:
        UserError: a value that is not allowed; one line.
    """
    text = str(dense_steps or "").strip()[: forms.LONGEST_TEXT]
    more: dict[str, Any] = {"dense_steps": parse_options([f"dense_steps={text}"])["dense_steps"]} if text else {}
    if dense_layers:
        whole = isinstance(dense_layers, float) and dense_layers.is_integer()  # a browser knows one kind of numbers
        more["dense_layers"] = int(dense_layers) if whole else dense_layers
    with refusing():
        Schedule(**{"dense_steps": 0.0, "dense_layers": 0, **more})
    cache = forms.step_cache(step_cache, None)
    return more if cache is None else {**more, "step_cache": cache}


def run(shelf: Shelf, asked: Asked, job: Job) -> Outcome:
    """Tune; the caller's thread holds the device.

    Raises:
        Cancelled: the job was stopped.
        ValueError, MemoryError, ...: what the host or the tuner refuses.
    """
    from .. import disable, tune

    pipe = shelf.open(asked.clip.model)
    call = host_arguments(asked.clip.shape.arguments())

    def progress(fraction: float, text: str, left: float | None) -> None:
        job.tell(phase=text, fraction=fraction, left=left)

    start = time.monotonic()
    disable(pipe)
    try:
        with job.watching(pipe):
            preset = tune(pipe, asked.target, list(asked.prompts) if asked.prompts else None, asked.mode,
                          statistic=asked.statistic, seed=asked.clip.seed, progress=progress, call=call,
                          **asked.more)
    finally:
        disable(pipe)
        forget_run(pipe)
    return Outcome(asked, cast("TunedPreset", preset), time.monotonic() - start)  # `tune` makes no other kind
