"""Orders of the video tokens, with exact inverses, and the block layouts they make.

An order is an int64 permutation: `order[position]` is the video token (frame-major id) at that position. Every
order works on every grid, however ragged; `layout` turns one into blocks of the whole sequence, text included.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocklayout import BlockLayout
from .grid import TokenGrid

AXIS_ORDERS = tuple("".join(axes) for axes in itertools.permutations("tyx"))

Device = torch.device | str | None


def raster(grid: TokenGrid, device: Device = None) -> Tensor:
    """Frame by frame, row by row: the order of the model itself. Returns int64 (video,)."""
    return torch.arange(grid.video, device=device)


def axis_order(grid: TokenGrid, axes: str, device: Device = None) -> Tensor:
    """Raster with the axes nested as written, slowest first: "tyx" is the model's own order.

    Args:
        grid: the token grid.
        axes: one of the six orderings of the letters t, y, x.

    Returns:
        int64 (video,).
    """
    if axes not in AXIS_ORDERS:
        raise ValueError(f"axis_order: axes={axes!r} is not allowed; use one of {', '.join(AXIS_ORDERS)}")
    return raster(grid, device).reshape(grid.sizes).permute(["tyx".index(a) for a in axes]).flatten()


def token_major(grid: TokenGrid, device: Device = None) -> Tensor:
    """All frames of one place, then the next place (time fastest): position = place * frames + frame."""
    return axis_order(grid, "yxt", device)


def tile(
    grid: TokenGrid, shape: tuple[int, int, int], device: Device = None
) -> tuple[Tensor, tuple[int, ...]]:
    """Tile by tile, raster over the tiles and inside each; tiles at the edges keep only the tokens that exist.

    Args:
        grid: the token grid.
        shape: (t, y, x) size of a tile; sizes beyond the grid's count as the grid's.

    Returns:
        The order, int64 (video,), and the number of tokens of each tile, in order.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"tile: shape={shape!r} is not allowed; use three whole numbers >= 1")
    sizes = [min(n, whole) for n, whole in zip(shape, grid.sizes, strict=True)]
    at = grid.coordinates(device).to(torch.int64).unbind(1)
    tile_id = torch.zeros_like(at[0])
    inside = torch.zeros_like(at[0])
    for place, n, whole in zip(at, sizes, grid.sizes, strict=True):
        part = torch.div(place, n, rounding_mode="floor")
        tile_id = tile_id * -(-whole // n) + part
        inside = inside * n + (place - part * n)
    order = torch.argsort(tile_id * (sizes[0] * sizes[1] * sizes[2]) + inside)
    edges = [
        [min(n, whole - start) for start in range(0, whole, n)]
        for n, whole in zip(sizes, grid.sizes, strict=True)
    ]
    return order, tuple(t * y * x for t, y, x in itertools.product(*edges))


def choose_tile(grid: TokenGrid, block_size: int, slack: float = 0.1) -> tuple[int, int, int]:
    """The most compact tile of at most block_size tokens among those that need few blocks.

    Args:
        grid: the token grid.
        block_size: most tokens of a tile.
        slack: how many more blocks than the least number are accepted for compactness, as a fraction; 0 takes
            the tile that wastes least.

    Returns:
        (t, y, x).
    """
    frames, height, width = grid.sizes
    tiles = [
        (t, y, x)
        for t in range(1, min(frames, block_size) + 1)
        for y in range(1, min(height, block_size // t) + 1)
        for x in range(1, min(width, block_size // (t * y)) + 1)
    ]

    def blocks(shape: tuple[int, int, int]) -> int:
        t, y, x = shape
        return -(-frames // t) * -(-height // y) * -(-width // x)

    most = min(map(blocks, tiles)) * (1 + slack)
    # Surface over volume, up to a factor, counts how far the tokens of a tile lie apart.
    return min((s for s in tiles if blocks(s) <= most), key=lambda s: (sum(1 / n for n in s), blocks(s), s))


def _curve_axes(grid: TokenGrid, device: Device) -> tuple[list[Tensor], int]:
    """Coordinates along the axes longer than 1, and the bits that the longest needs."""
    at = grid.coordinates(device).to(torch.int64).unbind(1)
    axes = [place for place, n in zip(at, grid.sizes, strict=True) if n > 1]
    return axes, max(1, (max(grid.sizes) - 1).bit_length())


def _interleave(axes: list[Tensor], bits: int) -> Tensor:
    """Bits of the axes woven into one number, the first axis' bit leading."""
    code = torch.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for axis in axes:
            code = (code << 1) | ((axis >> bit) & 1)
    return code


def morton(grid: TokenGrid, device: Device = None) -> Tensor:
    """Morton (Z) curve on the covering power of two, cells outside the grid dropped. Returns int64 (video,)."""
    axes, bits = _curve_axes(grid, device)
    return torch.argsort(_interleave(axes, bits)) if axes else raster(grid, device)


def hilbert(grid: TokenGrid, device: Device = None) -> Tensor:
    """Hilbert curve on the covering power of two, cells outside the grid dropped.

    On a cube (or square) whose size is a power of two consecutive tokens are neighbours; where the curve leaves a
    ragged grid, it jumps. Axes of length 1 take no part.
    Source: J. Skilling, Programming the Hilbert curve, AIP Conf. Proc. 707 (2004).

    Returns:
        int64 (video,).
    """
    axes, bits = _curve_axes(grid, device)
    if not axes:
        return raster(grid, device)
    # Undo the rotations and reflections of each level, from the coarsest ...
    for level in reversed(range(1, bits)):
        bit, low = 1 << level, (1 << level) - 1
        for i in range(len(axes)):
            inverted = (axes[i] & bit) != 0
            swap = (axes[0] ^ axes[i]) & low
            first = axes[0] ^ torch.where(inverted, low, swap)
            axes[i] = torch.where(inverted, axes[i], axes[i] ^ swap)
            axes[0] = first
    # ... then turn the Gray code into a number.
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for level in reversed(range(1, bits)):
        flip = torch.where((axes[-1] & (1 << level)) != 0, flip ^ ((1 << level) - 1), flip)
    return torch.argsort(_interleave([axis ^ flip for axis in axes], bits))


def inverse(order: Tensor) -> Tensor:
    """Where each token went: `inverse(order)[order[p]] == p`.

    Args:
        order: int64 (..., n), permutations along the last dimension.
    """
    position = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, position.expand_as(order))


def layout(
    grid: TokenGrid,
    order: Tensor | None,
    block_size: int,
    *,
    lengths: Sequence[int] | None = None,
    tile_shape: tuple[int, int, int] | None = None,
    device: Device = None,
) -> BlockLayout:
    """Blocks of the whole sequence: video blocks in the given order, then text in blocks of its own.

    A block never holds both video and text, wherever the text sits in the sequence.

    Args:
        grid: the token grid, with its text.
        order: int64 (video,) or (B|1, H|1, video), or None for raster.
        block_size: slots of a block.
        lengths: sizes of the tiles along the order, from `tile`; no block spans two tiles, and bigger tiles are
            cut. None: the video is one run of tokens.
        tile_shape: the shape given to `tile`, when order and lengths are what it returned: a layout whose tiles fit
            into blocks then says so in its `box`, which lets a kernel copy them without an index.
        device: where to build; by default the order's device.

    Returns:
        A layout of grid.tokens tokens whose first `video_blocks(layout, grid)` blocks hold the video.
    """
    device = order.device if device is None and order is not None else device
    text_fits = not grid.text or (grid.text_at == "back" and grid.video % block_size == 0)
    if order is None and lengths is None and text_fits:
        return BlockLayout.raster(grid.tokens, block_size, device)
    video = raster(grid, device) if order is None else order.to(device=device, dtype=torch.int64)
    if video.shape[-1] != grid.video:
        raise ValueError(f"layout: order has {video.shape[-1]} tokens, the grid {grid} has {grid.video}")
    text = torch.arange(grid.text, device=device) + grid.text_start
    whole = torch.cat((video + grid.video_start, text.expand(*video.shape[:-1], -1)), dim=-1)
    if lengths is not None:
        made = BlockLayout.from_order(whole, block_size, lengths=[*lengths, grid.text])
        shape = tuple(min(n, most) for n, most in zip(tile_shape or grid.sizes, grid.sizes, strict=True))
        if tile_shape is None or math.prod(shape) > block_size:
            return made
        box = (*grid.sizes, *shape, grid.video_start, grid.text_start, grid.text)
        return dataclasses.replace(made, box=box)
    parts = [BlockLayout.raster(n, block_size, device).lengths for n in (grid.video, grid.text)]
    return BlockLayout.from_order(whole, block_size, lengths=torch.cat(parts))


def video_blocks(layout: BlockLayout, grid: TokenGrid) -> int:
    """Blocks that hold video in a layout made by `layout`: all before the text blocks."""
    return layout.blocks - -(-grid.text // layout.block_size)


def per_head(layouts: Sequence[BlockLayout], choice: Tensor) -> BlockLayout:
    """One layout in which every head uses one of several orders.

    Args:
        layouts: layouts of the same tokens and block lengths, each with one order for all heads.
        choice: int64 (B|1, H), which layout each head uses.

    Returns:
        The layout with index (B|1, H, slots); its lengths are those of the first layout.
    """
    first = layouts[0]
    sizes = {(x.block_size, x.tokens, x.blocks) for x in layouts}
    if len(sizes) > 1:
        raise ValueError("per_head: layouts differ in block_size, tokens or blocks; build them alike")
    index = torch.stack([x.token_of_slot.reshape(x.slots) for x in layouts])
    return BlockLayout(first.block_size, first.tokens, index[choice], first.lengths)
