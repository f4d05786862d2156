"""Delta attention (arXiv 2505.11254): sparse attention of any method, corrected by a few dense rows.

Dropping keys shifts the output, and rows with similar queries are shifted alike. So one query in g attends to all
keys as well, and the difference that this makes is added to all queries of its group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..grid import TokenGrid
from ..inner import inner_method
from ..operators import Operator
from ..operators_delta import ANCHORS, DeltaRows
from ..patterns import check_block_size, choose_block_size
from .base import Call, Method, Plan, check_range


@dataclass(frozen=True)
class Delta(Method):
    """Another method's attention, corrected by dense rows.

    Args:
        inner: name of the method that makes the masks, or a method. The paper's is a window and a sink; here the
            default is the window along three axes, in whose tiles the queries of a group lie close together.
        group: queries that share a correction, 64 in the paper, at most a block; None: a whole block.
        anchor: which query of a group attends to all keys: the "first", as in the paper, or the one "nearest" to the
            group's mean query, our choice: queries of a video block have no order in which the first would stand out.
        density: kept fraction of all pairs, dense rows counted in, as near as the inner method comes to its own (which
            gets at least half of it); None leaves the inner method's density, dense rows on top.
        block_size: tokens of a block; None leaves it to the inner method.
    """

    inner: str | Method = "gna"
    group: int | None = 64
    anchor: str = "nearest"
    density: float | None = None
    block_size: int | None = None

    name: ClassVar[str] = "delta"
    title: ClassVar[str] = "Delta Attention"
    arxiv: ClassVar[str | None] = "2505.11254"
    scored: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "the inner method's",
        "score": "the inner method's",
        "select": "the inner method's",
        "operate": "the inner method's, plus the difference to dense attention of one row in every group",
        "remember": "the inner method's masks may be kept for some steps (refresh)",
    }
    # Source: the paper, on language models: groups of 64, a window of 2,048 tokens and a sink. It has no video model:
    # whole blocks, windows along three axes, and the query nearest to the mean, are our choice.
    family_defaults: ClassVar[dict[str, dict]] = {
        "wan": {"inner": "gna", "group": None},
        "hunyuan": {"inner": "gna", "group": None},
    }

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (DeltaRows,)

    def __post_init__(self) -> None:
        group = self.group
        if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
            raise ValueError(f"delta: group={group!r} is not allowed; use None or a whole number >= 1")
        if self.anchor not in ANCHORS:
            raise ValueError(f"delta: anchor={self.anchor!r} is not allowed; use one of {', '.join(ANCHORS)}")
        if self.density is not None:
            check_range(self.name, "density", self.density, 0, 1, open_low=True)
        check_block_size(self.name, self.block_size)
        inner = inner_method(self.name, self.inner, block_size=self.block_size)
        if self.density is not None and "density" not in {field.name for field in dataclasses.fields(inner)}:
            raise ValueError(
                f"delta: density={self.density} is not allowed with inner={inner.name!r}, which has no density"
            )

    def maker(self, grid: TokenGrid) -> Method:
        """The inner method, at the density that the dense rows leave to it."""
        density = self.density
        if density is not None and density < 1:
            size = choose_block_size(grid.tokens, self.block_size)
            rows = -(-size // min(self.group or size, size)) / size
            density = max(density / 2, (density - rows) / (1 - rows)) if rows < 1 else density
        return inner_method(self.name, self.inner, block_size=self.block_size, density=density)

    def check(self, grid: TokenGrid) -> None:
        """Raise ValueError when the inner method cannot serve this grid."""
        self.maker(grid).check(grid)

    def observe(self, call: Call, out: Tensor, lse: Tensor | None) -> None:
        """What the inner method keeps of a dense call."""
        self.maker(call.grid).observe(call, out, lse)

    def against_ranks(self) -> str:
        """See `Method.against_ranks`."""
        return inner_method(self.name, self.inner).against_ranks()

    def plan(self, call: Call) -> Plan:
        """The inner method's plan, its operator corrected."""
        plan = self.maker(call.grid).plan(call)
        operator = DeltaRows(self.group, self.anchor, plan.operator)
        return plan if plan.mask is None else dataclasses.replace(plan, operator=operator)
