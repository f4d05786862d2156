"""One run of a pipeline for a command: loading, timing, progress."""

from __future__ import annotations

import os
from typing import Any

import torch

from .console import UserError, progress, quiet_libraries, refusing
from .request import Shape


def stay_offline(model: str) -> None:
    """A model on this disk needs no hub: say so before a library asks (read once, when it is imported)."""
    if model == "embedded" or os.path.isdir(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def open_pipeline(model: str, device: str | None, proc: Any) -> Any:
    """The pipeline, without sparse attention yet and without progress bars of its own.

    `proc` is the SparseProc that it will run with: a kernel that cannot run on the device is refused first.
    """
    with refusing():
        from ..pipelines.load import load

        check_device(device)
        check_backend(proc.settings.backend, device)
        quiet_libraries()
        pipe = load(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have."""
    if device is None:
        return
    try:
        torch.empty(1, device=device).cpu()  # the meta device makes tensors, but they hold nothing
    except (RuntimeError, AssertionError) as error:
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"--device {device!r} cannot be used; this machine has {', '.join(found)}") from error


def check_backend(backend: str | None, device: str | None) -> None:
    """Refuse a kernel that cannot run on the device; None takes the GPU when there is one, as `load` does."""
    if backend is None:
        return
    from ..blockmask import BlockLayout, BlockMask
    from ..kernels.attention import can_run

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    some = torch.zeros(1, 128, 1, 64, device=place, dtype=torch.bfloat16 if place.type == "cuda" else torch.float32)
    layout = BlockLayout.raster(128, 128, place)  # blocks that every kernel takes
    keep = torch.ones(1, 1, layout.blocks, layout.blocks, dtype=torch.bool, device=place)
    reasons = can_run(backend, some, some, some, BlockMask.from_dense(keep, layout, layout))
    if reasons:
        raise UserError(f"backend={backend!r} cannot run on {place}: {reasons[0]}; leave it out for one that can")


def make_clip(pipe: Any, prompt: str, shape: Shape, seed: int, label: str) -> tuple[torch.Tensor, float]:
    """Run the pipeline once, with a progress bar.

    Returns:
        The clip (F, 3, H, W) in [0, 1], and the seconds of the whole call: text, steps and decoding.
    """
    from .. import SparseFallbackError
    from ..eval.compare import timed

    # No defects: sizes that the host refuses, `strict=True` doing what it says, memory that does not suffice.
    with refusing(ValueError, SparseFallbackError, MemoryError, torch.OutOfMemoryError):
        return timed(pipe, prompt, seed, shape.arguments(), progress(label))


def device_name(pipe: Any) -> str:
    """What the pipeline runs on, for people."""
    if pipe.device.type == "cuda":
        return f"{pipe.device} ({torch.cuda.get_device_name(pipe.device)})"
    return f"{pipe.device} ({torch.get_num_threads()} threads)"
