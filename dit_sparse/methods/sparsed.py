"""SparseD (arXiv 2509.24014): one pattern for the whole run, made from exact scores once the early steps are over.

Heads look at different places, but a head keeps looking there from step to step. So the pattern of every head is
worth an exact answer: at the first sparse step the mean softmax of all queries of a block ranks the key blocks, and
the best of them serve all later steps. The early steps, which settle the content, run dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..bits import pack_bits, unpack_bits
from ..blockmask import BlockLayout
from ..grid import TokenGrid
from ..order import layout, video_blocks
from ..patterns import check_block_size, choose_block_size
from ..routing import block_mass, lists_of_maps
from ..scoring import gather_tokens, head_chunks
from ..selection import rows_kept, select_top_k
from .base import Call, Method, Plan, check_range


def sampled_layout(blocks: BlockLayout, rows: int) -> tuple[Tensor, BlockLayout]:
    """A few tokens of every block, at regular distances, and the blocks that they make.

    Args:
        blocks: a layout with one order for all heads.
        rows: tokens of a block; shorter blocks give all of theirs.

    Returns:
        int64 (tokens,), which tokens; and their layout, block by block as `blocks`, on the CPU as they are.
    """
    lengths = blocks.lengths.tolist()
    counts = [min(rows, n) for n in lengths]
    place = [i * n // count for n, count in zip(lengths, counts, strict=True) for i in range(count)]
    block = torch.arange(blocks.blocks).repeat_interleave(torch.tensor(counts))
    tokens = blocks.token_of_slot.reshape(-1)[block * blocks.block_size + torch.tensor(place)]
    order = torch.arange(len(place))
    return tokens, BlockLayout.from_order(order, rows, lengths=torch.tensor(counts, dtype=torch.int32))


@dataclass(frozen=True)
class SparseD(Method):
    """The best key blocks of every row by exact attention mass, found once and kept.

    Args:
        select: share of the video's key blocks that every query block keeps, int(select * blocks) + 1 of them; 0.3 in
            the paper for long sequences, 0.5 for short ones. Text is kept on top.
        density: None: `select` decides. A number: kept fraction of all pairs, text included, within 0.03 of it on 2,000
            tokens and more; `select` then has no effect.
        every: make the pattern anew after so many steps; None: once in a run, as the paper.
        rows: query rows of a block whose softmax is looked at, at regular distances; None: all, as the paper.
        block_size: tokens of a block, 128 in the paper for long sequences, 32 for short ones; None chooses by length.
    """

    select: float = 0.3
    density: float | None = None
    every: int | None = None
    rows: int | None = None
    block_size: int | None = None

    name: ClassVar[str] = "sparsed"
    title: ClassVar[str] = "SparseD"
    arxiv: ClassVar[str | None] = "2509.24014"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "as the model has it",
        "score": "mean softmax of the block's queries, exact",
        "select": "top-k per row; text",
        "operate": "drop",
        "remember": "one pattern per layer and branch, for the run",
    }
    # Source: the paper, on diffusion language models: 0.3 on long sequences, the first fifth of the steps dense, no
    # dense layers. It has no video model: that these carry over is our choice.
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {"select": 0.3, "dense_steps": 0.2, "dense_layers": 0},
        "hunyuan": {"select": 0.3, "dense_steps": 0.2, "dense_layers": 0},
    }

    def __post_init__(self) -> None:
        check_range(self.name, "select", self.select, 0, 1, open_low=True)
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        for option in ("every", "rows"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(
                    f"sparsed: {option}={value!r} is not allowed; use None or a whole number >= 1"
                )
        check_block_size(self.name, self.block_size)

    def kept_blocks(self, grid: TokenGrid, blocks: BlockLayout) -> int:
        """Key blocks of the video that every query block keeps."""
        video = video_blocks(blocks, grid)
        if self.density is not None:
            return rows_kept(self.density, video, 0, blocks.blocks - video, count_forced=True)
        # A hair is added so that 0.7 * 10 is 7 and not 6.999...
        return min(video, math.floor(self.select * video + 1e-9) + 1)

    def importance(self, call: Call, blocks: BlockLayout, heads: slice) -> Tensor:
        """Mean softmax of every query block over every key block: float32 (B, h, nq, nk)."""
        query, rows = call.query[:, :, heads], blocks
        if self.rows is not None and self.rows < blocks.block_size:

            def sample() -> tuple[Tensor, BlockLayout]:
                found = sampled_layout(self.layout(call.grid), self.rows or 1)
                return found[0].to(call.device), found[1].to(call.device)

            tokens, rows = call.cached((self, "rows"), sample)
            query = gather_tokens(query, tokens)
        return block_mass(query, call.key[:, :, heads], rows, blocks, call.scale, key_mask=call.key_mask)

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """Blocks of the video in the model's order, then text, on the CPU."""
        return layout(grid, None, choose_block_size(grid.tokens, self.block_size))

    def pattern(self, call: Call, blocks: BlockLayout) -> Tensor:
        """bool (B, H, video, video): the blocks of the video that the call's own scores keep."""
        video, kept = video_blocks(blocks, call.grid), self.kept_blocks(call.grid, blocks)
        batch, _, heads, _ = call.query.shape
        chunks = head_chunks(heads, 4 * batch * blocks.blocks**2)
        masses = (self.importance(call, blocks, part)[..., :video, :video] for part in chunks)
        return torch.cat([select_top_k(mass, kept) for mass in masses], dim=1)

    def plan(self, call: Call) -> Plan:
        """The kept pattern, or a new one; text is ranked apart, and all of it kept."""
        blocks = call.cached((self, "layout"), lambda: self.layout(call.grid).to(call.device))
        packed = call.state.recall("pattern", max_age=math.inf if self.every is None else self.every)
        if packed is None:
            packed = pack_bits(self.pattern(call, blocks))  # a bit for every pair: lists would take 32 times as much
            call.state.keep("pattern", packed, "masks")
        bits, video = packed, video_blocks(blocks, call.grid)
        batch, heads = bits.shape[:2]
        mask = lists_of_maps(lambda part: unpack_bits(bits[:, part], video), batch, heads, blocks, video)
        return Plan(mask)
