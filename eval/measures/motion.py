"""Measures of one clip over time: flickering by VBench's exact formula, motion by its formulas on DIS optical flow.

VBench (arXiv 2311.17982) estimates motion with RAFT and interpolates with AMT-S, networks that are not in any package;
OpenCV's DIS flow (arXiv 1603.03590) stands in. Names that end in _proxy say so: their numbers are not VBench's.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from .clips import OfLast, check_clip, check_fps, eight_bit

_SIDE = 16  # DIS flow works on patches of 8 at half the size
_RATE = 8.0  # frames per second that VBench looks at


def temporal_flickering(video: torch.Tensor) -> float:
    """(255 - m) / 255, where m is the mean absolute difference of neighbouring 8-bit frames: VBench's formula.

    Range 0 to 1, higher flickers less. A frozen clip has 1: read `dynamic_degree_proxy` beside it. VBench takes it on
    prompts for static scenes only. (arXiv 2311.17982)
    """
    frames = eight_bit(check_clip(video, least=2)).astype(np.float32)
    errors = [float(np.abs(a - b).mean()) for a, b in zip(frames[:-1], frames[1:], strict=True)]
    return (255.0 - sum(errors) / len(errors)) / 255.0


def motion_smoothness_proxy(video: torch.Tensor) -> float:
    """(255 - m) / 255, m the mean absolute error of every odd frame against its interpolation from both neighbours.

    VBench's formula; instead of AMT-S the two neighbours are warped half way along the DIS flow between them and
    averaged. Range 0 to 1, higher is smoother. A frozen clip has 1. (arXiv 2311.17982)
    """
    frames = eight_bit(check_clip(video, least=3, side=_SIDE))
    flow = _flow()
    errors = []
    for i in range(0, len(frames) - 2, 2):
        before, between, after = frames[i : i + 3]
        errors.append(float(np.abs(_half_way(flow, before, after) - between).mean()))
    return (255.0 - sum(errors) / len(errors)) / 255.0


def dynamic_degree_proxy(video: torch.Tensor, *, fps: float = _RATE) -> float:
    """1 when the clip moves, else 0: VBench's rule on DIS flow instead of RAFT.

    About 8 frames a second are looked at. A pair of neighbours moves when the mean of its longest 5 % of flow vectors
    exceeds 6 * min(H, W) / 256 pixels (more below 8 fps); the clip moves when round(frames / 4) pairs do. Range 0
    or 1, higher moves more; neither is better by itself. (arXiv 2311.17982)
    """
    lengths, frames, side, fps = _flow_lengths(video, fps)
    threshold = max(1.0, _RATE / fps) * 6.0 * side / 256.0
    return float(sum(length > threshold for length in lengths) >= max(round(frames / 4), 1))


def motion_magnitude_proxy(video: torch.Tensor, *, fps: float = _RATE) -> float:
    """What `dynamic_degree_proxy` compares with its threshold, as a number: mean over the pairs of the longest 5 % of
    flow, in frame sides a second.

    Range 0 upwards, higher moves more; neither is better by itself.
    """
    lengths, _, side, fps = _flow_lengths(video, fps)
    step = max(1, round(fps / _RATE))
    return sum(lengths) / len(lengths) / side * fps / step


def without_opencv() -> str:
    """Why optical flow cannot be computed here; empty when it can."""
    try:
        _opencv()
    except ValueError as error:
        return str(error)
    return ""


def _flow_lengths(video: torch.Tensor, fps: float) -> tuple[list[float], int, int, float]:
    """Mean of the longest 5 % of flow of each pair; how many frames were looked at; the shorter side; fps."""
    fps = check_fps(fps)
    step = max(1, round(fps / _RATE))
    video = check_clip(video, least=1 + step, side=_SIDE)
    lengths = _lengths.get(video, step, lambda: _longest_flow(eight_bit(video)[::step]))
    return lengths, -(-len(video) // step), min(video.shape[2:]), fps


_lengths: OfLast[list[float]] = OfLast()


def _longest_flow(frames: np.ndarray) -> list[float]:
    """Mean of the longest 5 % of flow of each pair of neighbours of (F, H, W, 3)."""
    flow = _flow()
    lengths = []
    for a, b in zip(frames[:-1], frames[1:], strict=True):
        length = np.hypot(*np.moveaxis(_between(flow, a, b), -1, 0)).ravel()
        longest = max(int(length.size * 0.05), 1)
        lengths.append(float(np.partition(length, -longest)[-longest:].mean()))
    return lengths


def _between(flow: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Optical flow (H, W, 2) from frame a to frame b, pixels as (x, y)."""
    cv2 = _opencv()
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (a, b)]
    return flow.calc(gray[0], gray[1], None)


def _half_way(flow: Any, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The frame in the middle, float (H, W, 3): both ends warped by half of the flow, averaged."""
    cv2 = _opencv()
    height, width = before.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    halves = []
    for start, end in ((before, after), (after, before)):
        # Flow from the far end back to this one tells, for a pixel half way, where this frame showed it.
        back = _between(flow, end, start) / 2
        moved = cv2.remap(start, x + back[..., 0], y + back[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        halves.append(moved.astype(np.float32))
    return (halves[0] + halves[1]) / 2


def _flow() -> Any:
    cv2 = _opencv()
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    # Patches of 8 need a coarsest level of some pixels; OpenCV's own choice fits large frames only.
    flow.setFinestScale(0)
    return flow


def _opencv() -> Any:
    try:
        return importlib.import_module("cv2")
    except Exception as error:
        raise ValueError(f"needs OpenCV ({type(error).__name__}); pip install 'dit-sparse[eval]'") from error
