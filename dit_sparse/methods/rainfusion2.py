"""RainFusion2.0 (arXiv 2512.24086): tiles of each frame, pooled scores, the best key blocks of every row.

Tokens are reordered within their frame into 8x8 tiles, so that a block of 128 is two neighbouring tiles. Mean
query times mean key ranks the key blocks of every query block. Every query sees the whole first frame, and
the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout
from ..grid import TokenGrid
from ..order import layout, video_blocks
from ..patterns import check_block_size, choose_block_size
from ..routing import route_means
from ..selection import Rule, rows_kept
from .base import Call, Method, Plan, check_range


@lru_cache(maxsize=8)
def frame_tile_order(grid: TokenGrid, tile: int = 8) -> Tensor:
    """Each frame in square tiles; what they leave over comes after: bottom rows, then right columns.

    Args:
        grid: the token grid, of any size.
        tile: side of a tile.

    Returns:
        int64 (video,): video token at each place. Its inverse is by index (`order.inverse`), never by
            reshaping.
    """
    rows, columns = grid.height // tile * tile, grid.width // tile * tile
    frame = torch.arange(grid.frame_tokens).reshape(grid.height, grid.width)
    tiles = frame[:rows, :columns].reshape(rows // tile, tile, columns // tile, tile).transpose(1, 2)
    order = torch.cat((tiles.flatten(), frame[rows:].flatten(), frame[:rows, columns:].flatten()))
    return (torch.arange(grid.frames)[:, None] * grid.frame_tokens + order).flatten()


@dataclass(frozen=True)
class RainFusion2(Method):
    """Top-k key blocks by pooled scores, on tiles of each frame, with the first frame kept.

    Args:
        density: kept fraction of all pairs, within 0.03 of it on 2,000 tokens and more, unless sink and text
            alone take more than half of it (see `count_forced`). The paper's sparsity is 1 - density.
        sink: the first frame sees everything and is seen by everything; images have no sink.
        count_forced: sink and text are part of `density`. False: as the paper, the best ceil(density *
            blocks) blocks of every row, first frame included in the ranking, and sink and text on top.
        tile: side of the square tiles, in tokens.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    density: float = 0.2
    sink: bool = True
    count_forced: bool = True
    tile: int = 8
    block_size: int | None = None

    name: ClassVar[str] = "rainfusion2"
    title: ClassVar[str] = "RainFusion2.0"
    arxiv: ClassVar[str | None] = "2512.24086"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "8x8 tiles of each frame",
        "score": "mean query times mean key",
        "select": "top-k per row; first frame; text",
        "operate": "drop",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the vendor's recipes (Wan 2.2 at 720p: the first 15 of 40 steps dense).
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {"density": 0.2, "count_forced": False, "dense_steps": 15, "dense_layers": 0},
        "qwen": {"density": 0.4, "count_forced": False},
    }

    def __post_init__(self) -> None:
        check_range(self.name, "density", self.density, 0, 1, open_low=True)
        for name in ("sink", "count_forced"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"rainfusion2: {name}={getattr(self, name)!r} is not allowed; use True or False"
                )
        if not isinstance(self.tile, int) or isinstance(self.tile, bool) or self.tile < 1:
            raise ValueError(f"rainfusion2: tile={self.tile!r} is not allowed; use a whole number >= 1")
        check_block_size(self.name, self.block_size)

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """Blocks of the tile order, then text, on the CPU."""
        block = choose_block_size(grid.tokens, self.block_size)
        return layout(grid, frame_tile_order(TokenGrid(*grid.sizes), self.tile), block)

    def plan(self, call: Call) -> Plan:
        """Rank and keep, for every batch element and head."""
        grid = call.grid
        blocks = call.cached((self, "layout"), lambda: self.layout(grid).to(call.device))
        video = video_blocks(blocks, grid)
        sink = -(-grid.frame_tokens // blocks.block_size) if self.sink and grid.frames > 1 else 0
        count = rows_kept(self.density, video, sink, blocks.blocks - video, count_forced=self.count_forced)
        # Blocks that are kept anyway take no place in the ranking, unless the paper's count is asked for.
        rule = Rule("top_k", count, rows=slice(sink, video), columns=slice(sink if self.count_forced else 0, video),
                    forced_columns=slice(0, sink))
        means = call.block_mean("query", blocks), call.block_mean("key", blocks)
        return Plan(route_means(*means, blocks, blocks, call.scale, rule))
