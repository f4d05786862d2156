"""Batched sampling with the parts themselves: what ``WanPipeline`` computes, many clips at a time, without its loop."""

from __future__ import annotations

import torch

from . import model, whole, world


def embed(text_encoder, ids: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """Token ids (B, 32) -> text features (B, length, 128), as the pipeline makes them.

    The encoder sees the padding mask; past the end of each caption the features are zero. The transformer attends to
    those zeros without a mask, so their number (`length`, 32 unless told) is part of its input.
    """
    mask = (ids != 0).long()
    features = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
    if length is not None and length > ids.shape[1]:
        features = torch.nn.functional.pad(features, (0, 0, 0, length - ids.shape[1]))
    return features


def sigmas(steps: int, shift: float = model.SHIFT) -> list[float]:
    """Noise levels of the flow matching scheduler, from 1 to 0, `steps` + 1 of them."""
    scheduler = model.build_scheduler()
    if shift != model.SHIFT:
        scheduler.set_shift(shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


@torch.no_grad()
def generate_latents(
    transformer,
    text_encoder,
    ids: torch.Tensor,
    frames: int = 17,
    size: int = 256,
    steps: int = 20,
    guidance: float = 3.0,
    length: int | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalised latents of one square clip for every row of `ids` (:class:`world.TokenTables` makes them).

    `noise` (of ``model.latent_shape``) fixes the start; otherwise it is drawn from the global generator. Without
    guidance (1 or less) the transformer runs once a step instead of twice.
    """
    device, count = ids.device, len(ids)
    z = torch.randn(model.latent_shape(count, frames, size), device=device) if noise is None else noise.float()
    guided = guidance > 1
    text = embed(text_encoder, torch.cat([ids, world.empty_ids(count, device)]) if guided else ids, length)
    levels = sigmas(steps)
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        x = torch.cat([z, z]) if guided else z
        t = torch.full((len(x),), now * 1000, device=device)
        v = transformer(x, t, text, return_dict=False)[0].float()
        if guided:
            v = v[count:] + guidance * (v[:count] - v[count:])
        z = z + (following - now) * v
    return z


@torch.no_grad()
def generate(vae, transformer, text_encoder, ids: torch.Tensor, batch: int = 32, **options) -> torch.Tensor:
    """Clips (B, 3, frames, size, size) in [-1, 1] for every row of `ids`; options of :func:`generate_latents`."""
    clips = []
    noise = options.pop("noise", None)
    for start in range(0, len(ids), batch):
        part = None if noise is None else noise[start : start + batch]
        z = generate_latents(transformer, text_encoder, ids[start : start + batch], noise=part, **options)
        clips += [whole.decode(vae, piece) for piece in z.split(8)]
    return torch.cat(clips)
