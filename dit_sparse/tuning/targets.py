"""Targets such as "psnr>=30", and how far two clips are apart in the measure of a target."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .link import mse_of, psnr_of

__all__ = ["SIGNS", "STATISTICS", "Target", "check_batch", "measure"]

STATISTICS = ("mean", "min")
SIGNS = {"psnr": ">=", "ssim": ">=", "lpips": "<=", "speedup": ">="}
_RANGES = {"psnr": (0.0, 1000.0), "ssim": (0.0, 1.0), "lpips": (0.0, 1.0), "speedup": (0.01, 1000.0)}
MARGIN_DB, MARGIN = 0.5, 0.05  # above the target in the closed loop: of psnr, and as a share of the other measures
CAP = 100.0  # dB, where two clips count as equal
ALLOWED_DB = 0.5  # that the mean over other clips may lie below the target
OTHERS = 12  # clips that the reserve of a mean speaks of
SURE = 1.645  # normal quantile of 95 %
RESERVED = 3  # clips from which on there is a reserve: two say nothing of the spread
# 11 of 12 other clips lie above mean - k * s of n clips in 95 % of cases: k = LOW + LOW_FEW / (n - 1), fitted to
# simulated normal clips at n = 4, 8, 16 and 28 (3.9, 2.65, 2.2, 1.95).
LOW, LOW_FEW = 1.72, 7.2


@dataclass(frozen=True)
class Target:
    """What is asked for.

    Args:
        metric: "psnr" (dB), "ssim", "lpips" or "speedup".
        value: to reach, or not to exceed for lpips.
    """

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `psnr>=30`, and see that it can be measured here.

        Raises:
            ValueError: not such a text, a value out of range, or a measure whose network is not here; one line.
        """
        found = cls.read(text)
        if found.metric == "lpips":
            from ..eval.measures.reference import without_lpips

            if reason := without_lpips():
                raise ValueError(f"target={text!r} cannot be measured: {' '.join(reason.split())}")
        return found

    @classmethod
    def read(cls, text: str) -> Target:
        """Read `psnr>=30`, as a preset of any machine names it.

        Raises:
            ValueError: not such a text, or a value out of range; one line.
        """
        found = re.fullmatch(r"\s*([a-z]+)\s*(>=|<=)\s*([0-9.]+(?:e-?\d+)?)\s*", str(text))
        if found is None or found[1] not in SIGNS or found[2] != SIGNS[found[1]]:
            raise ValueError(f"target={text!r} is not allowed; write psnr>=30, ssim>=0.9, lpips<=0.1 or speedup>=1.5")
        low, high = _RANGES[found[1]]
        try:
            value = float(found[3])
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"target={text!r} is not allowed; use a number from {low:g} to {high:g}")
        return cls(found[1], value)

    def __str__(self) -> str:
        return f"{self.metric}{SIGNS[self.metric]}{self.value:g}"

    @property
    def by_time(self) -> bool:
        """Whether a speed is asked for, not a quality."""
        return self.metric == "speedup"

    def met(self, value: float) -> bool:
        """Whether a value of the measure reaches the target."""
        return value <= self.value if self.metric == "lpips" else value >= self.value

    def decibel(self, value: float) -> float:
        """The value as decibels of an error: of the mean squared error, of 1 - ssim, or of lpips."""
        return psnr_of(self.distance(value))

    def distance(self, value: float) -> float:
        """The value as an error that is 0 between equal clips."""
        return mse_of(value) if self.metric == "psnr" else 1 - value if self.metric == "ssim" else value

    def wanted_db(self) -> float:
        """What the closed loop aims at: the target and its margin, in decibels of the error."""
        if self.metric == "psnr":
            return self.value + MARGIN_DB
        return psnr_of(self.distance(self.value) * (1 - MARGIN))

    def statistic(self, values: Sequence[float], kind: str) -> float:
        """Mean over the clips, or the worst of them."""
        if kind == "mean":
            return sum(values) / len(values)
        return max(values) if self.metric == "lpips" else min(values)

    def standard_error(self, values: Sequence[float]) -> float:
        """Standard error of the mean over clips, in the measure's own unit; PSNR capped at `CAP`, 0 of one clip."""
        return _standard_error([min(value, CAP) for value in values])

    def cautious_db(self, values: Sequence[float], kind: str) -> float:
        """The statistic in decibels of the error, with a reserve for other clips.

        Clips differ by several dB. Means over n and over 12 other clips differ by s * sqrt(1/n + 1/12) in standard
        deviation, s that of a clip. From `RESERVED` clips on so much is taken off, times the 95 % quantile (of
        Student's t, by its first terms), as the margin and `ALLOWED_DB` do not cover: in 95 % of cases the mean over
        12 others is then at most that below the target. Of the worst clip it is asked that 11 of 12 others reach the
        target in 95 % of cases, were clips normal: it counts no more than mean - k * s and the margin, see `LOW`.
        """
        found = self.decibel(self.statistic(values, kind))
        if len(values) < RESERVED:
            return found
        count, each = len(values), [min(self.decibel(value), CAP) for value in values]
        error, margin = _standard_error(each), self.wanted_db() - self.decibel(self.value)
        if kind == "min":
            low = LOW + LOW_FEW / (count - 1)
            return min(found, statistics.fmean(each) - low * error * math.sqrt(count) + margin)
        quantile = SURE + (SURE**3 + SURE) / (4 * (count - 1))
        return found - max(0.0, quantile * error * math.sqrt(1 + count / OTHERS) - margin - ALLOWED_DB)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def check_batch(batch: object, target: Target) -> None:
    """See that so many clips can be made together: clips that are timed are made one at a time.

    Raises:
        ValueError: they cannot; one line.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1 or (batch > 1 and target.by_time):
        raise ValueError(f"batch={batch!r} is not allowed; use a whole number of at least 1, and 1 for a speed-up")


def measure(metric: str, reference: Tensor, clip: Tensor) -> float:
    """One measure of a clip against its reference, both (F, 3, H, W) in [0, 1].

    PSNR is of the whole clip and infinite for equal ones. SSIM and LPIPS are those of `dit_sparse.eval`, so that a
    preset's numbers and the evaluation's are the same; imported here, because the library itself needs neither.
    """
    if metric == "psnr":
        return psnr_of(float((reference.float() - clip.float()).square().mean(dtype=reference.float().dtype)))
    if metric == "ssim":
        from ..eval.fidelity import ssim

        return ssim(reference, clip)
    from ..eval.measures.reference import lpips

    return float(lpips(reference, clip))
