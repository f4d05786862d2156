"""Intervals of means over prompts, by resampling the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEAST = 5  # prompts below which no difference is called real


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it.

    Attributes:
        mean: over the prompts.
        low, high: ends of the interval; the mean itself when there is one prompt.
        prompts: how many there are.
    """

    mean: float
    low: float
    high: float
    prompts: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean (Efron 1979, doi 10.1214/aos/1176344552).

    Args:
        values: one number for each prompt (the mean over its seeds): seeds of a prompt are not independent.
        confidence: share of the resampled means inside the interval, in (0, 1).
        seed: of the resampling; the same values give the same interval.

    Raises:
        ValueError: no values, values that are not finite, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not allowed; use a number between 0 and 1")
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError("values must be a list of one or more finite numbers")
    picks = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    means = numbers[picks].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def verdict(difference: Interval) -> str:
    """What a paired difference says: "higher", "lower", "within noise" or "too few prompts"."""
    if difference.prompts < LEAST:
        return "too few prompts"
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "within noise"
