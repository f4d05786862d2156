"""Sol-Attn (arXiv 2607.24027): a threshold on pooled scores, and soft blocks for what lies below it.

A key block is computed exactly for a query block when the score of their means lies more than `tau` standard
deviations above the mean of its row. Both moments of a row come from the mean keys, without making the scores, so
the budget adapts to every query block, head and step. A block that is not computed is not dropped either: it
enters the softmax as one entry, with its mean key and value and the weight of its keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout
from ..grid import TokenGrid
from ..operators import Drop, Operator, Soft
from ..order import choose_tile, layout, morton, tile, video_blocks
from ..patterns import check_block_size, choose_block_size
from ..routing import pool, route_means
from ..scoring import pooled_moments
from ..selection import Rule, rows_kept
from .base import Call, Method, Plan, check_range

ORDERS = ("morton", "tiles", "raster")
VARIANCES = ("diag", "exact")
NEAR = 2  # key blocks less than so far from the query block's own are exact: itself and both neighbours
EPSILON = 1e-6  # added to the variance, of scores in units of log 2


def thresholds(
    block_query: Tensor, block_key: Tensor, scale: float, tau: float, variance: str, real: Tensor | None = None
) -> Tensor:
    """The score above which a key block is computed exactly: mean + tau * standard deviation of the row.

    Args:
        block_query: float32 (B, H, nq, D); block_key: float32 (B, H, nk, D), block means.
        scale: softmax scale.
        tau: how many standard deviations above the mean.
        variance: "exact", of the row's scores; "diag", as if channels of the mean keys were uncorrelated.
        real: bool (B|1, 1, nk), blocks that hold keys; None: all.

    Returns:
        float32 (B, H, nq, 1), natural units (scale * q.k).
    """
    mean, spread = pooled_moments(block_query, block_key, scale, real=real, diagonal=variance == "diag")
    return mean + tau * (spread.clamp(min=0) + EPSILON * math.log(2) ** 2).sqrt()


@dataclass(frozen=True)
class Sol(Method):
    """Threshold routing with soft blocks.

    Args:
        tau: standard deviations above the mean of its row from which a block is exact. Were the scores of a row
            Gaussian, the density would be 1 - Phi(tau): .31 at .5, .16 at 1, .067 at 1.5.
        variance: "diag" takes the channels of the mean keys for uncorrelated; "exact" is the row's true variance.
        density: None: the threshold decides. A number: the best blocks of every row instead, so that the mask
            comes within 0.03 of it on 2,000 tokens and more, text and neighbours included; `tau` and `variance`
            then have no effect.
        soft: blocks that are not exact enter as their means; False drops them.
        order: "morton" (as the authors on Wan), "tiles" (boxes, ours: needs no index on a GPU) or "raster" (the
            model's own order).
        block_size: tokens of a block, 64 in the paper; None chooses by the length of the sequence.
    """

    tau: float = 1.0
    variance: str = "diag"
    density: float | None = None
    soft: bool = True
    order: str = "morton"
    block_size: int | None = None

    name: ClassVar[str] = "sol"
    title: ClassVar[str] = "Sol-Attn"
    arxiv: ClassVar[str | None] = "2607.24027"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "Morton curve, tiles, or the model's",
        "score": "mean query times mean key",
        "select": "threshold by mean and deviation of the row; own block and neighbours; text",
        "operate": "soft",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the configurations of NVlabs/Sana, branch sol-engine: 10 of 50 steps and the first layer dense. The order
    # on Hunyuan was not found; theirs is taken to be the model's.
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {"tau": 1.0, "variance": "diag", "order": "morton", "dense_steps": 0.2, "dense_layers": 1},
        "hunyuan": {"tau": 1.0, "variance": "diag", "order": "raster", "dense_steps": 0.2, "dense_layers": 1},
    }

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (Soft,) if self.soft else (Drop,)

    def __post_init__(self) -> None:
        check_range(self.name, "tau", self.tau, -1e9, 1e9)
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        for option, allowed in (("variance", VARIANCES), ("order", ORDERS)):
            if getattr(self, option) not in allowed:
                raise ValueError(
                    f"sol: {option}={getattr(self, option)!r} is not allowed; use one of {', '.join(allowed)}"
                )
        if not isinstance(self.soft, bool):
            raise ValueError(f"sol: soft={self.soft!r} is not allowed; use True or False")
        check_block_size(self.name, self.block_size)

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """Blocks of the video in its order, then text, on the CPU."""
        size, video = choose_block_size(grid.tokens, self.block_size), TokenGrid(*grid.sizes)
        if self.order == "tiles":
            shape = choose_tile(video, size)
            order, lengths = tile(video, shape)
            return layout(grid, order, size, lengths=lengths, tile_shape=shape)
        return layout(grid, morton(video) if self.order == "morton" else None, size)

    def rule(self, call: Call, blocks: BlockLayout) -> Rule:
        """How a row of pooled scores becomes the blocks that are exact."""
        video = video_blocks(blocks, call.grid)
        # Text is exact for every query, and its own queries see everything.
        chosen = slice(0, video)
        if self.density is not None:
            count = rows_kept(self.density, video, 0, blocks.blocks - video, count_forced=True)
            return Rule("top_k", max(count, 2 * NEAR - 1), rows=chosen, columns=chosen, near=NEAR)
        real = blocks.lengths > 0
        if call.key_mask is not None:
            ones = call.key_mask[..., None, None].to(torch.float32)
            real = pool(ones, blocks, mask=call.key_mask)[..., 0] > 0
        means = call.block_mean("query", blocks), call.block_mean("key", blocks)
        least = thresholds(*means, call.scale, self.tau, self.variance, real)
        # The paper asks for more than the threshold, a rule for at least so much.
        least = torch.nextafter(least, torch.full_like(least, math.inf))
        return Rule("threshold", least, rows=chosen, columns=chosen, near=NEAR)

    def plan(self, call: Call) -> Plan:
        """Compare and keep, for every batch element and head."""
        blocks = call.cached((self, "layout"), lambda: self.layout(call.grid).to(call.device))
        means = call.block_mean("query", blocks), call.block_mean("key", blocks)
        mask = route_means(*means, blocks, blocks, call.scale, self.rule(call, blocks))
        return Plan(mask, operator=Soft() if self.soft else Drop())
