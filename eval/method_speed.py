"""Seconds of each method's plan and of its attention at a real model's geometry, random activations.

    python -m dit_sparse.eval.method_speed --grid 21x45x80 --heads 40 --head-dim 128

Random activations say nothing about quality; they give the time of the masks and of the kernels that run them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_sparse.eval.speed import DTYPES, environment, median_ms, misuse
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.memory import Memory
from dit_sparse.methods import all_methods, build
from dit_sparse.methods.base import Call

COLUMNS = ("method", "backend", "density", "plan ms", "attention ms", "x dense")


@dataclass(frozen=True)
class MethodRow:
    """One method at one geometry: medians in milliseconds; `speedup` counts plan and attention together."""

    method: str
    backend: str
    density: float
    plan_ms: float
    attention_ms: float
    speedup: float

    def cells(self) -> list[str]:
        """The row as printed."""
        return [self.method, self.backend, f"{self.density:.3f}", f"{self.plan_ms:.2f}", f"{self.attention_ms:.2f}",
                f"{self.speedup:.2f}"]


def bench_methods(grid: TokenGrid, heads: int, head_dim: int, *, density: float = 0.25, dtype: str = "bf16",
                  device: str = "cuda", names: list[str] | None = None, seconds: float = 0.5) -> list[MethodRow]:
    """Time every method once its static parts are built.

    Args:
        grid: tokens of the call, text included.
        heads, head_dim: shape of the activations (1, L, H, D).
        density: asked of the methods that have the option.
        dtype, device: of the activations.
        names: methods, default all but `dense`, which always leads the table.
        seconds: of timed calls for each number.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (1, grid.tokens, heads, head_dim)
    query, key, value = (torch.randn(shape, generator=generator, device=device, dtype=DTYPES[dtype]) for _ in range(3))
    scale = head_dim**-0.5
    dense = median_ms(lambda: dense_attention(query, key, value, scale=scale), device, seconds=seconds)
    rows = [MethodRow("dense", "dense", 1.0, 0.0, dense, 1.0)]
    for name in names or [n for n in sorted(all_methods()) if n != "dense"]:
        takes_density = "density" in getattr(all_methods().get(name), "__dataclass_fields__", {})
        method = build(name, **({"density": density} if takes_density else {}))
        memory = Memory()
        call = Call(query, key, value, grid, scale, cached=memory.static, generator=generator)
        # A call keeps what it pooled: a new one each time, or plan and operator would be timed without their pooling.
        plan_ms = median_ms(lambda m=method, c=call: m.plan(dataclasses.replace(c)), device,  # type: ignore[misc]
                            seconds=seconds)
        plan = method.plan(dataclasses.replace(call))
        mask = plan.mask
        if mask is None:  # the method's own choice is dense here: its row says so
            rows.append(MethodRow(name, "dense", 1.0, plan_ms, dense, dense / (plan_ms + dense)))
            continue
        used: list[str] = []

        def attend(plan: Any = plan, call: Call = call, used: list[str] = used) -> None:
            kernel = functools.partial(block_sparse_attention, scale=scale, on_backend=used.append)
            plan.operator.run(dataclasses.replace(call), plan.mask, kernel)

        took = median_ms(attend, device, seconds=seconds)
        rows.append(MethodRow(name, used[-1], float(mask.density()), plan_ms, took, dense / (plan_ms + took)))
    return rows


def main() -> None:
    """Print the table; `--out` also writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="21x45x80")
    parser.add_argument("--text", type=int, default=0)
    parser.add_argument("--text-at", default="none", choices=["none", "front", "back"])
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--method", action="append", dest="names")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if why := misuse(options.device, [options.density], options.names):
        parser.error(why)
    try:
        grid = TokenGrid.parse(options.grid, text=options.text, text_at=options.text_at)
    except ValueError as error:
        parser.error(str(error))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = bench_methods(grid, options.heads, options.head_dim, density=options.density, dtype=options.dtype,
                         device=options.device, names=options.names)
    where = environment(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    cells = [list(COLUMNS), *(row.cells() for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    for row in cells:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
    if options.out:
        options.out.write_text(json.dumps({"where": where, "grid": str(grid), "rows": [asdict(r) for r in rows]}))


if __name__ == "__main__":
    main()
