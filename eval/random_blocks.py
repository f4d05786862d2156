"""Random key blocks with the query's own one kept: what any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_sparse.methods.base import Call, Method, Plan, check_range
from dit_sparse.order import layout, video_blocks
from dit_sparse.patterns import check_block_size, choose_block_size
from dit_sparse.routing import lists_of_scores
from dit_sparse.selection import Rule, count_of_density


@dataclass(frozen=True)
class RandomBlocks(Method):
    """The same number of random key blocks in every row, the own one among them, drawn anew at every call.

    It is no method of the package: it stands in tables as the floor.

    Args:
        density: share of the key blocks; text comes on top.
        block_size: tokens of a block; None chooses by the length of the sequence.
    """

    density: float = 0.25
    block_size: int | None = None

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "random blocks, own block kept"
    scored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self.name, "density", self.density, 0, 1, open_low=True)
        check_block_size(self.name, self.block_size)

    def plan(self, call: Call) -> Plan:
        """Draw scores for every batch element, head and row, and keep the highest."""
        size = choose_block_size(call.grid.tokens, self.block_size)
        blocks = call.cached((self, "layout"), lambda: layout(call.grid, None, size).to(call.device))
        video = video_blocks(blocks, call.grid)
        shape = (call.query.shape[0], call.query.shape[2], blocks.blocks, blocks.blocks)
        scores = torch.rand(shape, device=call.device, generator=call.generator)
        chosen = slice(0, video)
        rule = Rule("top_k", count_of_density(video, self.density), rows=chosen, columns=chosen, near=1)
        return Plan(lists_of_scores(scores, blocks, blocks, rule))
