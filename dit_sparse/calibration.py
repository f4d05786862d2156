"""The file that keeps each head's axis order and static masks, and the runs that make it.

Source: PAROAttention, arXiv 2506.16054; the form of the file is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .axisorders import (
    AXES,
    axis_layouts,
    block_sums,
    check_options,
    choose_order,
    order_statistics,
    static_keep,
)
from .bits import pack_bits
from .choicefile import check_grid_and_block, check_made_for, reason_of, version_of
from .grid import TokenGrid
from .methods.base import Call, Method, Plan
from .order import per_head
from .selection import count_of_density

FORMAT = "dit-sparse axis orders 1"


def group_of(step: int, num_steps: int | None, groups: int) -> int:
    """Which masks a step uses: the first half of the run is cut into groups - 1 equal parts, the second shares one.

    A run of unknown length counts as being in its second half. Six groups are the paper's ten, five of them shared.
    """
    if num_steps is None:
        return groups - 1
    return min(2 * (groups - 1) * step // num_steps, groups - 1)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Axis orders and static masks of all heads, for one grid.

    Args:
        grid: frames, rows and columns of the video. Text does not matter: it is always kept.
        block_size: tokens of a block.
        density: the kept fraction that the masks were made for.
        orders: uint8 (layers, heads), codes of `AXES`.
        masks: uint8 (groups, layers, heads, bytes), the kept pairs of video blocks, from `pack_bits`.

    Raises:
        ValueError: when the parts do not fit together; one line.
    """

    grid: tuple[int, int, int]
    block_size: int
    density: float
    orders: Tensor
    masks: Tensor

    def __post_init__(self) -> None:
        frames, height, width = self.grid
        blocks = -(-frames * height * width // self.block_size)
        want = (*self.orders.shape, -(-(blocks**2) // 8))
        if self.orders.dtype != torch.uint8 or self.orders.dim() != 2 or 0 in self.orders.shape:
            raise ValueError(f"orders is {self.orders.dtype} {tuple(self.orders.shape)}; use torch.uint8 (layers, "
                             "heads)")
        if self.masks.dtype != torch.uint8 or tuple(self.masks.shape[1:]) != want or not len(self.masks):
            raise ValueError(f"masks is {self.masks.dtype} {tuple(self.masks.shape)}; use torch.uint8 (groups, "
                             f"{', '.join(map(str, want))})")
        if int(self.orders.max()) >= len(AXES):
            raise ValueError(f"orders holds {int(self.orders.max())}; use codes 0 ... {len(AXES) - 1}")

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as one safetensors file."""
        from safetensors.torch import save_file

        about = {"grid": list(self.grid), "block_size": self.block_size, "density": self.density}
        tensors = {"orders": self.orders.contiguous(), "masks": self.masks.contiguous()}
        save_file(tensors, path, metadata={"format": FORMAT, "about": json.dumps(about)})

    def check(self, grid: TokenGrid, layers: int | None = None, heads: int | None = None) -> None:
        """Raise ValueError, in one line, unless it was made for such a grid and model."""
        check_made_for("calibration", "calibrate anew or leave it out", (
            ("grid", self.grid, grid.sizes), ("layers", self.orders.shape[0], layers),
            ("heads", self.orders.shape[1], heads)))


def load_calibration(path: str | PathLike[str]) -> Calibration:
    """Read a file that `Calibration.save` wrote; a file is read once, until it changes.

    Raises:
        ValueError: no such file, not such a file, or parts that do not fit; one line that names the file.
    """
    return _load(*version_of("calibration", path, "calibrate(...).save(path)"))


@lru_cache(maxsize=4)
def _load(path: str, *_: int) -> Calibration:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            if head.get("format") != FORMAT:
                raise ValueError(f"its format is {head.get('format')!r}, not {FORMAT!r}")
            about = json.loads(head["about"])
            check_grid_and_block(about)
            return Calibration(tuple(about["grid"]), about["block_size"], float(about["density"]),
                               file.get_tensor("orders"), file.get_tensor("masks"))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"calibration={path!r} cannot be read: {reason_of(error)}") from error


# -- making one ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorder(Method):
    """Leaves every call dense and adds up what `calibrate` needs: first what tells the orders apart, then the mass.

    Args:
        block_size, density, eps, sigma, sample, rows, groups: as in `calibrate`.
        seen: what was added up so far; `seen["orders"]`, once there, makes the recorder add up mass.
    """

    block_size: int
    density: float
    eps: float | None
    sigma: float
    sample: int
    rows: int
    groups: int
    seen: dict[str, Any] = field(default_factory=dict, compare=False)

    def plan(self, call: Call) -> Plan:
        """Look at the call; it stays dense."""
        sizes = (call.grid.sizes, call.layers, call.query.shape[2])
        if self.seen.setdefault("sizes", sizes) != sizes:
            raise ValueError(f"calibrate: the runs differ in grid, layers or heads: {self.seen['sizes']} and {sizes}")
        layouts = call.cached((self, "layouts"), lambda: tuple(
            x.to(call.device) for x in axis_layouts(call.grid, self.block_size)))
        place: Any = call.layer
        if "orders" not in self.seen:
            found = order_statistics(call, layouts, self.sample, self.eps, self.sigma, self.density)
            store = self.seen.setdefault("statistics", {})
        else:
            order = self.seen["orders"][call.layer].to(call.device)
            found = block_sums(call, per_head(layouts, order[None]), self.rows).cpu()
            store = self.seen.setdefault("sums", {})
            place = (group_of(call.step, call.num_steps, self.groups), call.layer)
        store[place] = store[place] + found if place in store else found
        return Plan(None)

    def choose(self, alpha: float, measure: str) -> None:
        """Settle the order of every head from what was seen.

        Raises:
            ValueError: when a layer made no call.
        """
        found, layers = self.seen.get("statistics", {}), self.seen.get("sizes", (None, 1))[1]
        if missing := [layer for layer in range(layers) if layer not in found]:
            raise ValueError(f"calibrate: layer {missing[0]} made no self-attention call; generate() must run it")
        self.seen["orders"] = [choose_order(found[layer], alpha, measure) for layer in range(layers)]

    def result(self, kept: int) -> Calibration:
        """The masks of what was seen; a group in which no call was seen takes the mass of all groups."""
        grid, layers, _ = self.seen["sizes"]
        sums, masks = self.seen["sums"], []
        for layer in range(layers):
            every = sum(x for (_, at), x in sums.items() if at == layer)
            mine = torch.stack([sums.get((group, layer), every) for group in range(self.groups)])
            masks.append(pack_bits(static_keep(mine, kept, own_counts=True)))
        orders = torch.stack(self.seen["orders"]).to("cpu", torch.uint8)
        return Calibration(grid, self.block_size, self.density, orders, torch.stack(masks, dim=1))


def calibrate(
    target: Any,
    generate: Callable[[], Any],
    *,
    density: float = 0.5,
    block_size: int = 64,
    groups: int = 6,
    measure: str = "skip",
    alpha: float = 1.0,
    eps: float | None = None,
    sigma: float = 0.9,
    sample: int = 16,
    rows: int = 8,
) -> Calibration:
    """Find axis orders and static masks from two equal runs, the first for the orders, the second for the masks.

    Args:
        target: a pipeline or transformer; sparse attention is switched off on it afterwards. Layers with the same
            number of two denoisers (Wan 2.2) share their orders and masks.
        generate: runs the pipeline, with one or two prompts, at the size and number of steps to be used later.
        density: kept fraction of the video's pairs of blocks.
        block_size: tokens of a block.
        groups: masks per head, see `group_of`.
        measure, alpha: see `choose_order`.

    Expert args:
        eps, sigma: see `block_statistics`; eps None: 17.5 / video tokens.
        sample: query blocks looked at for the orders, per call and order (ours; the paper takes all).
        rows: queries of every block looked at for the masks, per call (ours; the paper takes all).

    Returns:
        The calibration; `.save(path)` writes it.

    Raises:
        ValueError: a wrong option, a run that left a layer out, or runs that differ.
    """
    from .processor import disable, enable

    check_options("calibrate", density=density, measure=measure, alpha=alpha, eps=eps, sigma=sigma, sample=sample,
                  rows=rows, groups=groups, block_size=block_size or 0)
    recorder = Recorder(block_size, density, eps, sigma, sample, rows, groups)
    enable(target, recorder, dense_steps=0, dense_layers=0, check="off", strict=True)
    try:
        generate()
        recorder.choose(alpha, measure)
        generate()
    finally:
        disable(target)
    frames, height, width = recorder.seen["sizes"][0]
    blocks = -(-frames * height * width // block_size)
    return recorder.result(count_of_density(blocks**2, density))
