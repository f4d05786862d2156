"""What a measure takes: clips that were looked at first, from memory or from a file.

A clip is (F, 3, H, W) float in [0, 1], as the pipelines return it. Everything else is refused in one line that names
the argument, so that a number never comes from frames that were not what they seemed to be.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

_SLACK = 1e-3  # rounding of low-precision decoders around 0 and 1
T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """A clip from a file.

    Attributes:
        video: (F, 3, H, W) float32 in [0, 1].
        fps: frames per second.
    """

    video: torch.Tensor
    fps: float


class OfLast(Generic[T]):
    """Keeps what was computed of the last clip: several measures look at the same tensor, one after the other."""

    def __init__(self) -> None:
        self._video: Callable[[], torch.Tensor | None] = lambda: None
        self._key: Any = None
        self._value: T | None = None

    def get(self, video: torch.Tensor, key: Any, make: Callable[[], T]) -> T:
        """`make()`, or what it gave for this very tensor, unchanged since, and an equal key."""
        full = (key, video._version)
        if self._video() is not video or self._key != full or self._value is None:
            self._value = make()
            self._video, self._key = weakref.ref(video), full
        return self._value


# Tensors that were found to be finite and within [0, 1], and have not been written to since.
_checked: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}


def _was_checked(video: torch.Tensor) -> bool:
    known = _checked.get(id(video))
    return known is not None and known[0]() is video and known[1] == video._version


def _note_checked(video: torch.Tensor) -> torch.Tensor:
    while len(_checked) >= 4:
        del _checked[next(iter(_checked))]
    _checked[id(video)] = weakref.ref(video), video._version
    return video


def check_clip(video: torch.Tensor, *, least: int = 1, side: int = 1, argument: str = "video") -> torch.Tensor:
    """Refuse what is no clip.

    Args:
        video: (F, 3, H, W) float in [0, 1]; landscape, square or portrait.
        least: frames that the measure needs.
        side: pixels that the shorter side needs.
        argument: name that the error gives.

    Returns:
        The clip as float32 on the CPU, within [0, 1].

    Raises:
        ValueError: wrong type, shape, number of frames, size or values.
    """
    if not isinstance(video, torch.Tensor) or not video.is_floating_point():
        kind = str(video.dtype) if isinstance(video, torch.Tensor) else type(video).__name__
        raise ValueError(f"{argument} is {kind}; use a float tensor (frames, 3, height, width) in [0, 1]")
    if video.ndim == 4 and video.shape[1] in (2, 4):
        raise ValueError(
            f"{argument} has an alpha channel (shape {tuple(video.shape)}); use 3 channels, red green blue"
        )
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"{argument} has shape {tuple(video.shape)}; use (frames, 3, height, width)")
    frames, _, height, width = video.shape
    if frames < least:
        raise ValueError(f"{argument} has {frames} frame{'s' * (frames > 1)}; this measure needs {least} or more")
    if min(height, width) < side:
        raise ValueError(f"{argument} is {width}x{height}; this measure needs sides of {side} pixels or more")
    if _was_checked(video):
        return video
    video = video.detach().float().cpu()
    if not bool(torch.isfinite(video).all()):
        bad = int((~torch.isfinite(video)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{argument} has values that are not finite (first in frame {bad}); use numbers in [0, 1]")
    low, high = float(video.min()), float(video.max())
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(f"{argument} has values from {low:.3g} to {high:.3g}; use numbers in [0, 1]")
    return _note_checked(video.clamp(0, 1))


def check_pair(
    reference: torch.Tensor, video: torch.Tensor, *, least: int = 1, side: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips of the same length and size, each checked as :func:`check_clip` does.

    Raises:
        ValueError: one of them is no clip, or they differ in frames, height or width.
    """
    reference = check_clip(reference, least=least, side=side, argument="reference")
    video = check_clip(video, least=least, side=side)
    if reference.shape != video.shape:
        (f, _, h, w), (f2, _, h2, w2) = reference.shape, video.shape
        raise ValueError(f"video is {w2}x{h2} with {f2} frames and reference {w}x{h} with {f}; use equal clips")
    return reference, video


def check_fps(fps: float) -> float:
    """A number of frames per second that a file can have.

    Raises:
        ValueError: not in (0, 1000].
    """
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= 1000:
        raise ValueError(f"fps={fps!r} is not allowed; use a number in (0, 1000]")
    return float(fps)


def eight_bit(video: torch.Tensor) -> np.ndarray:
    """(F, 3, H, W) in [0, 1] -> (F, H, W, 3) uint8, rounded: what a player shows."""
    return (video * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def luma(video: torch.Tensor) -> torch.Tensor:
    """(F, 3, H, W) -> (F, H, W): BT.601 luma in [0, 1]."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=video.dtype)
    return (video * weights.view(1, 3, 1, 1)).sum(1)


def read_clip(path: str | Path, *, fps: float | None = None) -> Clip:
    """Read a clip from any file that FFmpeg reads.

    10-bit video is rounded to 8 bits; a clip that a phone took upright is turned as players do. VP8 and VP9 keep alpha
    in a stream of its own, which FFmpeg's decoders leave out: the file says so by the tag `alpha_mode`.

    Args:
        path: the file.
        fps: frames per second that it must have; None takes what it has.

    Raises:
        ValueError: missing, no video, an alpha channel, or another frame rate than `fps`.
    """
    import av

    from dit_sparse.pipelines.video_io import read_video

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a video")
    video = read_video(path)
    with av.open(str(path.resolve())) as container:
        stream = container.streams.video[0]
        formats = stream.codec_context.format
        tagged = any(key.lower() == "alpha_mode" and value == "1" for key, value in stream.metadata.items())
        if tagged or (formats is not None and any(component.is_alpha for component in formats.components)):
            kind = "alpha_mode 1" if tagged or formats is None else formats.name
            raise ValueError(f"{path} has an alpha channel ({kind}); flatten it onto a background first")
        rate = float(stream.average_rate or 0)
        rotation = next((getattr(frame, "rotation", 0) for frame in container.decode(video=0)), 0)
    if fps is not None and not math.isclose(rate, check_fps(fps), rel_tol=1e-3):
        raise ValueError(f"{path} has {rate:g} frames per second; fps={fps:g} was asked for")
    if rotation % 90 == 0 and rotation % 360:
        video = video.rot90(rotation // 90 % 4, (2, 3)).contiguous()
    return Clip(check_clip(video, argument=str(path)), check_fps(rate))
