"""DraftAttention (arXiv 2505.14708): a draft attention map of averaged patches says which blocks are computed.

Queries and keys are averaged over patches of 8 x 16 tokens of a frame. The softmax of their products is an attention
map 128 times smaller per side, the draft; its largest entries, over all rows of a head together, are the blocks that
are computed. A patch is a block, because tokens are put in patch order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..order import layout, tile, video_blocks
from ..patterns import check_block_size, choose_block_size
from ..routing import lists_of_maps, route_means
from ..selection import Rule, map_kept, rows_kept, select_global
from .base import Call, Method, Plan, check_range

SELECTIONS = ("global", "row")


def patch_of(block_size: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a patch: 8 x 16 for blocks of 128 tokens in frames that these divide, as in the paper.

    What follows is ours: other block sizes; a longer patch along one axis where the frame is too small along the other;
    and, where the patches do not divide the frame, as many of them that are more alike (30 x 52: four columns of 13).
    """
    rows = 1 << (block_size.bit_length() - 1) // 2  # 256 16, 128 8, 64 8, 32 4, 16 4
    columns = block_size // rows
    if height < rows:
        rows, columns = height, block_size // height
    elif width < columns:
        rows, columns = block_size // width, width
    down, across = -(-height // rows), -(-width // columns)
    return -(-height // down), -(-width // across)


@lru_cache(maxsize=8)
def patch_layout(grid: TokenGrid, block_size: int) -> BlockLayout:
    """Blocks of patches, frame by frame, then text, on the CPU. Patches at the edges hold the tokens that exist."""
    shape = (1, *patch_of(block_size, grid.height, grid.width))
    order, lengths = tile(TokenGrid(*grid.sizes), shape)
    return layout(grid, order, block_size, lengths=lengths, tile_shape=shape)


def paper_kept(density: float, blocks: int) -> int:
    """Entries of a head's draft map that the paper's threshold keeps when no two are equal.

    With kk = int(sparsity * blocks^2), what is at least the kk-th smallest entry stays; all of them when kk is 0.
    """
    dropped = int((1 - density) * blocks**2 + 1e-6)  # 1 - .4 may lie a hair below .6
    return blocks**2 - max(dropped - 1, 0)


@dataclass(frozen=True)
class Draft(Method):
    """The largest entries of the averaged patches' attention map.

    Args:
        density: kept fraction of all pairs, within 0.03 of it on 2,000 tokens and more, unless text alone takes more
            than half of it (see `count_forced`). The paper's sparsity is 1 - density.
        selection: "global" ranks all entries of a head together (the paper), so that rows keep different numbers of
            blocks; "row" keeps as many in every row.
        count_forced: text and each query block's own block are part of `density`. False: as the paper, the fraction
            of the video's entries, with text and own blocks on top.
        block_size: tokens of a block, 128 (patches of 8 x 16) in the paper; None chooses by the length of the
            sequence.
    """

    density: float = 0.25
    selection: str = "global"
    count_forced: bool = True
    block_size: int | None = None

    name: ClassVar[str] = "draft"
    title: ClassVar[str] = "DraftAttention"
    arxiv: ClassVar[str | None] = "2505.14708"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "patches of 8x16 in each frame",
        "score": "softmax of mean query times mean key",
        "select": "largest entries of each head's map; own block; text",
        "operate": "drop",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the authors' scripts (768p: Hunyuan at sparsity .9, Wan at .75 with block 0 dense). The scripts leave the
    # first timesteps of Wan dense by their value (> 925) and none of Hunyuan's; the paper says the first 25 % of steps.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "wan": {"density": 0.25, "count_forced": False, "dense_steps": 0.25, "dense_layers": 1},
        "hunyuan": {"density": 0.1, "count_forced": False, "dense_steps": 0.25, "dense_layers": 0},
    }

    def __post_init__(self) -> None:
        check_range(self.name, "density", self.density, 0, 1, open_low=True)
        if self.selection not in SELECTIONS:
            raise ValueError(
                f"draft: selection={self.selection!r} is not allowed; use one of {', '.join(SELECTIONS)}"
            )
        if not isinstance(self.count_forced, bool):
            raise ValueError(f"draft: count_forced={self.count_forced!r} is not allowed; use True or False")
        check_block_size(self.name, self.block_size)

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """Blocks of patches, then text, on the CPU."""
        return patch_layout(grid, choose_block_size(grid.tokens, self.block_size))

    def kept(self, video: int, text: int) -> int:
        """Entries of a head's draft map to keep, for so many video and text blocks."""
        if not self.count_forced:
            return paper_kept(self.density, video)
        return map_kept(self.density, video, text, count_forced=True)

    def by_map(self, call: Call, blocks: BlockLayout) -> BlockMask:
        """The mask of the largest entries of every head's map."""
        video = video_blocks(blocks, call.grid)
        count = self.kept(video, blocks.blocks - video)
        query = call.block_mean("query", blocks)[:, :, :video] * call.scale
        key = call.block_mean("key", blocks)[:, :, :video].mT

        def keep(heads: slice) -> Tensor:
            draft = (query[:, heads] @ key[:, heads]).softmax(-1)
            if self.count_forced:
                draft.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)  # own blocks take the first places
            chosen = select_global(draft, count)
            chosen.diagonal(dim1=-2, dim2=-1).fill_(True)  # a diffuse row may have kept nothing
            return chosen

        return lists_of_maps(keep, query.shape[0], query.shape[1], blocks, video)

    def by_row(self, call: Call, blocks: BlockLayout) -> BlockMask:
        """The mask of the largest entries of every row, for which the softmax makes no difference."""
        video = video_blocks(blocks, call.grid)
        count = rows_kept(self.density, video, 0, blocks.blocks - video, count_forced=self.count_forced)
        rule = Rule("top_k", count, rows=slice(0, video), columns=slice(0, video), near=1)
        means = call.block_mean("query", blocks), call.block_mean("key", blocks)
        return route_means(*means, blocks, blocks, call.scale, rule)

    def plan(self, call: Call) -> Plan:
        """Draft, rank and keep, for every batch element and head."""
        blocks = call.cached((self, "layout"), lambda: self.layout(call.grid).to(call.device))
        return Plan(self.by_map(call, blocks) if self.selection == "global" else self.by_row(call, blocks))
