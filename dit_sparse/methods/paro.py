"""PAROAttention (arXiv 2506.16054): one axis order per head that makes its attention compact, then a static mask.

Attention over a video looks irregular because three axes are flattened in one order. In another order of the axes the
same head's map falls into whole blocks: those that hold its mass are computed at every step, the others never. Orders
and masks come from a calibration file (`dit_sparse.calibration.calibrate`), or, which is ours, from each layer's first
sparse call of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..axisorders import (
    axis_layouts,
    block_sums,
    check_options,
    choose_order,
    order_statistics,
    static_keep,
)
from ..bits import pack_bits, unpack_bits
from ..blockmask import BlockLayout
from ..calibration import Calibration, group_of, load_calibration
from ..grid import TokenGrid
from ..order import per_head, video_blocks
from ..patterns import choose_block_size
from ..routing import lists_of_maps
from ..selection import map_kept
from .base import Call, Method, Plan

DENSITY = 0.5  # the milder of the paper's two settings


@dataclass(frozen=True)
class Paro(Method):
    """One axis order and one static mask per head.

    Args:
        density: kept fraction of all pairs, within 0.03 of it on 2,000 tokens and more, unless text alone takes more
            than half of it (see `count_forced`). None: that of the calibration file, 0.5 without one.
        calibration: a file that `dit_sparse.calibration.calibrate(...).save(path)` wrote, for this grid and model.
            None: every layer is measured at its first sparse call, for the run (ours).
        count_forced: text and own blocks are part of `density`. False: as the paper, the fraction of the video's pairs
            of blocks, with text and own blocks on top. Without effect with a file.
        measure: what makes an order good: "skip", the share of blocks in which nearly all weights are nothing (the
            paper); "mass", that the best blocks hold (ours).
        alpha: weight of that measure; 1 - alpha is that of even weights inside of blocks, for 8-bit attention.
        eps: below it an attention weight counts as nothing; None: 17.5 / video tokens (ours), the paper's 1e-3 at its
            17,550 tokens.
        sigma: share of a block's weights that are nothing from which the block can be skipped.
        sample: query blocks of each order that are measured (ours).
        rows: queries of each block that are measured for the mask (ours).
        block_size: tokens of a block, 64 in the paper; None: that of the file, or by the length of the sequence.
    """

    density: float | None = None
    calibration: str | None = None
    count_forced: bool = True
    measure: str = "skip"
    alpha: float = 1.0
    eps: float | None = None
    sigma: float = 0.9
    sample: int = 8
    rows: int = 8
    block_size: int | None = None

    name: ClassVar[str] = "paro"
    title: ClassVar[str] = "PAROAttention"
    arxiv: ClassVar[str | None] = "2506.16054"
    needs: ClassVar[str] = "calibration file (optional)"
    scored: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        "order": "one of the six orders of the axes, per head",
        "score": "attention mass of blocks, measured once",
        "select": "largest blocks of each head's map; own block; text",
        "operate": "drop",
        "remember": "orders and masks: from a file, or from the first sparse step",
    }
    # Source: notes on the paper (density .5 and .3 on CogVideoX-5B and Wan 2.1, blocks of 64). A dense warm-up is not
    # mentioned: none then, on the understanding that a file is given (ours).
    family_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "cogvideox": {"density": 0.5, "count_forced": False, "dense_steps": 0, "dense_layers": 0},
        "wan": {"density": 0.5, "count_forced": False, "dense_steps": 0, "dense_layers": 0},
    }

    def __post_init__(self) -> None:
        check_options(self.name, density=self.density, measure=self.measure, alpha=self.alpha, eps=self.eps,
                      sigma=self.sigma, sample=self.sample, rows=self.rows, block_size=self.block_size)
        if not isinstance(self.count_forced, bool):
            raise ValueError(f"paro: count_forced={self.count_forced!r} is not allowed; use True or False")
        if self.calibration is None:
            return
        if not isinstance(self.calibration, (str, PathLike)):
            raise ValueError(f"paro: calibration={self.calibration!r} is not allowed; use the path of a file, or None")
        object.__setattr__(self, "calibration", fspath(self.calibration))
        made = load_calibration(self.calibration)
        for name in ("density", "block_size"):
            mine, theirs = getattr(self, name), getattr(made, name)
            if mine not in (None, theirs):
                raise ValueError(f"paro: {name}={mine!r} is not allowed with this calibration file; it was made for "
                                 f"{theirs!r}: use None")

    @property
    def file(self) -> Calibration | None:
        """What the calibration file holds, or None without one."""
        return None if self.calibration is None else load_calibration(self.calibration)

    def check(self, grid: TokenGrid) -> None:
        """Raise ValueError when the calibration file was made for another grid."""
        if (made := self.file) is not None:
            made.check(grid)

    def layouts(self, grid: TokenGrid) -> tuple[BlockLayout, ...]:
        """Blocks of the video in each of the six orders, then text, on the CPU."""
        made = self.file
        return axis_layouts(grid, made.block_size if made else choose_block_size(grid.tokens, self.block_size))

    def measured(self, call: Call, layouts: tuple[BlockLayout, ...]) -> tuple[Tensor, Tensor]:
        """Orders int64 (1, H) and packed masks uint8 (1, H, bytes) of this layer, measured once in a run."""
        kept = call.state.recall("choice")
        if kept is not None:
            return kept
        density = self.density or DENSITY
        found = order_statistics(call, layouts, self.sample, self.eps, self.sigma, density)
        order = choose_order(found, self.alpha, self.measure)[None]
        sums = block_sums(call, per_head(layouts, order), self.rows)
        video = video_blocks(layouts[0], call.grid)
        count = map_kept(density, video, layouts[0].blocks - video, count_forced=self.count_forced)
        choice = order, pack_bits(static_keep(sums, count, own_counts=self.count_forced))[None]
        call.state.keep("choice", choice)
        return choice

    def loaded(self, call: Call, made: Calibration) -> tuple[Tensor, Tensor]:
        """As `measured`, from the file, for the part of the run that the step is in."""
        made.check(call.grid, call.layers, call.all_heads)
        group = group_of(call.step, call.num_steps, made.masks.shape[0])
        kept = call.state.recall("loaded")
        if kept is None or kept[0] != group:  # one group at a time on the device
            order, bits = made.orders[call.layer], made.masks[group, call.layer]
            kept = group, order[None].to(call.device, torch.int64), bits[None].to(call.device)
            call.state.keep("loaded", kept)
        return call.own(kept[1], 1), call.own(kept[2], 1)

    def plan(self, call: Call) -> Plan:
        """The orders and masks of this layer, written out as lists."""
        made = self.file
        layouts = call.cached((self, "layouts"), lambda: tuple(x.to(call.device) for x in self.layouts(call.grid)))
        order, bits = self.loaded(call, made) if made else self.measured(call, layouts)
        blocks = per_head(layouts, order)
        video = video_blocks(blocks, call.grid)
        mask = lists_of_maps(lambda heads: unpack_bits(bits[:, heads], video), 1, order.shape[1], blocks, video)
        return Plan(mask, {"order": order})
