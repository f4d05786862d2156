"""Operators: what is computed for a mask. A method's plan carries one; the base case drops what the mask leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from .blockmask import BlockMask
from .kernels.soft import merge_soft_blocks

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["Attend", "Drop", "Operator", "Soft"]


class Attend(Protocol):
    """Block-sparse attention as a run has it set up: its scale, key mask and kernel."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, /) -> tuple[Tensor, Tensor]:
        """out (B, Lq, H, Dv) and the natural-log LSE (B, H, Lq), float32, of attention over the mask's pairs."""


@dataclass(frozen=True)
class Operator:
    """Base of all operators. An instance holds options, never activations: a plan may be kept for several steps."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""

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


@dataclass(frozen=True)
class Drop(Operator):
    """Softmax over the pairs that the mask keeps, and nothing else."""

    name: ClassVar[str] = "drop"
    title: ClassVar[str] = "pairs outside of the mask dropped"

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

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE holds the soft entries too."""
        out, lse = attend(call.query, call.key, call.value, mask)
        mean_key, mean_value = call.block_mean("key", mask.key), call.block_mean("value", mask.key)
        return merge_soft_blocks(
            call.query, mean_key, mean_value, mask, out, lse, scale=call.scale, key_mask=call.key_mask
        )
