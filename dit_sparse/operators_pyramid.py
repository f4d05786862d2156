"""The pyramid operator: some key blocks are read token by token, others pooled by 2, 4 or 8.

Source: PSA, arXiv 2512.04025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .blockmask import BlockLayout, BlockMask
from .kernels.attention import block_sparse_attention
from .operators import Attend, Operator, merge_parts
from .scoring import to_slots

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["LEVELS", "Pyramid", "PyramidMask", "pooled_layout", "pyramid"]

LEVELS = (1, 2, 4, 8)
_SMALLEST_BLOCK = 16  # of the kernels; pooled blocks with fewer keys are padded to it


@dataclass(frozen=True, eq=False)
class PyramidMask(BlockMask):
    """The blocks that are read token by token, as in every mask, and beside them those that are read pooled.

    Args:
        coarse: (level, mask) pairs; the keys of the mask are those of `pyramid` at this level.
    """

    coarse: tuple[tuple[int, BlockMask], ...] = ()

    @classmethod
    def from_levels(cls, levels: Tensor, query: BlockLayout, key: BlockLayout, pooled: Sequence[BlockLayout],
                    widths: Sequence[int | None] = ()) -> PyramidMask:
        """The mask of a map of levels, built without waiting for the device.

        Args:
            levels: uint8 (B|1, H|1, nq, nk), one of `LEVELS`, or 0: the block is left out. Blocks that are not full of
                keys must not be pooled (not checked).
            query, key: the layouts of the tokens.
            pooled: layouts of the pooled keys at levels 2, 4 and 8, from `pooled_layout`.
            widths: most blocks that any row has at levels 2, 4 and 8, where known.
        """
        fine = BlockMask.from_dense(levels == 1, query, key)
        widths = widths or [None] * len(pooled)
        coarse = tuple((level, BlockMask.from_dense(levels == level, query, layout, max_width=width))
                       for level, layout, width in zip(LEVELS[1:], pooled, widths, strict=True) if width != 0)
        return cls(fine.lists, fine.whole, fine.boundary, query, key, None, coarse)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PyramidMask:
        """The mask on another device."""
        fine = super().to(device, non_blocking=non_blocking)
        coarse = tuple((level, mask.to(device, non_blocking=non_blocking)) for level, mask in self.coarse)
        return PyramidMask(fine.lists, fine.whole, fine.boundary, fine.query, fine.key, fine.window, coarse)


def pooled_layout(key: BlockLayout, level: int) -> BlockLayout:
    """How the keys that `pyramid` makes at a level sit in blocks: as many blocks, each with its slots over the level.

    Args:
        key: layout of the tokens, its block size a multiple of the level.
        level: 2, 4 or 8.
    """
    size = key.block_size // level
    tokens = key.blocks * size
    if size >= _SMALLEST_BLOCK:
        return BlockLayout.raster(tokens, size, key.device)
    lengths = torch.full((key.blocks,), size, dtype=torch.int32, device=key.device)
    return BlockLayout.from_order(torch.arange(tokens, device=key.device), _SMALLEST_BLOCK, lengths=lengths)


def pyramid(x: Tensor, layout: BlockLayout, key_mask: Tensor | None = None) -> dict[int, Tensor]:
    """Means of 2, 4 and 8 neighbouring slots: x_1 = x, x_2h = mean of adjacent pairs of x_h.

    Args:
        x: (B, L, H, D), keys or values.
        layout: order and blocks of the tokens; groups of slots never span two blocks.
        key_mask: bool (B, L), True where the token is real: others count as zeros. Groups that hold one, or padding,
            are no means of their tokens.

    Returns:
        Level -> (B, slots / level, H, D) in the dtype of x, in slot order.
    """
    if key_mask is not None:
        x = x.masked_fill(~key_mask[..., None, None], 0)
    # Half precision is rounded at every level, as in the source.
    found, fine = {}, to_slots(x, layout)
    for level in LEVELS[1:]:
        fine = fine.unflatten(1, (-1, 2)).mean(2)
        found[level] = fine
    return found


@dataclass(frozen=True)
class Pyramid(Operator):
    """One softmax over the keys of fine blocks and the pooled keys of coarse ones, each with the weight of its tokens.

    A pooled key of level h has log(h) added to its score; that is a constant of its part, so each level is ordinary
    block-sparse attention, and the parts are merged by their LSE. Takes a `PyramidMask`.
    """

    name: ClassVar[str] = "pyramid"
    title: ClassVar[str] = "pyramid: blocks pooled by 2, 4 or 8 count 1/2, 1/4, 1/8"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`."""
        assert isinstance(mask, PyramidMask)
        parts = []
        if mask.coarse:
            keys, values = (pyramid(x, mask.key, call.key_mask) for x in (call.key, call.value))
        for level, coarse in mask.coarse:
            arguments = call.query, keys.pop(level), values.pop(level), coarse
            if call.key_mask is None:
                out, lse = attend(*arguments)
            else:  # the run's key mask is of the tokens; no block with a masked key is pooled
                out, lse = block_sparse_attention(*arguments, scale=call.scale)
            parts.append((out, lse + math.log(level)))
        parts.append(attend(call.query, call.key, call.value, mask))
        return merge_parts(parts)

    def density(self, mask: BlockMask) -> float | Tensor:
        """See `Operator.density`: a pair of a query and a pooled key counts as one pair."""
        assert isinstance(mask, PyramidMask)
        pairs = mask.pairs.to(torch.float32).mean()
        for _, coarse in mask.coarse:
            pairs = pairs + coarse.pairs.to(torch.float32).mean()
        return pairs / (mask.query.tokens * mask.key.tokens)
