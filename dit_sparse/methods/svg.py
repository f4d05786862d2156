"""Sparse VideoGen (arXiv 2502.01776): each head takes a band in space or in time, whichever serves it better.

A spatial head sees tokens near in the video's own order (its own and the neighbouring frames). A temporal
head sees tokens near in the order "all frames of one place, then the next place". Which of the two a head is,
is found at every call from a few query rows: the one whose output is nearer to the dense one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..blockmask import HIGHEST, LOWEST, BlockMask, TokenWindow
from ..grid import TokenGrid
from ..order import inverse, layout, token_major
from ..patterns import (
    build_mask,
    check_block_size,
    choose_block_size,
    half_band,
    interval_blocks,
    pick,
    static_mask,
)
from ..routing import row_errors
from ..selection import text_forced
from .base import Call, Method, Plan, check_range

SINKS = ("frame0", "permuted", "none")
EDGES = ("inclusive", "strict")
SPATIAL, TEMPORAL = 0, 1


def band_width(
    density: float, frames: int, frame_tokens: int, text: int = 0, *, edge: str = "inclusive", step: int = 128
) -> int:
    """Half-width of the reference's band, in tokens.

    Args:
        density: kept fraction; the text's rows and columns count, the sink does not.
        frames, frame_tokens, text: sizes of the sequence.
        edge: "strict" rounds down and keeps |q - k| < width (Hunyuan, CogVideoX); "inclusive" rounds up and
            keeps |q - k| <= width (Wan, Cosmos).
        step: rounding, 128 in the reference.

    Returns:
        The width, a multiple of step and at least one step; the whole sequence when that keeps everything.
    """
    tokens = frames * frame_tokens + text
    share = density - 2 * text / tokens
    if density >= 1 or share >= 1:
        return tokens
    width = tokens * (1 - math.sqrt(1 - max(share, 0.0)))
    return step * max(1, math.floor(width / step) if edge == "strict" else math.ceil(width / step))


def orders(grid: TokenGrid) -> Tensor:
    """The spatial and the temporal order of the video: int64 (2, video)."""
    return torch.stack((torch.arange(grid.video), token_major(grid)))


def band_mask(grid: TokenGrid, block_size: int, reach: int, *, permuted_sink: bool) -> BlockMask:
    """One band for both orders, exact to the token: a mask of two heads, spatial and temporal, on the CPU.

    Args:
        grid: the tokens.
        block_size: tokens of a block.
        reach: largest kept distance in either order.
        permuted_sink: keep the first frame_tokens keys of each order, as the reference does: in the temporal
            order these are the first places of all frames.
    """
    order = orders(grid)[None] if grid.frames > 1 else None
    blocks = layout(grid, order, block_size)
    slot = torch.arange(blocks.slots)
    # The video fills the slots from the first one on, so a token's slot is its place in the order.
    text = slot >= grid.video
    always = text | (slot < grid.frame_tokens) if permuted_sink else text
    window = TokenWindow(
        slot.to(torch.int32)[None],
        torch.where(text, LOWEST, slot - reach).to(torch.int32)[None],
        torch.where(text, HIGHEST, slot + reach).to(torch.int32)[None],
        always,
    )
    start = torch.arange(blocks.blocks) * block_size
    keep = interval_blocks(start - reach, start + block_size - 1 + reach, blocks.blocks, block_size)
    if permuted_sink:
        keep |= start < grid.frame_tokens
    # No block holds both video and text, so forcing the text's blocks forces nothing else.
    return build_mask(text_forced(keep, blocks, grid), blocks, blocks, window=window)


def first_frame_mask(grid: TokenGrid, block_size: int, reach: int) -> BlockMask:
    """The band of each order and the true first frame: a mask of two heads, spatial and temporal, on the CPU.

    In the temporal order the first frame's keys are moved to the front, so that they are whole blocks there
    too. The bands are covered by whole blocks: the two heads' rows differ, so no single test of pairs could
    serve both.

    Args:
        grid, block_size, reach: as in `band_mask`; the grid has more than one frame.
    """
    frame, frames = grid.frame_tokens, grid.frames
    space, time = orders(grid)
    query = layout(grid, torch.stack((space, time))[None], block_size)
    # Tokens of the first frame are those with the lowest numbers.
    key = layout(
        grid, torch.stack((space, torch.cat((space[:frame], time[time >= frame]))))[None], block_size
    )
    start = torch.arange(query.blocks) * block_size
    low, high = (start - reach).clamp(min=0), (start + block_size - 1 + reach).clamp(max=grid.video - 1)

    def later(position: Tensor) -> Tensor:
        # Tokens of later frames before a position of the temporal order: one in `frames` is of the first.
        return position - torch.div(position + frames - 1, frames, rounding_mode="floor")

    spatial = interval_blocks(low, high, key.blocks, block_size)
    temporal = interval_blocks(frame + later(low), frame + later(high + 1) - 1, key.blocks, block_size)
    keep = torch.stack((spatial, temporal))[None]
    keep[..., : -(-frame // block_size)] = True
    return build_mask(text_forced(keep, query, grid), query, key)


@dataclass(frozen=True)
class SVG(Method):
    """A band in space or in time for every head, chosen at every call from sampled rows.

    Args:
        density: kept fraction of all pairs, within 0.03 of it on 2,000 tokens and more, unless the sink alone
            takes more than half of it (see `count_forced`).
        sink: "frame0": every query sees the first frame; "permuted": the reference's form, in which temporal
            heads see the first places of all frames instead; "none". Images have no sink.
        count_forced: the sink's share is part of `density`, as text always is; the band keeps at least half
            of it. False: the reference's widths, with the sink on top.
        edge: rounding of the reference's widths, "inclusive" (Wan, Cosmos) or "strict" (Hunyuan, CogVideoX).
        rows: query rows sampled per call.
        row_range: sample among this many first tokens (10,000 in the reference's code); None: among all video
            tokens.
        profile_frames: width in frames of the bands that are compared; they do not follow the density.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    density: float = 0.25
    sink: Literal["frame0", "permuted", "none"] = "frame0"
    count_forced: bool = True
    edge: Literal["inclusive", "strict"] = "inclusive"
    rows: int = 64
    row_range: int | None = None
    profile_frames: float = 2.0
    block_size: int | None = None

    name: ClassVar[str] = "svg"
    title: ClassVar[str] = "Sparse VideoGen"
    arxiv: ClassVar[str | None] = "2502.01776"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "frame by frame, or place by place, per head",
        "score": "output error on sampled rows, per head",
        "select": "one band; first frame; text",
        "operate": "drop",
        "remember": "bands per shape; the choice may be kept for some steps (refresh)",
    }
    # Source: the authors' scripts at 720p. They give none for Wan 2.1 1.3B (users report visible loss).
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {"density": 0.3, "count_forced": False, "dense_steps": 0.2, "dense_layers": 1},
        "hunyuan": {
            "density": 0.25,
            "count_forced": False,
            "sink": "none",
            "edge": "strict",
            "profile_frames": 1.5,
            "dense_steps": 0.1,
            "dense_layers": 1,
        },
        "cogvideox": {
            "density": 0.25,
            "count_forced": False,
            "sink": "none",
            "edge": "strict",
            "profile_frames": 1.5,
            "rows": 32,
            "dense_steps": 0.2,
            "dense_layers": 1,
        },
        "cosmos": {"density": 0.25, "count_forced": False, "dense_steps": 0.3, "dense_layers": 1},
    }

    def __post_init__(self) -> None:
        check_range(self.name, "density", self.density, 0, 1, open_low=True)
        check_range(self.name, "profile_frames", self.profile_frames, 0, 1000, open_low=True)
        for name, allowed in (("sink", SINKS), ("edge", EDGES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"svg: {name}={getattr(self, name)!r} is not allowed; use one of {allowed}")
        if not isinstance(self.count_forced, bool):
            raise ValueError(f"svg: count_forced={self.count_forced!r} is not allowed; use True or False")
        for name in ("rows", "row_range"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"svg: {name}={value!r} is not allowed; use a whole number >= 1")
        if self.rows is None:
            raise ValueError("svg: rows=None is not allowed; use a whole number >= 1")
        check_block_size(self.name, self.block_size)

    def reach(self, grid: TokenGrid, block_size: int) -> int:
        """Largest kept distance in tokens, a multiple of the block size."""
        sink = self.sink != "none" and grid.frames > 1
        if not self.count_forced:
            width = band_width(
                self.density, grid.frames, grid.frame_tokens, grid.text, edge=self.edge, step=block_size
            )
            return width - (self.edge == "strict")
        share = half_band(self.density, grid, 1 / grid.frames if sink else 0.0)
        # Covering the band by whole blocks adds half a block on either side.
        covered = sink and self.sink == "frame0"
        blocks = share * grid.video / block_size - (0.5 if covered else 0.0)
        return grid.video if share > 0.999 else block_size * max(0 if covered else 1, round(blocks))

    def build(self, grid: TokenGrid) -> BlockMask:
        """The two masks of a grid as one mask of two heads (spatial, temporal), on the CPU."""
        block = choose_block_size(grid.tokens, self.block_size)
        reach = self.reach(grid, block)
        if self.sink == "frame0" and grid.frames > 1:
            return first_frame_mask(grid, block, reach)
        return band_mask(grid, block, reach, permuted_sink=self.sink == "permuted" and grid.frames > 1)

    def profile(self, grid: TokenGrid, block_size: int) -> tuple[Tensor, Tensor]:
        """What the compared bands are made of, per order: block of every token, keys that every row sees.

        Returns:
            int32 (2, tokens) and bool (2, tokens).
        """
        place = torch.zeros(2, grid.tokens, dtype=torch.int64)
        place[:, grid.video_slice] = inverse(orders(grid))
        always = torch.ones(2, grid.tokens, dtype=torch.bool)
        always[:, grid.video_slice] = False
        if self.sink == "frame0":
            always[:, grid.video_start : grid.video_start + grid.frame_tokens] = True
        elif self.sink == "permuted":
            always |= place < grid.frame_tokens
        return (place // block_size).to(torch.int32), always

    def choose(self, call: Call) -> Tensor:
        """Which band each head takes: int64 (B, H), 0 spatial, 1 temporal; decided on the device."""
        grid, device = call.grid, call.device
        block_size = choose_block_size(grid.tokens, self.block_size)
        generator = call.generator
        if generator is None:
            generator = torch.Generator().manual_seed(1009 * call.step + call.layer)
        rows = torch.randint(
            min(self.row_range or grid.video, grid.video),
            (self.rows,),
            generator=generator,
            device=generator.device,
        )
        rows = rows.to(device, non_blocking=True) + grid.video_start
        block, always = call.cached(
            (self, "profile"), lambda: tuple(x.to(device) for x in self.profile(grid, block_size))
        )
        width = max(1, math.floor(self.profile_frames * grid.frame_tokens / block_size))
        # (2, R, tokens)
        allowed = (block[:, rows, None] - block[:, None]).abs() < width
        allowed |= always[:, None]
        errors = row_errors(call.query, call.key, call.value, rows, allowed, call.scale, call.key_mask)
        return (errors[..., TEMPORAL] < errors[..., SPATIAL]).to(torch.int64)

    def plan(self, call: Call) -> Plan:
        """The band of every head; an image has only the spatial one."""
        mask = static_mask(call, (self, "bands"), lambda: self.build(call.grid))
        if call.grid.frames == 1:
            return Plan(mask)
        choice = self.choose(call)
        return Plan(pick(mask, choice), {"temporal": choice})
