"""Measures of a clip against a reference (the dense clip of the same seed) that need PyTorch or torchmetrics only.

All take `reference` and `video`, (F, 3, H, W) in [0, 1] of equal shape, and return one number.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import fidelity
from .clips import check_pair, luma
from .motion import temporal_flickering

# Variance that rounding to 8 bits alone gives a Laplacian (1/12 of a level squared, times 4^2 + 4): two clips that are
# flat but for it are equally sharp.
_ROUNDING = 20 / 12 / 255**2
_MS_SIDE = (11 - 1) * 2**4 + 1  # the window of 11 must fit into the fifth scale


def psnr(reference: torch.Tensor, video: torch.Tensor) -> float:
    """-10 log10 of the mean squared error over the whole clip, capped at 100 dB.

    Range 0 to 100 dB, higher is nearer.
    """
    return fidelity.psnr(*check_pair(reference, video))


def psnr_frames(reference: torch.Tensor, video: torch.Tensor) -> float:
    """Mean over the frames of each frame's PSNR, capped at 100 dB.

    Range 0 to 100 dB, higher is nearer. One good frame weighs more than in `psnr`.
    """
    return fidelity.psnr_frames(*check_pair(reference, video))


def ssim(reference: torch.Tensor, video: torch.Tensor) -> float:
    """Structural similarity, Gaussian window of 11, mean over the frames (doi 10.1109/TIP.2003.819861).

    (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2)). Range -1 to 1, higher is nearer.
    Equal to torchmetrics' structural_similarity_index_measure, which the tests compare it with.
    """
    return fidelity.ssim(*check_pair(reference, video, side=6))


def ms_ssim(reference: torch.Tensor, video: torch.Tensor) -> float:
    """Multi-scale structural similarity over five scales (Wang et al. 2003, doi 10.1109/ACSSC.2003.1292216).

    Product over the scales of contrast and structure to the published powers, times the luminance of the last. Range
    0 to 1, higher is nearer. By torchmetrics.

    Raises:
        ValueError: sides below 161 pixels, where the fifth scale is smaller than the window.
    """
    reference, video = check_pair(reference, video, side=_MS_SIDE)
    measure = _torchmetrics().multiscale_structural_similarity_index_measure
    # One frame at a time: all scales of a long clip at once are gigabytes.
    scores = [
        float(measure(b[None], a[None], data_range=1.0, normalize="relu"))
        for a, b in zip(reference, video, strict=True)
    ]
    return sum(scores) / len(scores)


def flicker_difference(reference: torch.Tensor, video: torch.Tensor) -> float:
    """Temporal flickering of the video minus that of the reference (VBench's formula, arXiv 2311.17982).

    Range -1 to 1, nearest to 0 is best: below 0 the video flickers more, above 0 it lost motion.
    """
    reference, video = check_pair(reference, video, least=2)
    return temporal_flickering(video) - temporal_flickering(reference)


def sharpness_drift(reference: torch.Tensor, video: torch.Tensor) -> float:
    """log2 of the video's sharpness over the reference's; sharpness is the variance of luma's Laplacian.

    Mean over frames before the ratio. Range about -10 to 10, nearest to 0 is best: -1 is half as sharp, 1 is twice
    as sharp or noisier. (Pech-Pacheco et al. 2000, doi 10.1109/ICPR.2000.903548)
    """
    reference, video = check_pair(reference, video, side=3)
    return float(torch.log2((_sharpness(video) + _ROUNDING) / (_sharpness(reference) + _ROUNDING)))


def _sharpness(video: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(luma(video)[:, None], kernel).flatten(1).var(1).mean()


def latent_error(reference: torch.Tensor, latent: torch.Tensor) -> float:
    """Relative error ||latent - reference|| / ||reference|| of one step's latents, of any equal shape.

    Range 0 upwards, lower is nearer; 0 for two that are all zero.

    Raises:
        ValueError: different shapes, or values that are not finite.
    """
    if reference.shape != latent.shape:
        raise ValueError(f"latent has shape {tuple(latent.shape)}, reference {tuple(reference.shape)}; use equal ones")
    a, b = reference.detach().float(), latent.detach().float()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("reference or latent has values that are not finite")
    size = float(a.norm())
    away = float((b - a).norm())
    return away / size if size else (0.0 if away == 0 else float("inf"))


def latent_errors(reference: Sequence[torch.Tensor], latents: Sequence[torch.Tensor]) -> list[float]:
    """:func:`latent_error` of every step.

    Raises:
        ValueError: different numbers of steps.
    """
    if len(reference) != len(latents):
        raise ValueError(f"latents has {len(latents)} steps and reference {len(reference)}; use runs of equal length")
    return [latent_error(a, b) for a, b in zip(reference, latents, strict=True)]


def lpips(reference: torch.Tensor, video: torch.Tensor) -> float:
    """Learned perceptual distance of AlexNet features, mean over the frames (arXiv 1801.03924).

    Range 0 to about 1, lower is nearer. By torchmetrics, when torchvision and its weights are on this disk.
    """
    net = _learned("lpips")
    return _over_frames(net, *check_pair(reference, video, side=32))


def dists(reference: torch.Tensor, video: torch.Tensor) -> float:
    """Distance of structure and texture of VGG features, mean over the frames (arXiv 2004.07728).

    Range 0 to about 1, lower is nearer. By torchmetrics, when torchvision and its weights are on this disk.
    """
    net = _learned("dists")
    return _over_frames(net, *check_pair(reference, video, side=32))


@torch.no_grad()
def _over_frames(net: Any, reference: torch.Tensor, video: torch.Tensor) -> float:
    scores = [float(net(b[None], a[None])) for a, b in zip(reference, video, strict=True)]
    return sum(scores) / len(scores)


def without_torchmetrics() -> str:
    """Why torchmetrics cannot be used here; empty when it can."""
    try:
        _torchmetrics()
    except ValueError as error:
        return str(error)
    return ""


def without_lpips() -> str:
    """Why `lpips` cannot be measured here; empty when it can."""
    return _missing_weights("lpips", "alexnet-owt-7be5be79.pth")


def without_dists() -> str:
    """Why `dists` cannot be measured here; empty when it can."""
    return _missing_weights("dists", "vgg16-397923af.pth")


@functools.cache
def _missing_weights(name: str, file: str) -> str:
    # Looked for before anything is called: the libraries would try to download, and hang where there is no network.
    if without_torchmetrics():
        return without_torchmetrics()
    try:
        importlib.import_module("torchvision.models")
    except Exception as error:
        # A torchvision of another PyTorch raises RuntimeError or AttributeError instead of ImportError.
        return f"needs torchvision ({type(error).__name__} when it is imported)"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    return "" if path.is_file() else f"needs torchvision's weights for {name}, {file} in torch.hub's checkpoints"


@functools.cache
def _learned(name: str) -> Any:
    reason = without_lpips() if name == "lpips" else without_dists()
    if reason:
        raise ValueError(f"{name} {reason}")
    if name == "lpips":
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Network

        return Network(net_type="alex", normalize=True).eval()
    # The network itself: torchmetrics' metric builds a new VGG for every frame.
    from torchmetrics.functional.image.dists import DISTSNetwork

    return DISTSNetwork().eval()


def _torchmetrics() -> Any:
    try:
        return importlib.import_module("torchmetrics.functional.image")
    except Exception as error:
        reason = f"needs torchmetrics ({type(error).__name__} when it is imported); pip install 'dit-sparse[eval]'"
        raise ValueError(reason) from error
