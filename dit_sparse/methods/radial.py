"""Radial Attention (arXiv 2506.19852): a static mask whose band halves each time the frame distance doubles.

Two forms of the mask are known. The one that the authors' code runs is decided per block ("blocks", the
default: it produced the published results). The one that the paper writes down is decided per token
("paper"); here it is covered by whole blocks, because no kernel tests it pair by pair. Both are computed from
the ends of bands, one pair of frames at a time: nothing of the size of a frame squared is ever made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..patterns import build_mask, check_block_size, choose_block_size, static_mask
from .base import Call, Method, Plan, check_range

MASKS = ("blocks", "paper")


def frame_pair(distance: int, frame_tokens: int, block_size: int, decay: float) -> int | None:
    """Half-width of the band that the reference code keeps between two frames.

    Args:
        distance: |i - j| in frames.
        frame_tokens: tokens of a frame.
        block_size: the least half-width beyond neighbouring frames.
        decay: factor on the half-width.

    Returns:
        Largest kept |k - l| between places in the two frames, or None when the pair of frames is dropped.
    """
    whole = 2.0 ** frame_tokens.bit_length() / 2.0 ** distance.bit_length()
    # The number 128 and the missing decay are the reference's own, whatever the block size.
    if whole < 128 and distance % int(128 / whole):
        return None
    return frame_tokens if distance <= 1 else math.floor(max(whole * decay, block_size))


def paper_pair(distance: int, frame_tokens: int) -> int | None:
    """Half-width of the paper's band between two frames, as in `frame_pair`."""
    halvings = max(distance, 1).bit_length() - 1
    if 2**halvings <= frame_tokens:
        return frame_tokens // 2**halvings - 1
    return None if distance % -(-(2**halvings) // frame_tokens) else 0


@lru_cache(maxsize=4096)
def _band_blocks(
    frame_tokens: int, block_size: int, width: int, row: int, column: int, cover: bool
) -> Tensor:
    """Blocks kept between two frames that start `row` and `column` tokens into a block.

    Args:
        width: largest kept |k - l|.
        cover: keep every block that the band touches; otherwise the reference's rule: of the columns that
            hold anything, more than 0.6 must be filled by more than a third.

    Returns:
        bool (p, p), blocks counted from the one in which each frame starts.
    """
    blocks = -(-frame_tokens // block_size) + 1
    edge = torch.arange(blocks + 1) * block_size
    rows, columns = (edge - row).clamp(0, frame_tokens), (edge - column).clamp(0, frame_tokens)

    def filled(least: int) -> Tensor:
        """Columns of each block with at least `least` kept entries: the band cuts one interval of them."""
        first = torch.maximum(columns[:-1], (rows[:-1] + least - 1 - width)[:, None])
        last = torch.minimum(columns[1:] - 1, (rows[1:] - least + width)[:, None])
        possible = (rows[1:] - rows[:-1] >= least)[:, None] & (2 * width + 1 >= least)
        return torch.where(possible, (last - first + 1).clamp(min=0), 0)

    touched = filled(1)
    if cover:
        return touched > 0
    return 5 * filled(block_size // 3 + 1) > 3 * touched


def radial_blocks(
    frames: int,
    frame_tokens: int,
    text: int,
    block_size: int,
    *,
    decay: float = 0.2,
    sink: bool = True,
    mask: Literal["blocks", "paper"] = "blocks",
    text_first: bool = False,
) -> Tensor:
    """Which key blocks each query block sees, in the sequence's own order.

    The leading (tokens // block_size) rows and columns equal the reference's mask when the text is last; a
    last, partial block and text in front are our addition.

    Args:
        frames, frame_tokens, text: sizes of the sequence in tokens.
        block_size: tokens of a block.
        decay: factor on the width of the bands ("blocks" only).
        sink: every query sees the whole first frame.
        mask: which form of the mask.
        text_first: the text is in front instead of at the back.

    Returns:
        bool (blocks, blocks). Blocks that hold text see all and are seen by all.
    """
    tokens, video = frames * frame_tokens + text, frames * frame_tokens
    blocks, start = -(-tokens // block_size), text if text_first else 0
    keep = torch.zeros(blocks, blocks, dtype=torch.bool)
    per_frame = -(-frame_tokens // block_size)
    # In a block of several frames no column can ever be filled by a third: there the band is covered.
    cover = mask == "paper" or frame_tokens < block_size

    def reach(block: int) -> int:
        # The reference drops what overhangs a frame's last whole block: neighbouring frames cover that, but
        # nothing covers the sequence's own last block.
        return per_frame + (cover or block + per_frame == blocks - 1)

    for i in range(frames):
        row, row_in = divmod(start + i * frame_tokens, block_size)
        for j in range(frames):
            column, column_in = divmod(start + j * frame_tokens, block_size)
            width = (
                paper_pair(abs(i - j), frame_tokens)
                if mask == "paper"
                else frame_pair(abs(i - j), frame_tokens, block_size, decay)
            )
            if sink and j == 0:
                width = frame_tokens
            if width is None:
                continue
            target = keep[row : row + reach(row), column : column + reach(column)]
            kept = _band_blocks(frame_tokens, block_size, width, row_in, column_in, cover)
            target |= kept[: target.shape[0], : target.shape[1]]
    if text:
        place = slice(0, -(-text // block_size)) if text_first else slice(video // block_size, blocks)
        keep[place, :] = True
        keep[:, place] = True
    keep.fill_diagonal_(True)
    return keep


def paper_density(frames: int, frame_tokens: int, *, sink: bool = True) -> float:
    """Kept fraction of the paper's token mask, without text, in closed form."""
    kept = 0
    for distance in range(frames):
        reach = paper_pair(distance, frame_tokens)
        if reach is None:
            band = 0
        else:
            # places at distance 0, and twice those at distances 1 .. reach
            band = frame_tokens + 2 * reach * frame_tokens - reach * (reach + 1)
        pairs = frames if distance == 0 else 2 * (frames - distance)
        kept += pairs * band
        if sink:
            kept += frame_tokens**2 - band
    return kept / (frames * frame_tokens) ** 2


@dataclass(frozen=True)
class Radial(Method):
    """Static bands between frames, narrower with distance in time; the same for all heads, layers and steps.

    Args:
        decay: factor on the width of the bands beyond neighbouring frames. At or below 0.2 it changes nothing
            more, because neighbouring frames and the sink stay whole.
        sink: every query sees the whole first frame (the authors use it for Wan only).
        mask: "blocks" as the authors' code, or "paper" as the paper's formula, covered by whole blocks.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    decay: float = 0.2
    sink: bool = True
    mask: Literal["blocks", "paper"] = "blocks"
    block_size: int | None = None

    name: ClassVar[str] = "radial"
    title: ClassVar[str] = "Radial Attention"
    arxiv: ClassVar[str | None] = "2506.19852"
    parts: ClassVar[dict[str, str]] = {
        "order": "as the model has it",
        "score": "distance in space and time",
        "select": "band that halves as the frame distance doubles; first frame; text",
        "operate": "drop",
        "remember": "one mask per shape",
    }
    # Source: the paper's runs and the authors' scripts (50 steps; Hunyuan and Wan 2.1 at 768x1280).
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {"decay": 0.2, "sink": True, "dense_steps": 0.24, "dense_layers": 1},
        "hunyuan": {"decay": 0.95, "sink": False, "dense_steps": 0.24, "dense_layers": 0},
        "mochi": {"dense_steps": 12, "dense_layers": 0},
    }

    def __post_init__(self) -> None:
        check_range(self.name, "decay", self.decay, 0, 1, open_low=True)
        if not isinstance(self.sink, bool):
            raise ValueError(f"radial: sink={self.sink!r} is not allowed; use True or False")
        if self.mask not in MASKS:
            raise ValueError(f"radial: mask={self.mask!r} is not allowed; use one of {', '.join(MASKS)}")
        check_block_size(self.name, self.block_size)

    def build(self, grid: TokenGrid) -> BlockMask:
        """The mask of a grid, on the CPU, in the sequence's own order."""
        block = choose_block_size(grid.tokens, self.block_size)
        keep = radial_blocks(
            grid.frames,
            grid.frame_tokens,
            grid.text,
            block,
            decay=self.decay,
            sink=self.sink,
            mask=self.mask,
            text_first=grid.text_at == "front",
        )
        layout = BlockLayout.raster(grid.tokens, block)
        return build_mask(keep, layout, layout)

    def plan(self, call: Call) -> Plan:
        """The shape's mask, built at the first call."""
        return Plan(static_mask(call, self, lambda: self.build(call.grid)))
