"""SpargeAttn (arXiv 2502.18137): pooled scores, trusted only for blocks whose tokens resemble each other.

The mean query and mean key of a block speak for its tokens when these point the same way. So blocks are tested for it:
one that fails is computed with everything. The others are ranked by the softmax of the products of their means, and a
row keeps its best blocks, a number of them or as many as hold a share. Optionally a second filter, inside of the
softmax, leaves out blocks that cannot change the result any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout
from ..gilbert import gilbert
from ..grid import TokenGrid
from ..operators import Drop, Operator, SkipBlocks
from ..order import layout, video_blocks
from ..patterns import check_block_size, choose_block_size, key_blocks_kept
from ..routing import lists_by_chunks, pool, route_means
from ..scoring import head_chunks
from ..selection import Rule, select_top_p
from .base import Call, Method, Plan, check_range

ORDERS = ("raster", "gilbert")
EPSILON = 1e-12  # least length of a token; zeros resemble nothing


def similarity(x: Tensor, blocks: BlockLayout, *, centre: bool = False, mask: Tensor | None = None) -> Tensor:
    """How alike the tokens of each block are: the mean cosine of all pairs of them, each with itself included.

    It is the squared length of the mean of the tokens' directions, so it needs no product of tokens.

    Args:
        x: (B, L, H, D).
        blocks: how the tokens sit in blocks.
        centre: subtract the mean of all tokens first.
        mask: bool (B, L), True where the token is real; others do not count.

    Returns:
        float32 (B, H, blocks), from 0 to 1; 0 for a block without real tokens.
    """
    batch, tokens, heads, dim = x.shape
    found = []
    for part in head_chunks(heads, 3 * batch * tokens * dim):
        piece = x[:, :, part].to(torch.float32)
        if mask is not None:
            piece = piece.masked_fill(~mask[..., None, None], 0)
        if centre:
            count = tokens if mask is None else mask.sum(1).clamp(min=1)[:, None, None, None]
            piece = piece - piece.sum(1, keepdim=True) / count
        direction = piece / piece.norm(dim=-1, keepdim=True).clamp(min=EPSILON)
        found.append(pool(direction, blocks, mask=mask).square().sum(-1))
    return torch.cat(found, dim=1)


@dataclass(frozen=True)
class Sparge(Method):
    """The best key blocks of every row by pooled scores; blocks of unlike tokens are computed with everything.

    Args:
        density: kept fraction of all pairs, as many blocks in every row, within 0.03 of it on 2,000 tokens and more,
            unless text and blocks that fail the test take more than half of it (see `count_forced`). None: `tau`
            decides.
        count_forced: text and blocks that fail the test are part of `density`. False: as the paper's top-k,
            int(density * blocks) of every row, text blocks among them, and the others on top.
        tau: a row keeps its best blocks while they hold at most this share, at least one (the paper's cdf); has an
            effect with density=None.
        theta: a block passes the test when the mean cosine of its tokens is above it. Below 0 all pass.
        smooth: subtract the mean of all keys before they are tested, as the authors' plug-in functions do.
        skip: leave out a block of a kept row when all of its weights are below 2^-skip of the largest one met before;
            None leaves out none. The reference's lambda: 50 there, which finds next to nothing.
        order: "raster" (the model's, as in the released code) or "gilbert" (the paper's Hilbert curve).
        block_size: tokens of a query block, 128 in the paper; None chooses by the length of the sequence.
        key_block_size: tokens of a key block; None: half of the query block, at least 16; 64 in the paper.
    """

    density: float | None = 0.5
    count_forced: bool = True
    tau: float = 0.98
    theta: float = -0.1
    smooth: bool = True
    skip: float | None = None
    order: str = "raster"
    block_size: int | None = None
    key_block_size: int | None = None

    name: ClassVar[str] = "sparge"
    title: ClassVar[str] = "SpargeAttn"
    arxiv: ClassVar[str | None] = "2502.18137"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "the model's, or the Gilbert curve",
        "score": "mean query times mean key; likeness of a block's tokens",
        "select": "top-k or share per row; blocks of unlike tokens; text",
        "operate": "drop; blocks far below the running maximum may be left out",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the entry points of the authors' code: top-k is what they recommend for every model, the cdf one has theta
    # .6 and tau .98; the LTX example has theta -.1 (its tau was not found: the plug-in's). No dense steps or layers are
    # mentioned. Their per-head tuned files are not options here, and for Wan and Hunyuan none was found: that the
    # general recommendation serves there is our choice.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        family: {"density": 0.5, "count_forced": False, "theta": -0.1, "block_size": 128, "key_block_size": 64,
                 "dense_steps": 0, "dense_layers": 0}
        for family in ("cogvideox", "mochi", "flux", "sd3", "wan", "hunyuan")
    } | {"ltx": {"density": None, "tau": 0.98, "theta": -0.1, "block_size": 128, "key_block_size": 64, "dense_steps": 0,
                 "dense_layers": 0}}

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (type(self.operator()),)

    def __post_init__(self) -> None:
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        check_range(self.name, "tau", self.tau, 0, 1)
        check_range(self.name, "theta", self.theta, -1, 1)
        if self.skip is not None:
            check_range(self.name, "skip", self.skip, 0, 1e7)
        for name in ("count_forced", "smooth"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"sparge: {name}={getattr(self, name)!r} is not allowed; use True or False")
        if self.order not in ORDERS:
            raise ValueError(f"sparge: order={self.order!r} is not allowed; use one of {', '.join(ORDERS)}")
        check_block_size(self.name, self.block_size)
        check_block_size(self.name, self.key_block_size, "key_block_size")

    def layouts(self, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        """Blocks of queries and of keys, of the video and then of text, on the CPU."""
        size = choose_block_size(grid.tokens, self.block_size)
        order = gilbert(TokenGrid(*grid.sizes)) if self.order == "gilbert" else None
        return layout(grid, order, size), layout(grid, order, self.key_block_size or max(16, size // 2))

    def operator(self) -> Operator:
        """What is computed for the kept blocks."""
        return Drop() if self.skip is None else SkipBlocks(2.0**-self.skip, first="list")

    def untrusted(self, call: Call, queries: BlockLayout, keys: BlockLayout) -> tuple[Tensor, Tensor]:
        """Query and key blocks that fail the test: bool (B, H, nq) and (B, H, nk)."""
        if self.theta < 0:  # a mean of cosines over all pairs is never negative
            made = (torch.zeros(1, 1, x.blocks, dtype=torch.bool, device=call.device) for x in (queries, keys))
            return next(made), next(made)
        query = similarity(call.query, queries)
        key = similarity(call.key, keys, centre=self.smooth, mask=call.key_mask)
        return ~(query > self.theta), ~(key > self.theta)

    def count(self, grid: TokenGrid, keys: BlockLayout, rows: Tensor, columns: Tensor) -> int | Tensor:
        """Key blocks that every row keeps for the density, beside the forced ones.

        Args:
            grid: the tokens.
            keys: the key blocks.
            rows, columns: bool (B|1, H|1, .), video blocks that fail the test.
        """
        if self.density is None:
            return 1
        if not self.count_forced:
            return max(1, int(self.density * keys.blocks))
        video = columns.shape[-1]
        count = key_blocks_kept(self.density, grid, video)
        if self.theta < 0:
            return count
        # What rows and columns kept whole leave of the head's pairs, for the rows that choose.
        full, seen = rows.sum(-1), columns.sum(-1)
        left = (count * rows.shape[-1] - full * video) / (rows.shape[-1] - full).clamp(min=1) - seen
        return left.round().to(torch.int64).clamp(min=max(1, count // 2))[..., None, None]

    def plan(self, call: Call) -> Plan:
        """Test, rank and keep, for every batch element and head."""
        queries, keys = call.cached(
            (self, "layouts"), lambda: tuple(x.to(call.device) for x in self.layouts(call.grid))
        )
        rows, columns = (video_blocks(x, call.grid) for x in (queries, keys))
        whole_rows, whole_columns = self.untrusted(call, queries, keys)
        means = call.block_mean("query", queries), call.block_mean("key", keys)
        query, key = means[0] * call.scale, means[1].mT
        text = torch.arange(keys.blocks, device=call.device) >= columns
        count = self.count(call.grid, keys, whole_rows[..., :rows], whole_columns[..., :columns])

        def scores(heads: slice) -> Tensor:
            hidden = (whole_columns if whole_columns.shape[1] == 1 else whole_columns[:, heads])[:, :, None]
            found = (query[:, heads] @ key[:, heads]).masked_fill(hidden, -torch.inf)
            if self.density is not None:
                return found
            shares = found.softmax(-1).nan_to_num(0)  # a row without a trusted block
            return select_top_p(shares, self.tau, crossing=False).to(torch.float32)

        rule = Rule(
            "threshold" if self.density is None else "top_k",
            0.5 if self.density is None else count,
            rows=slice(0, rows),
            # Text takes part in the paper's ranking; it is kept in any case.
            columns=slice(0, columns) if self.density is not None and self.count_forced else None,
            forced_rows=whole_rows,
            forced_columns=whole_columns | text,
        )
        if self.density is not None and self.theta < 0:
            mask = route_means(*means, queries, keys, call.scale, rule)
        else:
            mask = lists_by_chunks(scores, query.shape[0], query.shape[1], queries, keys, rule)
        return Plan(mask, operator=self.operator())
