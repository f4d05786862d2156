"""Operators that scale sparse attention by a share of its mass that was measured at an earlier step.

The share rho of a row's mass that the kept keys hold changes little from step to step, and so does what the others
add to the output. Both are measured at a step that is computed densely, kept, and used at the steps that follow.
Source: Re-ttention, arXiv 2505.22918.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .blockmask import BlockMask
from .operators import Attend, Operator, scale_and_add

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["MeasureShare", "ReuseShare"]


@dataclass(frozen=True)
class MeasureShare(Operator):
    """Dense attention; and the mask's share of it, and what the dropped keys add, are kept for later steps."""

    name: ClassVar[str] = "measure share"
    title: ClassVar[str] = "measured steps: dense, and the mask's share of the mass is kept"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`: the output is that of dense attention."""
        out, lse = attend(call.query, call.key, call.value, BlockMask.full(mask.query, mask.key))
        sparse, sparse_lse = attend(call.query, call.key, call.value, mask)
        # A row that sees no key at all, -inf less -inf, has no mass to share.
        share = (sparse_lse - lse).nan_to_num_(nan=0).exp_().clamp_(max=1)
        call.state.keep("share", share)
        residual = scale_and_add(sparse, lambda rows: (-share[..., rows], out[:, rows]))
        call.state.keep("residual", residual, "outputs")
        return out, lse

    def density(self, mask: BlockMask) -> float | Tensor:
        """Every pair is computed."""
        return 1.0


@dataclass(frozen=True)
class ReuseShare(Operator):
    """Drop, times the kept share, plus what the dropped keys added when it was measured.

    Args:
        shift: what the share grows by from one step to the next after the first use, at most to 1.
    """

    shift: float = 0.0

    name: ClassVar[str] = "reuse share"
    title: ClassVar[str] = "dropped, scaled by the share of the mass measured before"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE is that of the mask over the share, an estimate of the full one."""
        share, residual = (call.state.recall(name) for name in ("share", "residual"))
        if share is None or residual is None:
            raise ValueError("rettention: nothing was measured for this layer and shape")
        # By steps, not by uses: a step cache may have skipped some.
        steps = max(0, (call.state.age("share") or 0) - 1)
        share = (share + self.shift * steps).clamp_(max=1)
        out, lse = attend(call.query, call.key, call.value, mask)
        scale_and_add(out, lambda rows: (share[..., rows], residual[:, rows]))
        return out, lse - share.clamp(min=torch.finfo(share.dtype).tiny).log()
