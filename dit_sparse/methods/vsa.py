"""VSA, Video Sparse Attention (arXiv 2505.13389): cubes of tokens, the best in full, and their means beside them.

The model is trained with it: a gate for every layer says how much of the coarse branch is added to the fine one. A
model without such a gate has only the fine branch here, which is plain top-k over cubes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..blockmask import BlockLayout
from ..grid import TokenGrid
from ..operators import Operator
from ..operators_coarse import CoarseFine, Gate
from ..order import layout, tile, video_blocks
from ..patterns import check_block_size, key_blocks_kept
from ..routing import route_means
from ..selection import Rule, count_of_density
from .base import Call, Method, Plan, check_range

# (frames, rows, columns) of a cube by tokens of a block. 64 and 256 are the authors'; the others are ours.
CUBES = {16: (1, 4, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}


@dataclass(frozen=True)
class VSA(Method):
    """The best cubes of every row, and with a trained gate a coarse branch beside them.

    Args:
        density: share of the video's cubes that every cube sees, rounded up; the paper's sparsity is 1 - density. With
            text in the sequence, kept fraction of all pairs, text included.
        gate: a function from a `Call` to the gate of its layer, (B, L, H, head_dim): what the layer's trained
            `to_gate_compress` makes of the input of its attention, without a sigmoid (`operators_coarse.TrainedGates`).
            None: the fine branch alone, and the summary says so.
        block_size: tokens of a cube; None takes 64 (4x4x4), which the authors' models are trained with.
    """

    density: float = 0.1
    gate: Gate | None = None
    block_size: int | None = None

    name: ClassVar[str] = "vsa"
    title: ClassVar[str] = "Video Sparse Attention"
    arxiv: ClassVar[str | None] = "2505.13389"
    needs: ClassVar[str] = "a model trained with it, and its gate weights; without them only the fine branch runs"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "4x4x4 cubes",
        "score": "mean query times mean key",
        "select": "top-k per row; text",
        "operate": "drop; with a trained gate, plus attention between the means of cubes",
        "remember": "masks may be kept for some steps (refresh)",
    }
    # Source: the authors' training scripts: sparsity .9 for Wan 14B (.8 for 1.3B), no dense steps and layers.
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {"density": 0.1, "dense_steps": 0, "dense_layers": 0},
    }

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (CoarseFine,)

    def __post_init__(self) -> None:
        check_range(self.name, "density", self.density, 0, 1, open_low=True)
        if self.gate is not None and not callable(self.gate):
            raise ValueError(f"vsa: gate={self.gate!r} is not allowed; use None or a function from a Call to a tensor")
        check_block_size(self.name, self.block_size)

    def against_ranks(self) -> str:
        """See `Method.against_ranks`."""
        return "" if self.gate is None else "vsa: gate sees the tokens of one rank, its heads those of all"

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """One block for every cube, short at the edges, then text, on the CPU."""
        size = self.block_size or 64
        order, lengths = tile(TokenGrid(*grid.sizes), CUBES[size])
        return layout(grid, order, size, lengths=lengths, tile_shape=CUBES[size])

    def kept_blocks(self, grid: TokenGrid, cubes: int) -> int:
        """Cubes that every cube sees, of so many."""
        return key_blocks_kept(self.density, grid, cubes) if grid.text else count_of_density(cubes, self.density)

    def plan(self, call: Call) -> Plan:
        """Rank and keep, for every batch element and head."""
        grid = call.grid
        blocks = call.cached((self, "layout"), lambda: self.layout(grid).to(call.device))
        video = video_blocks(blocks, grid)
        chosen = slice(0, video)
        rule = Rule("top_k", self.kept_blocks(grid, video), rows=chosen, columns=chosen)
        means = call.block_mean("query", blocks), call.block_mean("key", blocks)
        return Plan(route_means(*means, blocks, blocks, call.scale, rule), operator=CoarseFine(self.gate))
