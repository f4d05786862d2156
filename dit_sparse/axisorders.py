"""Which of the six axis orders suits a head, and which blocks it needs in it: measuring and choosing.

A head whose attention is scattered in the model's order may be compact in another of the six orders of the three axes.
Source: PAROAttention, arXiv 2506.16054. No map of all queries and keys is ever in memory: rows are looked at in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .blocklayout import BlockLayout
from .grid import TokenGrid
from .methods.base import Call, check_range
from .order import axis_order, layout, video_blocks
from .patterns import check_block_size
from .scoring import head_chunks, sampled_row_attention, to_slots
from .selection import count_of_density, select_global

# The paper's codes 0 ... 5, slowest axis first: FHW, FWH, HWF, HFW, WHF, WFH. Ties between orders go to the first.
AXES = ("tyx", "txy", "yxt", "ytx", "xyt", "xty")
MEASURES = ("skip", "mass")
_NUMBERS_AT_ONCE = 2**24  # attention weights of one head in memory at a time: 64 MB in float32


def axis_layouts(grid: TokenGrid, block_size: int) -> tuple[BlockLayout, ...]:
    """Blocks of the video in each of the six axis orders, then text, on the CPU."""
    return tuple(layout(grid, axis_order(grid, axes), block_size) for axes in AXES)


def check_options(method: str, **options: Any) -> None:
    """Raise ValueError, in one line, unless the options of `paro` or `calibrate` are allowed."""
    for name, value in options.items():
        if name in ("sample", "rows", "groups"):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{method}: {name}={value!r} is not allowed; use a whole number >= 1")
        elif name == "measure":
            if value not in MEASURES:
                raise ValueError(f"{method}: measure={value!r} is not allowed; use one of {', '.join(MEASURES)}")
        elif name == "block_size":
            check_block_size(method, value)
        elif value is not None or name in ("alpha", "sigma"):
            check_range(method, name, value, 0, 1, open_low=name != "alpha")


def _attention_pieces(
    query: Tensor, key: Tensor, blocks: BlockLayout, slots: Tensor, unit: int, scale: float, key_mask: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Attention of the queries at some slots, some heads and multiples of `unit` rows at a time.

    Yields:
        Which heads, which rows, and their weights (B, h, rows, key slots), float32, zero for padding.
    """
    batch, heads = query.shape[0], query.shape[2]
    step = unit * max(1, _NUMBERS_AT_ONCE // (batch * unit * blocks.slots))
    for part in head_chunks(heads, 4 * batch * min(step, slots.numel()) * blocks.slots):
        mine, x = blocks, key[:, :, part]
        if blocks.index is not None and blocks.index.dim() == 3 and blocks.index.shape[1] > 1:
            mine = replace(blocks, index=blocks.index[:, part])
        allowed = mine.real
        if key_mask is not None:
            allowed = to_slots(key_mask[..., None, None].expand(-1, -1, x.shape[2], 1), mine).permute(0, 2, 3, 1)
        keys = to_slots(x, mine)
        for start in range(0, slots.numel(), step):
            rows = mine.token_of_slot[..., slots[start : start + step]]
            weights, _ = sampled_row_attention(query[:, :, part], keys, None, rows, scale, allowed=allowed)
            yield part, slice(start, start + step), weights.mul_((rows >= 0)[..., None])


def block_statistics(
    weights: Tensor, query_lengths: Tensor, key_lengths: Tensor, eps: float, sigma: float, density: float
) -> Tensor:
    """What says whether an order suits a head, over pairs of blocks of an attention map.

    Args:
        weights: float32 (B, H, rows, keys), nq and nk blocks of equal size, zero at padding.
        query_lengths: int (nq,); key_lengths: int (nk,), real tokens of the blocks.
        eps: below it a weight counts as nothing.
        sigma: share of a block's weights that are nothing from which the block can be skipped.
        density: kept fraction, for the last number.

    Returns:
        float32 (5, H), sums over batch and pairs: blocks that can be skipped, blocks, max / mean of the blocks that are
        not all zero (the paper's Psi), their number, and the mass that each query block's best key blocks hold (ours).
    """
    nq, nk = query_lengths.numel(), key_lengths.numel()
    parts = weights.unflatten(2, (nq, -1)).unflatten(4, (nk, -1))  # (B, H, nq, rows, nk, keys)
    held = (query_lengths[:, None] * key_lengths).to(torch.float32)
    padding = parts.shape[3] * parts.shape[5] - held
    small = (parts < eps).sum((3, 5), dtype=torch.int32) - padding
    skipped = (small >= sigma * held - 1e-3).to(torch.float32)
    total, peak = parts.sum((3, 5)), parts.amax((3, 5))
    some = total > 0
    psi = torch.where(some, peak * held / torch.where(some, total, 1), 0)
    best = (total / query_lengths.clamp(min=1)[:, None]).topk(count_of_density(nk, density), sorted=False).values
    sums = [x.sum((0, 2, 3)) for x in (skipped, torch.ones_like(skipped), psi, some.to(torch.float32), best)]
    return torch.stack(sums)


def order_statistics(
    call: Call, layouts: tuple[BlockLayout, ...], sample: int, eps: float | None, sigma: float, density: float
) -> Tensor:
    """`block_statistics` of a call in each of the six orders, from whole query blocks spread over the video.

    Args:
        call: the activations.
        layouts: from `axis_layouts`, on the call's device.
        sample: how many query blocks are looked at; all when the video has no more.
        eps: as in `block_statistics`; None: 17.5 / video tokens, the paper's 1e-3 at its 17,550 tokens.
        sigma, density: as in `block_statistics`.

    Returns:
        float32 (6, 5, H).
    """
    first = layouts[0]
    size, video = first.block_size, video_blocks(first, call.grid)
    sample, device = min(sample, video), call.device
    chosen = torch.arange(sample, device=device) * video // sample
    slots = (chosen[:, None] * size + torch.arange(size, device=device)).flatten()
    eps = 17.5 / call.grid.video if eps is None else eps
    found = torch.zeros(len(layouts), 5, call.query.shape[2], device=device)
    for sums, blocks in zip(found, layouts, strict=True):
        pieces = _attention_pieces(call.query, call.key, blocks, slots, size, call.scale, call.key_mask)
        for heads, rows, weights in pieces:
            here = chosen[rows.start // size : rows.stop // size]
            sums[:, heads] += block_statistics(weights[..., : video * size], blocks.lengths[here],
                                               blocks.lengths[:video], eps, sigma, density)
    return found


def choose_order(statistics: Tensor, alpha: float, measure: str) -> Tensor:
    """The order that suits each head best: few blocks hold what counts, and weights inside of them are even.

    With "skip", the paper's measure, the first is the share of blocks that can be skipped because nearly all of their
    weights are nothing; a block in which every query sees just one key counts as such. With "mass" (ours) it is the
    mass that the best blocks hold, which is what a mask keeps.

    Both measures are scaled to 0 ... 1 over the six orders (ours: the paper says that they are normalised, not how).
    The score is alpha * (1 - first) + (1 - alpha) * unevenness: the sign that is printed for the first is a slip.

    Args:
        statistics: float32 (6, 5, H), from `order_statistics`, of any number of calls added up.
        alpha: weight of the first against the second.
        measure: "skip" or "mass".

    Returns:
        int64 (H,), codes of `AXES`; of equally good ones the first.
    """
    skipped, blocks, psi, some, mass = statistics.unbind(1)
    first = mass if measure == "mass" else skipped

    def scaled(x: Tensor) -> Tensor:
        low, high = x.amin(0), x.amax(0)
        return (x - low) / torch.where(high > low, high - low, 1)

    score = alpha * (1 - scaled(first / blocks.clamp(min=1))) + (1 - alpha) * scaled(psi / some.clamp(min=1))
    return score.argmin(0)


def block_sums(call: Call, blocks: BlockLayout, rows: int) -> Tensor:
    """Attention mass of every pair of video blocks, from some rows of every query block.

    Args:
        call: the activations.
        blocks: one order, or one per head, on the call's device.
        rows: how many queries of a block are looked at, spread evenly; all when it has no more.

    Returns:
        float32 (H, video blocks, video blocks), mean over the batch and the rows.
    """
    size, video, device = blocks.block_size, video_blocks(blocks, call.grid), call.device
    rows = min(rows, size)
    inside = torch.arange(rows, device=device) * size // rows
    slots = (torch.arange(video, device=device)[:, None] * size + inside).flatten()
    real = (inside < blocks.lengths[:video, None]).sum(1).to(torch.float32)
    found = torch.empty(call.query.shape[2], video, video, device=device)
    for heads, piece, weights in _attention_pieces(call.query, call.key, blocks, slots, rows, call.scale,
                                                   call.key_mask):
        held = weights[..., : video * size].unflatten(-1, (video, size)).sum(-1)
        mean = held.unflatten(2, (-1, rows)).sum(3).mean(0)
        found[heads, piece.start // rows : piece.stop // rows] = mean
    return found / real[:, None]


def static_keep(sums: Tensor, kept: int, *, own_counts: bool) -> Tensor:
    """The pairs of blocks with the largest mass of each head, and each block's own pair.

    Args:
        sums: float32 (..., nb, nb).
        kept: how many.
        own_counts: own pairs are among the kept ones; False: on top.

    Returns:
        bool (..., nb, nb).
    """
    if own_counts:
        sums = sums.clone()
        sums.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    keep = select_global(sums, kept)
    keep.diagonal(dim1=-2, dim2=-1).fill_(True)
    return keep
