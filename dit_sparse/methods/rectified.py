"""Rectified SpaAttn (arXiv 2511.19835): the best key blocks by pooled attention, and a correction for all others.

Tokens follow a Gilbert curve. Attention between block means, in which a mean weighs as many keys as it stands for, says
which blocks are computed; the same numbers then scale the sparse output to the mass that it should have and put dropped
blocks back by their mean values, where that is worth it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blockmask import BlockLayout
from ..gilbert import gilbert, neighbour_blocks
from ..grid import TokenGrid
from ..operators import Operator
from ..operators_rectified import Rectify, pooled_shares
from ..order import layout, video_blocks
from ..patterns import check_block_size, choose_block_size
from ..routing import lists_of_maps
from ..selection import rows_kept, select_top_k, select_top_p
from .base import Call, Method, Plan, check_range


@dataclass(frozen=True)
class Rectified(Method):
    """Top-k or top-p of pooled attention, rectified.

    Args:
        drop_rate: at least this share of a row's video blocks is kept: round((1 - drop_rate) * blocks). Neighbours on
            the grid and text come on top.
        p_remain: more blocks are kept, best first, until those before hold more than this share of the row's mass.
        density: None: the two above decide. A number: the best blocks of every row instead, neighbours before others,
            so that the mask comes within 0.03 of it on 2,000 tokens and more unless text alone takes more than half
            of it; `drop_rate` and `p_remain` then have no effect.
        ipar: a block's mean weighs as many keys as the block holds. False: it weighs one, as in naive compensation.
        gapr: dropped blocks are put back only where the means say more than the spread about them; the others' mass
            goes to the kept keys. False: all are put back.
        first_frame: the first 1/frames of the blocks see each other (the authors: Wan only).
        block_size: tokens of a block, 128 in the paper; None chooses by the length of the sequence.
    """

    drop_rate: float = 0.75
    p_remain: float = 0.3
    density: float | None = None
    ipar: bool = True
    gapr: bool = True
    first_frame: bool = False
    block_size: int | None = None

    name: ClassVar[str] = "rectified"
    title: ClassVar[str] = "Rectified SpaAttn"
    arxiv: ClassVar[str | None] = "2511.19835"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "Gilbert curve",
        "score": "pooled attention, text not pooled",
        "select": "top-k or top-p per row; neighbours on the grid; text",
        "operate": "rectified",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the authors' code and scripts. Wan: 2.1 and 2.2 5B text to video; the 14B experts of 2.2 use drop_rate .85
    # and layers 0, 1, 40, 41 (layers of both experts counted in one row). CogVideoX: text to video, .75 with an image.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "wan": {"drop_rate": 0.75, "p_remain": 0.3, "first_frame": True, "dense_steps": 5, "dense_layers": 2},
        "hunyuan": {"drop_rate": 0.8, "p_remain": 0.3, "dense_steps": 0, "dense_layers": 0},
        "cogvideox": {"drop_rate": 0.85, "p_remain": 0.3, "dense_steps": 5, "dense_layers": 0},
        "flux": {"drop_rate": 0.9, "p_remain": 0.3, "dense_steps": 0, "dense_layers": 0},
    }

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (Rectify,)

    def __post_init__(self) -> None:
        for name in ("drop_rate", "p_remain"):
            check_range(self.name, name, getattr(self, name), 0, 1)
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        for name in ("ipar", "gapr", "first_frame"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"rectified: {name}={getattr(self, name)!r} is not allowed; use True or False")
        check_block_size(self.name, self.block_size)

    def build(self, grid: TokenGrid) -> tuple[BlockLayout, Tensor]:
        """Blocks along the curve, then text, and the pairs that are always kept, bool (video, video), on the CPU."""
        video, size = TokenGrid(*grid.sizes), choose_block_size(grid.tokens, self.block_size)
        order = gilbert(video)
        blocks, near = layout(grid, order, size), neighbour_blocks(video, order, size)
        if self.first_frame:
            first = near.shape[0] // grid.frames
            near[:first, :first] = True
        return blocks, near

    def plan(self, call: Call) -> Plan:
        """Rank and keep, for every batch element and head; the operator rectifies what is computed."""
        blocks, near = call.cached((self, "blocks"), lambda: tuple(x.to(call.device) for x in self.build(call.grid)))
        video = video_blocks(blocks, call.grid)
        batch, heads = call.query.shape[0], call.query.shape[2]
        least = max(1, round((1 - self.drop_rate) * video))
        density, text = self.density, blocks.blocks - video

        def keep(part: slice) -> Tensor:
            mass = pooled_shares(call, blocks, part, self.ipar)
            if density is not None:
                ranked = mass[..., :video] + near  # shares are at most 1
                ranked.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
                return select_top_k(ranked, rows_kept(density, video, 0, text, count_forced=True))
            return select_top_p(mass, self.p_remain, least=least)[..., :video] | near  # the text ranks as one block

        return Plan(lists_of_maps(keep, batch, heads, blocks, video), operator=Rectify(self.ipar, self.gapr))
