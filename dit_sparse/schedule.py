"""Which steps and layers of a run compute attention densely."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Dense steps at the start and end of a run, and dense layers at the start of the model.

    Args:
        dense_steps: first steps that run dense: a fraction in [0, 1] of the run (0.2, rounded down, but at least one
            step when it is positive), or a whole number of steps.
        dense_layers: first self-attention layers that run dense at every step.
        dense_last_steps: last steps that run dense, counted like dense_steps.

    Raises:
        ValueError: when a value is out of range.
    """

    dense_steps: float | int = 0.2
    dense_layers: int = 1
    dense_last_steps: float | int = 0

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_last_steps"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not whole and not (isinstance(value, float) and 0 <= value <= 1):
                allowed = "a fraction in [0.0, 1.0] or a whole number of steps"
                raise ValueError(f"{name}={value!r} is not allowed; use {allowed}")
        layers = self.dense_layers
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 0:
            raise ValueError(f"dense_layers={layers!r} is not allowed; use a whole number of layers >= 0")

    @staticmethod
    def count(steps: float | int, num_steps: int) -> int:
        """The number of steps that a fraction, or a whole number, of a run of num_steps means."""
        if isinstance(steps, int):
            return min(steps, num_steps)
        # 0.29 * 100 is 28.999...: a hair below the whole number that is meant.
        return max(math.floor(steps * num_steps + 1e-9), 1 if steps > 0 else 0)

    def is_dense(self, step: int, num_steps: int | None, layer: int) -> bool:
        """Whether this layer runs dense at this step.

        Args:
            step: denoising step, from 0.
            num_steps: length of the run; None when unknown: every step is past the warm-up then.
            layer: index of the layer among the self-attention layers.
        """
        if layer < self.dense_layers:
            return True
        if num_steps is None:
            return False
        first, last = (self.count(n, num_steps) for n in (self.dense_steps, self.dense_last_steps))
        return step < first or step >= num_steps - last
