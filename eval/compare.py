"""The same clip dense and sparse, with the same seed: how far apart they are, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .fidelity import psnr, psnr_frames, ssim


@dataclass(frozen=True)
class Comparison:
    """Numbers of one comparison; the dense clip is the reference.

    `density` is the mean over all attention calls of the sparse run, its dense steps counted as 1;
    `sparse_density` is the mean over its sparse calls. Seconds are of the whole pipeline call.
    """

    prompt: str
    seed: int
    method: str
    tokens: int
    dense_seconds: float
    sparse_seconds: float
    speedup: float
    attention_seconds: float
    density: float
    sparse_density: float | None
    psnr: float
    psnr_frames: float
    ssim: float
    summary: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return asdict(self)


Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]


def compare(
    pipe: Any,
    prompt: str,
    proc: Any,
    *,
    seed: int = 0,
    shape: Mapping[str, Any] | None = None,
    bar: Bar | None = None,
    dense: tuple[torch.Tensor, float] | None = None,
) -> tuple[Comparison, torch.Tensor, torch.Tensor]:
    """Make a clip with the untouched pipeline and with a sparse method.

    Args:
        pipe: a text-to-video pipeline; left with sparse attention off.
        prompt: what to show.
        proc: a SparseProc.
        seed: of both clips.
        shape: frames, height, width, steps, guidance_scale for text_to_video; None leaves the host's defaults.
        bar: bar(label) is entered around each run and yields its step callback.
        dense: the dense clip and its seconds, when they are known from before (other methods, same prompt and seed).

    Returns:
        The numbers, the dense clip and the sparse clip, each (F, 3, H, W) in [0, 1].
    """
    from dit_sparse import disable, enable, summary

    shape = dict(shape or {})
    bar = bar or (lambda label: nullcontext())
    disable(pipe)
    warm_up(pipe, prompt, proc, shape)
    if dense is None:
        dense = timed(pipe, prompt, seed, shape, bar("dense"))
    enable(pipe, proc)
    try:
        sparse_clip, sparse_seconds = timed(pipe, prompt, seed, shape, bar("sparse"))
        report = summary(pipe)
    finally:
        disable(pipe)
    dense_clip, dense_seconds = dense
    numbers = Comparison(
        prompt=prompt,
        seed=seed,
        method=report.method,
        tokens=report.tokens,
        dense_seconds=dense_seconds,
        sparse_seconds=sparse_seconds,
        speedup=dense_seconds / sparse_seconds,
        attention_seconds=report.attention_seconds,
        density=report.density,
        sparse_density=report.sparse_density,
        psnr=psnr(dense_clip, sparse_clip),
        psnr_frames=psnr_frames(dense_clip, sparse_clip),
        ssim=ssim(dense_clip, sparse_clip),
        summary=report.to_dict(),
    )
    return numbers, dense_clip, sparse_clip


def timed(
    pipe: Any, prompt: str, seed: int, shape: Mapping[str, Any], bar: AbstractContextManager[Any]
) -> tuple[torch.Tensor, float]:
    """One clip and the seconds of the whole call, the GPU's queue emptied at both ends."""
    from dit_sparse.pipelines.text_to_video import text_to_video

    with bar as callback:
        _synchronize(pipe)
        start = time.perf_counter()
        clip = text_to_video(pipe, prompt, seed=seed, callback=callback, **shape)
        _synchronize(pipe)
        return clip, time.perf_counter() - start


def warm_up(pipe: Any, prompt: str, proc: Any, shape: Mapping[str, Any]) -> None:
    """First-call costs belong to neither side: kernels are compiled on a GPU, buffers made on a CPU."""
    from dit_sparse import disable, enable
    from dit_sparse.pipelines.text_to_video import text_to_video

    small = dict(shape, steps=2)
    if pipe.device.type != "cuda":
        # On a CPU nothing is compiled: two short steps at a small size load the libraries.
        small |= {name: 64 for name in ("height", "width") if small.get(name)}
    text_to_video(pipe, prompt, **small)
    if pipe.device.type == "cuda" and proc is not None:
        enable(pipe, proc)
        try:
            text_to_video(pipe, prompt, **small)
        finally:
            disable(pipe)


def _synchronize(pipe: Any) -> None:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
