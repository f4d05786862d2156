"""Skip-softmax (BLASST, arXiv 2512.12087): leave out the softmax of blocks far below the running maximum.

Every block of keys is scored. Where all scores of a block lie so far below the maximum met before that no weight in it
reaches `threshold` times the largest one, its exponentials, its values and their product are left out. So at most half
of the work can go. With `carry` such a block leaves the list of the next step, scores included (LiteAttention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..blockmask import BlockLayout, BlockMask
from ..grid import TokenGrid
from ..kernels.skip import FIRST
from ..operators import Operator
from ..operators_skip import TRIALS, CarryBlocks, CountBlocks, Fit, SkipToTarget
from ..order import layout
from ..patterns import check_block_size, choose_block_size, static_mask
from ..selection import text_forced
from .base import Call, Method, Plan, check_range

TARGET = 0.5


@dataclass(frozen=True)
class SkipSoftmax(Method):
    """A filter inside of the softmax, steered by a threshold or by the share of blocks to leave out.

    Args:
        target: share of the pairs to leave out, reached by `fit`, or else by a threshold that every layer measures at
            its first sparse call, which computes everything (measuring in the run is ours). None: 0.5 unless
            `threshold` or `scale_factor` says more. A pair that is left out counts half in the density of a run.
        fit: (a, b) of scale_factor = a * exp(b * target), as `calibrate` finds them beforehand.
        scale_factor: the threshold times the number of keys.
        threshold: the threshold itself: a block is left out when no weight in it reaches so much of the largest weight
            met before, in (0, 1].
        carry: True: all listed blocks are computed, and what the filter finds leaves the list of the next step; text
            stays.
        renew: with `carry`, steps after which the list is whole again (ours); None: never in a run.
        first: "own": a query block's own key block is visited first, then those behind it; "list": the first block.
        block_size: tokens of a block, 128 in the sources; None chooses by the length of the sequence.
    """

    target: float | None = None
    fit: tuple[float, float] | None = None
    scale_factor: float | None = None
    threshold: float | None = None
    carry: bool = False
    renew: int | None = 12
    first: str = "own"
    block_size: int | None = None

    name: ClassVar[str] = "skip_softmax"
    title: ClassVar[str] = "Skip-softmax (BLASST)"
    arxiv: ClassVar[str | None] = "2512.12087"
    parts: ClassVar[dict[str, str]] = {
        "order": "as the model has it",
        "score": "all scores, block by block",
        "select": "distance to the running maximum",
        "operate": "skip",
        "remember": "the threshold per layer; with carry the list of blocks left",
    }
    # Source: Model-Optimizer's example for Wan 2.2 A14B: half of the blocks, the first and the last two layers dense
    # (here: the first two). How many steps run dense was not found; the default of all methods holds.
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {"wan": {"target": 0.5, "dense_layers": 2}}

    def operators(self) -> tuple[type[Operator], ...]:
        """See `Method.operators`."""
        return (SkipToTarget,)

    def __post_init__(self) -> None:
        given = [n for n in ("target", "scale_factor", "threshold") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"skip_softmax: {' and '.join(given)} exclude each other; give one of them")
        if self.target is not None:
            check_range(self.name, "target", self.target, 0, 0.99, open_low=True)
        if self.scale_factor is not None:
            check_range(self.name, "scale_factor", self.scale_factor, 0, 1e9, open_low=True)
        if self.threshold is not None:
            check_range(self.name, "threshold", self.threshold, 0, 1, open_low=True)
        self._check_fit(given)
        if not isinstance(self.carry, bool):
            raise ValueError(f"skip_softmax: carry={self.carry!r} is not allowed; use True or False")
        whole = isinstance(self.renew, int) and not isinstance(self.renew, bool) and self.renew >= 1
        if self.renew is not None and not whole:
            raise ValueError(f"skip_softmax: renew={self.renew!r} is not allowed; use None or a whole number >= 1")
        if self.first not in FIRST:
            raise ValueError(f"skip_softmax: first={self.first!r} is not allowed; use one of {', '.join(FIRST)}")
        check_block_size(self.name, self.block_size)

    def _check_fit(self, given: list[str]) -> None:
        """The fit is two numbers, and belongs to a target."""
        if self.fit is None:
            return
        if not isinstance(self.fit, (tuple, list)) or len(self.fit) != 2:
            raise ValueError(f"skip_softmax: fit={self.fit!r} is not allowed; use two numbers (a, b)")
        check_range(self.name, "fit", self.fit[0], 0, 1e9, open_low=True)
        check_range(self.name, "fit", self.fit[1], 0, 100)
        if given not in ([], ["target"]):
            raise ValueError(f"skip_softmax: fit and {given[0]} exclude each other; fit serves a target")
        object.__setattr__(self, "fit", tuple(self.fit))

    def against_ranks(self) -> str:
        """See `Method.against_ranks`."""
        if self.threshold or self.scale_factor or self.fit is not None:
            return ""
        return ("skip_softmax: target measures one threshold for all heads of a layer, some of them on other ranks; "
                "use scale_factor, threshold or fit")

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """The model's own order, text in blocks of its own, on the CPU."""
        return layout(grid, None, choose_block_size(grid.tokens, self.block_size))

    def operator(self, grid: TokenGrid) -> SkipToTarget:
        """The filter for a grid: its threshold, or the target that it measures one for."""
        target = None if self.threshold or self.scale_factor else self.target or TARGET
        threshold = self.threshold or 0.0
        if self.scale_factor is not None:
            threshold = min(1.0, self.scale_factor / grid.tokens)
        elif self.fit is not None and target is not None:
            threshold, target = Fit(*self.fit).threshold(target, grid.tokens), None
        return (CarryBlocks if self.carry else SkipToTarget)(threshold, self.first, target)

    def plan(self, call: Call) -> Plan:
        """Everything is listed; with `carry` what the steps before have left of it."""
        full = static_mask(call, (self, "full"), lambda: _full(self.layout(call.grid)))
        operator = self.operator(call.grid)
        if not self.carry:
            return Plan(full, operator=operator)
        left, age = CarryBlocks.carried(call, full.key.blocks), call.state.age("carried since")
        if left is None or age is None or (self.renew is not None and age >= self.renew):
            call.state.keep("carried since", True)
            return Plan(full, operator=operator)
        return Plan(BlockMask.from_dense(text_forced(left, full.query, call.grid), full.query, full.key),
                    operator=operator)


def _full(blocks: BlockLayout) -> BlockMask:
    """Every block pair, on the CPU."""
    return BlockMask.from_dense(torch.ones(blocks.blocks, blocks.blocks, dtype=torch.bool), blocks, blocks)


# -- calibration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counter(Method):
    """Computes every call in full and counts what each trial threshold would leave out."""

    filter: SkipSoftmax
    found: list[tuple[int, torch.Tensor]] = field(default_factory=list, compare=False)

    def plan(self, call: Call) -> Plan:
        """Everything; the operator counts."""
        full = static_mask(call, (self.filter, "full"), lambda: _full(self.filter.layout(call.grid)))
        tokens = call.grid.tokens
        return Plan(full, operator=CountBlocks(first=self.filter.first,
                                               keep=lambda shares: self.found.append((tokens, shares))))


def calibrate(target: Any, *runs: Callable[[], Any], first: str = "own", block_size: int | None = None) -> Fit:
    """Fit one curve of threshold and share of blocks left out, for all layers, heads and steps together.

    Source: the calibration of Model-Optimizer; it steers the share that is left out, not quality.

    Args:
        target: a pipeline or transformer; sparse attention is switched off on it afterwards.
        runs: each runs the pipeline once; every run gives a point for each of 22 thresholds.

    Expert args:
        first, block_size: as in `SkipSoftmax`.

    Returns:
        The fit; `SkipSoftmax(target=..., fit=(fit.a, fit.b))` uses it.

    Raises:
        ValueError: no self-attention call was seen, or too few thresholds leave out between .1 and .9.
    """
    from ..processor import disable, enable

    counter = _Counter(SkipSoftmax(first=first, block_size=block_size))
    points, trials = [], torch.tensor(TRIALS, dtype=torch.float64)
    enable(target, counter, dense_steps=0, dense_layers=0, strict=True)
    try:
        for run in runs:
            counter.found.clear()
            run()
            if not counter.found:
                raise ValueError("calibrate: no self-attention call was seen; every run must run the pipeline")
            shares = torch.stack([share.cpu() for _, share in counter.found]).mean(0)
            points.append((trials * counter.found[0][0], shares))
    finally:
        disable(target)
    if not points:
        raise ValueError("calibrate: runs is empty; give at least one function that runs the pipeline")
    return Fit.of(*(torch.cat(parts) for parts in zip(*points, strict=True)))
