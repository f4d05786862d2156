"""How close one clip is to another: PSNR over the clip, PSNR over its frames, SSIM.

All three take clips in [0, 1] of shape (F, 3, H, W), or several as (N, F, 3, H, W), and return one number. They need
nothing but PyTorch; `ssim` equals torchmetrics' structural_similarity_index_measure with data_range=1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CAP = 100.0  # dB, where two clips count as equal
_WINDOW, _SIGMA = 11, 1.5  # the Gaussian window of Wang et al. 2004, with K1 = 0.01 and K2 = 0.03


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """-10 log10 of the mean squared error over the whole clip, capped at 100 dB, then the mean over clips."""
    a, b = _clips(a, b)
    return _decibel((a - b).square().flatten(1).mean(1))


def psnr_frames(a: torch.Tensor, b: torch.Tensor) -> float:
    """The same for each frame, capped at 100 dB, then the mean over frames and clips."""
    a, b = _clips(a, b)
    return _decibel((a - b).square().flatten(2).mean(2).flatten())


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Structural similarity of each frame (Gaussian window of 11, sigma 1.5), then the mean over frames and clips.

    Borders are reflected, as torchmetrics 1.9 does. Computed in float64: a GPU may convolve float32 in TF32, whose
    rounding alone made two equal clips differ by .04, and a variance is a difference of two nearly equal means.

    Raises:
        ValueError: different shapes, or frames smaller than half the window.
    """
    a, b = _clips(a, b)
    if min(a.shape[-2:]) <= _WINDOW // 2:
        raise ValueError(f"ssim needs sides of more than {_WINDOW // 2} pixels, got {a.shape[-2]}x{a.shape[-1]}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - (_WINDOW - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).to(a.device)
    scores = [_ssim_frame(x, y, weights) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)]
    return sum(scores) / len(scores)


def _ssim_frame(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> float:
    # five local means in one pass: [5, 3, H, W] -> [15, 1, H, W]
    x, y = (F.pad(z.double(), [_WINDOW // 2] * 4, mode="reflect") for z in (x, y))
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]
    maps = F.conv2d(F.conv2d(maps, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    mean_x, mean_y, square_x, square_y, product = maps[:, 0].unflatten(0, (5, -1))
    c1, c2 = 0.01**2, 0.03**2
    variances = (square_x - mean_x**2).clamp(min=0) + (square_y - mean_y**2).clamp(min=0)
    covariance = product - mean_x * mean_y
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def _decibel(errors: torch.Tensor) -> float:
    values = [CAP if error <= 0 else min(CAP, -10 * math.log10(error)) for error in errors.tolist()]
    return sum(values) / len(values)


def _clips(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"the clips differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim not in (4, 5):
        raise ValueError(f"a clip has shape {tuple(a.shape)}; use (frames, 3, height, width), or several stacked")
    a, b = (x.detach().float() if x.ndim == 5 else x.detach().float()[None] for x in (a, b))
    return a, b
