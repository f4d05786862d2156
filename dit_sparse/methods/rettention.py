"""Re-ttention (arXiv 2505.22918): a very narrow window, and statistics of an earlier dense step that make up for it.

Every query sees the keys near its own place, in all frames, and the text. At every few steps attention is dense: then
the share of the mass that the window holds is kept, and what the keys outside of it add to the output. Between those
steps the sparse output is multiplied by the share, and the addition added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blockmask import HIGHEST, LOWEST, BlockLayout, BlockMask, TokenWindow
from ..grid import TokenGrid
from ..operators import Operator
from ..operators_statistics import MeasureShare, ReuseShare
from ..order import layout, token_major, video_blocks
from ..patterns import build_mask, check_block_size, choose_block_size, half_band, interval_blocks, static_mask
from ..selection import text_forced
from .base import Call, Method, Plan, check_range

MASKS = ("blocks", "tokens")


def _touched(grid: TokenGrid, blocks: BlockLayout, reach: int) -> Tensor:
    """bool (blocks, blocks): key blocks that hold a place at most `reach` away from one of the query block's."""
    size, frames = blocks.block_size, grid.frames
    start = torch.arange(blocks.blocks) * size
    end = (start + size).clamp(max=grid.video) - 1
    first, last = start // frames - reach, end // frames + reach
    return interval_blocks(first * frames, last * frames + frames - 1, blocks.blocks, size)


def _kept(grid: TokenGrid, blocks: BlockLayout, reach: int) -> float:
    """Share of the video's pairs that `_touched` keeps."""
    video = video_blocks(blocks, grid)
    lengths = blocks.lengths[:video].to(torch.float64)
    return float(lengths @ _touched(grid, blocks, reach)[:video, :video].to(torch.float64) @ lengths) / grid.video**2


@dataclass(frozen=True)
class Rettention(Method):
    """A window in every frame, with softmax statistics and residuals of dense steps.

    Args:
        window: width of the window over a frame, as a fraction of its tokens in raster order: |i - j| <= w / 2 with
            w = int(window * tokens of a frame). It is the same in all frames.
        density: None: `window` decides. A number: the window whose mask comes within 0.03 of it on 2,000 tokens and
            more, text included; `window` then has no effect. Of the mask: every `period`-th step is dense besides.
        period: steps from one dense step, at which the statistics are measured, to the next. The first sparse step
            of a run is one.
        lam: what the share of the mass grows by from one sparse step to the next, at most to 1.
        mask: "blocks" covers the window by whole blocks (ours: a block is often wider than the window, and costs as
            much whole); "tokens" is the paper's window, exact to the token.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    window: float = 0.03125
    density: float | None = None
    period: int = 5
    lam: float = 0.04
    mask: str = "blocks"
    block_size: int | None = None

    name: ClassVar[str] = "rettention"
    title: ClassVar[str] = "Re-ttention"
    arxiv: ClassVar[str | None] = "2505.22918"
    parts: ClassVar[dict[str, str]] = {
        "order": "place by place, all frames of one after the other",
        "score": "distance in the frame",
        "select": "window, the same in all frames; text",
        "operate": "scaled by the kept share, plus the kept residual",
        "remember": "share and residual of every n-th step, which is dense",
    }
    # Source: the authors' code and paper: of 50 steps of CogVideoX-2B 15 are dense before the first measured one, of 20
    # of PixArt 5. No other family that is supported here was tried.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "cogvideox": {"window": 0.03125, "period": 5, "lam": 0.04, "dense_steps": 0.3, "dense_layers": 0},
        "pixart": {"window": 0.03125, "period": 5, "lam": 0.04, "dense_steps": 0.25, "dense_layers": 0},
    }

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (MeasureShare, ReuseShare)

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 0, 2)
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        if not isinstance(self.period, int) or isinstance(self.period, bool) or self.period < 1:
            raise ValueError(f"rettention: period={self.period!r} is not allowed; use a whole number >= 1")
        check_range(self.name, "lam", self.lam, 0, 1)
        if self.mask not in MASKS:
            raise ValueError(f"rettention: mask={self.mask!r} is not allowed; use one of {', '.join(MASKS)}")
        check_block_size(self.name, self.block_size)

    def reach(self, grid: TokenGrid, blocks: BlockLayout) -> int:
        """Places of a frame that a query sees on either side of its own."""
        if self.density is None:
            return int(grid.frame_tokens * self.window) // 2
        share = half_band(self.density, grid, 0.0)
        if share > 0.999:
            return grid.frame_tokens
        if self.mask == "tokens":
            return max(0, round(share * grid.frame_tokens - 0.5))
        wanted, low, high = 1 - (1 - share) ** 2, 0, grid.frame_tokens
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if _kept(grid, blocks, middle) < wanted else (low, middle)
        return min((max(0, low - 1), low), key=lambda reach: abs(_kept(grid, blocks, reach) - wanted))

    def build(self, grid: TokenGrid) -> BlockMask:
        """The mask of a grid, on the CPU."""
        size = choose_block_size(grid.tokens, self.block_size)
        blocks = layout(grid, token_major(grid) if grid.frames > 1 else None, size)
        reach = self.reach(grid, blocks)
        keep = text_forced(_touched(grid, blocks, reach), blocks, grid)
        if self.mask == "blocks":
            return build_mask(keep, blocks, blocks)
        # The video fills the slots from the first one on, so a token's slot is its place in the order.
        slot = torch.arange(blocks.slots)
        text, place = slot >= grid.video, slot // grid.frames
        window = TokenWindow(
            place.to(torch.int32)[None],
            torch.where(text, LOWEST, place - reach).to(torch.int32)[None],
            torch.where(text, HIGHEST, place + reach).to(torch.int32)[None],
            text,
        )
        return build_mask(keep, blocks, blocks, window=window)

    def plan(self, call: Call) -> Plan:
        """The shape's mask; dense and measured where there are no statistics, or old ones."""
        mask = static_mask(call, (self, "window"), lambda: self.build(call.grid))
        measured = call.state.recall("share", max_age=self.period) is not None
        return Plan(mask, operator=ReuseShare(self.lam) if measured else MeasureShare())
