"""Parts that static masks share: block sizes, ranges of key blocks, one of several masks per head.

Everything here is made once per shape, on the CPU, from block ranges: nothing has the size of tokens x
tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .blockmask import BlockLayout, BlockMask, TokenWindow
from .grid import TokenGrid
from .methods.base import Call
from .selection import count_of_density

BLOCK_SIZES = (16, 32, 64, 128, 256)


def check_block_size(method: str, block_size: int | None, option: str = "block_size") -> None:
    """Raise ValueError unless block_size is None or a size that the kernels know; the option's name goes into it."""
    if block_size is not None and (type(block_size) is not int or block_size not in BLOCK_SIZES):
        raise ValueError(
            f"{method}: {option}={block_size!r} is not allowed; use None or one of {BLOCK_SIZES}"
        )


def choose_block_size(tokens: int, block_size: int | None = None) -> int:
    """Tokens of a block: the asked number, or 128 on long sequences and less on short ones."""
    if block_size is not None:
        return block_size
    return 128 if tokens >= 8192 else 64 if tokens >= 2048 else 32


def interval_blocks(first: Tensor, last: Tensor, blocks: int, block_size: int) -> Tensor:
    """Key blocks that touch a range of key slots, one range per query block.

    Args:
        first, last: int (nq,), both ends included; an empty range has last < first.
        blocks: number of key blocks.
        block_size: slots of a block.

    Returns:
        bool (nq, blocks).
    """
    start = torch.arange(blocks) * block_size
    return (start + block_size > first[:, None]) & (start <= last[:, None]) & (last >= first)[:, None]


def build_mask(
    keep: Tensor,
    query: BlockLayout,
    key: BlockLayout,
    partial: Tensor | None = None,
    window: TokenWindow | None = None,
) -> BlockMask:
    """`BlockMask.from_dense` for CPU tensors, with lists as narrow as the fullest row."""
    return BlockMask.from_dense(
        keep, query, key, partial=partial, window=window, max_width=max(1, int(keep.sum(-1).max()))
    )


def pick(mask: BlockMask, choice: Tensor) -> BlockMask:
    """One of the mask's K heads for every head of a call, decided on the device.

    Args:
        mask: a mask whose lists, layouts or both hold K heads, dimension (1, K, ...); parts of size 1 are
            shared.
        choice: int64 (B|1, H), which of the K heads each head takes.

    Returns:
        The mask of (B|1, H) heads. Nothing waits for the device.
    """

    def heads(x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x[0][choice]

    def layout(x: BlockLayout) -> BlockLayout:
        if x.index is None or x.index.dim() == 1:
            return x
        return dataclasses.replace(x, index=heads(x.index))

    query = layout(mask.query)
    key = query if mask.key is mask.query else layout(mask.key)
    picked = BlockMask(heads(mask.lists), heads(mask.whole), heads(mask.boundary), query, key, mask.window)
    # The pairs of the K masks were counted once; counting the picked ones again would cost as much as
    # building them.
    picked.__dict__["pairs"] = heads(mask.pairs)
    return picked


def heads_of(mask: BlockMask, heads: Tensor) -> BlockMask:
    """The mask of some of its heads: int64 (heads,), on its device. Parts that all heads share stay shared."""

    def part(x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x.index_select(1, heads)

    def layout(x: BlockLayout) -> BlockLayout:
        return x if x.index is None or x.index.dim() == 1 else dataclasses.replace(x, index=part(x.index))

    query = layout(mask.query)
    key = query if mask.key is mask.query else layout(mask.key)
    cut = BlockMask(part(mask.lists), part(mask.whole), part(mask.boundary), query, key, mask.window)
    if "pairs" in mask.__dict__:
        cut.__dict__["pairs"] = part(mask.pairs)
    return cut


def join_heads(masks: Sequence[BlockMask], counts: Sequence[int], heads: Tensor) -> BlockMask:
    """One mask of the heads of several; layouts are the first one's.

    Args:
        masks: of equal blocks, without windows and with layouts that all heads share.
        counts: of how many heads each is. Parts that its heads, or the batch, share may have size 1.
        heads: int64 (H,), for every head of the result its place among the heads of all the masks, one after another.
    """
    batch, width = max(x.lists.shape[0] for x in masks), max(x.lists.shape[-1] for x in masks)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        every = [x.expand(batch, n, *x.shape[2:]) for x, n in zip(parts, counts, strict=True)]
        return torch.cat(every, dim=1).index_select(1, heads)

    lists = joined([torch.nn.functional.pad(x.lists, (0, width - x.lists.shape[-1])) for x in masks])
    found = BlockMask(lists, joined([x.whole for x in masks]), joined([x.boundary for x in masks]), masks[0].query,
                      masks[0].key)
    found.__dict__["pairs"] = joined([x.pairs for x in masks])
    return found


def replace_heads(mask: BlockMask, other: BlockMask, take: Tensor) -> BlockMask:
    """The mask with the lists of another for some heads; layouts and window stay the first one's.

    Args:
        mask, other: masks over equal blocks.
        take: bool (heads,) or (B|1, heads), True where the other one's lists hold.
    """
    take = take if take.dim() == 2 else take[None]
    width = max(mask.lists.shape[-1], other.lists.shape[-1])
    mine, theirs = (torch.nn.functional.pad(x.lists, (0, width - x.lists.shape[-1])) for x in (mask, other))
    one = take[..., None]
    found = BlockMask(torch.where(one[..., None], theirs, mine), torch.where(one, other.whole, mask.whole),
                      torch.where(one, other.boundary, mask.boundary), mask.query, mask.key, mask.window)
    found.__dict__["pairs"] = torch.where(take, other.pairs, mask.pairs)
    return found


def static_mask(call: Call, name: Hashable, build: Callable[[], BlockMask]) -> BlockMask:
    """A mask that depends on the shape only: built and counted on the CPU once, kept on the device.

    Args:
        call: the call it is for.
        name: what distinguishes it from other static masks of the run (the method with its options).
        build: makes it, on the CPU.
    """

    def make() -> BlockMask:
        mask = build()
        pairs = mask.pairs
        moved = mask if call.device.type == "cpu" else mask.to(call.device)
        moved.__dict__["pairs"] = pairs.to(call.device)
        return moved

    return call.cached(name, make)


def half_band(density: float, grid: TokenGrid, forced: float) -> float:
    """Share of the video tokens on either side of a band that brings the whole mask to a density.

    Args:
        density: asked kept fraction of all pairs, text and sink included.
        grid: the tokens; text rows and columns are kept anyway.
        forced: fraction of the video pairs that a sink keeps anyway.

    Returns:
        w in [0, 1]: a band of w * video tokens on either side keeps 1 - (1 - w)^2 of the video pairs. The
        band never gets less than half of the asked density, so a sink of few frames may lift the mask above
        it.
    """
    video_pairs, all_pairs = grid.video**2, grid.tokens**2
    left = (density * all_pairs - (all_pairs - video_pairs)) / video_pairs
    band = (left - forced) / (1 - forced) if forced < 1 else 1.0
    return 1 - math.sqrt(1 - min(1.0, max(band, density / 2)))


def key_blocks_kept(density: float, grid: TokenGrid, blocks: int) -> int:
    """Key blocks of the video that every query block of the video keeps, for a density of the whole mask.

    Unlike `selection.rows_kept` it counts tokens, so blocks of queries and of keys may differ in size.

    Args:
        density: asked kept fraction of all pairs; the text's rows and columns, which are kept anyway, are part of it.
        grid: the tokens.
        blocks: key blocks that hold video.

    Returns:
        The number, at least half of the density's and at least 1.
    """
    video_pairs, all_pairs = grid.video**2, grid.tokens**2
    left = (density * all_pairs - (all_pairs - video_pairs)) / video_pairs
    return min(blocks, max(count_of_density(blocks, density / 2), round(left * blocks)))


def touching_blocks(layout: BlockLayout, grid: TokenGrid) -> Tensor:
    """Pairs of blocks that hold the same or neighbouring video tokens, diagonals through space and time included.

    Args:
        layout: how the tokens of the grid sit in blocks, one order for all heads, on the CPU.
        grid: the tokens; text touches nothing.

    Returns:
        bool (blocks, blocks), symmetric.
    """
    block = layout.block_of_token.reshape(grid.tokens)[grid.video_slice].reshape(grid.sizes)
    found = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool)
    for shift in itertools.product((-1, 0, 1), repeat=3):
        # The part of the grid that has a neighbour there, and its neighbours.
        here, there = (
            tuple(slice(max(0, s * way), n + min(0, s * way)) for s, n in zip(shift, grid.sizes, strict=True))
            for way in (-1, 1)
        )
        found[block[here].flatten(), block[there].flatten()] = True
    return found
