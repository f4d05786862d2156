"""RainFusion (arXiv 2505.21036): spatial, temporal and textural heads, told apart by a cheap recall test.

Spatial heads get a band in the video's own order, temporal heads a band in the order "all frames of one
place, then the next place", textural heads every query but only a regular fraction of the keys. The test
("adaptive recall") looks at two small samples of the tokens: inside one frame, a band finds what a temporal
head looks at; over tokens strided through the video, what a spatial head looks at. With `bandwidths` (the
paper's RainFusion+) each head also takes the narrowest band that recalls enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockMask
from ..grid import TokenGrid
from ..order import layout
from ..patterns import build_mask, check_block_size, choose_block_size, half_band, pick, static_mask
from ..scoring import head_chunks, sampled_row_attention
from ..selection import text_forced
from .base import Call, Method, Plan, check_range


def bandwidth(sparsity: float) -> float:
    """Half-width of a band, as a share of the tokens, that drops this share of the pairs; two decimals."""
    return round(1 - math.sqrt(sparsity), 2)


def checkerboard(grid: TokenGrid, tau: int) -> tuple[Tensor, int]:
    """Video tokens with every tau-th one first, in the diagonal pattern (t + y + x) mod tau.

    Returns:
        int64 (video,), and how many tokens the pattern keeps.
    """
    kept = grid.coordinates().sum(1) % tau == 0
    return torch.argsort((~kept).to(torch.int8), stable=True), int(kept.sum())


def class_masks(
    grid: TokenGrid, block_size: int, widths: tuple[float, ...], tau: int | None, sink: bool
) -> BlockMask:
    """All patterns as one mask, on the CPU; its heads are temporal and spatial for each width, then textural.

    The first frame, when it is a sink, is moved behind the others and treated as text: it sees all and is
    seen by all.

    Args:
        grid: the tokens.
        block_size: tokens of a block.
        widths: half-widths of the bands as a share of the tokens in bands.
        tau: textural heads keep every tau-th key; None: no textural pattern.
        sink: whether the first frame is a sink.
    """
    first = grid.frame_tokens if sink else 0
    rest = TokenGrid(grid.frames - 1, grid.height, grid.width) if sink else TokenGrid(*grid.sizes)
    blocks = -(-rest.video // block_size)
    at = torch.arange(blocks)
    distance = (at[:, None] - at).abs()
    space = torch.arange(rest.video)
    time = space.reshape(rest.frames, -1).T.flatten()
    query_orders, key_orders, bands = [], [], []
    for width in widths:
        # A row of a band of blocks is half a block wider on either side than its distance says.
        band = distance <= round(width * rest.video / block_size - 0.5)
        query_orders += [time, space]
        key_orders += [time, space]
        bands += [band, band]
    if tau is not None:
        order, kept = checkerboard(rest, tau)
        query_orders.append(space)
        key_orders.append(order)
        bands.append((at < -(-kept // block_size)).expand(blocks, blocks))

    def place(orders: list[Tensor]) -> Tensor:
        later = torch.stack(orders) + first
        return torch.cat((later, torch.arange(first).expand(len(orders), -1)), dim=1)[None]

    segments = [rest.video, first] if sink else [rest.video]
    query, key = (layout(grid, place(o), block_size, lengths=segments) for o in (query_orders, key_orders))
    keep = torch.ones(1, len(bands), query.blocks, key.blocks, dtype=torch.bool)
    keep[0, :, :blocks, :blocks] = torch.stack(bands)
    return build_mask(text_forced(keep, query, grid), query, key)


@dataclass(frozen=True)
class RainFusion(Method):
    """A spatial, temporal or textural pattern for every head, chosen at every call by recall on samples.

    Args:
        density: kept fraction of all pairs; None: 0.5. Spatial and temporal heads are within 0.03 of it on
            2,000 tokens and more, unless sink and text alone take more than half of it; textural heads keep 1
            / tau, with the sink on top.
        alpha: recall from which a band is good enough.
        textural: give heads that neither band serves the regular fraction of keys. False: the rule of the
            vendor's code, in which every head is temporal or spatial.
        tau: textural heads keep every tau-th key; None: as many as the band would, or every second with
            `bandwidths`.
        bandwidths: candidate half-widths of bands as shares of the tokens, such as (1/8, 1/4, 1/2); each head
            takes the narrowest with enough recall. Excludes `density` and textural=False.
        sink: the first frame sees everything and is seen by everything; images have no sink.
        count_forced: sink and text are part of `density`. False: as the vendor's code, they come on top.
        samples: query rows of each sample.
        sample_stride: distance between the tokens of the sample over the whole video; None: the number of
            frames.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    density: float | None = None
    alpha: float = 0.9
    textural: bool = True
    tau: int | None = None
    bandwidths: tuple[float, ...] | None = None
    sink: bool = True
    count_forced: bool = True
    samples: int = 256
    sample_stride: int | None = None
    block_size: int | None = None

    name: ClassVar[str] = "rainfusion"
    title: ClassVar[str] = "RainFusion and RainFusion+"
    arxiv: ClassVar[str | None] = "2505.21036"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "frame by frame, place by place, or every tau-th key first, per head",
        "score": "recall of the band on two samples, per head",
        "select": "band or regular fraction of keys; first frame; text",
        "operate": "drop",
        "remember": "patterns per shape; the choice may be kept for some steps (refresh)",
    }
    # Source: the paper (HunyuanVideo, CogVideoX-5B: half of the pairs, first 10 % of steps dense) and the
    # vendor's recipe for Wan 2.1 (15 of 40 steps dense, no textural heads).
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {
            "density": 0.5,
            "textural": False,
            "count_forced": False,
            "dense_steps": 0.375,
            "dense_layers": 0,
        },
        "hunyuan": {"density": 0.5, "dense_steps": 0.1, "dense_layers": 0},
        "cogvideox": {"density": 0.5, "dense_steps": 0.1, "dense_layers": 0},
    }

    def __post_init__(self) -> None:
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        check_range(self.name, "alpha", self.alpha, 0, 1, open_low=True)
        for name in ("textural", "sink", "count_forced"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"rainfusion: {name}={getattr(self, name)!r} is not allowed; use True or False"
                )
        for name in ("tau", "samples", "sample_stride"):
            value = getattr(self, name)
            free = value is None and name != "samples"
            if not free and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"rainfusion: {name}={value!r} is not allowed; use a whole number >= 1")
        if self.bandwidths is not None:
            if not isinstance(self.bandwidths, (tuple, list)) or not self.bandwidths:
                raise ValueError(
                    f"rainfusion: bandwidths={self.bandwidths!r} is not allowed; use shares like (1/8, 1/4)"
                )
            for share in self.bandwidths:
                check_range(self.name, "bandwidths", share, 0, 1, open_low=True)
            if self.density is not None or not self.textural:
                raise ValueError("rainfusion: bandwidths excludes density and textural=False; give one kind")
            object.__setattr__(self, "bandwidths", tuple(sorted(self.bandwidths)))
        check_block_size(self.name, self.block_size)

    def _sink(self, grid: TokenGrid) -> bool:
        return self.sink and grid.frames > 1

    def widths(self, grid: TokenGrid) -> tuple[float, ...]:
        """Half-widths of the bands as shares of the tokens in bands, narrowest first."""
        if self.bandwidths is not None:
            return self.bandwidths
        density = 0.5 if self.density is None else self.density
        if not self.count_forced:
            return (bandwidth(1 - density),)
        forced = 1 - (1 - 1 / grid.frames) ** 2 if self._sink(grid) else 0.0
        return (half_band(density, grid, forced),)

    def fraction(self, grid: TokenGrid) -> int | None:
        """Of how many keys textural heads keep one, or None when there are no such heads."""
        if not self.textural:
            return None
        if self.tau is not None or self.bandwidths is not None:
            return self.tau or 2
        return max(1, round(1 / (1 - (1 - self.widths(grid)[0]) ** 2)))

    def build(self, grid: TokenGrid) -> BlockMask:
        """The masks of all patterns as one mask of as many heads, on the CPU; see `class_masks`."""
        block = choose_block_size(grid.tokens, self.block_size)
        return class_masks(grid, block, self.widths(grid), self.fraction(grid), self._sink(grid))

    def recalls(self, call: Call) -> Tensor:
        """Share of the samples' attention that each band holds: float32 (B, H, widths, 2), temporal first."""
        grid, first = call.grid, int(self._sink(call.grid))
        frames = grid.frames - first
        start = grid.video_start + first * grid.frame_tokens
        stride = self.sample_stride or frames
        found = []
        for tokens, step in ((grid.frame_tokens, 1), (frames * grid.frame_tokens, stride)):
            size = -(-tokens // step)
            rows, inside = call.cached((self, "sample", size), partial(self._sample, call, size))
            part = slice(start, start + tokens, step)
            query, key = call.query[:, part], call.key[:, part]
            real = None if call.key_mask is None else call.key_mask[:, part]
            chunks = []
            for heads in head_chunks(query.shape[2], 2 * query.shape[0] * len(rows) * size):
                probs, _ = sampled_row_attention(query[:, :, heads], key[:, :, heads], None, rows, call.scale,
                                                 key_mask=real)
                # (B, h, R * size) x (R * size, widths): mean over the rows of what each band holds
                chunks.append(probs.flatten(2) @ inside / len(rows))
            found.append(torch.cat(chunks, dim=1))
        return torch.stack(found, dim=-1)

    def _sample(self, call: Call, size: int) -> tuple[Tensor, Tensor]:
        """Rows (R,) of a sample of `size` tokens, and the keys in each band: float32 (R * size, widths)."""
        count = min(self.samples, size)
        rows = torch.arange(count) * size // count
        distance = (rows[:, None] - torch.arange(size)).abs()
        inside = [(distance <= int(size * width)).flatten() for width in self.widths(call.grid)]
        return rows.to(call.device), torch.stack(inside, dim=1).to(call.device, torch.float32)

    def choose(self, recalls: Tensor) -> Tensor:
        """Which pattern each head takes, as an index into `class_masks`.

        Args:
            recalls: (B, H, widths, 2).

        Returns:
            int64 (B, H).
        """
        if not self.textural:
            temporal, spatial = recalls[..., 0, 0], recalls[..., 0, 1]
            return (~((temporal > 0.95) | (temporal > spatial))).to(torch.int64)
        # Narrowest first, temporal before spatial; the textural pattern comes last and is always good enough.
        good = recalls.flatten(2) >= self.alpha
        patterns = good.shape[-1]
        index = torch.arange(patterns, device=good.device)
        return torch.where(good, index, patterns).amin(-1)

    def plan(self, call: Call) -> Plan:
        """The pattern of every head."""
        mask = static_mask(call, (self, "patterns"), lambda: self.build(call.grid))
        choice = self.choose(self.recalls(call))
        return Plan(pick(mask, choice), {"pattern": choice})
