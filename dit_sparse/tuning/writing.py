"""From what a tuning run found to the preset that is saved."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .headplan import HeadPlan
from .preset import TunedPreset, model_identity
from .run import argument
from .targets import CAP

__all__ = ["Verified", "clip_entry", "preset_of", "prompt_hash"]

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def prompt_hash(prompt: str) -> str:
    """Eight digits that tell prompts apart without giving them away."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def clip_entry(prompt: str, seed: int, value: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved of any clip: which one it was, and the measures that there are.

    Args:
        prompt, seed: of the clip.
        value: measures by name, and more.
    """
    found: dict[str, Any] = {"prompt_hash": prompt_hash(prompt), "seed": seed}
    return found | {name: round(min(value[name], CAP), 4) for name in ("psnr", "ssim", "lpips") if name in value}


@dataclass(frozen=True)
class Verified:
    """How a run ended.

    Args:
        plan: what it chose.
        evidence: of the held-out clips.
        loop: of the loop's clips, run with this plan too; None where it was not.
        met: whether all these clips reach the target.
        step_cache: of the held-out clips beside a step cache; None where none was named.
    """

    plan: HeadPlan
    evidence: list[dict[str, Any]]
    loop: dict[str, Any] | None
    met: bool
    step_cache: dict[str, Any] | None = None


def preset_of(run: Any, found: Verified) -> TunedPreset:
    """The preset of a finished `tune`.

    Args:
        run: the run: its pipe, call, target, problem and so on.
        found: how it ended.
    """
    from .. import __version__

    plan = found.plan
    grid, device = run.problem.probe.grid, run.device()
    identity = model_identity(run.model)
    identity["heads"] = identity["heads"] or plan.heads
    scale = argument(run.pipe, run.call, "guidance_scale")
    ceiling = run.ceiling_db
    return TunedPreset(
        model=identity, grid=grid.sizes, text=grid.text, steps=plan.steps,
        scheduler=type(run.pipe.scheduler).__name__,
        cfg=float(scale) if isinstance(scale, (int, float)) else None,
        dtype=_DTYPES.get(run.model.dtype, str(run.model.dtype).removeprefix("torch.")),
        gpu=_gpu(device), dense_kernel=_dense_kernel(device), target=str(run.target), statistic=run.statistic,
        met=found.met, ceiling_db=None if ceiling is None else round(min(ceiling, 1e3), 2), buckets=plan.edges,
        candidates=plan.candidates, choices=plan.choices, evidence=tuple(found.evidence), loop=found.loop,
        step_cache=found.step_cache, checks=tuple(run.checks) or None, version=__version__,
        date=datetime.date.today().isoformat())


def _gpu(device: Any) -> str:
    if torch.device(device).type != "cuda":
        return str(torch.device(device).type)
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _dense_kernel(device: Any) -> str:
    from ..kernels.dense import prefers_cudnn

    if torch.device(device).type != "cuda":
        return "pytorch"
    return "cudnn" if prefers_cudnn(torch.empty(1, 1, 1, 64, device=device, dtype=torch.bfloat16)) else "pytorch"
