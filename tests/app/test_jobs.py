"""Jobs: one at a time, progress from outside, a stop within a step; and what a stopped run leaves behind."""

import threading
import time
from typing import Any

import pytest
import torch

from dit_sparse.app import job as jobs
from dit_sparse.app import wanted
from dit_sparse.app.job import Cancelled, Job, Progress
from dit_sparse.app.preview import CELL, Preview, Strip
from dit_sparse.app.sessions import Sessions
from dit_sparse.app.work import make
from dit_sparse.bridge import binding_of
from dit_sparse.commands.console import UserError

from .conftest import PROMPT, SMALL, until


def run(lock: threading.Lock, work: Any) -> Job:
    job = Job(lock)
    job.start(work)
    while not job.wait(0.05):
        pass
    return job


def test_both_clips_and_their_numbers(shelf: Any) -> None:
    asked = wanted.check(shelf, prompt=PROMPT, **SMALL, options={"density": 0.4})
    seen: list[Progress] = []
    job = Job(shelf.lock)
    job.start(lambda job: make(shelf, asked, job))
    while not job.wait(0.02):
        seen.append(job.progress)
    assert job.error is None
    result = job.result
    assert set(result.clips) == {"dense", "sparse", "difference"} and result.kept == "sparse"
    assert result.clips["dense"][0][4:8] == b"ftyp"
    assert 20 < result.numbers["psnr"] <= 100 and 0.5 < result.numbers["ssim"] <= 1
    assert result.numbers["speedup"] == result.numbers["dense_seconds"] / result.numbers["sparse_seconds"]
    assert {layer: len(row) for layer, row in result.density.items()} == {str(i): 3 for i in range(8)}
    assert job.progress.done == job.progress.steps == 6
    assert any(found.preview for found in seen) and any(found.remaining() for found in seen)
    phases = list(dict.fromkeys(found.phase for found in seen))
    assert phases.index("dense") < phases.index("sparse")


def test_a_stop_takes_hold_within_a_step(shelf: Any) -> None:
    pipe = shelf.open("embedded")
    asked = wanted.check(shelf, prompt=PROMPT, steps=50, mode="sparse", step_cache="first_block")
    before = {name: id(processor) for name, processor in pipe.transformer.attn_processors.items()}
    job = Job(shelf.lock)
    job.start(lambda job: make(shelf, asked, job))
    until(lambda: job.progress.phase == "sparse")
    time.sleep(0.3)
    job.cancel()
    start = time.monotonic()
    assert job.join(20) and job.cancelled and job.result is None
    assert time.monotonic() - start < 5  # a step of this size takes about 2 s on one slow core
    # As it was: the same processors, no binding, no hooks, no cache; and the device is free.
    assert {name: id(processor) for name, processor in pipe.transformer.attn_processors.items()} == before
    assert binding_of(pipe.transformer) is None and not pipe.transformer.is_cache_enabled
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
    assert not shelf.lock.locked()


def test_a_job_that_nobody_asks_about_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "FORGOTTEN", 0.2)

    def work(job: Job) -> None:
        while True:
            job.check()
            time.sleep(0.02)

    job = Job(threading.Lock())
    job.start(work)
    assert job.join(5) and job.cancelled


def test_jobs_of_a_device_wait_and_can_be_stopped_meanwhile() -> None:
    lock = threading.Lock()
    with lock:
        job = Job(lock)
        job.start(lambda job: 1)
        assert not job.wait(0.2) and job.progress.phase == "waiting"
        job.cancel()
        assert job.join(5) and job.cancelled
    assert run(lock, lambda job: 1).result == 1


def test_who_stops_reading_stops_the_job() -> None:
    sessions, started = Sessions(threading.Lock()), threading.Event()

    def work(job: Job) -> None:
        started.set()
        while True:
            job.tell()
            time.sleep(0.01)

    reader = sessions.follow("me", work, every=0.05)
    next(reader)
    started.wait(5)
    reader.close()
    until(lambda: not sessions._device.locked(), 5)
    assert sessions.cancel("me") == 0


@pytest.mark.parametrize("error, words", [
    (ValueError("first line\nsecond"), "^first line$"),
    (RuntimeError("CUDA out of memory. Tried"), "ran out of memory; use a smaller size"),
    (KeyError("x"), "^KeyError: 'x'$"),
])
def test_errors_reach_the_visitor_in_one_line(error: Exception, words: str) -> None:
    def work(job: Job) -> None:
        raise error

    with pytest.raises(UserError, match=words):
        list(Sessions(threading.Lock()).follow(None, work))
    with pytest.raises(Cancelled):
        list(Sessions(threading.Lock()).follow(None, lambda job: (job.cancel(), job.check())))


def test_preview_is_near_to_the_decoded_clip(shelf: Any) -> None:
    """The matrix is fitted to other clips; its pictures of a clip of the world have that clip's colours."""
    from dit_sparse.pipelines.text_to_video import text_to_video

    pipe, kept = shelf.open("embedded"), {}

    def at_end(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept["latents"] = tensors["latents"]
        return tensors

    clip = text_to_video(pipe, PROMPT, height=64, width=64, frames=5, steps=4, guidance_scale=1.0,
                         callback_on_step_end=at_end)
    preview = Preview.fit(pipe)
    assert preview is not None
    pictures = preview.pictures(kept["latents"])
    assert pictures.shape == (2, 3, 8 * CELL, 8 * CELL)
    small = torch.nn.functional.interpolate(clip[[2, 4]], (32, 32), mode="area")
    away, flat = (pictures - small).abs().mean(), (small.mean() - small).abs().mean()
    assert away < 0.12 and (away < 0.8 * flat or flat < 0.12)


def test_a_strip_shows_where_a_run_is_heading() -> None:
    """On a straight path from noise to a clip the picture after the second step is the clip's own."""
    class Scheduler:
        sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])

    preview = Preview(torch.randn(2, 5, 3 * CELL * CELL) * 0.1, torch.zeros(4), torch.ones(4))
    clean, noise = torch.randn(2, 1, 4, 3, 2, 2).unbind(0)
    strip, found = Strip(preview), []
    for done in range(1, 5):
        sigma = float(Scheduler.sigmas[done])
        found.append(strip.step(Scheduler, (1 - sigma) * clean + sigma * noise, done))
    assert found[0] is None and len(set(found[1:])) == 1
    assert strip.step(Scheduler, torch.zeros(1, 16, 3), 1) is None  # packed latents: no picture
