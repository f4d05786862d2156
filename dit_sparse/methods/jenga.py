"""Jenga's block carving (arXiv 2505.16864): the best key blocks by pooled scores, and all that touch in space and time.

Tokens follow a curve through the video, so that a block is a compact piece of it. Every query block keeps at least a
fixed number of key blocks, and more where the softmax of the pooled scores is spread out. The other half of Jenga,
early steps at a lower resolution, is not part of this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..order import hilbert, layout, video_blocks
from ..patterns import check_block_size, choose_block_size, touching_blocks
from ..routing import route_means
from ..scoring import select_means
from ..selection import Rule, rows_kept, select_top_k
from .base import Call, Method, Plan, check_range

ORDERS = ("hilbert", "raster")
ALL_KEPT = 0.25  # a drop of at most so much is not worth a mask: the call is dense
SWITCHES = {1: (), 2: (0.5,), 3: (0.3, 0.5)}  # fractions of the run after which the next stage begins
WARM_UP = 0.1  # fraction of the run over which the drop grows from 0


@dataclass(frozen=True)
class Jenga(Method):
    """Top-k and top-p of pooled scores together, with the blocks that touch the query block.

    Args:
        drop: share of the video's key blocks that may go, one number, or one for every stage of the run: two stages
            change at half of the steps, three at .3 and .5 of them. A run of unknown length has only the last.
        p: every row also keeps its best blocks until they hold so much of the softmax over the video's blocks.
        warm_up: the drop grows from 0 over the first tenth of the run; calls in which it is at most .25 are dense.
        density: None: `drop` and `p` decide. A number: as many blocks in every row as bring the mask within 0.03 of it
            on 2,000 tokens and more, touching blocks and text included, unless these alone take more; `drop`, `p` and
            `warm_up` then have no effect.
        order: "hilbert" (a curve through space and time) or "raster" (the model's own).
        block_size: tokens of a block, 128 in the paper; None chooses by the length of the sequence.
    """

    drop: float | tuple[float, ...] = (0.75, 0.85)
    p: float = 0.3
    warm_up: bool = True
    density: float | None = None
    order: Literal["hilbert", "raster"] = "hilbert"
    block_size: int | None = None

    name: ClassVar[str] = "jenga"
    title: ClassVar[str] = "Jenga (block carving)"
    arxiv: ClassVar[str | None] = "2505.16864"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "Hilbert curve, or the model's",
        "score": "softmax of mean query times mean key",
        "select": "top-k and top-p together; touching blocks; text",
        "operate": "drop",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the presets of dvlab-research/Jenga ("base"), whose first number belongs to the stage at lower resolution.
    # No step and no layer is dense but by the warm-up of the drop.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "hunyuan": {"drop": (0.75, 0.85), "p": 0.3, "dense_steps": 0, "dense_layers": 0},
        "wan": {"drop": (0.75, 0.85), "p": 0.9, "dense_steps": 0, "dense_layers": 0},
    }

    def __post_init__(self) -> None:
        stages = tuple(self.drop) if isinstance(self.drop, (tuple, list)) else (self.drop,)
        if len(stages) not in SWITCHES:
            raise ValueError(f"jenga: drop={self.drop!r} is not allowed; use one number, or one for each of 2 or 3 "
                             "stages")
        for share in stages:
            check_range(self.name, "drop", share, 0, 1)
        if isinstance(self.drop, list):
            object.__setattr__(self, "drop", stages)
        check_range(self.name, "p", self.p, 0, 1)
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        if not isinstance(self.warm_up, bool):
            raise ValueError(f"jenga: warm_up={self.warm_up!r} is not allowed; use True or False")
        if self.order not in ORDERS:
            raise ValueError(f"jenga: order={self.order!r} is not allowed; use one of {', '.join(ORDERS)}")
        check_block_size(self.name, self.block_size)

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """Blocks along the curve, then text, on the CPU."""
        size = choose_block_size(grid.tokens, self.block_size)
        return layout(grid, hilbert(TokenGrid(*grid.sizes)) if self.order == "hilbert" else None, size)

    def drop_at(self, step: int, num_steps: int | None) -> float:
        """The drop of a step: that of its stage, less during the warm-up."""
        stages = self.drop if isinstance(self.drop, tuple) else (self.drop,)
        if num_steps is None:
            return stages[-1]
        share = stages[sum(step >= end * num_steps for end in SWITCHES[len(stages)])]
        if not self.warm_up or num_steps == 1:
            return share
        return share * min(1.0, step / (num_steps - 1) / WARM_UP)

    def rule(self, blocks: BlockLayout, grid: TokenGrid, drop: float) -> Rule:
        """Top-k and top-p together: the larger of the two counts, in every row.

        Args:
            blocks, grid: the layout and its grid.
            drop: share of the video's key blocks that may go.
        """
        video = video_blocks(blocks, grid)
        # Floats such as (1 - .9) * 10 lie a hair below the whole number that is meant.
        least = max(1, int((1 - drop) * video + 1e-9))
        chosen = slice(0, video)  # text sees everything and is seen by everyone
        return Rule("top_p", self.p, softmax=True, least=least, rows=chosen, columns=chosen)

    def filled(self, scores: Tensor, touching: Tensor, blocks: BlockLayout, grid: TokenGrid) -> Tensor:
        """As many blocks in every row as the density asks for; those that touch take the first places.

        Args:
            scores: (..., n, n), mean query times mean key.
            touching: bool (n, n), pairs of blocks that touch.
            blocks, grid: the layout and its grid.

        Returns:
            bool (..., n, n).
        """
        assert self.density is not None
        video = video_blocks(blocks, grid)
        count = rows_kept(self.density, video, 0, blocks.blocks - video, count_forced=True)
        near = touching[:video, :video]
        kept = select_top_k(scores[..., :video, :video].masked_fill(near, torch.inf),
                            near.sum(-1, keepdim=True).clamp(min=count))
        whole = torch.ones_like(scores, dtype=torch.bool)
        whole[..., :video, :video] = kept
        return whole

    def plan(self, call: Call) -> Plan:
        """Carve, for every batch element and head."""
        drop = self.drop_at(call.step, call.num_steps)
        if self.density is None and drop <= ALL_KEPT:
            return Plan(None)
        grid = call.grid
        blocks = call.cached((self, "layout"), lambda: self.layout(grid).to(call.device))
        touching = call.cached((self, "touching"), lambda: touching_blocks(self.layout(grid), grid).to(call.device))
        means = call.block_mean("query", blocks), call.block_mean("key", blocks)
        if self.density is not None:
            keep = select_means(*means, call.scale, lambda scores, _: self.filled(scores, touching, blocks, grid))
            return Plan(BlockMask.from_dense(keep, blocks, blocks))
        near = call.cached((self, "near"), lambda: BlockMask.from_dense(touching, blocks, blocks))
        mask = route_means(*means, blocks, blocks, call.scale, self.rule(blocks, grid, drop))
        return Plan(mask.union(near))
