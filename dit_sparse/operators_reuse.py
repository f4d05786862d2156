"""Operators that reuse a part of the attention of an earlier step: what the mask dropped, or the output of whole heads.

The output of attention changes little from one step to the next, and so does what the keys outside of a mask add to it.
Both can be computed at some steps and kept for the steps after, each with a bounded age. Source: FlashBlock, arXiv
2602.05305, whose residual reuse for sparse attention is given without a formula; the formulas here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .blockmask import BlockMask
from .operators import Attend, Drop, Operator, merge_parts, scale_and_add
from .selection import blocks_holding

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["LEAST_REST", "ReuseComplement", "ReuseHeads", "output_drift", "rest_of"]

LEAST_REST = 1e-4  # rows whose dropped keys hold less of the mass have nothing worth keeping
SAMPLED_ROWS = 256


def rest_of(whole: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the other keys, from attention over all keys and over some: the inverse of a merge by LSE.

    With w = exp(part_lse - lse): out = (whole - w part) / (1 - w) and rest_lse = lse + log(1 - w). An error of the two
    outputs grows by 1 / (1 - w), and shrinks by the same factor when the result is merged with the part again.

    Args:
        whole: out (B, L, H, Dv) and LSE (B, H, L), float32, of attention over all keys.
        part: the same over some of them; its out is overwritten.

    Returns:
        out (B, L, H, Dv) in the part's dtype and LSE (B, H, L). Rows in which the others hold less than `LEAST_REST` of
        the mass give 0 and -inf.
    """
    (out, lse), (some, some_lse) = whole, part
    # A row that sees no key at all, -inf less -inf, has nothing left; rounding can make a part exceed the whole.
    gap = (some_lse - lse).nan_to_num_(nan=0).clamp_(max=0)
    left = -torch.expm1(gap)
    nothing = left < LEAST_REST
    left = left.masked_fill_(nothing, 1)
    factor = (-gap.exp() / left).masked_fill_(nothing, 0)
    share = left.reciprocal().masked_fill_(nothing, 0)

    def terms(rows: slice) -> tuple[Tensor, Tensor]:
        return factor[..., rows], out[:, rows] * share[..., rows].transpose(1, 2)[..., None]

    return scale_and_add(some, terms), (lse + left.log()).masked_fill_(nothing, -torch.inf)


def output_drift(out: Tensor, before: Tensor) -> Tensor:
    """How far outputs turned: float32 (B, H), 1 less the mean cosine between out and before, (B, rows, H, D) each."""
    return 1 - cosine_similarity(out.to(torch.float32), before.to(torch.float32), dim=-1).mean(1)


@dataclass(frozen=True)
class _Reuse(Operator):
    """What both kinds share: the operator that they wrap, how long a kept part serves, and what a call computed."""

    base: Operator = field(default_factory=Drop)
    every: int = 2

    COMPUTED: ClassVar[str] = "computed share"

    def computed(self, call: Call, mask: BlockMask) -> float | Tensor:
        """See `Operator.computed`: what `run` noted in this very step."""
        share: float | Tensor | None = call.state.recall(self.COMPUTED, max_age=1)
        return self.base.density(mask) if share is None else share


@dataclass(frozen=True)
class ReuseComplement(_Reuse):
    """Attention over the mask, fresh at every step, merged with attention over all other keys of an earlier step.

    Every `every`-th step computes both, so that the result is that of dense attention for any mask; output and LSE of
    the other keys are kept, with the mask they belong to. The steps between use that mask, whatever the plan says.

    Args:
        base: what is computed for the mask; one that drops the other keys.
        every: a kept part serves so many steps, the one that made it included; 1 is dense attention.
    """

    name: ClassVar[str] = "reuse complement"
    PARTS: ClassVar[tuple[str, ...]] = ("mask of the rest", "output of the rest", "LSE of the rest")

    @property
    def title(self) -> str:  # type: ignore[override]
        """What the summary prints."""
        return f"{self.base.title}; the rest kept for {self.every} step(s)"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE is that of all keys, the kept part's from its own step."""
        held, rest, rest_lse = (call.state.recall(name, max_age=self.every) for name in self.PARTS)
        if held is None or rest is None or rest_lse is None:
            return self.refreshed(call, mask, attend)
        fresh = self.base.run(call, held, attend)
        call.state.keep(self.COMPUTED, self.base.computed(call, held))
        return merge_parts([(rest, rest_lse), fresh])

    def refreshed(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """Dense attention, and the part of the other keys is kept."""
        kept = self.base.run(call, mask, attend)
        if mask.window is None:
            rest = attend(call.query, call.key, call.value, mask.complement())
            whole = merge_parts([rest, kept])
        else:  # a window cuts blocks: the pairs it leaves out of them are no list
            whole = attend(call.query, call.key, call.value, BlockMask.full(mask.query, mask.key))
            rest = rest_of(whole, kept)
        for name, value, kind in zip(self.PARTS, (mask, *rest), ("masks", "outputs", "LSE"), strict=True):
            call.state.keep(name, value, kind)
        call.state.keep(self.COMPUTED, 1.0)
        return whole


@dataclass(frozen=True)
class ReuseHeads(_Reuse):
    """Heads whose output hardly changes are not computed at every step: their last output stands in for it.

    A head that was computed at two steps, one after the other as far as it was computed at all, with
    1 - mean cosine <= `drift` between its two outputs on sampled rows, is left out for the next `every` - 1 steps: its
    lists are emptied. It is then computed again, and judged again. Text queries are always computed. Everything is
    decided on the device.

    Args:
        base: what is computed for the mask; one that takes empty rows.
        every: an output serves so many steps, the one that made it included; 1 reuses nothing.
        drift: in [0, 2]; 0 reuses only heads whose output does not turn at all, 2 all of them.
    """

    drift: float = 0.1

    name: ClassVar[str] = "reuse heads"
    PARTS: ClassVar[tuple[str, ...]] = ("output of heads", "step of heads", "steady heads")

    @property
    def title(self) -> str:  # type: ignore[override]
        """What the summary prints."""
        return f"{self.base.title}; steady heads kept for {self.every} step(s)"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE of a head that is reused is -inf for the video's queries."""
        before, at, steady = (call.state.recall(name) for name in self.PARTS)
        video = call.grid.video_slice
        if before is None or at is None or steady is None:
            out, lse = self.base.run(call, mask, attend)
            at = torch.full((out.shape[0], out.shape[2]), call.step, dtype=torch.int32, device=out.device)
            self.keep(call, mask, out[:, video].clone(), at, torch.zeros_like(at, dtype=torch.bool))
            return out, lse
        reused = steady & (call.step - at < self.every)
        text = blocks_holding(mask.query, call.grid.text_slice.start, call.grid.text_slice.stop)
        mask = mask.without_rows(reused[..., None] & ~text)
        out, lse = self.base.run(call, mask, attend)
        rows = call.cached("rows that tell how outputs change", lambda: _sampled(call.grid.video, call.device))
        fresh = out[:, video]
        drift = output_drift(fresh.index_select(1, rows), before.index_select(1, rows))
        before = torch.where(reused[:, None, :, None], before, fresh)
        fresh.copy_(before)
        lse[..., video].masked_fill_(reused[..., None], -torch.inf)
        steady = torch.where(reused, steady, drift <= self.drift)
        self.keep(call, mask, before, torch.where(reused, at, call.step), steady)
        return out, lse

    def keep(self, call: Call, mask: BlockMask, out: Tensor, at: Tensor, steady: Tensor) -> None:
        """Keep the outputs (B, video, H, Dv), the step of each head's and whether it is steady, (B, H) both."""
        for name, value, kind in zip(self.PARTS, (out, at, steady), ("outputs", *2 * ("statistics",)), strict=True):
            call.state.keep(name, value, kind)
        call.state.keep(self.COMPUTED, self.base.computed(call, mask))


def _sampled(video: int, device: torch.device) -> Tensor:
    """Places of sampled rows among the video's, spread over it."""
    count = min(video, SAMPLED_ROWS)
    return torch.arange(count, device=device) * video // count
