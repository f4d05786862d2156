"""The video VAE in one pass over the whole clip, with the weights of an ``AutoencoderKLWan``.

Diffusers encodes four frames and decodes one latent frame at a time and hands caches from chunk to chunk, which saves
memory and costs thousands of small launches. Its convolutions are causal, so one pass over all frames computes the
same function (tests compare them); training and measuring on a GPU use this.
"""

from __future__ import annotations

import torch


def _patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    b, c, t, h, w = x.shape
    x = x.view(b, c, t, h // patch, patch, w // patch, patch)
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, c * patch * patch, t, h // patch, w // patch)


def _unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    b, c, t, h, w = x.shape
    x = x.view(b, c // (patch * patch), patch, patch, t, h, w)
    return x.permute(0, 1, 4, 5, 3, 6, 2).reshape(b, c // (patch * patch), t, h * patch, w * patch)


def moments(vae, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (B, 3, T, H, W) with T = 1 + 4k -> mean and log-variance of the latents, before normalisation, fp32."""
    encoder = vae.encoder
    h = encoder.conv_in(_patchify(clips, vae.config.patch_size))
    for layer in encoder.down_blocks:
        h = layer(h)
        if getattr(layer, "mode", "") == "downsample3d" and h.shape[2] > 1:
            # The first frame stands alone; every later latent frame sees the two frames it covers and the one before.
            h = torch.cat([h[:, :, :1], layer.time_conv(h)], 2)
    h = encoder.mid_block(h)
    h = vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(h))))
    mean, log_variance = h.float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def reconstruct(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents, before normalisation, -> clips (B, 3, 1 + 2(t - 1), H, W), fp32, not clamped."""
    decoder = vae.decoder
    h = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            h = resnet(h)
        for up in block.upsamplers or ():
            if up.mode == "upsample3d" and h.shape[2] > 1:
                h = torch.cat([h[:, :, :1], _twice(up, h[:, :, 1:])], 2)
            h = up(h)
    h = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(h)))
    return _unpatchify(h, vae.config.patch_size).float()


def _twice(up, h: torch.Tensor) -> torch.Tensor:
    """Two frames from each latent frame after the first, as the cached path does (it never shows them the first)."""
    b, c, t, height, width = h.shape
    pair = up.time_conv(h).view(b, 2, c, t, height, width)
    return pair.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, height, width)


def scale(vae, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents from the VAE's configuration, (1, channels, 1, 1, 1) each."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    return mean, std


def encode(vae, clips: torch.Tensor) -> torch.Tensor:
    """Clips in [-1, 1] -> normalised latents, fp32: what the transformer is trained on."""
    mean, std = scale(vae, clips.device)
    return (moments(vae, clips)[0] - mean) / std


def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents -> clips in [-1, 1], fp32."""
    mean, std = scale(vae, latents.device)
    return reconstruct(vae, latents * std + mean).clamp(-1, 1)
