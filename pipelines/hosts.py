"""Calling any Diffusers pipeline by one set of names, and reading its result as tensors in [0, 1]."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Progress = Callable[[int, int], None]

# Our names of sizes and steps, and those of most hosts.
HOST_NAMES = {"height": "height", "width": "width", "frames": "num_frames", "steps": "num_inference_steps",
              "guidance_scale": "guidance_scale"}


def host_arguments(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline's call by the hosts' names; those that are None stay the host's own."""
    return {HOST_NAMES.get(name, name): value for name, value in ours.items() if value is not None}


def accepted(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments that the pipeline's call takes, by name."""
    return inspect.signature(pipe.__call__).parameters


def call_host(
    pipe: Any,
    wanted: Mapping[str, Any],
    *,
    seed: int,
    callback: Progress | None = None,
    extra: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Run a pipeline and return what it made.

    Args:
        pipe: a Diffusers pipeline for video or images.
        wanted: arguments by the names that most hosts use; None means the host's own default.
        seed: seeds a CPU generator, so that the noise does not depend on the device.
        callback: called as callback(done, steps) after every denoising step.
        extra: further arguments for this host alone.

    Returns:
        (F, 3, H, W) float32 on the CPU in [0, 1]; F is 1 for an image host.

    Raises:
        ValueError: the host does not take one of the arguments, or made numbers that are not finite.
    """
    return call_batch(pipe, wanted, seeds=(seed,), callback=callback, extra=extra)[0]


def call_batch(
    pipe: Any,
    wanted: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    callback: Progress | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[torch.Tensor]:
    """`call_host` for several prompts in one batch, each with the noise that its seed gives it alone.

    Args:
        pipe, callback, extra: as in `call_host`.
        wanted: as there; with several seeds `prompt` is a list of as many texts.
        seeds: one for each.

    Returns:
        What `call_host` returns, for each of them.

    Raises:
        ValueError: as there.
    """
    names = accepted(pipe)
    arguments = {name: value for name, value in {**wanted, **(extra or {})}.items() if value is not None}
    unknown = [name for name in arguments if name not in names]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no argument {unknown[0]!r}")
    length = _text_length(pipe, names)
    if length is not None:
        arguments.setdefault("max_sequence_length", length)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    arguments["generator"] = generators if len(generators) > 1 else generators[0]
    arguments["output_type"] = "pt"
    if callback is not None:
        arguments.update(_progress(pipe, names, callback))
    with torch.no_grad():
        output = pipe(**arguments)
    made = output.frames if hasattr(output, "frames") else output.images
    # [B, F, 3, H, W] from a video host, [B, 3, H, W] from an image host, whose image stands for a frame
    clips = (made if made.ndim == 5 else made[:, None])[: len(generators)].detach().float().cpu()
    if not torch.isfinite(clips).all():  # as pixels they would be black
        dtype = str(getattr(pipe, "dtype", "dtype")).removeprefix("torch.")
        raise ValueError(f"{type(pipe).__name__} made numbers that are not finite: its weights are damaged, or they "
                         f"do not bear {dtype}")
    return list(clips.clamp(0, 1))


def _text_length(pipe: Any, names: Mapping[str, inspect.Parameter]) -> int | None:
    """A tokenizer that was made for short prompts says so; hosts pad to 226 or 512 tokens otherwise.

    Of several tokenizers the longest decides: FLUX and SD3 have CLIP's 77 tokens beside T5's 512.
    """
    if "max_sequence_length" not in names:
        return None
    made = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    lengths = [n for n in (getattr(one, "model_max_length", None) for one in made) if isinstance(n, int)]
    usual = names["max_sequence_length"].default
    return max(lengths) if lengths and isinstance(usual, int) and max(lengths) < usual else None


def _progress(pipe: Any, names: Mapping[str, inspect.Parameter], callback: Progress) -> dict[str, Any]:
    def report(done: int) -> None:
        callback(done, len(pipe.scheduler.timesteps))

    if "callback_on_step_end" in names:

        def at_step_end(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            report(step + 1)
            return tensors

        return {"callback_on_step_end": at_step_end}
    if "callback" in names:
        return {"callback": lambda step, _time, _latents: report(step + 1)}
    return {}
