"""In which order query blocks are launched. Importing this module needs triton."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MANY_BLOCKS", "MOST", "launch_order", "launch_order_reference"]

# From so many query blocks on, what is left over at the end is short against the whole, and the order of heads and
# blocks is faster: 671 against 618 TFLOP/s with 23,640 of them, heads of density .02 to 1 (H200, November 2026).
MANY_BLOCKS = 8192
MOST = 16  # times the mean: blocks of more work keep their order
_SIZES = (1024, 4096, MANY_BLOCKS)  # of the kernel's one program


def launch_order(counts: Tensor, batch: int, heads: int, *, longest_first: bool | None = None) -> Tensor:
    """int32 (B * H * nq,): query blocks in launch order.

    Those with at least twice the mean work come first, longest first, so that none of them is left over at the end;
    all others keep their order, in which neighbours share keys in the cache.

    Args:
        counts: int32 (B|1, H|1, nq), listed blocks.
        longest_first: False keeps the order of heads and blocks for all; None does so from `MANY_BLOCKS` on.
    """
    blocks = counts.shape[2]
    tiles = batch * heads * blocks
    if longest_first is None:
        longest_first = tiles < MANY_BLOCKS
    if not longest_first:
        return torch.arange(tiles, dtype=torch.int32, device=counts.device)
    if not counts.is_cuda or not 0 < tiles <= _SIZES[-1]:
        return launch_order_reference(counts, batch, heads)
    # Plain PyTorch takes a dozen kernels for it: 40 microseconds, a twentieth of a call of density .1.
    order = torch.empty(tiles, dtype=torch.int32, device=counts.device)
    b, h, n = (0 if size == 1 else stride for size, stride in zip(counts.shape, counts.stride(), strict=True))
    size = next(size for size in _SIZES if size >= tiles)
    order_kernel[(1,)](counts, order, b, h, n, heads, blocks, tiles, SIZE=size, MOST=MOST, num_warps=size // 256)
    return order


def launch_order_reference(counts: Tensor, batch: int, heads: int) -> Tensor:
    """`launch_order` of any number of blocks by PyTorch, the longest first."""
    counts = counts.expand(batch, heads, -1).flatten().long()
    ratio = (counts * counts.numel() // counts.sum().clamp(min=1)).clamp(1, MOST)
    return ratio.sort(descending=True, stable=True).indices.to(torch.int32)


@triton.jit(do_not_specialize=["count_b", "count_h", "count_q", "heads", "blocks", "tiles"])
def order_kernel(COUNTS, ORDER, count_b, count_h, count_q, heads, blocks, tiles, SIZE: tl.constexpr,
                 MOST: tl.constexpr):  # fmt: skip
    """One program: every level of work from the highest, its blocks in their order."""
    place = tl.arange(0, SIZE)
    real = place < tiles
    count = tl.load(COUNTS + place // (heads * blocks) * count_b + place // blocks % heads * count_h
                    + place % blocks * count_q, mask=real, other=0).to(tl.int64)  # fmt: skip
    ratio = (count * tiles // tl.maximum(tl.sum(count), 1)).to(tl.int32)
    ratio = tl.where(real, tl.minimum(tl.maximum(ratio, 1), MOST), 0)
    target = place
    level = tl.max(ratio)
    before = 0 * level
    if level > 1:  # else all keep their places
        while level > 0:
            here = ratio == level
            seen = tl.cumsum(here.to(tl.int32))
            target = tl.where(here, before + seen - 1, target)
            before += tl.max(seen)
            level = tl.max(tl.where(ratio < level, ratio, 0))
    tl.store(ORDER + target, place, mask=real)
