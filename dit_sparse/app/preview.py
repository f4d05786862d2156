"""Pictures of a run that goes on: latents to pixels by one matrix, fitted to the model's own encoder when it is loaded.

A decoder takes as long as a step or more; a matrix costs nothing. What is shown is the clip that the model is heading
for, x0 = x - sigma * v, not the noisy latents: the velocity v is known from two steps of a flow-matching run.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CELL = 4  # pixels across of what one latent becomes
SHOWN = 4  # frames of a strip
_SIDE, _FRAMES, _CLIPS = 64, 5, 10  # of the clips that the matrices are fitted to
_RIDGE = 1e-3


@dataclass
class Preview:
    """A linear map from latents to pixels.

    Attributes:
        weight: (2, channels + 1, 3 * CELL * CELL) float32 on the CPU, of the first frame, which such encoders code
            alone, and of the others; the last row is the bias.
        mean, std: (channels,) float32: the latents of a run times `std` plus `mean` are those of the encoder.
    """

    weight: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, pipe: Any) -> Preview | None:
        """Fit the map to the pipeline's VAE on clips of coloured shapes; None for a VAE of another kind than Wan's.

        Args:
            pipe: a pipeline on its device.
        """
        vae = getattr(pipe, "vae", None)
        config: Any = getattr(vae, "config", None)
        if vae is None or not hasattr(config, "latents_mean") or not hasattr(config, "latents_std"):
            return None
        clips = _coloured_clips()
        with torch.no_grad():
            try:
                moments = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode()
            except Exception:  # a VAE that wants other sizes: the page goes without pictures of the run
                return None
        if moments.ndim != 5:
            return None
        latents = moments.float().cpu()
        frames, height, width = latents.shape[2:]
        # (B, 3, F, H, W) -> one picture for each latent frame, CELL pixels for each latent
        time = torch.linspace(0, clips.shape[2] - 1, frames).round().to(torch.int64)
        pictures = torch.nn.functional.interpolate(
            clips[:, :, time].transpose(1, 2).flatten(0, 1), (height * CELL, width * CELL), mode="area")
        # [B, F, h, w, .]
        target = torch.nn.functional.pixel_unshuffle(pictures, CELL).permute(0, 2, 3, 1).unflatten(0, (-1, frames))
        rows = _with_one(latents.permute(0, 2, 3, 4, 1))
        weights = [_solve(rows[:, some].flatten(0, 3), target[:, some].flatten(0, 3))
                   for some in (slice(1), slice(1, None))]
        return cls(torch.stack(weights), torch.tensor(config.latents_mean), torch.tensor(config.latents_std))

    def pictures(self, latents: Tensor, most: int = SHOWN) -> Tensor:
        """Some frames of a clip of latents.

        Args:
            latents: (1, C, F, h, w), as a run holds them.
            most: at most so many frames, at even distances.

        Returns:
            (frames, 3, h * CELL, w * CELL) float32 in [0, 1].
        """
        last = latents.shape[2] - 1
        # The first frame, coded alone, is the least linear of all: it is shown where there is no other.
        chosen = torch.linspace(min(1, last), last, min(most, max(last, 1))).round().to(torch.int64)
        some = latents[0, :, chosen.to(latents.device)].float().cpu()
        some = some * self.std[:, None, None, None] + self.mean[:, None, None, None]
        pixels = _with_one(some.permute(1, 2, 3, 0)) @ self.weight[chosen.clamp(max=1), None]
        pixels = torch.nn.functional.pixel_shuffle(pixels.permute(0, 3, 1, 2), CELL)
        return (pixels * 0.5 + 0.5).clamp(0, 1)


class Strip:
    """Frames of a run after every step, as a data address of one picture.

    Args:
        preview: the map.
        every: a picture after so many steps.
    """

    def __init__(self, preview: Preview, every: int = 1) -> None:
        self.preview, self.every = preview, every
        self._last: tuple[Tensor, float] | None = None

    def step(self, scheduler: Any, latents: Tensor, done: int) -> str | None:
        """Take in the latents after a step; the picture when one is due.

        Args:
            scheduler: of the pipeline; its `sigmas` tell how noisy the latents are.
            latents: after the step.
            done: steps done.
        """
        if latents.ndim != 5 or latents.shape[1] != len(self.preview.mean):
            return None
        sigmas = getattr(scheduler, "sigmas", None)
        sigma = float(sigmas[done]) if sigmas is not None and len(sigmas) > done else 0.0
        last, self._last = self._last, (latents.detach().clone(), sigma)
        if (done % self.every or last is None) and sigma:
            return None  # after the first step there is nothing but noise to see
        clean = latents
        if last is not None and last[1] > sigma > 0:
            clean = latents - sigma * (latents - last[0]) / (sigma - last[1])
        return strip_address(self.preview.pictures(clean))


def strip_address(pictures: Tensor, quality: int = 80) -> str:
    """Pictures (n, 3, H, W) in [0, 1] side by side, as a data address of a JPEG."""
    from PIL import Image

    from ..pipelines.video_io import to_bytes

    image = Image.fromarray(to_bytes(torch.cat(list(pictures), dim=2)[None])[0])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _solve(rows: Tensor, target: Tensor) -> Tensor:
    """Least squares with a little ridge."""
    gram = rows.T @ rows + _RIDGE * len(rows) * torch.eye(rows.shape[1])
    return torch.linalg.solve(gram, rows.T @ target)


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def _coloured_clips() -> Tensor:
    """(_CLIPS, 3, _FRAMES, _SIDE, _SIDE) in [-1, 1]: smooth colours and greys that drift, with sharp discs on them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(_CLIPS, 3, 3, 8, 8, generator=generator)
    coarse[::2] = coarse[::2, :1]
    clips = torch.nn.functional.interpolate(coarse, (_FRAMES, _SIDE, _SIDE), mode="trilinear")
    y, x = torch.meshgrid(torch.arange(_SIDE), torch.arange(_SIDE), indexing="ij")
    for clip in clips:
        for disc in range(6):
            at, move = torch.rand(2, generator=generator) * _SIDE, torch.randn(2, generator=generator) * 3
            colour, radius = torch.rand(3, generator=generator), 4 + 14 * torch.rand(1, generator=generator)
            colour = (colour * 2 - 0.5).clamp(0.1, 0.9) if disc % 2 else colour
            for frame in range(_FRAMES):
                centre = at + frame * move
                inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
                clip[:, frame, inside] = colour[:, None]
    return clips * 2 - 1
