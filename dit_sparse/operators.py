"""Operators: what is computed for a mask. A method's plan carries one; the base case drops what the mask leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from .blockmask import BlockMask
from .kernels.reference import merge_by_lse
from .kernels.skip import skip_attention
from .kernels.soft import SoftMeans, soft_means
from .memory import COUNTERS
from .scoring import head_chunks

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["Attend", "Drop", "Operator", "SkipBlocks", "Soft", "ZeroHeads", "means_of", "merge_parts",
           "scale_and_add"]

_NUMBERS_AT_ONCE = 2**24  # float32 numbers of output in memory at a time: 64 MB


class Attend(Protocol):
    """Block-sparse attention as a run has it set up: its scale, key mask and kernel."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, /, *, soft: SoftMeans | None = None
    ) -> tuple[Tensor, Tensor]:
        """out (B, Lq, H, Dv) and the natural-log LSE (B, H, Lq), float32, of attention over the mask's pairs."""


@dataclass(frozen=True)
class Operator:
    """Base of all operators. An instance holds options, never activations: a plan may be kept for several steps.

    `reuses` names the kinds of the option `reuse` that go with it: "complement" where what the mask leaves out is
    dropped and nothing else is done about it; "heads" where rows may be empty and nothing is learnt from them.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    reuses: ClassVar[tuple[str, ...]] = ()

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """Attention of one call.

        Args:
            call: the activations; `call.block_mean` pools them, once per call.
            mask: the plan's mask.
            attend: computes the pairs of a mask, by the kernel that the run uses.

        Returns:
            out (B, L, H, Dv) in the query's dtype and the LSE (B, H, L), float32.
        """
        raise NotImplementedError

    def density(self, mask: BlockMask) -> float | Tensor:
        """Share of the pairs computed exactly; an operator that computes some at a coarser level counts them in."""
        return mask.density()

    def computed(self, call: Call, mask: BlockMask) -> float | Tensor:
        """`density` of the call that `run` has just computed, when only the run shows what can be left out."""
        return self.density(mask)


@dataclass(frozen=True)
class Drop(Operator):
    """Softmax over the pairs that the mask keeps, and nothing else."""

    name: ClassVar[str] = "drop"
    title: ClassVar[str] = "pairs outside of the mask dropped"
    reuses: ClassVar[tuple[str, ...]] = ("complement", "heads")

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`."""
        return attend(call.query, call.key, call.value, mask)


@dataclass(frozen=True)
class Soft(Operator):
    """Every key block that is not listed enters the softmax as one entry: its mean key and value, as many keys heavy.

    Source: Sol-Attn, arXiv 2607.24027.
    """

    name: ClassVar[str] = "soft"
    title: ClassVar[str] = "soft blocks: those not listed enter as their means"
    reuses: ClassVar[tuple[str, ...]] = ("heads",)

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE holds the soft entries too."""
        return attend(call.query, call.key, call.value, mask, soft=means_of(call, mask))


def means_of(call: Call, mask: BlockMask, heads: Tensor | None = None) -> SoftMeans:
    """Means of all key blocks of a call, for `attend`; heads: as in `kernels.soft.soft_attention`."""
    mean_key, mean_value = (call.block_mean(name, mask.key) for name in ("key", "value"))
    return soft_means(mean_key, mean_value, mask, call.key_mask, heads)


@dataclass(frozen=True)
class SkipBlocks(Operator):
    """A listed block whose scores lie far below the rows' running maximum is left out once its scores are known.

    The share of pairs whose blocks were left out is kept in `call.state`; they count half in `computed`.

    Args:
        threshold: a block is left out when the scores of all its pairs lie below the maximum met before by more than
            -log(threshold); in [0, 1], one number or one per head. 0 leaves out nothing.
        first: which block of a list is visited first, see `kernels.skip.skip_attention`.

    Source: BLASST, arXiv 2512.12087; with threshold 2^-lambda the second filter of SpargeAttn, arXiv 2502.18137.
    """

    threshold: float | tuple[float, ...] = 0.0
    first: str = "own"

    name: ClassVar[str] = "skip"
    title: ClassVar[str] = "blocks far below the running maximum left out; they count half"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the backend of `attend` is not asked, the filter has a kernel of its own."""
        out, lse, levels = self.filtered(call, mask, self.thresholds(call))
        self.note(call, mask, levels > 0)
        return out, lse

    def filtered(self, call: Call, mask: BlockMask, thresholds: Tensor, *, apply: bool = True
                 ) -> tuple[Tensor, Tensor, Tensor]:
        """`skip_attention` of the call."""
        return skip_attention(call.query, call.key, call.value, mask, thresholds, apply=apply, first=self.first,
                              scale=call.scale, key_mask=call.key_mask)

    def thresholds(self, call: Call) -> Tensor:
        """float32 (H|1, 1) on the call's device."""
        if isinstance(self.threshold, tuple):
            table = call.cached(("skip thresholds", self.threshold),
                                lambda: torch.tensor(self.threshold, device=call.device)[:, None])
            return call.own(table)
        return torch.full((1, 1), self.threshold, device=call.device)

    @staticmethod
    def note(call: Call, mask: BlockMask, left_out: Tensor) -> None:
        """Keep the share of all pairs that was left out; left_out is bool (B, H, nq, width)."""
        pairs = torch.where(left_out, mask.entry_pairs(), 0).sum((-2, -1)).to(torch.float32).mean()
        call.state.keep("skipped share", pairs / (mask.query.tokens * mask.key.tokens), kind=COUNTERS)

    def computed(self, call: Call, mask: BlockMask) -> float | Tensor:
        """See `Operator.computed`: of a pair that was left out one of two matrix products was computed."""
        share = call.state.recall("skipped share", max_age=1)
        return self.density(mask) if share is None else self.density(mask) - share / 2


@dataclass(frozen=True)
class ZeroHeads(Drop):
    """As `Drop`, but heads that are skipped give 0 for the video's queries; text queries are never skipped.

    Which heads: bool (B|1, H) in `call.state` under `STATE`. Source: Sparse-vDiT, arXiv 2506.03065.
    """

    STATE: ClassVar[str] = "skipped heads"
    title: ClassVar[str] = "pairs outside of the mask dropped; skipped heads give 0"
    reuses: ClassVar[tuple[str, ...]] = ("heads",)

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE of what is skipped is -inf."""
        out, lse = attend(call.query, call.key, call.value, mask)
        skipped = call.state.recall(self.STATE)
        if skipped is not None:
            out[:, call.grid.video_slice].masked_fill_(skipped[:, None, :, None], 0)
            lse[..., call.grid.video_slice].masked_fill_(skipped[..., None], -torch.inf)
        return out, lse


def merge_parts(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`kernels.reference.merge_by_lse`, some heads at a time, written into the last part.

    Args:
        parts: attention over disjoint sets of keys, out (B, L, H, Dv) and LSE (B, H, L) each.

    Returns:
        Attention over all of the keys: the last part's tensors.
    """
    out, lse = parts[-1]
    if len(parts) == 1:
        return out, lse
    for heads in head_chunks(out.shape[2], len(parts) * out[:, :, 0].numel()):
        some = merge_by_lse([(o[:, :, heads], e[:, heads]) for o, e in parts])
        out[:, :, heads], lse[:, heads] = some
    return out, lse


def scale_and_add(out: Tensor, terms: Callable[[slice], tuple[Tensor, Tensor]]) -> Tensor:
    """factor * out + addend, in place and in float32, some tokens at a time: what operators that correct do at the end.

    Args:
        out: (B, L, H, Dv).
        terms: tokens -> their factor (B, H, tokens) and addend (B, tokens, H, Dv).

    Returns:
        `out`.
    """
    step, dtype = max(1, _NUMBERS_AT_ONCE // max(1, out[:, 0].numel())), torch.promote_types(out.dtype, torch.float32)
    for start in range(0, out.shape[1], step):
        tokens = slice(start, start + step)
        factor, addend = terms(tokens)
        out[:, tokens].copy_(out[:, tokens].to(dtype) * factor.transpose(1, 2)[..., None] + addend)
    return out
