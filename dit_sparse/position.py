"""Where a run stands: denoising step and CFG branch of each forward, read without waiting for the device.

Sources, in this order: the `cache_context` a pipeline opens (branch name, sometimes the step), the scheduler's
`step_index`, and, for a bare transformer only, the timestep's value (one small device read per forward).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

# More unnamed forwards than this at one place of the scheduler are not guidance: look at the timestep.
MAX_BRANCHES = 4
# A bare transformer called again and again at one timestep starts a new run after this many forwards.
MAX_REPEATS = 16


class LiveScheduler:
    """The scheduler that a pipeline holds at the moment, also after `pipe.scheduler = ...`.

    Args:
        pipe: the pipeline; held weakly.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)

    def current(self) -> Any:
        """The scheduler, or None."""
        return getattr(self._pipe(), "scheduler", None)


@dataclass(frozen=True)
class Place:
    """Step (from 0) and length of the run, branch name, and whether a new run begins with this forward."""

    step: int
    num_steps: int | None
    branch: str
    new_run: bool


class Inputs:
    """Weak memory of which tensors a forward was called with: the same living objects mean the same call again."""

    def __init__(self, *tensors: Any) -> None:
        self._refs = [weakref.ref(x) if isinstance(x, torch.Tensor) else (lambda x=x: x) for x in tensors]

    def same(self, *tensors: Any) -> bool:
        """Whether these are the very objects remembered."""
        return all(ref() is x for ref, x in zip(self._refs, tensors, strict=True))


class Position:
    """Follows one transformer through its runs.

    Args:
        scheduler: a scheduler, a LiveScheduler, or None for a bare transformer.
    """

    def __init__(self, scheduler: Any = None) -> None:
        self._scheduler = scheduler
        self.context: Any = None  # CacheContext or name, set through Diffusers' hook
        self.restart()

    def restart(self) -> None:
        """The next forward begins a run."""
        self._step, self._fresh, self._by_time = -1, True, False
        self._timesteps: Any = None
        self._values: list[float] = []
        self._time: Any = None
        self._rising: bool | None = None
        self._seen: list[tuple[str, Inputs]] = []
        self._shape: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Position:
        return self

    def advance(self, timestep: Any, hidden: Any, text: Any) -> Place:
        """Place of the forward that begins now.

        Args:
            timestep: the transformer's timestep argument, a tensor or number (of any shape; the largest counts).
            hidden, text: the transformer's latent and text arguments, to recognise a repeated call.

        Returns:
            Its place in the run.
        """
        name = getattr(self.context, "name", self.context)
        self._note_timesteps()
        index, length = self._from_context()
        if index is None and not self._by_time:
            index, length = self._from_scheduler(timestep)
            if index is not None and index == self._step and self._repeats(name) and self._moved(timestep):
                # Forwards go on but this scheduler stands still: the pipeline steps another one.
                self._by_time, index = True, None
        if index is not None:
            place, self._time = self._by_index(index, length, name), timestep
        else:
            place = self._by_change(_largest(timestep), name, hidden, text)
        self._seen.append((place.branch, Inputs(hidden, text)))
        self._fresh = False
        return place

    def _scheduled(self) -> Any:
        """The scheduler in use, when it was given its timesteps."""
        held = self._scheduler.current() if isinstance(self._scheduler, LiveScheduler) else self._scheduler
        return held if getattr(held, "num_inference_steps", None) is not None else None

    def _note_timesteps(self) -> None:
        """A new tensor of timesteps means that set_timesteps was called: a new run."""
        timesteps = getattr(self._scheduled(), "timesteps", None)
        if timesteps is not self._timesteps:
            if self._timesteps is not None:
                self.restart()
            self._timesteps, self._values = timesteps, []

    def _length(self) -> int | None:
        return len(self._timesteps) if self._timesteps is not None else None

    def _from_context(self) -> tuple[int | None, int | None]:
        index = getattr(self.context, "step_index", None)
        if not isinstance(index, int):
            return None, None
        length = getattr(self.context, "num_inference_steps", None)
        return index, length if isinstance(length, int) else self._length()

    def _from_scheduler(self, timestep: Any) -> tuple[int | None, int | None]:
        """(index, length) of the scheduler's next step; None when it has none or its run is over."""
        scheduler, length = self._scheduled(), self._length()
        if scheduler is None or not length:
            return None, None
        if not hasattr(scheduler, "step_index"):
            return self._by_value(timestep), length
        index = scheduler.step_index
        if index is None:
            # Before its first step a scheduler knows only where it was told to begin. A pipeline that starts late
            # without telling it (Wan video-to-video) leaves the value of the timestep: one device read in a run.
            begin = getattr(scheduler, "begin_index", None)
            index = begin if begin is not None else self._by_value(timestep) or 0
        return (index, length) if isinstance(index, int) and index < length else (None, None)

    def _by_value(self, timestep: Any) -> int | None:
        """Place of the timestep's value in the scheduler's list (DDIM and others count nothing); reads the device."""
        if not self._values:
            self._values = [float(t) for t in self._timesteps]
        value = _largest(timestep)
        return self._values.index(value) if value in self._values else None

    def _repeats(self, name: str | None) -> bool:
        """Whether one step cannot take another forward of this name without doubt."""
        if name is not None:
            return any(branch == name for branch, _ in self._seen)
        return len(self._seen) >= MAX_BRANCHES

    def _moved(self, timestep: Any) -> bool:
        return self._time is not None and _largest(timestep) != _largest(self._time)

    def _by_index(self, index: int, length: int | None, name: str | None) -> Place:
        new_run = self._fresh or index < self._step
        if index != self._step or new_run:
            self._step, self._seen = index, []
        return Place(index, length, self._branch(name), new_run)

    def _by_change(self, time: float, name: str | None, hidden: Any, text: Any) -> Place:
        """From the timestep alone: equal means another branch, on means the next step, back means a new run."""
        change = 0.0 if self._fresh or self._time is None else time - _largest(self._time)
        new_run, self._time = self._fresh, time
        if change:
            new_run = new_run or self._rising not in (None, change > 0)
            if not new_run:
                self._rising = change > 0
            self._step, self._seen = self._step + 1, []
        elif not self._by_time:
            first = name if name is not None else "0"
            again = any(branch == first and inputs.same(hidden, text) for branch, inputs in self._seen)
            resized = self._shape is not None and _size(hidden) != self._shape
            new_run = new_run or again or resized or len(self._seen) >= MAX_REPEATS
        self._shape = _size(hidden)
        if new_run:
            self._step, self._seen = 0, []
        return Place(self._step, self._length() if self._by_time else None, self._branch(name), new_run)

    def _branch(self, name: str | None) -> str:
        return name if name is not None else str(len(self._seen))


def _size(hidden: Any) -> Any:
    """Shape of the latents without the batch, in which guidance branches may differ."""
    return tuple(hidden.shape[1:]) if isinstance(hidden, torch.Tensor) else None


def _largest(timestep: Any) -> float:
    if isinstance(timestep, torch.Tensor):
        return float(timestep.detach().max()) if timestep.numel() else 0.0
    return float(timestep) if isinstance(timestep, (int, float)) else 0.0
