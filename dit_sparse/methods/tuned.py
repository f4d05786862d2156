"""Runs what `tune` chose: for every stretch of a run, layer and head a candidate of its own.

Heads of one order are computed together, each with its own number of key blocks; a layer whose heads use two orders
makes two launches. Layouts are those of `sol`. Ranking and forced blocks are its too, but for the pattern "spread",
which ranks as `auto`; the oracle judges just that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..operators import Attend, Operator, means_of
from ..order import video_blocks
from ..patterns import build_mask, join_heads, pick
from ..routing import route_means
from ..selection import Rule, rows_kept
from ..session import SparseFallbackError
from ..tuning.candidates import Candidate
from ..tuning.headplan import HeadPlan
from .auto import block_weight
from .base import Call, Method, Plan
from .sol import NEAR, Sol

__all__ = ["Group", "HeadGroups", "PresetMismatch", "Tuned", "candidate_layout", "kept_blocks", "kept_of", "kept_share",
           "near_of"]

_ORDERS = {"tile": "tiles", "morton": "morton"}  # how `sol` calls them
TRANSFER = 0.25  # largest difference of the number of tokens, as a share, at which a plan is carried over


class PresetMismatch(SparseFallbackError, ValueError):
    """The preset was made for another size: the run is refused, in one line."""


def candidate_layout(grid: TokenGrid, order: str) -> BlockLayout:
    """Blocks of an order, on the CPU: those of `sol`."""
    return Sol(order=_ORDERS[order]).layout(grid)


def near_of(ranking: str) -> int:
    """Key blocks less than so far from the query block's own are kept in any case, whatever their rank.

    Ranked by their score and spread, blocks win by merit what neighbours are given elsewhere. Included model, 12
    captions, 512x512x33, density .1 in every head, PSNR in dB, H200, November 2026: along the Morton curve 31.6 with
    its own block only, 31.3 with both neighbours; ranked by the score alone, in tiles, 29.7 and 30.2.
    """
    return 1 if ranking == "spread" else NEAR


def kept_blocks(candidate: Candidate, blocks: BlockLayout, grid: TokenGrid) -> int:
    """Video key blocks that every query block of a head sees; all of them when it is dense."""
    return kept_of(candidate.density, candidate.ranking, blocks, grid)


def kept_of(density: float, ranking: str, blocks: BlockLayout, grid: TokenGrid) -> int:
    """`kept_blocks` of candidates of one ranking."""
    video = video_blocks(blocks, grid)
    if density >= 1:
        return video
    count = rows_kept(density, video, 0, blocks.blocks - video, count_forced=True)
    return min(video, max(count, 2 * near_of(ranking) - 1))


def kept_share(candidate: Candidate, blocks: BlockLayout, grid: TokenGrid) -> float:
    """Share of all key blocks, those of the text included, that a video query block of a head sees."""
    text = blocks.blocks - video_blocks(blocks, grid)
    return (kept_blocks(candidate, blocks, grid) + text) / blocks.blocks


@dataclass(frozen=True, eq=False)
class Group:
    """Heads that are computed in one launch.

    Args:
        heads: which heads of the call, rising; None: all.
        mask: the mask of these heads.
        soft: which of them, counted inside the group, have soft blocks.
    """

    heads: tuple[int, ...] | None
    mask: BlockMask
    soft: tuple[int, ...] = ()

    def call(self, call: Call) -> Call:
        """The call of these heads."""
        return call if self.heads is None else call.of_heads(self.heads)

    def run(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        """out (B, L, h, Dv) and LSE (B, h, L) of the group's heads; `call` is theirs."""
        if not self.soft:
            return attend(call.query, call.key, call.value, self.mask)
        # Of all heads: ranking has pooled the keys already, and often the values.
        some = None if len(self.soft) == call.query.shape[2] else call.head_index(self.soft)
        return attend(call.query, call.key, call.value, self.mask, soft=means_of(call, self.mask, some))


@dataclass(frozen=True)
class HeadGroups(Operator):
    """Every head drops what its mask leaves out, or has it as soft blocks; one launch for each group of heads.

    Args:
        groups: the groups; the first one's mask is also the plan's.
    """

    groups: tuple[Group, ...] = ()

    name: ClassVar[str] = "per head"
    title: ClassVar[str] = "drop or soft blocks, per head"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`."""
        if len(self.groups) == 1:
            return self.groups[0].run(call, attend)
        batch, tokens, heads = call.query.shape[:3]
        out = call.query.new_empty(batch, tokens, heads, call.value.shape[3])
        lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=call.device)
        for group in self.groups:
            assert group.heads is not None  # several groups share the heads
            index = call.head_index(group.heads)
            part, part_lse = group.run(group.call(call), attend)
            out.index_copy_(2, index, part)
            lse.index_copy_(1, index, part_lse.to(torch.float32))
        return out, lse

    def density(self, mask: BlockMask) -> float | Tensor:
        """Mean over the heads of all groups."""
        if len(self.groups) == 1:
            return mask.density()
        sizes = [len(group.heads or ()) for group in self.groups]
        parts = [group.mask.density() * n for group, n in zip(self.groups, sizes, strict=True)]
        return torch.stack(parts).sum() / sum(sizes)


@dataclass(frozen=True, eq=False)
class Tuned(Method):
    """A head plan, as a preset holds it: `enable(pipe, preset=...)`.

    Args:
        table: the plan.
        grid: frames, rows and columns of the video that it was made for; None: any.
        text: text tokens in the same sequence that it was made for.
        transferred: made for another configuration of the model: every head takes the next larger budget.
    """

    table: HeadPlan
    grid: tuple[int, int, int] | None = None
    text: int = 0
    transferred: bool = False

    name: ClassVar[str] = "tuned"
    title: ClassVar[str] = "Plan of tune()"
    needs: ClassVar[str] = "a preset"
    hidden: ClassVar[bool] = True
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "tiles or Morton curve, per head",
        "score": "mean query times mean key, some plus the log of the block's spread, or distance, per head",
        "select": "top-k per row with a budget per head; own block, some with neighbours; text",
        "operate": "drop or soft, per head; some heads dense",
        "remember": "masks may be kept for some steps (refresh)",
    }

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (HeadGroups,)

    def is_transfer(self, grid: TokenGrid) -> bool:
        """Whether the plan is carried over to this grid instead of made for it.

        Raises:
            PresetMismatch: the grids differ too much; one line.
        """
        if reason := self.refusal(grid):
            raise PresetMismatch(reason)
        same = self.grid is None or (grid.sizes == tuple(self.grid) and grid.text == self.text)
        return self.transferred or not same

    def refusal(self, grid: TokenGrid) -> str:
        """Why the plan is not for this grid, in one line; empty when it is, or can be carried over."""
        if self.grid is None:
            return ""
        frames, height, width = self.grid
        made = frames * height * width + self.text
        if abs(grid.tokens - made) <= TRANSFER * made:
            return ""
        sizes = ["x".join(map(str, x)) for x in (self.grid, grid.sizes)]
        return (f"preset was made for {sizes[0]} ({made} tokens), not {sizes[1]} ({grid.tokens}); run dit-sparse tune "
                "at this size")

    def remarks(self, grid: TokenGrid | None, num_steps: int | None) -> list[str]:
        """Notes for the summary: a plan that was carried over, or mapped to another number of steps."""
        notes = []
        if grid is not None and not self.refusal(grid) and self.is_transfer(grid):
            notes.append("transferred: the preset was made for another grid or configuration; every head takes the "
                         "next larger budget")
        if num_steps and num_steps != self.table.steps:
            notes.append(f"the preset was made for {self.table.steps} steps; its buckets are mapped to {num_steps}")
        return notes

    def chosen(self, call: Call) -> tuple[Candidate, ...]:
        """The candidates of the call's heads.

        Raises:
            ValueError: the place in the run is unknown, or the plan has other layers or heads; one line.
        """
        table, heads = self.table, call.all_heads
        if (call.layers, heads) != (table.layers, table.heads) or call.layer >= table.layers:
            raise ValueError(f"preset was made for {table.layers} layers of {table.heads} heads, not {call.layers} of "
                             f"{heads}")
        if table.buckets > 1 and call.num_steps is None:
            raise ValueError("the run's length is unknown; pass num_steps=")
        if self.is_transfer(call.grid):
            table = call.cached((self, "denser"), table.denser)
        every = table.of(table.bucket_of(call.step, call.num_steps or 1), call.layer)
        if call.ranks > 1 and call.host_heads is None:
            raise ValueError(f"preset: {heads} heads cannot be spread over {call.ranks} ranks")
        return every if call.host_heads is None else tuple(every[head] for head in call.host_heads)

    def head_costs(self) -> Tensor:
        """See `Method.head_costs`: the mean density of every head over the run."""
        table = self.table
        density = torch.tensor([c.density for c in table.candidates])[torch.from_numpy(table.choices).long()]
        steps = torch.tensor(table.edges, dtype=torch.float32).diff()
        return (density * steps[:, None, None]).sum(0) / steps.sum()

    def plan(self, call: Call) -> Plan:
        """Route the heads of each order together."""
        chosen = self.chosen(call)
        if all(one.is_dense for one in chosen):
            return Plan(None)
        orders = list(dict.fromkeys(one.order for one in chosen if not one.is_dense))
        groups = []
        for number, order in enumerate(orders):
            # Dense heads keep all blocks, in the first group.
            heads = tuple(h for h, one in enumerate(chosen) if (number == 0 if one.is_dense else one.order == order))
            whole = len(heads) == len(chosen)
            part = call if whole else call.of_heads(heads)
            mine = tuple(chosen[h] for h in heads)
            soft = tuple(i for i, one in enumerate(mine) if one.is_soft)
            groups.append(Group(None if whole else heads, self.mask(part, order, mine), soft))
        return Plan(groups[0].mask, operator=HeadGroups(tuple(groups)))

    @staticmethod
    def blocks(call: Call, order: str) -> BlockLayout:
        """`candidate_layout` on the call's device, made once for the shape."""
        made: BlockLayout = call.cached(("tuned", "layout", order),
                                        lambda: candidate_layout(call.grid, order).to(call.device))
        return made

    def mask(self, call: Call, order: str, chosen: tuple[Candidate, ...]) -> BlockMask:
        """The mask of heads of one order, each with its own budget.

        Args:
            call: the call of these heads.
            order: their order.
            chosen: what each computes; dense ones keep all blocks.
        """
        blocks = self.blocks(call, order)
        counts = tuple(kept_blocks(one, blocks, call.grid) for one in chosen)
        kinds = tuple(one.ranking for one in chosen)
        masks: list[BlockMask] = []
        heads: list[int] = []
        sizes: list[int] = []
        # The spread first: its reading of the keys makes their means, which the others need too.
        for kind in sorted(set(kinds), key=("spread", "pooled", "band").index):
            which = tuple(h for h, other in enumerate(kinds) if other == kind)
            some = tuple(counts[h] for h in which)
            heads += which
            sizes.append(len(which))
            if kind == "band":
                masks.append(self.bands(call, order, some))
            else:
                masks.append(self.ranked(call, order, some, None if len(which) == len(kinds) else which, kind))
        if len(masks) == 1:
            return masks[0]
        places = tuple(heads.index(h) for h in range(len(kinds)))
        return join_heads(masks, sizes, call.head_index(places))

    def ranked(self, call: Call, order: str, counts: tuple[int, ...], heads: tuple[int, ...] | None, kind: str
               ) -> BlockMask:
        """The best `counts[h]` video blocks of every row of some heads (None: all), of one ranking; all
        text."""
        grid, blocks, near = call.grid, self.blocks(call, order), near_of(kind)

        def mine(x: Tensor) -> Tensor:
            return x if heads is None or x.shape[1] == 1 else x.index_select(1, call.head_index(heads))

        weight = mine(block_weight(call, blocks, soft=True)) if kind == "spread" else None
        query, key = (mine(call.block_mean(name, blocks)) for name in ("query", "key"))
        rule = call.cached(("tuned", "rule", order, counts, near),
                           lambda: _rule(counts, blocks, grid, call.device, near))
        return route_means(query, key, blocks, blocks, call.scale, rule, key_weight=weight,
                           max_width=blocks.blocks if grid.text else max(counts))

    def bands(self, call: Call, order: str, counts: tuple[int, ...]) -> BlockMask:
        """The `counts[h]` nearest video blocks along the order for every head, and all text.

        Every width is built once for the shape: a list for each head would be another one in every layer and bucket.
        """
        grid, blocks = call.grid, self.blocks(call, order)
        widths = tuple(sorted(set(counts)))
        table = call.cached(("tuned", "bands", order, widths),
                            lambda: _bands(grid, order, widths).to(call.device).with_layouts(blocks, blocks))
        which = tuple(widths.index(n) for n in counts)
        return pick(table, call.cached(("tuned", "widths", which), lambda: torch.tensor([which], device=call.device)))


def _rule(
    counts: tuple[int, ...], blocks: BlockLayout, grid: TokenGrid, device: torch.device | str, near: int = NEAR
) -> Rule:
    """The best `counts[h]` video blocks of every row of head h, those less than `near` away first; all text."""
    video = slice(0, video_blocks(blocks, grid))
    amount = torch.tensor(counts, device=device)[None, :, None, None]
    return Rule("top_k", amount, rows=video, columns=video, near=near)


def _bands(grid: TokenGrid, order: str, counts: tuple[int, ...]) -> BlockMask:
    """The `counts[h]` nearest video blocks along the order for every head, and all text; on the CPU."""
    blocks = candidate_layout(grid, order)
    at = torch.arange(blocks.blocks)
    scores = -(at[:, None] - at).abs().to(torch.float32).expand(1, len(counts), -1, -1)
    return build_mask(_rule(counts, blocks, grid, "cpu").keep(scores), blocks, blocks)
