"""Measures on a model what MagCache and TeaCache need to know about it. Offline: it may wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.hooks import MagCacheConfig

from ..modelid import config_hash
from .active import active_of
from .coefficients import FORMAT, fitted
from .names import CALIBRATED, MAGCACHE, TEACACHE
from .teacache import TeaCacheConfig

Make = Callable[[str, Callable[[int, int], None]], Any]
ENDLESS = 1_000_000  # longer than any run: Diffusers' hook then neither prints nor forgets what it measured


def calibrate(kind: str, pipe: Any, prompts: Sequence[str], make: Make, *, model: str = "") -> dict[str, Any]:
    """Run every step of every prompt and fold what was measured into a document.

    MagCache: Diffusers' own calibration; the mean over prompts and branches of each step's ratio. TeaCache: least
    squares of degree 4 of the relative change of the blocks' output on that of the signal, over all steps.

    Args:
        kind: "magcache" or "teacache".
        pipe: a pipeline; sparse attention and step cache are off afterwards.
        prompts: one run each; a handful suffices, TeaCache's authors took 70.
        make: make(prompt, callback) runs the pipeline once and calls callback(done, steps) after every step.
        model: the name to write into the document.

    Returns:
        The document that `step_cache="FILE.json"` reads.

    Raises:
        ValueError: the model takes no such cache, or nothing could be measured; one line.
    """
    from .. import bridge, disable, enable

    if kind not in CALIBRATED:
        raise ValueError(f"there is nothing to calibrate for {kind!r}; use {' or '.join(CALIBRATED)}")
    parts = bridge.transformers_of(pipe)
    if len(parts) > 1:
        raise ValueError(f"{kind} follows one denoiser through the whole run, and {type(pipe).__name__} has "
                         f"{len(parts)}")
    transformer, found = parts[0][1], list[list[Any]]()
    config = (MagCacheConfig(calibrate=True, num_inference_steps=ENDLESS) if kind == MAGCACHE
              else TeaCacheConfig(calibrate=True))
    enable(pipe, "dense", step_cache=config)
    try:
        signal = getattr(active_of(transformer).config, "signal", None)  # type: ignore[union-attr]
        for prompt in prompts:
            found += _one_run(transformer, kind, prompt, make)
    finally:
        disable(pipe)
    if not found:
        raise ValueError("no step followed another: a calibration needs at least 2 steps")
    about = {"format": FORMAT, "cache": kind, "model": model, "class": type(transformer).__name__,
             "config": config_hash(transformer), "prompts": len(prompts)}
    if kind == TEACACHE:
        points = [point for values in found for point in values]
        return {**about, "steps": len(found[0]) + 1, "signal": signal, "coefficients": fitted(points)}
    steps = {len(values) for values in found}
    if len(steps) > 1:
        raise ValueError(f"runs and branches differ in their number of steps: {sorted(steps)}")
    ratios = [sum(step) / len(step) for step in zip(*found, strict=True)]
    return {**about, "steps": len(ratios), "ratios": [round(ratio, 5) for ratio in ratios]}


def _one_run(model: Any, kind: str, prompt: str, make: Make) -> list[list[Any]]:
    """What each branch measured in one run; looked at after every step, as the run's end wipes it."""
    seen: dict[str, list[Any]] = {}

    def after_step(done: int, steps: int) -> None:
        seen.update(_noted(model, kind))

    make(prompt, after_step)
    return [values for values in seen.values() if values]


def _noted(model: Any, kind: str) -> dict[str, list[Any]]:
    """What each branch has measured so far."""
    cache = active_of(model)
    states = {} if cache is None else {name: state for manager in cache._managers
                                       for name, state in manager._state_cache.items()}
    field = "calibration_ratios" if kind == MAGCACHE else "records"
    return {name: list(getattr(state, field)) for name, state in states.items()}
