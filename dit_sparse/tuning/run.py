"""Running a pipeline for `tune`: one clip at a time, progress with the time left, and the pipe as it was found."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Progress", "Runner", "Tracker", "as_found", "default_call"]

Progress = Callable[[float, str, float | None], None]


def default_call(pipe: Any) -> tuple[dict[str, Any], bool]:
    """Arguments of the pipeline's call where the user gave none, and whether it is the included model.

    The included model takes its preview size; any other pipeline its own defaults.
    """
    from ..pipelines.embedded import DEFAULTS, folder
    from ..pipelines.hosts import host_arguments

    place = getattr(getattr(pipe, "config", {}), "get", lambda *_: None)("_name_or_path")
    if not place or Path(str(place)) != folder():
        return {}, False
    return host_arguments(DEFAULTS), True


def argument(pipe: Any, call: Mapping[str, Any], name: str) -> Any:
    """An argument of the pipeline's call: the one given, or the pipeline's default."""
    if call.get(name) is not None:
        return call[name]
    from ..pipelines.hosts import accepted

    parameter = accepted(pipe).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


class Tracker:
    """Turns work done into a share of all and seconds left.

    Args:
        planned: work in generations; what turns out to be less makes the share jump.
        progress: told (share, text, seconds left or None); None: nobody.
    """

    def __init__(self, planned: float, progress: Progress | None) -> None:
        self._planned, self._progress = max(planned, 1e-6), progress
        self._done, self._shown, self._worked, self._start = 0.0, 0.0, 0.0, time.monotonic()
        self.text = ""

    def begin(self, text: str) -> None:
        """Another part of the work begins."""
        self.text = text
        self.tell(0.0)

    def tell(self, part: float) -> None:
        """So much of the present generation is done."""
        if self._progress is None:
            return
        done = self._done + part
        self._shown = max(self._shown, min(0.99, done / self._planned))
        worked, seconds = self._worked + part, time.monotonic() - self._start
        left = seconds / worked * max(0.0, self._planned - done) if worked > 0.05 else None
        self._progress(self._shown, self.text, left)

    def add(self, work: float, *, resumed: bool = False) -> None:
        """So many generations are done; resumed ones took no time."""
        self._done += work
        self._worked += 0 if resumed else work
        self.tell(0.0)

    def skip_to(self, done: float) -> None:
        """What was planned until here is done, or was not needed."""
        self._done = max(self._done, done)
        self.tell(0.0)

    def finish(self) -> None:
        """All is done."""
        if self._progress is not None:
            self._progress(1.0, "done", 0.0)


class Runner:
    """Makes clips with one pipeline, the same way every time.

    Args:
        pipe: the pipeline.
        call: keyword arguments of its call.
        tracker: told of every denoising step.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], tracker: Tracker) -> None:
        self.pipe, self.call, self.tracker = pipe, dict(call), tracker

    def clip(self, prompt: str, seed: int) -> tuple[Tensor, float]:
        """One clip (F, 3, H, W) in [0, 1] on the CPU, and the seconds it took.

        Raises:
            ValueError: the pipeline does not take one of the arguments, or made numbers that are not finite.
        """
        return self.clips([prompt], [seed])[0]

    def clips(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[Tensor, float]]:
        """`clip` of several prompts in one batch; the seconds are shared out evenly."""
        from ..pipelines.hosts import call_batch

        count = len(prompts)
        asked = {"prompt": list(prompts) if count > 1 else prompts[0], **self.call}
        self.wait()
        start = time.perf_counter()
        clips = call_batch(self.pipe, asked, seeds=seeds,
                           callback=lambda done, steps: self.tracker.tell(0.97 * count * done / max(1, steps)))
        self.wait()
        seconds = time.perf_counter() - start
        self.tracker.add(count)
        return [(clip, seconds / count) for clip in clips]

    def wait(self) -> None:
        """Empty the GPU's queue."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def with_proc(self, proc: Any, work: Callable[[], Any]) -> Any:
        """Do something with a SparseProc switched on, and off again."""
        from ..processor import disable, enable

        enable(self.pipe, proc)
        try:
            return work()
        finally:
            disable(self.pipe)


@contextmanager
def as_found(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline is dense and quiet; afterwards it is as it was, whatever happens.

    Kept are the method that is switched on, the very same processors and scheduler, the progress bar's settings and
    the state of the global random generator.

    Raises:
        ValueError: a step cache that this library did not enable is on.
    """
    from ..bridge import binding_of, transformers_of
    from ..processor import disable, enable
    from ..session import RunSession

    parts = transformers_of(pipe)
    bindings = [(model, binding_of(model)) for _, model, _ in parts]
    procs = [(model, b.session.proc) for model, b in bindings if b is not None and isinstance(b.session, RunSession)]
    whole = len(procs) == len(parts) and all(proc is procs[0][1] for _, proc in procs)
    scheduler, bar = getattr(pipe, "scheduler", None), getattr(pipe, "_progress_bar_config", None)
    random_state = torch.get_rng_state()
    disable(pipe)
    try:
        for _, model, _ in parts:
            if getattr(model, "is_cache_enabled", False):
                raise ValueError("a step cache is on; call disable_cache() on the transformer and enable it afterwards")
        if scheduler is not None:
            pipe.scheduler = copy.deepcopy(scheduler)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        yield
    finally:
        disable(pipe)
        if scheduler is not None:
            pipe.scheduler = scheduler
        if bar is not None:
            pipe._progress_bar_config = bar
        elif hasattr(pipe, "_progress_bar_config"):
            del pipe._progress_bar_config
        torch.set_rng_state(random_state)
        for target, proc in [(pipe, procs[0][1])] if whole else procs:
            enable(target, proc)
