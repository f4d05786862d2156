"""A run in a thread of its own, with its progress to read from outside, and a stop that takes hold within a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..bridge import transformers_of
from .preview import Strip

FORGOTTEN = 60.0  # seconds after which a run that nobody asks about is stopped


class Cancelled(Exception):
    """The run was stopped from outside."""


@dataclass(frozen=True)
class Progress:
    """Where a job stands.

    Attributes:
        phase: "waiting", "loading", "text", "dense", "sparse", "measuring", or any other word of what goes on.
        done, steps: denoising steps of all runs of the job.
        started: time.monotonic() at the start of the job; first: after its first step, with `first_done` steps.
        preview: data address of a picture, or None.
        fraction, left: share of the work that is done and seconds to go, of work that tells them itself instead of
            steps; None: it does not, or does not know.
    """

    phase: str = "waiting"
    done: int = 0
    steps: int = 0
    started: float = 0.0
    first: float = 0.0
    first_done: int = 0
    preview: str | None = None
    fraction: float | None = None
    left: float | None = None

    @property
    def share(self) -> float:
        """Share of the work that is done."""
        if self.fraction is not None:
            return self.fraction
        return self.done / self.steps if self.steps else 0.0

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started if self.started else 0.0

    def remaining(self) -> float | None:
        """Seconds that the steps to come should take, from those since the first; None before the second."""
        if self.fraction is not None:
            return self.left
        if self.done <= self.first_done or not self.first:
            return None
        last = time.monotonic() - self.first
        return max(self.steps - self.done, 0) * last / (self.done - self.first_done)


class Job:
    """One run: `start(work)` begins it, `wait` sleeps until something changes, `cancel` stops it.

    Args:
        lock: held while the work runs; jobs of one device wait for each other.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self.progress = Progress()
        self.result: Any = None
        self.error: BaseException | None = None
        self._lock = lock
        self._changed = threading.Condition()
        self._stop, self._over = threading.Event(), threading.Event()
        self._seen = time.monotonic()
        self._strip: Strip | None = None
        self._before = 0

    # -- from outside ------------------------------------------------------------------------------------------

    def start(self, work: Callable[[Job], Any]) -> None:
        """Run work(job) in a thread; its result or error stays in `result` or `error`."""
        threading.Thread(target=self._run, args=(work,), name="dit-sparse-job", daemon=True).start()

    def wait(self, timeout: float = 0.5) -> bool:
        """Sleep until something changes or the time is over; whether the job is over."""
        self._seen = time.monotonic()
        with self._changed:
            if not self._over.is_set():
                self._changed.wait(timeout)
        return self._over.is_set()

    def cancel(self) -> None:
        """Stop at the next layer, frame or step, whichever comes first; twice equals once."""
        self._stop.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the job is over; whether it is."""
        return self._over.wait(timeout)

    @property
    def cancelled(self) -> bool:
        """Whether it was stopped."""
        return isinstance(self.error, Cancelled)

    # -- from the work -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise Cancelled when the job shall stop."""
        if self._stop.is_set() or time.monotonic() - self._seen > FORGOTTEN:
            raise Cancelled

    def tell(self, **changes: Any) -> None:
        """Change the progress."""
        self.check()
        with self._changed:
            self.progress = replace(self.progress, **changes)
            self._changed.notify_all()

    @contextmanager
    def part(self, phase: str, strip: Strip | None = None) -> Iterator[Callable[[int, int], None]]:
        """One run of the pipeline among those of the job; yields update(done, steps) for hosts without latents."""
        self._strip, self._before = strip, self.progress.done
        self.tell(phase=phase)
        try:
            yield self._update
        finally:
            self._strip = None

    def at_step_end(self, pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """What Diffusers calls after a denoising step; outside of a part (a warm-up) it only looks for a stop."""
        self.check()
        if self.progress.phase in ("dense", "sparse", "recording"):
            strip, latents = self._strip, tensors.get("latents")
            picture = None
            if strip is not None and isinstance(latents, torch.Tensor):
                picture = strip.step(pipe.scheduler, latents, step + 1)
            self._update(step + 1, 0)
            if picture is not None:
                self.tell(preview=picture)
        return tensors

    def _update(self, done: int, _steps: int) -> None:
        now: dict[str, Any] = {"done": self._before + done}
        if not self.progress.first:
            now |= {"first": time.monotonic(), "first_done": self._before + done}
        self.tell(**now)

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Inside, the pipeline looks for a stop at every attention layer and before every decoded frame."""
        parts = [m for _, model, _ in transformers_of(pipe) for m in model.modules() if hasattr(m, "processor")]
        parts += [m for m in (getattr(getattr(pipe, "vae", None), "decoder", None),) if m is not None]
        hooks = [part.register_forward_pre_hook(lambda _module, _inputs: self.check()) for part in parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, work: Callable[[Job], Any]) -> None:
        try:
            while not self._lock.acquire(timeout=0.1):
                self.check()
            try:
                self.tell(phase="loading", started=time.monotonic())
                self.result = work(self)
            finally:
                self._lock.release()
        except BaseException as error:  # also Cancelled and a lack of memory: whoever waits for the job says it
            self.error = error.with_traceback(None)
        finally:
            with self._changed:
                self._over.set()
                self._changed.notify_all()
