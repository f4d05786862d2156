"""An image from a prompt, with any host pipeline."""

from __future__ import annotations

from typing import Any

import torch

from .hosts import Progress, accepted, call_host


def text_to_image(
    pipe: Any,
    prompt: str,
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    negative_prompt: str = "",
    callback: Progress | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Make one image. A video host is asked for a clip of one frame.

    Args:
        pipe: a Diffusers image pipeline (FLUX, Qwen-Image, SD3, PixArt, ...) or video pipeline.
        prompt: what to show.
        height, width, steps, guidance_scale: None leaves the host's default.
        seed: seeds a CPU generator, so that the noise does not depend on the device.

    Expert arguments:
        negative_prompt: what to avoid; the empty one leaves the host's default.
        callback: called as callback(done, steps) after every step.
        kwargs: handed to the host as they are.

    Returns:
        (3, H, W) float32 on the CPU in [0, 1].

    Raises:
        ValueError: the host does not take one of the arguments.
    """
    wanted = {
        "prompt": prompt,
        "negative_prompt": negative_prompt or None,
        "num_frames": 1 if "num_frames" in accepted(pipe) else None,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    return call_host(pipe, wanted, seed=seed, callback=callback, extra=kwargs)[0]
