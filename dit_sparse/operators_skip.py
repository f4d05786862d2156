"""How far below the running maximum a block must lie to be left out: fitted thresholds, and lists that shrink.

Sources: BLASST (arXiv 2512.12087) and its calibration in NVIDIA's Model-Optimizer; LiteAttention (arXiv 2511.11062).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .bits import pack_bits, unpack_bits
from .blockmask import BlockMask
from .operators import Attend, SkipBlocks

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["CarryBlocks", "CountBlocks", "Fit", "SkipToTarget", "TRIALS", "fit_exponential"]

# Thresholds that a counting pass tries, highest first: 22 from 1e-12 to .99, as in Model-Optimizer for diffusion.
TRIALS = tuple(10 ** (math.log10(0.99) + (-12 - math.log10(0.99)) * i / 21) for i in range(22))
VALID = (0.1, 0.9)  # shares outside of this say nothing about the curve
FEWEST = 3


def fit_exponential(scale_factor: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of log(scale_factor) = log a + b * share over the points with a share in [.1, .9].

    Args:
        scale_factor: (n,), threshold * number of keys, positive.
        share: (n,), share of the blocks left out.

    Returns:
        log a, b (not below 0) and the number of points used; b is 0 where the points do not determine it. Nothing
        waits for the device.
    """
    weight = ((share >= VALID[0]) & (share <= VALID[1])).to(scale_factor.dtype)
    count = weight.sum()
    y, share = scale_factor.log(), share.to(scale_factor.dtype)
    mean_y, mean_s = ((weight * x).sum() / count.clamp(min=1) for x in (y, share))
    variance = (weight * (share - mean_s).square()).sum()
    slope = (weight * (share - mean_s) * (y - mean_y)).sum() / variance.clamp(min=1e-12)
    slope = torch.where(variance > 1e-12, slope, 0).clamp(min=0)
    return mean_y - slope * mean_s, slope, count


@dataclass(frozen=True)
class Fit:
    """scale_factor = a * exp(b * share): the threshold for a wished share, whatever the length of the sequence.

    Args:
        a, b: the curve.
        r2: share of the variance of log(scale_factor) that it explains.
        low, high: observed shares; beyond them the curve is a guess.
    """

    a: float
    b: float
    r2: float = 1.0
    low: float = VALID[0]
    high: float = VALID[1]

    @classmethod
    def of(cls, scale_factor: Tensor, share: Tensor) -> Fit:
        """The fit of measured points, see `fit_exponential`.

        Raises:
            ValueError: with fewer than ten points, or fewer than three with a share in [.1, .9].
        """
        inside = (share >= VALID[0]) & (share <= VALID[1])
        if share.numel() < 10 or int(inside.sum()) < FEWEST:
            raise ValueError(f"Fit: {share.numel()} points, {int(inside.sum())} with a share in [.1, .9], are too few; "
                             f"use at least 10, {FEWEST} of them inside")
        log_a, b, _ = (float(x) for x in fit_exponential(scale_factor, share))
        y, x = scale_factor[inside].log(), share[inside]
        rest = float((y - log_a - b * x).square().sum() / (y - y.mean()).square().sum().clamp(min=1e-30))
        return cls(math.exp(log_a), b, 1 - rest, float(x.min()), float(x.max()))

    def threshold(self, share: float, keys: int) -> float:
        """The threshold, at most 1, that leaves out so large a share of the blocks of a sequence of so many keys."""
        return min(1.0, self.a * math.exp(self.b * share) / keys)


def shares_of(levels: Tensor, mask: BlockMask, trials: int) -> Tensor:
    """Share of the listed pairs that each trial leaves out: float64 (trials,), from a counting pass.

    Args:
        levels: uint8 (B, H, nq, width): an entry of level n is left out by the first n trials.
        mask: the mask of the pass.
        trials: how many.
    """
    pairs = mask.entry_pairs().expand(levels.shape)
    found = torch.stack([torch.where(levels > j, pairs, 0).sum() for j in range(trials)])
    return found / pairs.sum().clamp(min=1).to(torch.float64)


@dataclass(frozen=True)
class CountBlocks(SkipBlocks):
    """Computes everything that is listed and hands on what each of `TRIALS` would have left out.

    Args:
        keep: called with the shares, float64 (22,).
    """

    keep: Callable[[Tensor], None] = lambda shares: None

    name: ClassVar[str] = "count"
    title: ClassVar[str] = "everything computed, what a filter would leave out counted"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`."""
        out, lse, levels = self.filtered(call, mask, trials_of(call), apply=False)
        self.keep(shares_of(levels, mask, len(TRIALS)))
        return out, lse


def trials_of(call: Call) -> Tensor:
    """float32 (1, 22): `TRIALS` on the call's device."""
    found: Tensor = call.cached("skip trials", lambda: torch.tensor([TRIALS], device=call.device))
    return found


@dataclass(frozen=True)
class SkipToTarget(SkipBlocks):
    """`SkipBlocks` whose threshold is found by itself: the first call of a layer computes everything and counts.

    The counts of the layer's heads together, at 22 thresholds, are fitted as in `Fit`; the threshold found stays for
    the run. Measuring each layer in the run itself is ours; the source fits one curve for all layers beforehand.

    Args:
        target: share of the listed pairs to leave out; None: `threshold` holds.
    """

    target: float | None = None

    name: ClassVar[str] = "skip to target"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`."""
        limit = self.limit(call)
        if limit is None:
            return self.count(call, mask)
        out, lse, levels = self.filtered(call, mask, limit)
        self.note(call, mask, levels > 0)
        return out, lse

    def limit(self, call: Call) -> Tensor | None:
        """float32 (H|1, 1), the threshold of this layer, or None before it is measured."""
        return self.thresholds(call) if self.target is None else call.state.recall("skip threshold")

    def count(self, call: Call, mask: BlockMask) -> tuple[Tensor, Tensor]:
        """Everything that is listed; the threshold for the target is kept."""
        trials = trials_of(call)
        out, lse, levels = self.filtered(call, mask, trials, apply=False)
        assert self.target is not None
        call.state.keep("skip threshold", _threshold_of(levels, mask, trials[0], self.target)[None, None])
        return out, lse


def _threshold_of(levels: Tensor, mask: BlockMask, trials: Tensor, target: float) -> Tensor:
    """float32 (): the threshold for a share of the listed pairs, from a counting pass; decided on the device.

    Args:
        levels: uint8 (B, H, nq, width), for how many of the trials an entry is left out.
        trials: float32 (J,), falling: an entry of level n is left out by the first n.
    """
    share = shares_of(levels, mask, len(trials))
    log_a, slope, count = fit_exponential(trials.to(torch.float64), share)
    fitted = (log_a + slope * target).exp().clamp(max=1)
    # Too few points for a curve: the highest trial that leaves out no more than asked, else nothing.
    highest = torch.where(share <= target, trials, 0).amax()
    return torch.where((count >= FEWEST) & (slope > 0), fitted, highest).to(torch.float32)


@dataclass(frozen=True)
class CarryBlocks(SkipToTarget):
    """What the filter finds is computed in this call, and left out of the list, scores included, from the next step on.

    The list that is left is kept in `call.state` as one bit per block; `carried` reads it. Source: LiteAttention,
    arXiv 2511.11062.
    """

    name: ClassVar[str] = "carry"
    title: ClassVar[str] = "blocks far below the running maximum leave the list of the next step"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`."""
        limit = self.limit(call)
        if limit is None:
            return self.count(call, mask)
        out, lse, levels = self.filtered(call, mask, limit, apply=False)
        place = torch.arange(levels.shape[-1], device=levels.device)
        left = (place < mask.work()[..., None]) & (levels == 0)
        # Entries that leave go to one column beyond the blocks, which is cut off.
        target = torch.where(left, mask.lists, mask.key.blocks).to(torch.int64)
        keep = torch.zeros(*target.shape[:3], mask.key.blocks + 1, dtype=torch.bool, device=target.device)
        call.state.keep("carried blocks", pack_bits(keep.scatter_(-1, target, True)[..., :-1]), "masks")
        return out, lse

    def computed(self, call: Call, mask: BlockMask) -> float | Tensor:
        """See `Operator.computed`: everything listed is computed."""
        return self.density(mask)

    @staticmethod
    def carried(call: Call, blocks: int) -> Tensor | None:
        """bool (B, H, nq, blocks): the key blocks left by the last call of this layer and branch; None before it."""
        kept = call.state.recall("carried blocks")
        return None if kept is None else unpack_bits(kept, blocks).to(torch.bool)
