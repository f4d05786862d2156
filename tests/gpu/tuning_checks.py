"""What must hold of the tuner's parts on a GPU, and what they cost there. Every check returns "" or what is wrong.

    python tests/gpu/run.py --out DIR --kernel tuning
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dit_sparse.eval.speed import median_ms
from dit_sparse.grid import TokenGrid
from dit_sparse.tuning.cost import CostTable, measure
from dit_sparse.tuning.oracle import ordered, probe_heads, sample_rows

GRIDS = (TokenGrid(9, 16, 24), TokenGrid(5, 17, 23, text=40, text_at="back"),
         TokenGrid(7, 15, 19, text=77, text_at="front"))
LARGE, HEADS = TokenGrid(21, 45, 80), 40  # Wan-14B, 720p, 81 frames
MOST = 3 * 2**30  # bytes beside the activations that one layer's probe may take


def oracle(grid: TokenGrid, device: str = "cuda") -> str:
    """The same numbers as on a CPU from the same activations, in bf16."""
    generator = torch.Generator().manual_seed(0)
    activations = [torch.randn(grid.tokens, 4, 64, generator=generator).to(torch.bfloat16) for _ in range(3)]
    activations[0] *= 2
    rows = sample_rows(grid)
    words: dict[str, Any] = {"scale": 0.125, "grid": grid, "budgets": (0.1, 0.3, 1.0)}
    here = probe_heads(*activations, rows, **words)
    there = probe_heads(*(x.to(device) for x in activations), rows, **words)
    for name in ("mass", "err", "a", "err_error"):
        mine, theirs = getattr(here, name), getattr(there, name).cpu()
        # A tie of two scores may fall differently for one row.
        worst = ((mine - theirs).abs() / (mine.abs() + 1e-3)).max().item()
        if worst > 0.02:
            return f"{name} differs by {worst:.3f} of itself from the CPU's"
    return "" if there.err[..., -1, :].max() < 1e-6 else "budget 1 has an error"


def costs(device: str = "cuda", grid: TokenGrid = GRIDS[0], seconds: float = 10.0) -> str:
    """A measured table rises with density, and is read again as it was written."""
    table = measure(grid, 4, 64, device=device,
                    dtype=torch.bfloat16 if device == "cuda" else torch.float32, densities=(0.1, 0.5, 1.0),
                    seconds=seconds)
    if CostTable.from_dict(table.to_dict()) != table:
        return "a table changes on its way through JSON"
    rising = all(a[1] <= b[1] for curve in table.curves.values() for a, b in zip(curve, curve[1:], strict=False))
    return "" if rising and table.dense > 0 else f"times do not rise with density: {table.curves}"


def all_checks() -> dict[str, Callable[[], str]]:
    """Every check by name."""
    return {**{f"oracle, {grid}": partial(oracle, grid) for grid in GRIDS}, "costs": costs}


def speeds(log: Callable[[str], None]) -> list[dict[str, Any]]:
    """The oracle's time and memory for a layer of Wan-14B at 720p, and the measured cost table of that geometry.

    Args:
        log: takes every line.

    Returns:
        One dictionary a row: what, with milliseconds and bytes, or the table.
    """
    generator = torch.Generator(device="cuda").manual_seed(0)
    activations = [torch.randn(LARGE.tokens, HEADS, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
                   for _ in range(3)]
    rows, layouts = sample_rows(LARGE), ordered(LARGE, device="cuda")

    def probe() -> object:
        return probe_heads(*activations, rows, scale=128**-0.5, grid=LARGE, orders=layouts)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = median_ms(probe, "cuda")
    peak = torch.cuda.max_memory_allocated() - before
    log(f"{took:9.1f} ms  {LARGE}, {HEADS} heads of 128, oracle of a layer; {peak / 2**30:.2f} GiB beside the "
        f"activations{'' if peak < MOST else ', MORE THAN ALLOWED'}")
    table = measure(LARGE, HEADS, 128, device="cuda", dtype=torch.bfloat16, seconds=60.0)
    modelled = CostTable.modelled()
    log(f"{table.dense * HEADS:9.1f} ms  dense; modelled {modelled.dense * HEADS:.1f}; orders cost "
        f"{ {name: round(ms, 2) for name, ms in table.fixed.items()} }; mixed launch x {table.mixed:.3f}")
    for name, curve in table.curves.items():
        points = ", ".join(f"{density:g}: {ms * HEADS + table.fix(name.split('/')[1]):.1f}" for density, ms in curve)
        said = ", ".join(f"{d:g}: {ms * HEADS:.1f}" for d, ms in modelled.curves[name] if d in dict(curve))
        log(f"{name:12s} ms by density: {points} (modelled {said})")
    return [{"what": "oracle", "ms": took, "bytes": peak}, {"what": "costs", "table": table.to_dict()}]
