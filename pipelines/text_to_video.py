"""A video from a prompt, with any host pipeline."""

from __future__ import annotations

from typing import Any

import torch

from .hosts import Progress, call_host


def text_to_video(
    pipe: Any,
    prompt: str,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    negative_prompt: str = "",
    callback: Progress | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Make one clip; sparse when `enable` or `set_attn_processor` was called on the pipeline.

    Args:
        pipe: a Diffusers text-to-video pipeline (Wan, HunyuanVideo, CogVideoX, LTX, Mochi, ...).
        prompt: what to show.
        frames, height, width, steps, guidance_scale: None leaves the host's default.
        seed: seeds a CPU generator, so that the noise does not depend on the device.

    Expert arguments:
        negative_prompt: what to avoid; the empty one leaves the host's default.
        callback: called as callback(done, steps) after every step.
        kwargs: handed to the host as they are.

    Returns:
        (F, 3, H, W) float32 on the CPU in [0, 1].

    Raises:
        ValueError: the host does not take one of the arguments.
    """
    wanted = {
        "prompt": prompt,
        "negative_prompt": negative_prompt or None,
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    return call_host(pipe, wanted, seed=seed, callback=callback, extra=kwargs)
