"""Runs of a bare transformer as a pipeline makes them, in which every branch gets the same input at every step."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from tests.bridge.hosts import HOSTS, Host, call
from tests.bridge.more_hosts import MORE

ALL = {h.name: h for h in (*HOSTS, *MORE)}


def deeper(h: Host) -> Host:
    """The host with at least two blocks in its stack."""
    import dataclasses

    single = "num_single_layers" in h.config or "num_single_dit_layers" in h.config
    names = [n for n in ("num_layers", "num_visual_blocks") if h.config.get(n) == 1]
    if single or not names:
        return h
    return dataclasses.replace(h, config={**h.config, names[0]: 2})


class Pipe:
    """What `enable` needs of a pipeline: a transformer and a scheduler that counts."""

    def __init__(self, model: torch.nn.Module, **attributes: Any) -> None:
        self.components = {"transformer": model}
        self.transformer = model
        self.scheduler = SimpleNamespace(num_inference_steps=None, timesteps=None, step_index=None)
        for name, value in attributes.items():
            setattr(self, name, value)

    def run(self, inputs: dict[str, dict[str, Any]], steps: int, named: bool = True, begin: int = 0,
            reset: bool = True) -> dict[str, list[torch.Tensor]]:
        """The outputs by branch; `named`: the pipeline opens a cache context for each."""
        self.scheduler.num_inference_steps = steps
        self.scheduler.timesteps = torch.linspace(990, 10, steps)
        found: dict[str, list[torch.Tensor]] = {branch: [] for branch in inputs}
        for step in range(begin, steps):
            self.scheduler.step_index = step
            for branch, given in inputs.items():
                context = getattr(self.transformer, "cache_context", None)
                with context(branch) if named and context else nullcontext():
                    found[branch].append(call(self.transformer, given))
        if reset and hasattr(self.transformer, "_reset_stateful_cache"):
            self.transformer._reset_stateful_cache()
        return found


def two_branches(h: Host, batch: int = 1) -> dict[str, dict[str, Any]]:
    """Inputs that differ in the latent only: {"cond": ..., "uncond": ...}."""
    cond = h.inputs(batch)
    other = {**h.inputs(batch)}
    other["hidden_states"] = -0.7 * other["hidden_states"] + 0.3
    return {"cond": cond, "uncond": other}
