"""What a job of the page computes: a clip dense, sparse or both, with what is shown of it. No Gradio here."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..commands.settings import FPS
from .job import Job
from .models import Shelf
from .preview import Strip
from .wanted import Wanted, check_memory

GAIN = 4  # of the difference view
COUNTED = ("density", "sparse_density", "tokens", "attention_seconds")  # of a sparse run


@dataclass
class Outcome:
    """What came out of a job.

    Attributes:
        clips: by "dense", "sparse" and "difference", the file's bytes and its kind (video/mp4 or image/png).
        numbers: plain data: seconds, and with both clips psnr, ssim and speedup.
        summary: of the sparse run, or None.
        density: {layer: {step: density}} of the sparse run.
    """

    wanted: Wanted
    clips: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    density: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def kept(self) -> str:
        """The clip that is downloaded: the sparse one, or the only one."""
        return "sparse" if "sparse" in self.clips else "dense"


def make(shelf: Shelf, wanted: Wanted, job: Job) -> Outcome:
    """Make what is wanted; the caller's thread holds the device.

    Raises:
        Cancelled: the job was stopped.
        ValueError, MemoryError, ...: what the host refuses.
    """
    from .. import disable

    pipe = shelf.open(wanted.model)
    own = shelf.geometry(wanted.model)  # of a model from the hub known only now that it is loaded
    shape = replace(wanted.shape, **{name: value for name, value in own.items()
                                     if getattr(wanted.shape, name) is None and value is not None})
    check_memory(shelf, wanted.model, shape, clips=2 if wanted.mode == "both" else 1)
    runs = 2 if wanted.mode == "both" else 1
    job.tell(phase="warming up", steps=runs * (shape.steps or 0))
    disable(pipe)
    try:
        with job.watching(pipe):
            return _run(shelf, pipe, wanted, job)
    finally:
        disable(pipe)  # also after a stop, in the middle of a forward: the next visitor finds the pipeline as it was
        forget_run(pipe)


def _run(shelf: Shelf, pipe: Any, wanted: Wanted, job: Job) -> Outcome:
    from .. import enable, summary
    from ..eval.attention import density_map
    from ..eval.compare import compare, timed

    outcome, clips = Outcome(wanted), {}

    @contextmanager
    def bar(label: str) -> Iterator[Any]:
        preview = shelf.preview(wanted.model)
        with job.part(label, Strip(preview) if preview is not None else None) as update:
            yield update if "callback_on_step_end" not in shape else None
            job.tell(phase="measuring")
        if label == "sparse":  # the pipeline still has its session
            outcome.density = density_map(pipe)["density_map"]

    shape = arguments(pipe, wanted, job)
    if wanted.mode == "both":
        numbers, clips["dense"], clips["sparse"] = compare(pipe, wanted.prompt, wanted.proc, seed=wanted.seed,
                                                           shape=shape, bar=bar)
        outcome.summary = numbers.summary
        names = ["dense_seconds", "sparse_seconds", "speedup", "psnr", "ssim", *COUNTED]
        outcome.numbers = {name: getattr(numbers, name) for name in names}
    else:
        if wanted.mode == "sparse":
            enable(pipe, wanted.proc)
        context: AbstractContextManager[Any] = bar(wanted.mode)
        clips[wanted.mode], seconds = timed(pipe, wanted.prompt, wanted.seed, shape, context)
        outcome.numbers = {f"{wanted.mode}_seconds": seconds}
        if wanted.mode == "sparse":
            outcome.summary = summary(pipe).to_dict()
            outcome.numbers |= {name: outcome.summary[name] for name in COUNTED}
    if len(clips) == 2:
        clips["difference"] = (GAIN * (clips["dense"] - clips["sparse"]).abs()).clamp(max=1)
    job.tell(phase="encoding")
    outcome.clips = {name: encoded(clip) for name, clip in clips.items()}
    first = next(iter(clips.values()))
    outcome.numbers |= {"frames": first.shape[0], "height": first.shape[2], "width": first.shape[3]}
    return outcome


def arguments(pipe: Any, wanted: Wanted, job: Job) -> dict[str, Any]:
    """The arguments of text_to_video, with the callback that a host takes."""
    from ..pipelines.hosts import accepted

    shape = {name: value for name, value in wanted.shape.arguments().items() if value is not None}
    if "callback_on_step_end" in accepted(pipe):
        shape["callback_on_step_end"] = job.at_step_end
    return shape


def encoded(clip: Tensor) -> tuple[bytes, str]:
    """A clip (F, 3, H, W) in [0, 1] as the bytes of an mp4 (a PNG for one frame) and its kind.

    The file lies in a private folder for as long as it takes to read it back.
    """
    from ..pipelines.video_io import write_image, write_video

    with tempfile.TemporaryDirectory(prefix="dit-sparse-") as folder:
        if len(clip) == 1:
            file, kind = Path(folder) / "clip.png", "image/png"
            write_image(file, clip[0])
        else:
            file, kind = Path(folder) / "clip.mp4", "video/mp4"
            write_video(file, clip, FPS)
        return file.read_bytes(), kind


def address(data: bytes, kind: str) -> str:
    """Bytes as a data address: nothing of a visitor's clips stays on the server."""
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def forget_run(pipe: Any) -> None:
    """What Diffusers does at the end of a call, which a stopped one does not reach."""
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()
