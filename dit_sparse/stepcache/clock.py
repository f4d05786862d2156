"""The timestep of the forward under way, for caches that ask for it in every layer: no wait for the device there."""

from __future__ import annotations

import weakref
from typing import Any

import torch


class Clock:
    """Value of the present timestep on the usual scale: 1000 is noise, 0 the clip.

    The scheduler's list is copied to the CPU once for each run; the step comes from our own position.

    Args:
        model: the transformer, bound by `enable`; held weakly.
        scheduler: what `bridge.transformers_of` returns for it: its `current()` is the pipeline's scheduler.
    """

    def __init__(self, model: Any, scheduler: Any) -> None:
        self._model, self._scheduler = weakref.ref(model), scheduler
        self._timesteps: Any = None
        self._values: list[float] = []

    def _list(self) -> list[float]:
        held = self._scheduler.current() if hasattr(self._scheduler, "current") else self._scheduler
        timesteps = getattr(held, "timesteps", None)
        if timesteps is not self._timesteps:
            values = [] if timesteps is None else [float(t) for t in timesteps.tolist()]
            if len(values) > 1 and values[0] < values[-1]:  # Mochi counts from noise up
                values = [1000 - value for value in values]
            self._timesteps, self._values = timesteps, values
        return self._values

    # A compiler would hold on to every transformer that is bound in this process, and fail when one of them goes.
    @torch.compiler.disable
    def __call__(self) -> float:
        """The value; 1000, at which nothing is skipped, while no run is under way."""
        from .. import bridge

        model = self._model()
        binding = None if model is None else bridge.binding_of(model)
        info = None if binding is None else getattr(binding.session, "info", None)
        values = self._list()
        if info is None or not values:
            return 1000.0
        return values[min(info.step, len(values) - 1)]
