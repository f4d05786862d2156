"""AdaSpa (arXiv 2502.21079): blocks by their true attention mass, searched at two steps of the run, kept in between.

Which blocks matter differs per prompt, layer and head, but hardly changes over the steps. So the search is exact and
rare: one pass over queries and keys adds up exp(score - LSE) for every pair of blocks, without values. The LSE of the
first search serves the later ones, which then need no attention before them. Every row of a head keeps as many blocks;
heads whose kept blocks hold much of their mass give blocks to those that hold little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bits import pack_bits, unpack_bits
from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..kernels.attention import block_sparse_attention
from ..operators import Attend, Operator
from ..order import inverse, layout, video_blocks
from ..patterns import check_block_size, choose_block_size
from ..routing import listed_mass, lists_of_maps
from ..schedule import Schedule
from ..scoring import head_chunks
from ..selection import count_of_density, rows_kept
from .base import Call, Method, Plan, check_range

FEWER, BASE, MORE = 0, 1, 2
HIGHEST_MASS = 1e30  # an LSE of an earlier step may be too low; sums of this stay finite


def head_levels(recall: Tensor, threshold: float) -> Tensor:
    """Which heads give blocks and which get them, as many of one kind as of the other.

    With m heads above the threshold, at most half of all (our bound; the paper leaves it open), the m with the highest
    recall keep fewer blocks and the m with the lowest keep more.

    Args:
        recall: (B, H), share of a head's mass on the blocks that it would keep with the base budget.
        threshold: recall above which a head can give.

    Returns:
        int64 (B, H): FEWER, BASE or MORE.
    """
    heads = recall.shape[-1]
    giving = (recall > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = inverse(recall.argsort(dim=-1, descending=True, stable=True))
    return torch.where(rank < giving, FEWER, torch.where(rank >= heads - giving, MORE, BASE))


def budget_classes(mass: Tensor, counts: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The blocks that each of three budgets keeps, the ones with most mass of every row, as one map.

    Args:
        mass: float32 (B, h, nq, nk).
        counts: blocks of a row with fewer, with the base and with more.

    Returns:
        uint8 (B, h, nq, nk): 3 where all three keep a block, 2 where the base and the wider do, 1 where only the widest
        does, 0 elsewhere; and the mass that the base keeps, float32 (B, h, nq).
    """
    value, place = torch.sort(mass, dim=-1, descending=True, stable=True)
    rank = torch.arange(mass.shape[-1], device=mass.device)
    taken = torch.stack([rank < count for count in counts]).sum(0, dtype=torch.uint8)
    classes = torch.zeros_like(place, dtype=torch.uint8).scatter_(-1, place, taken.expand_as(place))
    return classes, value[..., : counts[BASE]].sum(-1)


@dataclass(frozen=True)
class DenseSearch(Operator):
    """Dense attention, and the search for later steps from the LSE that it gives.

    Args:
        method: searches.
    """

    method: AdaSpa

    name: ClassVar[str] = "search"
    title: ClassVar[str] = "dense, while the masks of later steps are searched"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`."""
        out, lse = attend(call.query, call.key, call.value, mask)
        self.method.search(call, lse)
        return out, lse


@dataclass(frozen=True)
class AdaSpa(Method):
    """The blocks with most attention mass, searched exactly at a few steps, with a budget for every head.

    A search is exact but for the age of its LSE. Remembered are the kept blocks, one bit for a pair of blocks and head,
    and until the last search the LSE, 4 bytes for a token and head. The shared option `refresh` adds nothing here.
    In runs of few steps (distilled models) there is little to spread a search over.

    Args:
        density: kept fraction of all pairs, mean over the heads, within 0.03 of it on 2,000 tokens and more, unless
            text alone takes more than half of it (see `count_forced`). The paper's sparsity is 1 - density.
        count_forced: text is part of `density`. False: as the paper, ceil(density * video blocks) of every row, and
            text on top.
        searches: steps at which the blocks are searched anew, as fractions of the run (0.6) or step numbers (30). The
            first sparse step always searches. Fractions have no effect when the run's length is unknown.
        dense_search: the first sparse step gives dense output while it searches, as in the paper. False: it is sparse
            already, from the LSE of the last dense step where the dense kernel gives one, else from a pass of its own.
        head_adaptive: heads above `recall` give half of their blocks to as many heads with the lowest recall.
        recall: share of a head's mass, text left out, above which it can give.
        block_size: tokens of a block, 64 in the paper; None chooses by the length of the sequence.
    """

    density: float = 0.2
    count_forced: bool = True
    searches: tuple[float | int, ...] = (0.2, 0.6)
    dense_search: bool = False
    head_adaptive: bool = True
    recall: float = 0.8
    block_size: int | None = None

    name: ClassVar[str] = "adaspa"
    title: ClassVar[str] = "AdaSpa"
    arxiv: ClassVar[str | None] = "2502.21079"
    scored: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "the model's",
        "score": "exact attention mass, from the LSE of an earlier step",
        "select": "top-k per row, with a budget per head; text",
        "operate": "drop",
        "remember": "masks between searches; the first search's LSE",
    }
    # Source: the paper's runs of 50 steps: 10 dense, searches at steps 10 (dense too) and 30. Dense layers are not
    # mentioned. Wan, Mochi and Flux are not in the paper.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        family: {"density": 0.2, "count_forced": False, "searches": (0.2, 0.6), "dense_search": True, "block_size": 64,
                 "dense_steps": 0.2, "dense_layers": 0}
        for family in ("hunyuan", "cogvideox")
    }

    def __post_init__(self) -> None:
        check_range(self.name, "density", self.density, 0, 1, open_low=True)
        check_range(self.name, "recall", self.recall, 0, 1)
        for name in ("count_forced", "dense_search", "head_adaptive"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"adaspa: {name}={getattr(self, name)!r} is not allowed; use True or False")
        if isinstance(self.searches, list):
            object.__setattr__(self, "searches", tuple(self.searches))
        fits = isinstance(self.searches, tuple) and all(
            (isinstance(x, float) and 0 <= x <= 1) or (isinstance(x, int) and not isinstance(x, bool) and x >= 0)
            for x in self.searches
        )
        if not fits:
            raise ValueError(f"adaspa: searches={self.searches!r} is not allowed; use a tuple of fractions in "
                             "[0.0, 1.0] or whole numbers of steps >= 0")
        check_block_size(self.name, self.block_size)

    def against_ranks(self) -> str:
        """See `Method.against_ranks`."""
        heads = "gives blocks of some heads of a layer to others, which are on other ranks; use head_adaptive=False"
        return f"adaspa: head_adaptive=True {heads}" if self.head_adaptive else ""

    # -- when ------------------------------------------------------------------------------------------------------

    def points(self, call: Call) -> list[int]:
        """The steps at which to search."""
        length = call.num_steps
        if length is None:
            return [x for x in self.searches if isinstance(x, int)]
        return [x if isinstance(x, int) else Schedule.count(x, length) for x in self.searches]

    def due(self, call: Call) -> bool:
        """Whether a search was to happen since the last one; steps in between may have been skipped."""
        age = call.state.age("kept")
        return age is None or any(call.step - age < point <= call.step for point in self.points(call))

    # -- what ------------------------------------------------------------------------------------------------------

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """Blocks of the video, then text, on the CPU."""
        return layout(grid, None, choose_block_size(grid.tokens, self.block_size))

    def full(self, call: Call) -> BlockMask:
        """The mask of all blocks, made once per shape."""
        blocks = call.cached((self, "layout"), lambda: self.layout(call.grid).to(call.device))
        mask: BlockMask = call.cached((self, "full"), lambda: BlockMask.full(blocks, blocks))
        return mask

    def counts(self, video: int, text: int) -> tuple[int, int, int]:
        """Video blocks that a row keeps with fewer, with the base and with more, for so many video and text blocks.

        Half as many and half as many again; above a density of 2/3, where the latter do not exist, less far apart
        (ours), so that the mean stays.
        """
        if self.count_forced:
            base = rows_kept(self.density, video, 0, text, count_forced=True)
            spread = min(base // 2, video - base)
            return base - spread, base, base + spread
        apart = min(self.density / 2, 1 - self.density)
        fewer, base, more = (count_of_density(video, self.density + sign * apart) for sign in (-1, 0, 1))
        return fewer, base, more

    def search(self, call: Call, lse: Tensor) -> Tensor:
        """Find the blocks to keep, from the LSE of this step or an earlier one, and remember them.

        Args:
            call: the activations.
            lse: float32 (B, H, L), natural logarithm.

        Returns:
            uint8 (B, H, nq, bytes), the video blocks that are kept, packed.
        """
        full, batch = self.full(call), call.query.shape[0]
        blocks, video = full.query, video_blocks(full.query, call.grid)
        rows = blocks.lengths[:video].to(torch.float32)
        # Short blocks come last in a list: back to the order of the blocks.
        place = inverse(full.lists[0, 0, 0].to(torch.int64))[:video]
        counts = self.counts(video, blocks.blocks - video)
        classes, recalls = [], []
        for heads in head_chunks(call.query.shape[2], 6 * batch * blocks.blocks**2):
            mass = listed_mass(call.query[:, :, heads], call.key[:, :, heads], lse[:, heads], full, call.scale,
                               key_mask=call.key_mask)
            mass = mass[:, :, :video].index_select(-1, place).clamp(max=HIGHEST_MASS)
            found, kept = budget_classes(mass, counts)
            classes.append(found)
            recalls.append((kept @ rows) / (mass.sum(-1) @ rows).clamp(min=1e-30))
        level = head_levels(torch.cat(recalls, 1), self.recall if self.head_adaptive else 2.0)
        # FEWER keeps what all three budgets keep, MORE what any does.
        keep = pack_bits(torch.cat(classes, 1) >= (3 - level)[..., None, None])
        call.state.keep("kept", keep, "masks")
        later = any(point > call.step for point in self.points(call))
        if not later:
            call.state.keep("lse", None)
        elif call.state.recall("lse") is None:
            call.state.keep("lse", lse, "LSE")
        return keep

    def mask(self, call: Call, keep: Tensor) -> BlockMask:
        """The lists of the kept blocks; text sees everything and is seen by everything."""
        blocks = self.full(call).query
        video = video_blocks(blocks, call.grid)
        return lists_of_maps(
            lambda heads: unpack_bits(keep[:, heads], video), keep.shape[0], keep.shape[1], blocks, video
        )

    def observe(self, call: Call, out: Tensor, lse: Tensor | None) -> None:
        """Keep a dense step's LSE for the first search, where there is one."""
        if lse is not None and not self.dense_search:
            call.state.keep("lse", lse, "LSE")

    def plan(self, call: Call) -> Plan:
        """The remembered blocks, or a search."""
        if not self.due(call):
            return Plan(self.mask(call, call.state.recall("kept")))
        lse = call.state.recall("lse")
        if lse is None:
            if self.dense_search:
                return Plan(self.full(call), operator=DenseSearch(self))
            _, lse = block_sparse_attention(call.query, call.key, call.value, self.full(call), scale=call.scale,
                                            key_mask=call.key_mask)
        return Plan(self.mask(call, self.search(call, lse)))
