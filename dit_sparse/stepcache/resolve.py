"""From what a user writes (a name, a file, a configuration) to the configuration that runs on this model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import hooks
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.mag_cache import nearest_interp
from diffusers.utils.torch_utils import unwrap_module

from . import coefficients
from .clock import Clock
from .defaults import defaults
from .names import (
    CALIBRATED,
    FASTERCACHE,
    FIRST_BLOCK,
    MAGCACHE,
    NAMES,
    PAB,
    TAYLORSEER,
    TEACACHE,
    as_text,
    check_name,
    name_of,
)
from .refusals import reason_against
from .signals import default_signal
from .teacache import TeaCacheConfig, blocks_of

_CLASSES = {FIRST_BLOCK: FirstBlockCacheConfig, TAYLORSEER: TaylorSeerCacheConfig, PAB: PyramidAttentionBroadcastConfig,
            FASTERCACHE: FasterCacheConfig}
_TIMED = (PyramidAttentionBroadcastConfig, FasterCacheConfig)


@dataclass
class FittedMagCacheConfig(MagCacheConfig):
    """MagCache whose ratios are stretched to the length of every run.

    Args:
        all_ratios: as they were measured, one for each step of that run.
    """

    all_ratios: list[float] = field(default_factory=list)

    def fit(self, num_steps: int) -> None:
        """Stretch the ratios to a run of this length, as Diffusers does when a configuration is made."""
        if num_steps != self.num_inference_steps or self.mag_ratios is None:
            self.num_inference_steps = num_steps
            self.mag_ratios = nearest_interp(torch.tensor(self.all_ratios), num_steps)


@dataclass
class _WantedMagCache:
    """MagCache by name, before its numbers are looked up.

    Args:
        named: the set or file that was asked for.
    """

    named: str | None


def resolve(step_cache: Any, model: Any, family: str, scheduler: Any = None, *, num_steps: int | None = None,
            denoisers: int = 1) -> Any:
    """The configuration for a model.

    Args:
        step_cache: a name (`NAMES`), "magcache:SET" or "teacache:SET" with the name of a published set, a .json file
            of `dit-sparse calibrate`, a configuration of Diffusers, a TeaCacheConfig, or None.
        model: the transformer.
        family: name of its family.
        scheduler: as `bridge.transformers_of` returns it; None for a bare transformer.
        num_steps: length of the run, where there is no scheduler.
        denoisers: transformers that share a run (2 for Wan 2.2).

    Returns:
        A configuration of its own for this model (None for None); the user's object is not changed.

    Raises:
        ValueError: an unknown name, missing numbers, or a combination that would spoil the result; one line.
    """
    if step_cache is None:
        return None
    config = _open(step_cache, family)
    name = name_of(config)
    reason = reason_against(name, config, model, family) or _against_run(name, config, scheduler, denoisers)
    if reason:
        raise ValueError(f"step_cache={name!r} is refused on {type(model).__name__}: {reason}")
    if isinstance(config, TeaCacheConfig):
        return _teacache(config, model)
    if isinstance(config, _WantedMagCache):
        config = _magcache(coefficients.find(MAGCACHE, model, config.named), family)
        if scheduler is None and num_steps is None:
            raise ValueError("step_cache='magcache': its ratios belong to the steps of a run: pass num_steps=")
    if isinstance(config, _TIMED) and config.current_timestep_callback is None:
        config.current_timestep_callback = Clock(model, scheduler)  # type: ignore[assignment]
    if isinstance(config, FittedMagCacheConfig):
        config.fit(num_steps or config.num_inference_steps)
    return config


def _against_run(name: str, config: Any, scheduler: Any, denoisers: int) -> str:
    """Why the run that is known so far does not suffice."""
    if isinstance(config, _TIMED) and config.current_timestep_callback is None and scheduler is None:
        return ("it needs the value of the timestep, which only a pipeline's scheduler tells: enable it on the "
                "pipeline, or give a configuration with current_timestep_callback")
    if name in CALIBRATED and denoisers > 1 and not getattr(config, "calibrate", False):
        return "its numbers follow one denoiser through the whole run, and this pipeline takes turns with two"
    return ""


def _open(step_cache: Any, family: str) -> Any:
    """The configuration with what does not depend on the model; a copy of the user's."""
    step_cache = as_text(step_cache)
    if isinstance(step_cache, str):
        return _named(step_cache, family)
    known = tuple(getattr(hooks, name) for name in dir(hooks) if name.endswith("CacheConfig")) + _TIMED
    if not isinstance(step_cache, (TeaCacheConfig, *known)):
        raise ValueError(f"step_cache={type(step_cache).__name__} is not allowed; use one of {', '.join(NAMES)}, a "
                         ".json file of `dit-sparse calibrate`, a cache configuration of Diffusers or a TeaCacheConfig")
    return copy.copy(step_cache)


def _named(text: str, family: str) -> Any:
    kind, _, named = text.partition(":")
    if text.endswith(".json") and kind not in CALIBRATED:
        kind, named = coefficients.kind_of_file(text), text
    elif named and kind not in CALIBRATED:
        raise ValueError(f"step_cache={text[:80]!r}: only {' and '.join(CALIBRATED)} have sets of numbers")
    else:
        check_name(kind)
    if kind == MAGCACHE:
        return _WantedMagCache(named or None)
    if kind == TEACACHE:
        return TeaCacheConfig(coefficients=named or None)
    return _CLASSES[kind](**defaults(kind, family))


def _magcache(numbers: Any, family: str) -> FittedMagCacheConfig:
    own = {key: numbers.get(key, value) for key, value in defaults(MAGCACHE, family).items()}
    ratios = list(numbers["ratios"])
    return FittedMagCacheConfig(**own, num_inference_steps=len(ratios), mag_ratios=list(ratios), all_ratios=ratios)


def _teacache(config: TeaCacheConfig, model: Any) -> TeaCacheConfig:
    """The configuration with everything filled in that was left open."""
    try:
        own = default_signal(unwrap_module(blocks_of(model)[0]))
    except ValueError as error:
        raise ValueError(f"step_cache='teacache' is refused on {type(model).__name__}: {error}") from error
    if config.calibrate:
        return dataclasses.replace(config, signal=config.signal or own, first_steps=config.first_steps or 1)
    numbers: Any = {}
    given: Any = as_text(config.coefficients)
    if given is None or isinstance(given, str):
        numbers = coefficients.find(TEACACHE, model, given)
        given = numbers["coefficients"]
    if "config" in numbers:  # a calibration, not a published set
        numbers = {**defaults(TEACACHE, ""), **numbers}
    threshold = config.threshold if config.threshold is not None else numbers.get("threshold")
    if not coefficients.is_number(threshold) or threshold < 0:
        raise ValueError(f"step_cache: TeaCacheConfig needs threshold, a number >= 0, for these coefficients; it is "
                         f"{threshold!r}")
    given = tuple(given) if isinstance(given, Iterable) else (given,)
    if not coefficients.are_numbers(given):
        raise ValueError(f"step_cache: TeaCacheConfig coefficients={str(given)[:80]} is not allowed; use finite "
                         "numbers, the name of a published set or a .json file")
    signal = config.signal or numbers.get("signal") or own
    first = config.first_steps if config.first_steps is not None else numbers.get("first_steps", 1)
    length = 0 if config.num_inference_steps is None else config.num_inference_steps
    for key, value in (("first_steps", first), ("last_steps", config.last_steps), ("num_inference_steps", length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"step_cache: TeaCacheConfig {key}={value!r} is not allowed; use a whole number >= 0")
    return dataclasses.replace(config, coefficients=tuple(map(float, given)), threshold=float(threshold), signal=signal,
                               first_steps=first)
