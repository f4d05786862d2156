"""Generalized Neighborhood Attention (arXiv 2504.16922): a window that groups of queries share.

Along each of frames, rows and columns a query sees `window` keys around it; queries in groups of `stride`
share one window, so stride 1 is a sliding window and stride = window is blocked attention. Windows shift
inwards at borders. Sliding Tile Attention (arXiv 2502.04507) is the case window = k tiles, stride = one tile,
and also brings windows that differ between heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blockmask import HIGHEST, LOWEST, BlockLayout, BlockMask, TokenWindow
from ..grid import TokenGrid
from ..order import choose_tile, layout, tile
from ..patterns import build_mask, check_block_size, choose_block_size, pick, static_mask
from ..selection import text_forced
from .base import Call, Method, Plan, check_range

Triple = tuple[int, int, int]
AXES = ("frames", "rows", "columns")


def axis_window(
    size: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The rule along one axis, as an exact test of places.

    Dilation splits an axis into groups of every dilation-th place, each a small axis of its own. A place is
    written group by group, so that one range of places also says that query and key are of the same group.

    Args:
        size: places along the axis; window, stride, dilation, causal: the rule.

    Returns:
        place, low, high: int64 (size,); query q sees key k exactly if low[q] <= place[k] <= high[q].
    """
    at = torch.arange(size)
    group, local = at % dilation, torch.div(at, dilation, rounding_mode="floor")
    length = torch.div(size - group + dilation - 1, dilation, rounding_mode="floor")
    start = torch.div(local, stride, rounding_mode="floor") * stride
    if causal:
        leader = torch.minimum(start + stride - 1, length - 1)
        low, high = (leader - window + 1).clamp(min=0), local
    else:
        left, right = window // 2, window // 2 + window % 2 - 1
        leader = torch.minimum(start + stride // 2, length - 1)
        centre = torch.minimum(leader.clamp(min=left), length - 1 - right)
        low, high = centre - left, centre + right
    base = group * -(-size // dilation)
    return base + local, base + low, base + high


def tile_axis(tiles: int, window: int) -> Tensor:
    """Sliding tiles along one axis: the rule with tiles for tokens. Returns bool (tiles, tiles)."""
    place, low, high = axis_window(tiles, min(window, tiles))
    return (low[:, None] <= place) & (place <= high[:, None])


def default_tile(grid: TokenGrid, block_size: int) -> Triple:
    """The most compact tile of exactly one block among those that need little work on the grid.

    Work counts blocks, and short ones (at ragged edges) 1.3 times, because kernels test their length. Grids
    too small for a whole tile take the tile that wastes least.
    """
    powers = [2**i for i in range(block_size.bit_length())]
    shapes = [(t, y, block_size // (t * y)) for t in powers for y in powers if t * y <= block_size]
    work = {}
    for shape in shapes:
        full = math.prod(n // t for n, t in zip(grid.sizes, shape, strict=True))
        if full:
            work[shape] = (
                1.3 * math.prod(-(-n // t) for n, t in zip(grid.sizes, shape, strict=True)) - 0.3 * full
            )
    if not work:
        return choose_tile(grid, block_size)
    most = 1.1 * min(work.values())
    return min((s for s in work if work[s] <= most), key=lambda s: (sum(1 / n for n in s), work[s], s))


def fit_tiles(grid: TokenGrid, tile_shape: Triple, density: float) -> Triple:
    """The window in tiles whose share of the video's pairs comes nearest to a density.

    Of windows about equally near, the one with the most equal shares of the three axes is taken.
    """
    axes = []
    for n, t in zip(grid.sizes, tile_shape, strict=True):
        lengths = torch.tensor([min(t, n - start) for start in range(0, n, t)])
        tiles = len(lengths)
        pairs = [int((tile_axis(tiles, k) * lengths[:, None] * lengths).sum()) for k in range(1, tiles + 1)]
        axes.append([(k, math.log(kept / n**2)) for k, kept in enumerate(pairs, 1)])

    def cost(window: tuple[tuple[int, float], ...]) -> float:
        shares = [share for (_, share), n in zip(window, grid.sizes, strict=True) if n > 1] or [0.0]
        return 4 * abs(sum(shares) - math.log(density)) + 0.5 * (max(shares) - min(shares))

    t, y, x = (k for k, _ in min(itertools.product(*axes), key=cost))
    return t, y, x


@lru_cache(maxsize=8)
def _groups(grid: TokenGrid, tile_shape: Triple, dilation: Triple) -> tuple[Tensor, tuple[int, ...]]:
    """Tile order inside each dilation group: the order, and the tokens of each tile."""
    if dilation == (1, 1, 1):
        return tile(grid, tile_shape)
    token = torch.arange(grid.video).reshape(grid.sizes)
    orders: list[Tensor] = []
    lengths: list[int] = []
    for offset in itertools.product(*map(range, dilation)):
        part = token[tuple(slice(o, None, d) for o, d in zip(offset, dilation, strict=True))]
        if part.numel():
            order, sizes = tile(TokenGrid(*part.shape), tile_shape)
            orders.append(part.flatten()[order])
            lengths.extend(sizes)
    return torch.cat(orders), tuple(lengths)


def _per_block(values: Tensor, blocks: BlockLayout) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of the real tokens of every block: int (C, slots) -> two (C, blocks)."""
    shape = (values.shape[0], blocks.blocks, blocks.block_size)
    low = torch.where(blocks.real, values, HIGHEST).reshape(shape).amin(-1)
    high = torch.where(blocks.real, values, LOWEST).reshape(shape).amax(-1)
    return low, high


def window_mask(
    grid: TokenGrid,
    window: Triple,
    stride: Triple,
    dilation: Triple,
    causal: tuple[bool, bool, bool],
    tile_shape: Triple,
    block_size: int,
) -> BlockMask:
    """The exact mask of a windowed rule over the grid, text included, on the CPU.

    Args:
        grid: the tokens.
        window, stride, dilation, causal: the rule along (frames, rows, columns).
        tile_shape: box of tokens that is kept together; bigger ones are cut into blocks.
        block_size: tokens of a block.
    """
    order, lengths = _groups(grid, tile_shape, dilation)
    blocks = layout(grid, order, block_size, lengths=lengths)
    rules = [axis_window(*rule) for rule in zip(grid.sizes, window, stride, dilation, causal, strict=True)]
    at = grid.coordinates().to(torch.int64)
    # (video, C) -> (C, tokens): text queries see every key, and every query sees the text
    shape, video = (3, grid.tokens), grid.video_slice
    place, low, high = (
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, LOWEST),
        torch.full(shape, HIGHEST),
    )
    for c, (p, lo, hi) in enumerate(rules):
        place[c, video], low[c, video], high[c, video] = p[at[:, c]], lo[at[:, c]], hi[at[:, c]]
    text = torch.zeros(grid.tokens, dtype=torch.bool)
    text[grid.text_slice] = True
    exact = TokenWindow.from_tokens(place, low, high, blocks, blocks, always=text if grid.text else None)

    # A block pair is needed if some window meets the key block, and whole if every window holds all of it.
    key_low, key_high = _per_block(exact.key_coordinates, blocks)
    low_low, low_high = _per_block(exact.query_low, blocks)
    high_low, high_high = _per_block(exact.query_high, blocks)
    keep = torch.ones(blocks.blocks, blocks.blocks, dtype=torch.bool)
    every = keep.clone()
    for c in range(3):
        keep &= (key_low[c] <= high_high[c][:, None]) & (key_high[c] >= low_low[c][:, None])
        every &= (low_high[c][:, None] <= key_low[c]) & (key_high[c] <= high_low[c][:, None])
    keep, every = (text_forced(x, blocks, grid) for x in (keep, every))
    mask = build_mask(keep, blocks, blocks, partial=~every, window=exact)
    # Rules along the axes are independent, so the pairs multiply: no need to count them block by block.
    pairs = math.prod(int((hi - lo + 1).sum()) for _, lo, hi in rules)
    pairs += grid.tokens**2 - grid.video**2
    mask.__dict__["pairs"] = torch.tensor([[pairs]])
    return mask


def tile_window_mask(
    grid: TokenGrid, windows: tuple[Triple, ...], tile_shape: Triple, block_size: int
) -> BlockMask:
    """Sliding tiles for several windows at once: a mask with one head per window, without boundary tests.

    Args:
        grid: the tokens; tiles at its edges may be short.
        windows: (frames, rows, columns) in tiles, one per head.
        tile_shape, block_size: as in `window_mask`.
    """
    order, lengths = tile(grid, tile_shape)
    blocks = layout(grid, order, block_size, lengths=lengths)
    counts = [-(-n // min(t, n)) for n, t in zip(grid.sizes, tile_shape, strict=True)]
    cut = torch.tensor([-(-n // block_size) for n in lengths])
    tile_of_block = torch.repeat_interleave(torch.arange(len(lengths)), cut)
    place = (
        tile_of_block // (counts[1] * counts[2]),
        tile_of_block // counts[2] % counts[1],
        tile_of_block % counts[2],
    )
    keep = torch.ones(1, len(windows), blocks.blocks, blocks.blocks, dtype=torch.bool)
    video = len(tile_of_block)
    for head, window in enumerate(windows):
        for at, tiles, size in zip(place, counts, window, strict=True):
            keep[0, head, :video, :video] &= tile_axis(tiles, min(size, tiles))[at[:, None], at]
    return build_mask(text_forced(keep, blocks, grid), blocks, blocks)


@dataclass(frozen=True)
class GNA(Method):
    """A window of neighbours in time and space for every query; the same at all layers and steps.

    Triples are (frames, rows, columns). On an image the first entry is 1.

    Args:
        density: kept fraction of all pairs, reached by sliding tiles: a window of whole tiles is fitted to
            the grid, within 15 % of the asked density on 2,000 tokens and more. None: 0.25, unless one of the
            next two is given.
        window: keys that every query sees along each axis, exact to the token.
        tile_windows: windows in tiles, for sliding tiles (STA): one triple for all heads, one per head, or
            nested per layer and head or per step, layer and head. At most one of these three is given.
        stride: with `window`, queries that share a window along each axis; None: one tile.
        dilation: with `window`, distance between neighbouring keys.
        causal: with `window`, along which axes a query sees only keys up to its own place.
        tile: box of tokens that is kept together; None: the most compact one that suits the block size and
            the grid.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    density: float | None = None
    window: Triple | None = None
    tile_windows: tuple[Any, ...] | None = None
    stride: Triple | None = None
    dilation: Triple = (1, 1, 1)
    causal: tuple[bool, bool, bool] = (False, False, False)
    tile: Triple | None = None
    block_size: int | None = None

    name: ClassVar[str] = "gna"
    title: ClassVar[str] = "Generalized Neighborhood Attention (NATTEN), with Sliding Tile Attention"
    arxiv: ClassVar[str | None] = "2504.16922"
    parts: ClassVar[dict[str, str]] = {
        "order": "tiles",
        "score": "distance along each axis",
        "select": "window shared by groups of queries; text",
        "operate": "drop, exact at the window's borders",
        "remember": "one mask per shape",
    }
    # Source: the paper's runs (Hunyuan 30x48x80, 58 % and 91 % sparse; Cosmos 16x44x80; FLUX at 4096x4096).
    # Their windows belong to those grids; the density carries over to others.
    family_defaults: ClassVar[dict[str, dict]] = {
        "hunyuan": {"density": 0.417, "dense_steps": 0.3, "dense_layers": 0},
        "cosmos": {"density": 0.436, "dense_steps": 0.34, "dense_layers": 0},
        "flux": {"density": 0.098, "dense_steps": 0.32, "dense_layers": 0},
    }

    def __post_init__(self) -> None:
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        for name in ("window", "stride", "dilation", "tile"):
            value = getattr(self, name)
            if value is not None or name == "dilation":
                object.__setattr__(self, name, _triple(name, value))
        causal = tuple(self.causal) if isinstance(self.causal, (tuple, list)) else self.causal
        if not isinstance(causal, tuple) or len(causal) != 3 or any(not isinstance(c, bool) for c in causal):
            raise ValueError(f"gna: causal={self.causal!r} is not allowed; use three of True and False")
        object.__setattr__(self, "causal", causal)
        if sum(x is not None for x in (self.density, self.window, self.tile_windows)) > 1:
            raise ValueError("gna: density, window and tile_windows exclude each other; give at most one")
        if self.window is None and (self.stride is not None or self.dilation != (1, 1, 1) or any(causal)):
            raise ValueError(
                "gna: stride, dilation and causal need a window; give window=(frames, rows, columns)"
            )
        if self.window is not None and self.stride is not None:
            for axis, w, s in zip(AXES, self.window, self.stride, strict=True):
                if s > w:
                    raise ValueError(
                        f"gna: stride {s} along {axis} is not allowed; use 1 to the window's {w}"
                    )
        check_block_size(self.name, self.block_size)
        if self.tile_windows is not None:
            object.__setattr__(self, "tile_windows", _table(self.tile_windows))

    def __hash__(self) -> int:
        # A published table holds 72,000 windows: hashing them at every call would take longer than the call.
        return hash(
            (self.density, self.window, self.stride, self.dilation, self.causal, self.tile, self.block_size)
        )

    def check(self, grid: TokenGrid) -> None:
        """Raise ValueError when the window does not fit the grid."""
        if self.window is None:
            return
        for axis, w, d, n in zip(AXES, self.window, self.dilation, grid.sizes, strict=True):
            if w * d > n:
                raise ValueError(
                    f"gna: window {w} with dilation {d} along {axis} does not fit the grid {grid}; "
                    f"use at most {n // d}"
                )

    def tiles(self, grid: TokenGrid) -> tuple[Triple, int]:
        """The tile and the block size for a grid."""
        block = choose_block_size(grid.tokens, self.block_size)
        shape = self.tile or default_tile(grid, block)
        t, y, x = (min(t, n) for t, n in zip(shape, grid.sizes, strict=True))
        return (t, y, x), block

    def build(self, grid: TokenGrid) -> BlockMask:
        """The mask of a grid, on the CPU; with `tile_windows`, one head per distinct window."""
        self.check(grid)
        shape, block = self.tiles(grid)
        if self.tile_windows is not None:
            return tile_window_mask(grid, self._distinct(), shape, block)
        if self.window is None:
            # The text's rows and columns are part of the asked density.
            asked = (0.25 if self.density is None else self.density) * grid.tokens**2 - grid.tokens**2
            left = max(1 + asked / grid.video**2, 1 / grid.video)
            return tile_window_mask(grid, (fit_tiles(grid, shape, left),), shape, block)
        st, sy, sx = (min(s, w) for s, w in zip(self.stride or shape, self.window, strict=True))
        return window_mask(grid, self.window, (st, sy, sx), self.dilation, self.causal, shape, block)

    def plan(self, call: Call) -> Plan:
        """The shape's mask, built at the first call; with `tile_windows`, each head's own."""
        mask = static_mask(call, self, lambda: self.build(call.grid))
        if self.tile_windows is None:
            return Plan(mask)
        windows = self.windows_of(call.layer, call.step, call.all_heads)

        def choose() -> Tensor:
            distinct = self._distinct()
            return torch.tensor([[distinct.index(w) for w in windows]]).to(call.device)

        return Plan(pick(mask, call.own(call.cached((self, "heads", windows), choose), 1)))

    @property
    def table_heads(self) -> int | None:
        """Heads that `tile_windows` names, or None when it names none."""
        table: Any = self.tile_windows
        while table is not None and not isinstance(table[0][0], int):
            table = table[0]
        return None if table is None or len(table) == 1 else len(table)

    def _distinct(self) -> tuple[Triple, ...]:
        """Every window of the table once."""
        return tuple(dict.fromkeys(_flat(self.tile_windows)))

    def windows_of(self, layer: int, step: int, heads: int) -> tuple[Triple, ...]:
        """The window in tiles of every head, from the table.

        Raises:
            ValueError: when the table has another number of heads, or no such layer.
        """
        table: Any = self.tile_windows
        levels = _levels(table)
        if levels == 4:
            table = table[min(step, len(table) - 1)]
        if levels >= 3:
            if layer >= len(table):
                raise ValueError(f"gna: tile_windows has {len(table)} layers, the model has layer {layer}")
            table = table[layer]
        if len(table) not in (1, heads):
            raise ValueError(
                f"gna: tile_windows has {len(table)} heads, the model has {heads}; use 1 or {heads}"
            )
        return tuple(table) * (heads if len(table) == 1 else 1)


def _triple(name: str, value: Any) -> Triple:
    """Three whole numbers of at least 1 as a tuple."""
    good = isinstance(value, (tuple, list)) and len(value) == 3
    if not good or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in value):
        raise ValueError(
            f"gna: {name}={value!r} is not allowed; use three whole numbers (frames, rows, columns) >= 1"
        )
    return tuple(value)


def _levels(table: Any) -> int:
    """How deep the first window of a table lies."""
    return 0 if isinstance(table, int) else 1 + _levels(table[0])


def _flat(table: Any) -> Iterator[Triple]:
    """All windows of a nested table."""
    for item in table:
        if isinstance(item[0], int):
            yield item
        else:
            yield from _flat(item)


def _table(value: Any, depth: int = 0) -> tuple[Any, ...]:
    """Windows nested up to step, layer, head, as tuples of full depth."""
    if isinstance(value, (tuple, list)) and value and all(isinstance(v, int) for v in value):
        window = _triple("tile_windows", value)
        return (window,) if depth == 0 else window
    if not isinstance(value, (tuple, list)) or not value or depth > 2:
        raise ValueError(
            "gna: tile_windows is not allowed; use a triple, or triples nested per head, per layer and "
            "head, or per step, layer and head"
        )
    table = tuple(_table(v, depth + 1) for v in value)
    if len({_levels(v) for v in table}) > 1:
        raise ValueError("gna: tile_windows mixes levels of nesting; write out every layer and step alike")
    return table
