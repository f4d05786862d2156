"""What the server holds for each visitor: his running job, last recording and last preset; nothing on the disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..commands.console import UserError
from .capture import Recording
from .job import Job, Progress

if TYPE_CHECKING:
    from ..tuning.preset import Preset

MOST_PRESETS = 64  # of all visitors together, some kilobytes each
MOST_RECORDINGS = 4  # of all visitors together, at most capture.BUDGET bytes and a clip's stamps each


class Sessions:
    """Jobs, recordings and presets by session.

    Args:
        lock: of the device; see `Job`.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._device, self._guard = lock, threading.Lock()
        self._jobs: dict[str, list[Job]] = {}
        self._recordings: OrderedDict[str, Recording] = OrderedDict()
        self._presets: OrderedDict[str, Preset] = OrderedDict()

    def follow(self, session: str | None, work: Callable[[Job], Any], every: float = 0.4) -> Iterator[Progress | Any]:
        """Run work(job); yields the progress, and last of all the result.

        Whoever stops reading (a closed page) stops the job.

        Args:
            session: the visitor's; his `cancel` and his leaving stop the job.
            work: see `Job.start`.
            every: seconds between two looks at the least.

        Raises:
            UserError: one line, whatever stopped the work.
            Cancelled: it was stopped.
        """
        key, job = session or "", Job(self._device)
        with self._guard:
            self._jobs.setdefault(key, []).append(job)
        try:
            job.start(work)
            while not job.wait(every):
                yield job.progress
            if job.error is not None:
                raise _readable(job.error)
            yield job.result
        finally:
            job.cancel()
            with self._guard:
                self._jobs[key].remove(job)
                if not self._jobs[key]:
                    del self._jobs[key]

    def cancel(self, session: str | None) -> int:
        """Stop the jobs of a visitor; how many there were. Who has no session has none of his own."""
        with self._guard:
            jobs = list(self._jobs.get(session, ())) if session else []
        for job in jobs:
            job.cancel()
        return len(jobs)

    def keep(self, session: str | None, recording: Recording) -> None:
        """Remember a visitor's recording in place of his last one; the oldest of all goes when there are too many."""
        with self._guard:
            _keep(self._recordings, session or "", recording, MOST_RECORDINGS)

    def recording(self, session: str | None) -> Recording | None:
        """A visitor's recording, if it is still there."""
        with self._guard:
            return self._recordings.get(session or "")

    def keep_preset(self, session: str | None, preset: Preset) -> None:
        """Remember what a visitor tuned in place of what he tuned before; see `keep`."""
        with self._guard:
            _keep(self._presets, session or "", preset, MOST_PRESETS)

    def preset(self, session: str | None) -> Preset | None:
        """What a visitor tuned, if it is still there."""
        with self._guard:
            return self._presets.get(session or "")

    def forget(self, session: str | None) -> None:
        """A visitor has left: his jobs stop, his recording and preset go."""
        self.cancel(session)
        with self._guard:
            self._recordings.pop(session or "", None)
            self._presets.pop(session or "", None)


def _keep(held: OrderedDict[str, Any], key: str, value: Any, most: int) -> None:
    held.pop(key, None)
    held[key] = value
    while len(held) > most:
        held.popitem(last=False)


def _readable(error: BaseException) -> BaseException:
    """What a job tripped over, as one line for the visitor: the host's refusals, too little memory, defects."""
    from .job import Cancelled

    if isinstance(error, (Cancelled, UserError)):
        return error
    lines = str(error).strip().splitlines() or [""]
    text = lines[0][:300] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0][:200]}"
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        text = "the device ran out of memory; use a smaller size or fewer frames"
    return UserError(text)
