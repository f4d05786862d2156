"""One of five masks for every head: how it is chosen, what it costs, and the file that keeps the choices of a search.

Source: Sparse-vDiT, arXiv 2506.03065. The file's form, and costs measured instead of counted, are ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .choicefile import check_grid_and_block, check_made_for, reason_of, version_of
from .grid import TokenGrid

__all__ = ["MODES", "HeadModes", "choose", "load_modes", "relative_cost"]

MODES = ("full", "skip", "diagonal", "multi-diagonal", "stripe")
FULL, SKIP, DIAGONAL, MULTI, STRIPE = range(len(MODES))
BY_DENSITY = "density"  # the paper's cost: the computed share itself
FORMAT, COST_FORMAT = "dit-sparse head modes 1", "dit-sparse costs 1"
_COSTS = Path(__file__).with_name("costs")


def choose(errors: Tensor, cost: Tensor, lam: float, eps: float, most_skipped: int | None = None) -> Tensor:
    """The mode of every head: the one of the least loss, error + lam * cost, or full when no loss is within eps.

    Args:
        errors: (..., H, 4), of skip, diagonal, multi-diagonal and stripe.
        cost: (4,), what each computes of dense attention; the paper's 1 - S.
        lam, eps: weight of the cost, and the largest loss that is accepted.
        most_skipped: skip at most so many of the H heads, those of the least loss; the others take their next best
            mode. None: as many as there are.

    Returns:
        int64 (..., H), numbers of `MODES`; of equal losses the smallest number wins. Decided on the device.
    """
    loss = errors + lam * cost
    best = _least(loss, eps)
    if most_skipped is None:
        return best
    wishes = torch.where(best == SKIP, loss[..., 0], torch.inf)
    rank = torch.sort(wishes, dim=-1, stable=True).indices.argsort(-1)
    without = torch.cat((torch.full_like(loss[..., :1], torch.inf), loss[..., 1:]), dim=-1)
    return torch.where((best == SKIP) & (rank >= most_skipped), _least(without, eps), best)


def _least(loss: Tensor, eps: float) -> Tensor:
    """Number of the smallest loss, counted from 1, or 0 when it is above eps."""
    least = loss.amin(-1, keepdim=True)
    number = torch.arange(1, loss.shape[-1] + 1, device=loss.device)
    first = torch.where(loss == least, number, loss.shape[-1]).amin(-1)
    return torch.where(least[..., 0] <= eps, first, FULL)


# -- costs ---------------------------------------------------------------------------------------------------------


def relative_cost(cost: str, density: float, permuted: bool = False) -> float:
    """Time of attention at a density over that of dense attention.

    Args:
        cost: "density": the density itself, as in the paper; the name of a table that comes along ("hopper-h200"); or a
            JSON file of the same form.
        density: computed share, in [0, 1].
        permuted: the tokens are read in another order than the model's.

    Raises:
        ValueError: unknown table, or not such a file; one line.
    """
    if cost == BY_DENSITY:
        return density
    points = [(0.0, 0.0), *load_costs(cost)["permuted" if permuted else "raster"]]
    for (low, below), (high, above) in zip(points, points[1:], strict=False):
        if density <= high:
            return below + (above - below) * (density - low) / (high - low)
    return points[-1][1]


@lru_cache(maxsize=8)
def load_costs(cost: str) -> dict[str, list[tuple[float, float]]]:
    """The (density, time) points of a table of costs, by kind of order."""
    shipped = sorted(file.stem for file in _COSTS.glob("*.json"))
    file = _COSTS / f"{cost}.json" if cost in shipped else Path(cost)
    if not file.is_file():
        raise ValueError(f"cost={cost!r} is not allowed; use {BY_DENSITY}, {', '.join(shipped)} or a JSON file")
    held = _read(file, COST_FORMAT, "cost")
    tables = {}
    for kind in ("raster", "permuted"):
        points: Any = held.get(kind)
        good = isinstance(points, list) and points and all(
            isinstance(p, list) and len(p) == 2 and all(isinstance(x, (int, float)) and x > 0 for x in p)
            for p in points)
        if not good or [p[0] for p in points] != sorted({p[0] for p in points}):
            raise ValueError(f"cost={cost!r} cannot be read: {kind} is not a list of [density, time], densities rising")
        tables[kind] = [(float(density), float(time)) for density, time in points]
    return tables


def _read(file: Path, form: str, option: str) -> dict[str, Any]:
    """A JSON object of a format, or ValueError in one line."""
    try:
        held = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{option}={str(file)!r} cannot be read: {reason_of(error)}") from error
    if not isinstance(held, dict) or held.get("format") != form:
        said = held.get("format") if isinstance(held, dict) else None
        raise ValueError(f"{option}={str(file)!r} cannot be read: its format is {said!r}, not {form!r}")
    return held


# -- the file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadModes:
    """Modes of all heads at every step, and the key blocks of stripes: what a search found.

    Args:
        grid: frames, rows and columns of the video. Text does not matter: it is always kept.
        block_size: tokens of a block.
        density: kept fraction of the sparse modes.
        modes: int64 (steps, layers, heads), numbers of `MODES`.
        stripes: video key blocks by (layer, head), for heads that are ever of mode stripe.

    Raises:
        ValueError: when the parts do not fit together; one line.
    """

    grid: tuple[int, int, int]
    block_size: int
    density: float
    modes: Tensor
    stripes: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modes = self.modes
        if modes.dim() != 3 or 0 in modes.shape or modes.dtype != torch.int64:
            raise ValueError(f"modes is {modes.dtype} {tuple(modes.shape)}; use torch.int64 (steps, layers, heads)")
        if int(modes.min()) < 0 or int(modes.max()) >= len(MODES):
            raise ValueError(f"modes holds {int(modes.min())} ... {int(modes.max())}; use 0 ... {len(MODES) - 1}")
        blocks = -(-self.grid[0] * self.grid[1] * self.grid[2] // self.block_size)
        for place, ids in self.stripes.items():
            if not all(isinstance(i, int) and 0 <= i < blocks for i in ids):
                raise ValueError(f"stripes of layer {place[0]}, head {place[1]} are no blocks; use 0 ... {blocks - 1}")
        striped = (modes == STRIPE).any(0).nonzero().tolist()
        if missing := [tuple(place) for place in striped if tuple(place) not in self.stripes]:
            raise ValueError(f"stripes of layer {missing[0][0]}, head {missing[0][1]} are missing")

    def check(self, grid: TokenGrid, *, layers: int | None = None, heads: int | None = None,
              steps: int | None = None) -> None:
        """Raise ValueError, in one line, unless it was made for such a grid, model and number of steps."""
        made = dict(zip(("steps", "layers", "heads"), self.modes.shape, strict=True))
        check_made_for("the search", "search anew or leave it out", (
            ("grid", self.grid, grid.sizes), ("layers", made["layers"], layers), ("heads", made["heads"], heads),
            ("steps", made["steps"], steps)))

    def stripe_map(self, layer: int) -> Tensor:
        """bool (heads, video blocks): the stripes of a layer."""
        blocks = -(-self.grid[0] * self.grid[1] * self.grid[2] // self.block_size)
        found = torch.zeros(self.modes.shape[2], blocks, dtype=torch.bool)
        for (at, head), ids in self.stripes.items():
            if at == layer:
                found[head, ids] = True
        return found

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as one JSON file: a row of digits for every step and layer."""
        content = {
            "format": FORMAT, "grid": list(self.grid), "block_size": self.block_size, "density": self.density,
            "modes": [["".join(map(str, row)) for row in step] for step in self.modes.tolist()],
            "stripes": {f"{layer}.{head}": ids for (layer, head), ids in sorted(self.stripes.items())},
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


def load_modes(path: str | PathLike[str]) -> HeadModes:
    """Read a file that `HeadModes.save` wrote; a file is read once, until it changes.

    Raises:
        ValueError: no such file, not such a file, or parts that do not fit; one line that names the file.
    """
    return _load(*version_of("table", path, "search(...).save(path)"))


@lru_cache(maxsize=4)
def _load(path: str, *_: int) -> HeadModes:
    held = _read(Path(path), FORMAT, "table")
    try:
        check_grid_and_block(held)
        modes = torch.tensor([[[int(digit) for digit in row] for row in step] for step in held["modes"]])
        stripes = {}
        for place, ids in held["stripes"].items():
            layer, head = place.split(".")
            stripes[int(layer), int(head)] = list(ids)
        return HeadModes(tuple(held["grid"]), held["block_size"], float(held["density"]), modes, stripes)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"table={path!r} cannot be read: {reason_of(error)}") from error
