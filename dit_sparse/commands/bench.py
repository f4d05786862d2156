"""`dit-sparse bench`: dense and block-sparse attention side by side on this machine."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from .console import UserError, print_json, print_table, progress, refusing

MAX_TOKENS = 1_000_000
# Where nothing is said: a size that shows the kernel, in seconds on two cores and in milliseconds on a GPU.
CPU = {"tokens": 4096, "heads": 4, "head_dim": 64, "dtype": "fp32", "block_size": 64}
CUDA = {"tokens": 32768, "heads": 12, "head_dim": 128, "dtype": "bf16", "block_size": 128}


def bench(
    *,
    tokens: list[int] | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    dtype: str | None = None,
    block_size: int | None = None,
    densities: list[float] | None = None,
    backend: str | None = None,
    device: str | None = None,
    seconds: float = 0.4,
    as_json: bool = False,
) -> None:
    """Measure and print; every row counts the blocks computed."""
    import torch

    from ..eval.speed import DTYPES, bench_attention, environment
    from ..kernels.attention import backends
    from .run import check_device

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    defaults = CUDA if torch.device(device).type == "cuda" else CPU
    densities = densities or [0.5, 0.25, 0.1]
    shape: dict[str, Any] = {
        "heads": heads or defaults["heads"],
        "head_dim": head_dim or defaults["head_dim"],
        "dtype": dtype or defaults["dtype"],
        "block_size": block_size or defaults["block_size"],
    }
    if shape["dtype"] not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is not allowed; use one of {', '.join(DTYPES)}")
    if any(not 0 < density <= 1 for density in densities):
        raise UserError(f"--density: {densities} is not allowed; use numbers in (0, 1]")
    names = [known.name for known in backends()]
    if backend is not None and backend not in names:
        raise UserError(f"--backend {backend!r} is unknown; use one of {', '.join(names)}")
    sizes = tokens or [int(str(defaults["tokens"]))]
    if any(not 1 <= size <= MAX_TOKENS for size in sizes):
        raise UserError(f"--tokens: {sizes} is not allowed; use numbers from 1 to {MAX_TOKENS}")
    rows: list[Any] = []
    with refusing(ValueError, RuntimeError), progress("measuring") as update:
        expected, done = len(sizes) * (2 + 3 * len(densities)), itertools.count(1)

        def count(_row: Any) -> None:
            update(next(done), expected)

        for size in sizes:
            rows += bench_attention(
                tokens=size,
                densities=densities,
                device=device,
                backend=backend,
                seconds=seconds,
                on_row=count,
                **shape,
            )
    where = environment(device)
    if as_json:
        print_json({"environment": where, "rows": [dataclasses.asdict(row) for row in rows]})
        return
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"heads {shape['heads']}, head dim {shape['head_dim']}, {shape['dtype']}, blocks of {shape['block_size']}")
    columns = ["tokens", "what", "backend", "density", "median ms", "TFLOP/s", "x dense"]
    table = [[r.tokens, r.what, r.backend, *_numbers(r)] for r in rows]
    print_table(columns, table)
    print("TFLOP/s count the blocks that are computed; every time includes reordering, the mask has its own row.")


def _numbers(row: Any) -> list[str]:
    rates = [f"{row.tflops:.3g}", f"{row.speedup:.2f}"] if row.tflops else ["-", "-"]
    return [f"{row.density:.3f}", f"{row.milliseconds:.3f}", *rates]
