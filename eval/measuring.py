"""Measuring clips and writing their videos, here or in processes of their own while the GPU makes the next clip.

Measures run on the CPU and take longer than a small clip takes to make. On a GPU they are handed to other processes,
by files, each with one thread; the clip that is being timed keeps its own core. On a CPU that would falsify the times,
so there everything is done in turn.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .measures.networks import Networks
from .measures.table import measure

PARTS = ".measuring"  # folder of clips on their way to a process; gone when a run ends
MOST_WORKERS, SPARE_CORES = 12, 4
Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is to be done with a clip.

    Attributes:
        prompt: what it should show.
        fps: of its video.
        file: where the video goes.
        names: of the measures; None takes all.
        networks: folders of DINO and CLIP.
    """

    prompt: str
    fps: int
    file: Path
    names: tuple[str, ...] | None
    networks: Networks


def workers_for(device: str) -> int:
    """How many processes measure beside a run on a device: none on a CPU, which the clips need for themselves."""
    if torch.device(device).type == "cpu":
        return 0
    return max(0, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - SPARE_CORES))


def finish(clip: torch.Tensor, reference: torch.Tensor | None, task: Task) -> Result:
    """Measure a clip and write its video.

    Args:
        clip: (F, 3, H, W) in [0, 1].
        reference: the dense clip of the same seed, or None.
        task: what is to be done.

    Returns:
        values and reasons as `measure` gives them, frames, height and width.
    """
    from dit_sparse.pipelines.video_io import write_video

    values, reasons = measure(
        clip, reference=reference, prompt=task.prompt, fps=task.fps, names=task.names, networks=task.networks
    )
    task.file.parent.mkdir(parents=True, exist_ok=True)
    height, width = (side // 2 * 2 for side in clip.shape[2:])
    write_video(task.file, clip[..., :height, :width], task.fps)
    return {
        "values": values,
        "reasons": reasons,
        "frames": len(clip),
        "height": clip.shape[2],
        "width": clip.shape[3],
    }


class Measuring:
    """Hands clips to processes, or measures them here.

    Args:
        folder: of the run; clips on their way lie below it.
        workers: processes; 0 measures here and returns results at once.
    """

    def __init__(self, folder: Path, workers: int = 0) -> None:
        self.workers = workers
        self._folder = folder / PARTS
        self._count = 0
        self._reference: tuple[torch.Tensor, Path] | None = None
        self._pending: list[Future[Any]] = []
        self._longest = 0.0
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Measuring:
        if self.workers:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
            self._folder.mkdir(parents=True)
            # A process that was forked after CUDA began cannot be trusted: each starts afresh.
            start = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=start, initializer=_one_thread)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def submit(
        self, clip: torch.Tensor, reference: torch.Tensor | None, task: Task, result: Mapping[str, Any]
    ) -> Result | Future[Any]:
        """`result` and what `finish` adds to it, at once or as a future."""
        if self._pool is None:
            return {**result, **finish(clip, reference, task)}
        while len([f for f in self._pending if not f.done()]) > 2 * self.workers:
            time.sleep(0.05)  # clips are made faster than they are measured: they would fill the disk
        other = None if reference is None else self._stored_reference(reference)
        future = self._pool.submit(_finish_files, self._store(clip), other, task, dict(result))
        self._pending = [f for f in self._pending if not f.done()] + [future]
        future.add_done_callback(self._note)
        return future

    def behind(self) -> float:
        """About how many seconds the clips that are not measured yet will still take."""
        open_tasks = sum(not f.done() for f in self._pending)
        return self._longest * math.ceil(open_tasks / self.workers) if self.workers else 0.0

    def _note(self, future: Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._longest = max(self._longest, float(future.result()["measuring_seconds"]))

    def _stored_reference(self, reference: torch.Tensor) -> Path:
        if self._reference is None or self._reference[0] is not reference:
            self._reference = reference, self._store(reference)
        return self._reference[1]

    def _store(self, clip: torch.Tensor) -> Path:
        self._count += 1
        path = self._folder / f"{self._count}.npy"
        np.save(path, clip.numpy())
        return path


def _one_thread() -> None:
    torch.set_num_threads(1)
    for name in ("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):  # read by what is not imported yet
        os.environ[name] = "1"


def _finish_files(clip: Path, reference: Path | None, task: Task, result: Result) -> Result:
    """`finish` on files; the clip's own is removed, the reference's serves other clips."""
    start = time.monotonic()
    loaded = [None if path is None else torch.from_numpy(np.load(path)) for path in (clip, reference)]
    assert loaded[0] is not None
    found = finish(loaded[0], loaded[1], task)
    clip.unlink()
    return {**result, **found, "measuring_seconds": round(time.monotonic() - start, 3)}
