"""Twilight (arXiv 2502.02770): top-p budgets on top of any other method.

The inner method proposes candidates, more of them than are needed. The softmax shares of the candidates are
estimated, and every row keeps the fewest that hold the share p. So rows and heads whose attention is spread out get
long lists, peaked ones short lists, and nobody sets a budget.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..inner import inner_method
from ..patterns import check_block_size
from ..routing import lists_by_chunks
from ..scoring import head_chunks, keys_held, to_slots
from ..selection import Rule, blocks_holding
from .base import Call, Method, Plan, check_range

ESTIMATES = ("means", "tokens")
NO_KEYS, NO_CANDIDATE = -1e30, -2e30  # log mass; finite, so that no softmax is NaN, and far enough for shares of 0
OCTAVES, STEPS = 40, 64  # bins of what a share leaves over: down to 2^-40, as fine as top-p counts; 64 a halving


def count_by_share(scores: Tensor, pairs: Tensor) -> Tensor:
    """How many pairs of tokens come in as the share p rises from 0 to 1.

    Args:
        scores: float32 (..., nq, nk), log mass of the candidates, `NO_CANDIDATE` for other blocks.
        pairs: int64 (nq, nk), pairs of tokens of every pair of blocks.

    Returns:
        int64 (bins,): pairs whose block comes in when the blocks before it leave 2^(-i / 64), or a bit less.
    """
    value, place = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    share = (value * 2.0**OCTAVES).to(torch.int64)  # whole numbers, as `select_top_p` adds them up
    left = (2**OCTAVES - (share.cumsum(-1) - share)).clamp_(min=1)
    bins = ((OCTAVES - left.to(torch.float64).log2()) * STEPS).to(torch.int64).clamp_(0, OCTAVES * STEPS - 1)
    counted = torch.where(scores > NO_CANDIDATE, pairs, 0).gather(-1, place)
    empty = torch.zeros(OCTAVES * STEPS, dtype=torch.int64, device=scores.device)
    return empty.scatter_add_(0, bins.flatten(), counted.flatten())


def share_of_count(counts: Tensor, wanted: float) -> Tensor:
    """The share at which the counted pairs come nearest to a number of them: float64 (1, 1, 1, 1).

    Args:
        counts: from `count_by_share`, added up over heads.
        wanted: pairs of tokens, of all batch elements and heads together.
    """
    last = (counts.cumsum(0) - wanted).abs().argmin()
    share = 1 - 2.0 ** (-(last + 1).to(torch.float64) / STEPS)
    return torch.where(last == counts.numel() - 1, 1.0, share).reshape(1, 1, 1, 1)


def heads_of(layout: BlockLayout, heads: slice) -> BlockLayout:
    """The layout as some of the heads see it."""
    if layout.index is None or layout.index.dim() == 1 or layout.index.shape[1] == 1:
        return layout
    return dataclasses.replace(layout, index=layout.index[:, heads])


def log_mass(call: Call, query: BlockLayout, key: BlockLayout, heads: slice, estimate: str) -> Tensor:
    """Estimated log of the attention mass of every key block for every query block, up to a constant of the row.

    Args:
        call: the activations.
        query, key: the layouts.
        heads: which heads.
        estimate: "means": mean query times mean key, plus the log of the block's keys; "tokens": mean query times every
            key, as the paper does with keys of 4 bits.

    Returns:
        float32 (B, h, nq, nk); blocks without a real key have `NO_KEYS`.
    """
    mean = call.block_mean("query", query)[:, heads] * call.scale
    if estimate == "means":
        held = keys_held(key, call.key_mask)
        held = held if held.shape[1] == 1 else held[:, heads]
        mass = mean @ call.block_mean("key", key)[:, heads].transpose(-1, -2) + held.log()[:, :, None]
        return mass.clamp(min=NO_KEYS)
    numbers = 3 * call.query.shape[0] * query.blocks * key.slots
    first = heads.indices(call.query.shape[2])[0]
    chunks = [slice(first + x.start, first + x.stop) for x in head_chunks(mean.shape[1], numbers)]
    parts = [_token_mass(call, mean[:, x.start - first : x.stop - first], key, x) for x in chunks]
    return torch.cat(parts, dim=1).clamp_(min=NO_KEYS)


def _token_mass(call: Call, mean: Tensor, key: BlockLayout, heads: slice) -> Tensor:
    """Log of the mass that mean queries (B, h, nq, D), scaled, put on every key block: float32 (B, h, nq, nk)."""
    layout = heads_of(key, heads)
    keys = to_slots(call.key[:, :, heads], layout)
    real = layout.real.expand(call.key.shape[0], 1, -1)
    if call.key_mask is not None:
        token = layout.token_of_slot.clamp(min=0)
        token = token.expand(call.key.shape[0], token.shape[1] if token.dim() == 3 else 1, -1)
        real = real & call.key_mask[:, None].expand(-1, token.shape[1], -1).gather(-1, token)
    scores = (mean.to(keys.dtype) @ keys.permute(0, 2, 3, 1)).to(torch.float32)
    scores = scores.masked_fill_(~real[:, :, None], -torch.inf)
    return scores.unflatten(-1, (key.blocks, -1)).logsumexp(-1)


@dataclass(frozen=True)
class Twilight(Method):
    """The fewest candidates of another method that hold a share of the attention.

    Args:
        p: share of the softmax over the candidates that every row keeps; 1 keeps all candidates.
        inner: name of the method that proposes candidates, or a method; its masks must be plain lists (not `psa`).
        candidates: density of its masks, where it has such an option; None leaves the inner method's own.
        estimate: how shares are estimated: "means", mean query times mean key, which costs next to nothing, or
            "tokens", mean query times every key, nearer to the paper: one 1 / (2 * block size) of dense attention.
        density: None: p decides. A number: the share, one for all rows and heads of a call, that brings the mask within
            0.03 of it, text included (less where more of the blocks hold no share that float32 can tell); candidates
            are then at least twice as dense, and `p` has no effect.
        block_size: tokens of a block; None leaves it to the inner method.
    """

    p: float = 0.85
    inner: str | Method = "rainfusion2"
    candidates: float | None = 0.5
    estimate: str = "means"
    density: float | None = None
    block_size: int | None = None

    name: ClassVar[str] = "twilight"
    title: ClassVar[str] = "Twilight"
    arxiv: ClassVar[str | None] = "2502.02770"
    scored: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "the inner method's",
        "score": "estimated softmax shares of the inner method's blocks",
        "select": "top-p per row and head, among the inner method's blocks; text",
        "operate": "the inner method's",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the paper, on language models: p = .85 and the first two layers dense. It has no video model: that both
    # carry over, the inner method and the density of its candidates are our choice.
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {"p": 0.85, "dense_layers": 2},
        "hunyuan": {"p": 0.85, "dense_layers": 2},
    }

    def __post_init__(self) -> None:
        check_range(self.name, "p", self.p, 0, 1, open_low=True)
        for option in ("density", "candidates"):
            if getattr(self, option) is not None:
                check_range(self.name, option, getattr(self, option), 0, 1, open_low=True)
        if self.estimate not in ESTIMATES:
            raise ValueError(
                f"twilight: estimate={self.estimate!r} is not allowed; use one of {', '.join(ESTIMATES)}"
            )
        check_block_size(self.name, self.block_size)
        self.selector()

    def selector(self) -> Method:
        """The inner method, at the density of its candidates."""
        inner = inner_method(self.name, self.inner, block_size=self.block_size)
        if not inner.lists:
            raise ValueError(f"twilight: inner={inner.name!r} is not allowed; its masks are more than lists of blocks")
        steers = "density" in {field.name for field in dataclasses.fields(inner)}
        if self.density is not None and not steers:
            raise ValueError(
                f"twilight: density={self.density} is not allowed with inner={inner.name!r}, which has no density"
            )
        if not steers or (self.density is None and self.candidates is None):
            return inner
        most = min(1.0, max(self.candidates or 0.0, 2 * (self.density or 0.0)))
        return inner_method(self.name, inner, density=most)

    def check(self, grid: TokenGrid) -> None:
        """Raise ValueError when the inner method cannot serve this grid."""
        self.selector().check(grid)

    def observe(self, call: Call, out: Tensor, lse: Tensor | None) -> None:
        """What the inner method keeps of a dense call."""
        self.selector().observe(call, out, lse)

    def against_ranks(self) -> str:
        """See `Method.against_ranks`."""
        if self.density is not None and self.density < 1:
            return "twilight: density sets one share for all heads of a layer, some of them on other ranks; use p"
        return self.selector().against_ranks()

    def plan(self, call: Call) -> Plan:
        """The inner method's plan, with the blocks that the share can do without taken out."""
        plan = self.selector().plan(call)
        return plan if plan.mask is None else dataclasses.replace(plan, mask=self.prune(call, plan.mask))

    def prune(self, call: Call, mask: BlockMask) -> BlockMask:
        """The fewest blocks of a mask that hold the share; rows and columns of text stay as they are.

        Raises:
            ValueError: when the mask holds more than lists of blocks, such as the levels of `psa` inside of `delta`.
        """
        if type(mask) is not BlockMask:
            name, kind = self.selector().name, type(mask).__name__
            raise ValueError(f"twilight: inner={name!r} is not allowed: a {kind} is more than lists of blocks")
        query, key = mask.query, mask.key
        start, stop = call.grid.text_slice.start, call.grid.text_slice.stop
        text = blocks_holding(query, start, stop)[..., None] | blocks_holding(key, start, stop)[..., None, :]
        candidates = mask.to_dense()
        undecided = candidates & ~text

        def scores(heads: slice) -> Tensor:
            asked = undecided if undecided.shape[1] == 1 else undecided[:, heads]
            return log_mass(call, query, key, heads, self.estimate).masked_fill_(~asked, NO_CANDIDATE)

        batch, _, heads, _ = call.query.shape
        share: float | Tensor = self.p
        if self.density == 1:
            share = 1.0
        elif self.density is not None:
            pairs = query.lengths[:, None].to(torch.int64) * key.lengths
            chunks = head_chunks(heads, 8 * batch * query.blocks * key.blocks)
            counts = torch.stack([count_by_share(scores(part), pairs) for part in chunks]).sum(0)
            share = share_of_count(counts, self.wanted(call))
        rule = Rule("top_p", share, softmax=True)
        chosen = lists_by_chunks(scores, batch, heads, query, key, rule).to_dense()
        partial = None if mask.window is None else mask.boundary_dense()
        keep = (chosen & undecided) | (candidates & text)
        return BlockMask.from_dense(keep, query, key, partial=partial, window=mask.window)

    def wanted(self, call: Call) -> float:
        """Pairs of video tokens for the asked density, of all batch elements and heads."""
        video, whole = call.grid.video**2, call.grid.tokens**2
        density = self.density or 0.0
        pairs = max(density * whole - (whole - video), density / 2 * video)
        return pairs * call.query.shape[0] * call.query.shape[2]
