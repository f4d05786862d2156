"""What a composed run is compared with, and when it is the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse import Summary, summary
from dit_sparse.replay import Recording, overlap, record, replay
from tests.composition import hosts
from tests.composition.cases import Case

OVERLAP, DIFFERENCE, ROUNDING = 0.98, 0.02, 2.0  # of block lists at least; of outputs at most; times the plain error


@dataclass
class Ran:
    """One run: latents, masks and summary."""

    out: Tensor
    masks: Recording
    summary: Summary


def difference(x: Tensor, y: Tensor) -> float:
    """Root mean square of x - y over that of y."""
    return float((x - y).norm() / y.norm())


def ran(pipe: Any, guidance: str) -> Ran:
    """A run with its masks recorded."""
    with record(pipe) as masks:
        out = hosts.run(pipe, guidance)
    return Ran(out, masks, summary(pipe))


def replayed(pipe: Any, guidance: str, masks: Recording) -> Tensor:
    """A run with these masks, every one of which is used."""
    with replay(pipe, masks) as used:
        out = hosts.run(pipe, guidance)
    assert used == set(masks) and not summary(pipe).fallbacks
    return out


def _switched_on(case: Case, dtype: torch.dtype, device: str) -> Any:
    """The case with nothing compiled or offloaded, and with the LoRA a part of the weights."""
    pipe = hosts.build(case.guidance, dtype, device)
    if case.lora == "LoRA":
        hosts.add_lora(pipe, fuse=True)
    return hosts.switch_on(pipe, case)


def plain(case: Case, device: str = "cpu") -> Ran:
    """The run that a composed one is compared with: the same method, cache, guidance and linear layers, with nothing
    compiled or offloaded, and the LoRA a part of the weights."""
    return _plain(case._replace(run="eager", offload="no offload"), device)


@functools.lru_cache(maxsize=8)
def _plain(case: Case, device: str) -> Ran:
    return ran(_switched_on(case, torch.bfloat16, device), case.guidance)


def truth(case: Case, masks: Recording, device: str = "cpu") -> Tensor:
    """The plain run in float32, its linear layers too, with these masks."""
    return replayed(_switched_on(case._replace(linear="bf16"), torch.float32, device), case.guidance, masks)


def problem_live(live: Ran, want: Ran, most: float = DIFFERENCE) -> str:
    """What is wrong with a run whose masks are its own, "" when nothing is.

    Args:
        live, want: the composed run and the plain one.
        most: largest difference of their outputs.
    """
    if live.summary.skipped_per_step != want.summary.skipped_per_step:
        return f"skipped {live.summary.skipped_per_step}, the plain run {want.summary.skipped_per_step}"
    found = overlap(want.masks, live.masks)
    if found.share < OVERLAP or found.only_first or found.only_second:
        return f"other blocks: {found}"
    apart = difference(live.out, want.out)
    return "" if apart <= most else f"outputs differ by {apart:.4f}"


def problem_replayed(case: Case, again: Tensor, want: Ran, device: str = "cpu") -> str:
    """What is wrong with a run that had the plain one's masks, "" when nothing is: rounding is all that is left."""
    exact = truth(case, want.masks, device)
    error, allowed = difference(again, exact), ROUNDING * difference(want.out, exact)
    return "" if error <= allowed else f"error {error:.4f} against float32, {allowed:.4f} is allowed"
