"""A clip changed by a prompt, with any host pipeline that can start from a video."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .hosts import Progress, accepted, call_host

# Text-to-video hosts whose parts also make up a video-to-video pipeline of Diffusers.
SIBLINGS = {
    "WanPipeline": "WanVideoToVideoPipeline",
    "CogVideoXPipeline": "CogVideoXVideoToVideoPipeline",
}


def video_to_video(
    pipe: Any,
    video: torch.Tensor,
    prompt: str,
    strength: float = 0.6,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    negative_prompt: str = "",
    callback: Progress | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Noise a clip part of the way and denoise it towards the prompt.

    Args:
        pipe: a video-to-video pipeline, or a text-to-video pipeline with such a sibling (Wan, CogVideoX); the
            sibling shares its parts, sparse attention included.
        video: (F, 3, H, W) float in [0, 1].
        prompt: what to show.
        strength: how far to go back into noise, in (0, 1]; the share of the steps that are run.
        steps, guidance_scale: None leaves the host's default.
        seed: seeds a CPU generator, so that the noise does not depend on the device.

    Expert arguments:
        negative_prompt: what to avoid; the empty one leaves the host's default.
        callback: called as callback(done, steps) after every step.
        kwargs: handed to the host as they are.

    Returns:
        (F, 3, H, W) float32 on the CPU in [0, 1].

    Raises:
        ValueError: a wrong strength or clip, or a host that cannot start from a video.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength!r} is not allowed; use a number in (0, 1]")
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"video has shape {tuple(video.shape)}; use (frames, 3, height, width)")
    host = pipe if {"video", "strength"} <= set(accepted(pipe)) else sibling(pipe)
    wanted = {
        "video": video[None],
        "prompt": prompt,
        "negative_prompt": negative_prompt or None,
        "height": video.shape[2],
        "width": video.shape[3],
        "strength": strength,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    return call_host(host, wanted, seed=seed, callback=callback, extra=kwargs)


def sibling(pipe: Any) -> Any:
    """The video-to-video pipeline made of the same parts as `pipe`.

    Raises:
        ValueError: Diffusers has none for this class.
    """
    import diffusers

    name = SIBLINGS.get(type(pipe).__name__)
    if name is None:
        able = f"{', '.join(SIBLINGS)}, or a host that takes video="
        raise ValueError(f"{type(pipe).__name__} cannot start from a video; use one of {able}")
    cls = getattr(diffusers, name)
    wanted = inspect.signature(cls.__init__).parameters
    host = cls(**{part: value for part, value in pipe.components.items() if part in wanted})
    # The sibling guesses its compression from the length of a list in the VAE's configuration, which holds only for
    # the released Wan VAE; the pipeline at hand knows.
    for attribute in ("vae_scale_factor_spatial", "vae_scale_factor_temporal", "video_processor"):
        if hasattr(pipe, attribute):
            setattr(host, attribute, getattr(pipe, attribute))
    host.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return host
