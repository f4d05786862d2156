"""Budgets without calibration: how many key blocks each head needs is estimated while the model runs.

Heads differ many times over in the key blocks that they need, so equal budgets give some far too many and others too
few. Here a few query rows of every head attend to all keys. From these, one ranking of a row's blocks gives the error
that the head would have at each of about ten budgets. Then blocks go where they lower the layer's error most, until
its estimate is below a bound that the user names, or until a mean density is spent. A few rows know the curve of one
head only roughly, so a part of the layer's mean curve is mixed in before blocks are given out. Estimates are renewed
every few steps; the lists themselves are made anew at every step. All of it is ours; the soft blocks are Sol-Attn's
(arXiv 2607.24027), the rows SVG's (2502.01776), and budgets per head were found worth it by AdaSpa (2502.21079) and
others.

Cost at 75,600 tokens, 40 heads of 128, bf16, blocks of 128, 64 rows, density .3, measured on one H200 in November 2026.
With an estimate 3.0 ms: means and spreads of keys and values .5, the rows' errors 1.4, means of queries .2, scores and
lists .3. Mean of eight steps, two of them with an estimate: 1.9 ms, beside 58.5 of attention; both with keys and values
put in order in the plan, .4 to .8 ms, which plans no longer do; 11.5 before the estimate was kernels. An estimate takes
430 MB of memory beside the activations. Kept are 0.1 MB for a layer and branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout
from ..budgets import budget_errors
from ..grid import TokenGrid
from ..operators import Drop, Operator, Soft
from ..order import inverse, video_blocks
from ..patterns import check_block_size
from ..routing import route_means
from ..scoring import gather_tokens, keys_held
from ..selection import Rule, count_of_density, map_kept
from .base import Call, Method, Plan, check_range
from .sol import ORDERS, Sol

DENSITIES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)  # at which errors are estimated
LEAST_SPREAD = 1e-6  # of a block's mean square: below, rounding is all there is
LEAST = 1e-30


def budget_grid(video: int) -> list[int]:
    """Blocks of a row at each of `DENSITIES`, rising, the last one all; few blocks have fewer different numbers."""
    return sorted({count_of_density(video, density) for density in DENSITIES})


def sampled_positions(tokens: int, rows: int, generator: torch.Generator) -> Tensor:
    """One place drawn from each of so many equal stretches of 0 ... tokens - 1: int64 (min(rows, tokens),), rising."""
    rows, device = min(rows, tokens), generator.device
    drawn = torch.arange(rows, device=device) + torch.rand(rows, generator=generator, device=device)
    return (drawn * (tokens / rows)).to(torch.int64).clamp_(max=tokens - 1)


def block_weight(call: Call, blocks: BlockLayout, soft: bool) -> Tensor:
    """What is added to a key block's score before blocks are ranked: the log of what its loss is proportional to.

    A dropped block loses the mass of its keys. A soft one loses the covariance of scores and values inside of it: its
    mass, times the spread of its keys, times the spread of its values.

    Args:
        call: the activations.
        blocks: layout of the keys.
        soft: whether blocks become soft.

    Returns:
        float32 (B|1, H|1, blocks), finite.
    """
    weight = keys_held(blocks, call.key_mask).clamp(min=LEAST).log()
    for name in ("key", "value") if soft else ():
        mean, squares = call.block_moments(name, blocks)
        spread = squares - mean.square().sum(-1)
        weight = weight + torch.maximum(spread, LEAST_SPREAD * squares).clamp(min=LEAST).log() / 2
    return weight


@dataclass(frozen=True)
class Sample:
    """What the estimate of a call's heads is made of.

    Args:
        call: the activations.
        blocks: layout of queries and keys; the first `video` blocks hold video.
        video: how many.
        weight: (B|1, H|1, blocks), from `block_weight`.
        position: int64 (R,), places of the sampled rows in the layout's order.
        counts: (G,), rising numbers of blocks that a row may keep, the last one all.
        soft: blocks that are not kept become soft.
    """

    call: Call
    blocks: BlockLayout
    video: int
    weight: Tensor
    position: Tensor
    counts: Tensor
    soft: bool

    def errors(self) -> tuple[Tensor, Tensor]:
        """Squared error of every head's output on every sampled row at every budget, and the output's squared norm.

        Returns:
            float32 (B, H, R, G), 0 at the last budget, and (B, H, R); rows of padding count 0.
        """
        call, blocks = self.call, self.blocks
        token = blocks.token_of_slot.reshape(-1)[self.position]
        query = gather_tokens(call.query, token).transpose(1, 2).to(torch.float32)  # [B, H, R, D]
        entry = mean_value = None
        if self.soft:
            mean_key, mean_value = (call.block_mean(name, blocks) for name in ("key", "value"))
            entry = query @ mean_key.mT * call.scale + keys_held(blocks, call.key_mask).log()[:, :, None]
        return budget_errors(call.query, call.key, call.value, token, blocks, self._left(), len(self.counts),
                             call.scale, entry=entry, mean_value=mean_value, key_mask=call.key_mask)

    def _left(self) -> Tensor:
        """How many of the budgets leave a block out for a row: int32 (B, H, R, blocks); text is always kept."""
        video, blocks = self.video, self.blocks
        block = torch.div(self.position, blocks.block_size, rounding_mode="floor")
        scores = pooled(self.call, blocks, self.weight, block)
        own = block[:, None] == torch.arange(video, device=block.device)
        place = scores[..., :video].masked_fill(own, torch.inf).argsort(dim=-1, descending=True, stable=True)
        left = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        # The first budget that holds the rank: budgets up to the rank leave it out.
        left[..., :video] = torch.bucketize(inverse(place).to(torch.float64), self.counts, right=True, out_int32=True)
        return left


def pooled(call: Call, blocks: BlockLayout, weight: Tensor, rows: Tensor) -> Tensor:
    """What key blocks are ranked by: scores of the means plus the blocks' weight.

    Args:
        call: the activations.
        blocks: layout of queries and keys.
        weight: float32 (B|1, H|1, blocks).
        rows: int64 (R,), query blocks.

    Returns:
        float32 (B, H, R, blocks).
    """
    query = call.block_mean("query", blocks)[:, :, rows] * call.scale
    return query @ call.block_mean("key", blocks).mT + weight[:, :, None]


def lower_hull(errors: Tensor, counts: Tensor) -> Tensor:
    """The convex curve below each curve: no budget between two others is worth more than a mix of them.

    Args:
        errors: float64 (..., G). counts: float64 (G,), rising.
    """
    if counts.shape[0] == 1:
        return errors
    left, right = counts[:, None, None], counts[:, None]
    inside = (left <= counts) & (counts <= right) & (left < right)  # [G, G, G]
    share = (counts - left) / torch.where(left < right, right - left, 1)
    start, end = errors[..., :, None, None], errors[..., None, :, None]
    return torch.where(inside, start + (end - start) * share, torch.inf).amin((-3, -2))


def spread(errors: Tensor, counts: Tensor, *, mean: float | None = None, limit: Tensor | None = None,
           pull: float = 0.0) -> Tensor:
    """Blocks for every head: given out where a block lowers the summed error most, head by head along its curve.

    On convex curves this is the best there is, for a number of blocks as well as for a bound. No sort and no running
    sum: what comes before a step is a comparison of all steps with all, a few hundred in a layer.

    Args:
        errors: float (B, H, G), squared errors, 0 at the last budget.
        counts: float64 (G,), rising budgets in blocks.
        mean: blocks of a head, mean over the heads; or
        limit: (B,), the bound of the summed error.
        pull: part of the layer's mean curve in the curves that say whose turn it is, 0 to 1. The bound is on the
            heads' own errors all the same.

    Returns:
        int64 (B, H), from the first to the last of `counts`.
    """
    hull = lower_hull(errors.to(torch.float64), counts)
    heads, size = errors.shape[1], counts.diff().expand(*errors.shape[:2], -1).flatten(1)
    step = (hull[..., :-1] - hull[..., 1:]).clamp(min=0)
    gain = step.flatten(1)
    # A mean of convex curves is convex: no second hull.
    slope = torch.lerp(step, step.mean(1, keepdim=True), pull).flatten(1) / size
    place = torch.arange(slope.shape[1], device=slope.device)
    mine, other = slope[:, :, None], slope[:, None]
    before = ((other > mine) | (other == mine) & (place < place[:, None])).to(torch.float64)
    if limit is None:
        left = ((mean or 0) - counts[0]) * heads - (before @ size[..., None])[..., 0]
        share = left / size
    else:
        left = (hull[..., 0].sum(1) - limit)[:, None] - (before @ gain[..., None])[..., 0]
        # A step that a head's own curve sees nothing in may still have its turn, by the layer's.
        share = torch.where(gain > 0, left / gain.clamp(min=torch.finfo(torch.float64).tiny), (left > 0).to(left.dtype))
    more = (share.clamp(0, 1) * size).unflatten(1, (heads, -1)).sum(-1)
    return (counts[0] + (more.round() if limit is None else (more - 1e-6).ceil())).to(torch.int64)


@dataclass(frozen=True)
class Auto(Method):
    """A budget for every head from errors that are estimated while the model runs.

    Every batch element is on its own: what else is in the batch changes nothing. Text is exact for every query, and its
    own queries see everything; each query block keeps its own block. Remembered are, for every head, the estimated
    errors, the budget, and one number for each key block.

    Args:
        max_error: estimated relative error of a layer's attention output, ||sparse - dense|| / ||dense|| over all of
            its heads, that blocks are bought down to. 0 keeps everything.
        density: None: `max_error` decides. A number: kept fraction of all pairs, text included, mean over the heads,
            within 0.03 of it on 2,000 tokens and more; `max_error` then has no effect.
        soft: blocks that are not kept enter as their means; False drops them.
        rows: sampled query rows. 64 know one head's error to within 65 % in 95 % of draws, the sum of many better.
        pull: how far a head's curve is drawn to the mean curve of its layer before blocks are given out: 0 not at all,
            near 1 all heads get nearly the same. The bound holds for the heads' own errors whatever it is.
        every: steps from one estimate to the next; each new one is averaged with those before.
        order: "morton", "tiles" (boxes) or "raster" (the model's own order).
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    max_error: float = 0.05
    density: float | None = None
    soft: bool = True
    rows: int = 64
    pull: float = 0.25
    every: int = 5
    order: str = "morton"
    block_size: int | None = None

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "Budgets from sampled rows (ours)"
    arxiv: ClassVar[str | None] = None
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "Morton curve, tiles, or the model's",
        "score": "mean query times mean key, plus the log of the key block's spread",
        "select": "top-k per row, with a budget per head from errors on sampled rows; text",
        "operate": "soft",
        "remember": "budgets for some steps; masks may be kept too (refresh)",
    }
    # Source: the schedules of the methods that it is made of. Wan and Hunyuan: Sol-Attn's (10 of 50 steps, the first
    # layer). CogVideoX: AdaSpa's, which names no dense layer. The bound is our choice, untested on these weights.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "wan": {"max_error": 0.05, "dense_steps": 0.2, "dense_layers": 1},
        "hunyuan": {"max_error": 0.05, "dense_steps": 0.2, "dense_layers": 1},
        "cogvideox": {"max_error": 0.05, "dense_steps": 0.2, "dense_layers": 0},
    }

    def against_ranks(self) -> str:
        """See `Method.against_ranks`."""
        return ("auto: the blocks of a layer are spread over all of its heads, some of them on other ranks; use "
                "another method, or ring_degree")

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (Soft,) if self.soft else (Drop,)

    def __post_init__(self) -> None:
        check_range(self.name, "max_error", self.max_error, 0, 1)
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        check_range(self.name, "pull", self.pull, 0, 1)
        if not isinstance(self.soft, bool):
            raise ValueError(f"auto: soft={self.soft!r} is not allowed; use True or False")
        for name in ("rows", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"auto: {name}={value!r} is not allowed; use a whole number >= 1")
        if self.order not in ORDERS:
            raise ValueError(f"auto: order={self.order!r} is not allowed; use one of {', '.join(ORDERS)}")
        check_block_size(self.name, self.block_size)

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """Blocks of the video in its order, then text, on the CPU."""
        return Sol(order=self.order, block_size=self.block_size).layout(grid)

    def static(self, call: Call) -> tuple[BlockLayout, Tensor, Tensor]:
        """Of the shape: the layout, the grid of budgets (G,) float64, and the slots that hold video, int64."""

        def build() -> tuple[BlockLayout, Tensor, Tensor]:
            blocks = self.layout(call.grid)
            video = video_blocks(blocks, call.grid)
            counts = torch.tensor(budget_grid(video), dtype=torch.float64)
            slots = blocks.real[: video * blocks.block_size].nonzero()[:, 0]
            return blocks.to(call.device), counts.to(call.device), slots.to(call.device)

        made: tuple[BlockLayout, Tensor, Tensor] = call.cached((self, "layout"), build)
        return made

    def estimate(self, call: Call, weight: Tensor | None = None) -> Tensor:
        """Squared error of every head's output at every budget of the grid, as a share of the layer's squared norm.

        Args:
            call: the activations; its generator draws the rows.
            weight: from `block_weight`, where it is there already.

        Returns:
            float32 (B, H, G), 0 at the last budget. Summed over heads at their budgets, the square of what `max_error`
            bounds.
        """
        blocks, counts, slots = self.static(call)
        weight = block_weight(call, blocks, self.soft) if weight is None else weight
        generator = call.generator
        if generator is None:
            generator = torch.Generator(device=call.device).manual_seed(1009 * call.step + call.layer)
        position = slots[sampled_positions(slots.shape[0], self.rows, generator)]
        sample = Sample(call, blocks, video_blocks(blocks, call.grid), weight, position, counts, self.soft)
        errors, norms = sample.errors()
        return errors.sum(2) / norms.sum((1, 2))[:, None, None].clamp(min=LEAST)

    def budget(self, call: Call) -> dict[str, Tensor]:
        """The heads' budgets, kept for `every` steps: "counts" int64 (B, H), with "errors" and "weight" behind them."""
        age = call.state.age("budget")
        kept: dict[str, Tensor] | None = call.state.recall("budget")
        if kept is not None and age is not None and age < self.every:
            return kept
        blocks, counts, _ = self.static(call)
        weight = block_weight(call, blocks, self.soft)
        errors = self.estimate(call, weight)
        if kept is not None:
            errors = (errors + kept["errors"]) / 2
        if self.density is None:
            limit = torch.full((errors.shape[0],), self.max_error**2, dtype=torch.float64, device=call.device)
            found = spread(errors, counts, limit=limit, pull=self.pull)
        else:
            video = video_blocks(blocks, call.grid)
            pairs = map_kept(self.density, video, blocks.blocks - video, count_forced=True)
            found = spread(errors, counts, mean=pairs / video, pull=self.pull)
        kept = {"counts": found, "errors": errors, "weight": weight}
        call.state.keep("budget", kept)
        return kept

    def plan(self, call: Call) -> Plan:
        """Rank, and keep as many blocks of a row as its head has."""
        blocks, _, _ = self.static(call)
        kept, chosen = self.budget(call), slice(0, video_blocks(blocks, call.grid))
        rule = Rule("top_k", kept["counts"][..., None, None], rows=chosen, columns=chosen, near=1)
        means = call.block_mean("query", blocks), call.block_mean("key", blocks)
        mask = route_means(*means, blocks, blocks, call.scale, rule, key_weight=kept["weight"])
        return Plan(mask, operator=Soft() if self.soft else Drop())
