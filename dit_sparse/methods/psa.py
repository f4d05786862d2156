"""Pyramid Sparse Attention (arXiv 2512.04025): less important key blocks are read at lower resolution.

Every key block gets a resolution for every query block: token by token, the means of 2, 4 or 8 neighbouring tokens, or
nothing. What decides is the largest attention weight between a sample of the block's queries and of its keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..blockmask import BlockLayout
from ..grid import TokenGrid
from ..operators import Operator
from ..operators_pyramid import LEVELS, Pyramid, PyramidMask, pooled_layout
from ..order import hilbert, layout, video_blocks
from ..patterns import check_block_size, choose_block_size
from ..scoring import head_chunks, to_slots
from .base import Call, Method, Plan, check_range

MODES = ("topk", "threshold")
ORDERS = ("hilbert", "raster")
LEAST_FINE = 0.06  # in threshold mode so many of the blocks, and one more, are read token by token
_SCORES_AT_ONCE = 2**25


def alignments(key_block: int, tile: int) -> tuple[int, ...]:
    """How many blocks of each level fill a tile of the reference's kernel: intervals are multiples of it."""
    return tuple(math.ceil(level / max(1, key_block // tile)) for level in LEVELS)


def levels_of_ranks(ends: Tensor, count: int, align: tuple[int, ...]) -> Tensor:
    """Which level each rank of a row gets.

    Args:
        ends: int64 (..., 4), where the interval of every level ends; an interval begins where the one before it ends.
        count: number of ranks.
        align: interval lengths are rounded up to multiples of these, or down at the end of the row.

    Returns:
        uint8 (..., count); 0 beyond the last interval.
    """
    rank = torch.arange(count, device=ends.device)
    levels = torch.zeros(*ends.shape[:-1], count, dtype=torch.uint8, device=ends.device)
    start = torch.zeros_like(ends[..., :1])
    for i, (level, step) in enumerate(zip(LEVELS, align, strict=True)):
        length = (ends[..., i : i + 1] - start).clamp(min=0)
        length = (length + step - 1) // step * step
        length = torch.where(start + length > count, (count - start) // step * step, length)
        levels = torch.where((rank >= start) & (rank < start + length), level, levels)
        start = start + length
    return levels


def threshold_ends(ranked: Tensor, ratios: tuple[float, ...]) -> Tensor:
    """Where intervals end that hold so much of a row's importance, the block that crosses the limit included.

    Args:
        ranked: (..., n), importance from the highest down.
        ratios: cumulative share that ends each level.

    Returns:
        int64 (..., 4).
    """
    share = ranked.cumsum(-1) / ranked.sum(-1, keepdim=True)
    ends = []
    for ratio in ratios:
        found = (share <= ratio + 1e-6).sum(-1)
        ends.append(torch.where(found > 0, found + 1, 0))
    ends[0] = ends[0].clamp(min=int(LEAST_FINE * ranked.shape[-1]) + 1)
    return torch.stack(ends, dim=-1).clamp(max=ranked.shape[-1])


def counts_of(levels: Tensor) -> list[int]:
    """Blocks at levels 1, 2, 4 and 8 of one row of levels, on the CPU."""
    return [int((levels == level).sum()) for level in LEVELS]


@dataclass(frozen=True)
class PSA(Method):
    """Key blocks at four resolutions, ranked by sampled attention weights.

    Args:
        density: None: `ratios` say how much. A number: `ratios` are scaled together, as far as each is below 1, so that
            the computed share comes within 0.03 of it on 2,000 tokens and more, text included, unless text alone takes
            more; a block pooled by h counts 1/h. `mode` then has no effect.
        mode: "topk": ratios are shares of the blocks; "threshold": of the row's summed importance.
        ratios: where levels 1, 2, 4 and 8 end, rising; blocks beyond are left out.
        similarity: None, or three numbers: a block is pooled by 2, 4 or 8 only if the mean cosine of its tokens at
            distance 1, 3 or 7 is above the first, second or third.
        order: "hilbert" (a curve through space and time, as the authors' default) or "raster" (the model's own).
        sample_every: one of so many queries and keys is scored (4 in the source), the first of them moving with the
            step; a short block's last token stands in for what it lacks. The source draws positions at random.
        tile: keys of the reference's compute tile; level counts are rounded so that it holds whole pooled blocks.
        key_block_size: tokens of a key block, of at least 8; None: as `block_size`.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    density: float | None = None
    mode: Literal["topk", "threshold"] = "topk"
    ratios: tuple[float, float, float, float] = (0.10, 0.15, 0.15, 0.35)
    similarity: tuple[float, float, float] | None = None
    order: Literal["hilbert", "raster"] = "hilbert"
    sample_every: int = 4
    tile: int = 32
    key_block_size: int | None = None
    block_size: int | None = None

    name: ClassVar[str] = "psa"
    title: ClassVar[str] = "Pyramid Sparse Attention"
    arxiv: ClassVar[str | None] = "2512.04025"
    scored: ClassVar[bool] = True
    lists: ClassVar[bool] = False
    parts: ClassVar[dict[str, str]] = {
        "order": "Hilbert curve, or the model's",
        "score": "largest weight between sampled queries and keys",
        "select": "four resolutions by rank or by share of the importance; text",
        "operate": "pyramid",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the configurations of ziplab/Pyramid-Sparse-Attention. Wan: that of Wan 2.1 14B; 1.3B has .5 .6 .7 .8 with
    # similarity .7 .65 .6, Wan 2.2 A14B .5 .6 .6 .8 with key blocks of 32 and 12 dense steps. The authors' kernel reads
    # other keys at levels 4 and 8 of key blocks of 32.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "wan": {"mode": "threshold", "ratios": (0.4, 0.5, 0.6, 0.8), "block_size": 128, "dense_steps": 15,
                "dense_layers": 0},
        "cogvideox": {"ratios": (0.10, 0.15, 0.15, 0.35), "block_size": 128, "key_block_size": 32, "dense_steps": 15,
                      "dense_layers": 0},
    }

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (Pyramid,)

    def __post_init__(self) -> None:
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        for option, allowed in (("mode", MODES), ("order", ORDERS)):
            if getattr(self, option) not in allowed:
                raise ValueError(f"psa: {option}={getattr(self, option)!r} is not allowed; use one of "
                                 f"{', '.join(allowed)}")
        self._numbers("ratios", 4, 0.0)
        if list(self.ratios) != sorted(self.ratios) or not self.ratios[0]:
            raise ValueError(f"psa: ratios={self.ratios!r} is not allowed; use four rising numbers in (0, 1]")
        if self.similarity is not None:
            self._numbers("similarity", 3, -1.0)
        for option in ("sample_every", "tile"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"psa: {option}={value!r} is not allowed; use a whole number >= 1")
        check_block_size(self.name, self.key_block_size, "key_block_size")
        check_block_size(self.name, self.block_size)

    def _numbers(self, option: str, count: int, low: float) -> None:
        """Check an option of several numbers, and make it a tuple."""
        value = getattr(self, option)
        if not isinstance(value, (tuple, list)) or len(value) != count:
            raise ValueError(f"psa: {option}={value!r} is not allowed; use {count} numbers")
        for number in value:
            check_range(self.name, option, number, low, 1)
        object.__setattr__(self, option, tuple(value))

    def layouts(self, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        """Blocks of queries and of keys, the video in its order, then text, on the CPU."""
        size = choose_block_size(grid.tokens, self.block_size)
        order = hilbert(TokenGrid(*grid.sizes)) if self.order == "hilbert" else None
        query = layout(grid, order, size)
        key_size = self.key_block_size or size
        return query, query if key_size == size else layout(grid, order, key_size)

    def ranks(self, grid: TokenGrid) -> Tensor:
        """Level of each rank, uint8 (video key blocks,), where it does not depend on the activations; on the CPU."""
        query, key = self.layouts(grid)
        count, align = video_blocks(key, grid), alignments(key.block_size, self.tile)

        def levels(ratios: tuple[float, ...]) -> Tensor:
            # Floats such as 0.07 * 100 lie a hair beside the whole number that is meant.
            ends = torch.tensor([int(count * ratio + 1e-9) for ratio in ratios])
            ends[0] = ends[0].clamp(min=1)  # no row is empty: ours
            return levels_of_ranks(ends, count, align)

        if self.density is None:
            return levels(self.ratios)
        video = (grid.video / grid.tokens) ** 2
        asked = max(0.0, (self.density - (1 - video)) / video)
        low, high = 0.0, 1 / self.ratios[0]
        for _ in range(40):  # the computed share rises with the factor
            middle = (low + high) / 2
            found = counts_of(levels(tuple(min(1.0, ratio * middle) for ratio in self.ratios)))
            share = sum(n / level for n, level in zip(found, LEVELS, strict=True)) / count
            low, high = (middle, high) if share <= asked else (low, middle)
        return levels(tuple(min(1.0, ratio * (high if self.density == 1 else low)) for ratio in self.ratios))

    def plan(self, call: Call) -> Plan:
        """Rank, give levels, and pool what is not read token by token."""
        grid = call.grid
        query, key = call.cached((self, "layouts"), lambda: _moved(self.layouts(grid), call.device))
        pooled = call.cached((self, "pooled"), lambda: [pooled_layout(key, level) for level in LEVELS[1:]])
        static = self.mode == "topk" or self.density is not None
        ranks, widths = call.cached((self, "ranks"), lambda: _static_ranks(self.ranks(grid), call.device))
        vq, vk = video_blocks(query, grid), video_blocks(key, grid)
        levels = torch.ones(call.query.shape[0], call.query.shape[2], query.blocks, key.blocks, dtype=torch.uint8,
                            device=call.device)
        align, offset = alignments(key.block_size, self.tile), call.step % self.sample_every
        sample = call.cached((self, "sample", offset),
                             lambda: [_sample(x, self.sample_every, offset) for x in (query, key)])
        for heads, scores in importance(call, query, key, *sample):
            value, place = torch.sort(scores[..., :vq, :vk], dim=-1, descending=True, stable=True)
            of_rank = ranks if static else levels_of_ranks(threshold_ends(value, self.ratios), vk, align)
            levels[:, heads, :vq, :vk] = torch.empty_like(place, dtype=torch.uint8).scatter_(
                -1, place, of_rank.expand(place.shape))
        levels = torch.minimum(levels, self.cap(call, key)[:, :, None])
        mask = PyramidMask.from_levels(levels, query, key, pooled, widths if static and self.similarity is None else ())
        return Plan(mask, operator=Pyramid())

    def cap(self, call: Call, key: BlockLayout) -> Tensor:
        """The most that each key block may be pooled, uint8 (B|1, H|1, nk): 1 where it is not full of real keys."""
        full = (key.lengths == key.block_size)[None, None]
        if call.key_mask is not None:
            ones = to_slots(call.key_mask[..., None, None].to(torch.float32), key)
            full = full & (ones.unflatten(1, (-1, key.block_size)).amin((2, 4)) > 0).transpose(1, 2)
        cap = torch.where(full, LEVELS[-1], 1).to(torch.uint8)
        if self.similarity is None:
            return cap
        similar = torch.ones(call.key.shape[0], call.key.shape[2], key.blocks, dtype=torch.uint8, device=call.device)
        for heads in head_chunks(call.key.shape[2], 3 * call.key[:, :, 0].numel()):
            slots = to_slots(call.key[:, :, heads], key).transpose(1, 2).unflatten(2, (key.blocks, -1))
            for level, least in zip(LEVELS[1:], self.similarity, strict=True):
                first, last = slots[..., ::level, :], slots[..., level - 1 :: level, :]
                cosine = torch.cosine_similarity(first.float(), last.float(), dim=-1).mean(-1)
                similar[:, heads] = torch.where(cosine > least, level, similar[:, heads])
        return torch.minimum(cap, similar)


def importance(call: Call, query: BlockLayout, key: BlockLayout, rows: Tensor, columns: Tensor
               ) -> Iterator[tuple[slice, Tensor]]:
    """Largest weight, relative to the row's largest, between sampled queries and keys of every pair of blocks.

    Args:
        call: the activations.
        query, key: the layouts.
        rows, columns: int64, sampled tokens, as many of every query block and of every key block.

    Yields:
        Heads, and their float32 (B, h, nq, nk): a chunk of heads at a time.
    """
    B, _, H, _ = call.query.shape
    queries, keys = call.query[:, rows].transpose(1, 2), call.key[:, columns].permute(0, 2, 3, 1)
    real = None if call.key_mask is None else call.key_mask[:, None, None, columns]
    per_row = rows.numel() // query.blocks
    for heads in head_chunks(H, 4 * B * query.blocks * key.blocks):
        found, some = [], keys[:, heads]
        step = max(1, _SCORES_AT_ONCE // max(1, B * some.shape[1] * columns.numel() * per_row)) * per_row
        for part in queries[:, heads].split(step, dim=2):
            score = (part @ some).to(torch.float32).mul_(call.scale)
            if real is not None:
                score = score.masked_fill_(~real, -torch.inf)
            best = score.unflatten(-1, (key.blocks, -1)).amax(-1)
            top = best.amax(-1, keepdim=True)
            weight = (best - torch.where(top == -torch.inf, 0, top)).exp_()
            found.append(weight.unflatten(2, (-1, per_row)).amax(3))
        yield heads, torch.cat(found, dim=2)


def _sample(blocks: BlockLayout, every: int, offset: int) -> Tensor:
    """int64 (blocks * samples,): sampled tokens of every block."""
    size = blocks.block_size
    place = torch.arange(0, size, every, device=blocks.device) + offset
    slot = torch.minimum(place, blocks.lengths[:, None] - 1).clamp(min=0)
    slot = slot + torch.arange(blocks.blocks, device=blocks.device)[:, None] * size
    return blocks.token_of_slot.reshape(-1)[slot.flatten()]


def _moved(layouts: tuple[BlockLayout, BlockLayout], device: torch.device) -> tuple[BlockLayout, BlockLayout]:
    """The layouts on a device, one object where they are one."""
    query = layouts[0].to(device)
    return query, query if layouts[1] is layouts[0] else layouts[1].to(device)


def _static_ranks(ranks: Tensor, device: torch.device) -> tuple[Tensor, list[int]]:
    """The ranks on a device, and how many blocks every row has at levels 2, 4 and 8."""
    return ranks.to(device), counts_of(ranks)[1:]
