"""Everything that needs a GPU, in one go: checks, then speeds. Needs torch and triton only.

    python tests/gpu/run.py --out DIR                       # about 6 minutes on an H200
    python tests/gpu/run.py --out DIR --only checks
    python tests/gpu/run.py --out DIR --kernel hopper       # that kernel alone, or: portable, routing

Prints tables, and writes gpu.log and gpu.json to DIR. Exits with 1 when a check fails. A check that takes longer than
--limit seconds ends the run with the place where it hangs.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from dit_sparse.eval import speed  # noqa: E402

# What the portable kernel must reach, from the prototype: 32,768 tokens, 12 heads of 128, bf16, density 0.25.
TARGET_TFLOPS = 450
# What the prototype of the Hopper kernel reached at these densities on an H200 with the same shape.
HOPPER_PROTOTYPE = {1.0: 645, 0.5: 617, 0.25: 601, 0.1: 560}


class Log:
    """Prints, and writes the same lines to a file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()


def checks_of(kernel: str | None) -> dict[str, Callable[[], str]]:
    """The checks of one kernel, or of all, by name."""
    from tests.gpu import checks, routing_checks

    attention = checks.all_checks()
    hopper = {name: check for name, check in attention.items() if name.startswith("hopper")}
    groups = {
        "portable": {name: check for name, check in attention.items() if name not in hopper},
        "hopper": hopper,
        "routing": {f"routing {name}": check for name, check in routing_checks.all_checks().items()},
    }
    return groups[kernel] if kernel else {name: check for group in groups.values() for name, check in group.items()}


def run_checks(log: Log, kernel: str | None = None, limit: float = 300) -> list[dict[str, Any]]:
    """Runs every check, or one kernel's; a check that raises has failed, one that hangs ends the process."""
    found = []
    for name, function in checks_of(kernel).items():
        start = time.perf_counter()
        # A kernel that waits for itself cannot be interrupted: the process must end, with its last lines in the log.
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            problem = function()
            torch.cuda.synchronize()
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        torch.cuda.empty_cache()
        seconds = time.perf_counter() - start
        found.append({"check": name, "problem": problem, "seconds": round(seconds, 2)})
        log(f"{'FAILED' if problem else 'ok':6} {seconds:6.2f} s  {name}" + (f": {problem}" if problem else ""))
    return found


def run_speeds(log: Log) -> list[dict[str, Any]]:
    """Times the shapes that matter, dense beside sparse."""
    shapes: list[dict[str, Any]] = [
        dict(tokens=32768, heads=12, head_dim=128, densities=(0.5, 0.25, 0.1)),
        dict(tokens=32768, heads=12, head_dim=128, densities=(0.25,), dtype="fp16"),
        dict(tokens=32768, heads=12, head_dim=128, densities=(0.25,), block_size=64),
        dict(tokens=32768, heads=24, head_dim=64, densities=(0.25,)),
        dict(tokens=75600, heads=12, head_dim=128, densities=(0.25, 0.1)),
        dict(tokens=8192, heads=12, head_dim=128, densities=(0.25,)),
        dict(tokens=8192, heads=12, head_dim=128, densities=(0.25,), dtype="fp32"),
    ]
    log("  ".join(speed.COLUMNS))
    rows: list[speed.Row] = []
    for shape in shapes:
        rows += speed.bench_attention(**shape, device="cuda", seconds=0.25,
                                      on_row=lambda row: log("  ".join(row.cells())))
        torch.cuda.empty_cache()
    rows += boundary_speeds()
    log("\n" + speed.table(row.cells() for row in rows))
    reached = next(row.tflops for row in rows if row.what == "sparse" and abs(row.density - 0.25) < 0.01)
    log(f"\nportable kernel at density 0.25: {reached:.0f} TFLOP/s, target {TARGET_TFLOPS}")
    return [dataclasses.asdict(row) for row in rows]


def run_hopper_speeds(log: Log) -> list[dict[str, Any]]:
    """Times the Hopper kernel: densities, head dims, key blocks, persistent programs, uneven heads, boundary tests."""
    from dit_sparse.kernels import hopper_plan

    if why := hopper_plan.missing():
        log(f"speeds of the Hopper kernel left out: {why}")
        return []
    densities = (1.0, 0.5, 0.25, 0.1)
    rows: list[speed.Row] = []
    for shape in (dict(heads=12, head_dim=128, densities=densities),
                  dict(heads=12, head_dim=128, densities=(0.25,), dtype="fp16"),
                  dict(heads=24, head_dim=64, densities=(1.0, 0.25))):
        rows += speed.bench_attention(tokens=32768, **shape, device="cuda", seconds=0.25,  # type: ignore[arg-type]
                                      backend="hopper", on_row=lambda row: log("  ".join(row.cells())))
        torch.cuda.empty_cache()
    rows += hopper_variants(densities, rows[0].milliseconds) + hopper_tile_speeds() + boundary_speeds("hopper")
    log("\n" + speed.table(row.cells() for row in rows))
    for row in rows:
        nearest = min(densities, key=lambda d: abs(d - row.density))
        if row.what == "sparse" and row.head_dim == 128 and row.dtype == "bf16":
            log(f"Hopper kernel at density {row.density:.2f}: {row.tflops:.0f} TFLOP/s, prototype "
                f"{HOPPER_PROTOTYPE[nearest]}")
    return [dataclasses.asdict(row) for row in rows]


def hopper_variants(densities: tuple[float, ...], dense_ms: float) -> list[speed.Row]:
    """Persistent programs, 64-key blocks, and heads of uneven density against even ones of the same work."""
    from dit_sparse.blockmask import BlockLayout, BlockMask
    from dit_sparse.kernels.blocks import Blocks
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    tokens, heads, dim = 32768, 12, 128
    query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    layout, narrow = (BlockLayout.raster(tokens, size, "cuda") for size in (128, 64))
    uneven = torch.logspace(math.log10(0.02), 0, heads).tolist()
    masks = {f"random {d}": speed.random_keep(heads, layout.blocks, layout.blocks, d, "cuda") for d in densities}
    masks["uneven heads"] = torch.cat(
        [speed.random_keep(1, layout.blocks, layout.blocks, d, "cuda") for d in uneven], dim=1)
    masks["even heads, same work"] = speed.random_keep(heads, layout.blocks, layout.blocks, sum(uneven) / heads, "cuda")
    calls = {(name, persistent): (BlockMask.from_dense(keep, layout, layout), persistent)
             for name, keep in masks.items() for persistent in (False, True)}
    wide = speed.random_keep(heads, layout.blocks, narrow.blocks, 0.25, "cuda")
    calls["random 0.25, 64-key blocks", False] = (BlockMask.from_dense(wide, layout, narrow), False)
    rows = []
    for (name, _), (mask, persistent) in calls.items():
        density = mask.density().item()
        blocks = Blocks.from_mask(mask)
        call = partial(block_sparse_attention_hopper, query, key, value, blocks, dim**-0.5, persistent=persistent)
        took = speed.median_ms(call, "cuda", seconds=0.25)
        rows.append(speed.Row(tokens, heads, dim, 1, "bf16", mask.key.block_size, name + ", persistent" * persistent,
                              "hopper", density, took, 4 * heads * dim * tokens**2 * density / took / 1e9,
                              dense_ms / took))
    return rows


def hopper_tile_speeds() -> list[speed.Row]:
    """Tiles of three grids, the first aligned, the others ragged: rates count pairs of real tokens only."""
    from dit_sparse import order
    from dit_sparse.blockmask import BlockMask
    from dit_sparse.grid import TokenGrid
    from dit_sparse.kernels.attention import block_sparse_attention, dense_attention

    heads, dim = 12, 128
    rows = []
    for sizes, shape in (((20, 48, 80), (4, 4, 8)), ((21, 45, 80), (4, 4, 8)), ((21, 30, 52), (1, 8, 16))):
        grid = TokenGrid(*sizes)
        positions, lengths = order.tile(grid, shape)
        tiles, index = (order.layout(grid, positions, 128, lengths=lengths, tile_shape=tile, device="cuda")
                        for tile in (shape, None))
        query, key, value = (torch.randn(1, grid.tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
                             for _ in range(3))
        dense_ms = speed.median_ms(partial(dense_attention, query, key, value), "cuda", seconds=0.25)
        for density in (1.0, 0.25, 0.1):
            keep = speed.random_keep(heads, tiles.blocks, tiles.blocks, density, "cuda")
            for way, layout in (("tiles", tiles), ("index", index)):
                mask = BlockMask.from_dense(keep, layout, layout)
                found = mask.density().item()
                took = speed.median_ms(partial(block_sparse_attention, query, key, value, mask, backend="hopper"),
                                       "cuda", seconds=0.25)
                name = f"{'x'.join(map(str, sizes))} {way} {'x'.join(map(str, shape))}"
                rows.append(speed.Row(grid.tokens, heads, dim, 1, "bf16", 128, name, "hopper", found, took,
                                      4 * heads * dim * grid.tokens**2 * found / took / 1e9, dense_ms / took))
    return rows


def boundary_speeds(backend: str = "triton") -> list[speed.Row]:
    """What the tests of boundary blocks, and a key mask, cost at 32,768 tokens: every listed block is tested."""
    from dit_sparse.blockmask import BlockLayout, BlockMask, TokenWindow
    from dit_sparse.kernels.attention import block_sparse_attention, dense_attention

    tokens, heads, dim, block = 32768, 12, 128, 128
    query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    layout = BlockLayout.raster(tokens, block, "cuda")
    keep = speed.random_keep(heads, layout.blocks, layout.blocks, 0.25, "cuda")
    place = torch.zeros(3, tokens, dtype=torch.int32, device="cuda")
    key_mask = torch.ones(1, tokens, dtype=torch.bool, device="cuda")
    key_mask[:, -200:] = False
    masks = {"all tested, no window": BlockMask.from_dense(keep, layout, layout, partial=keep)}
    for count in (1, 3):
        window = TokenWindow.from_tokens(place[:count], place[:count] - 1, place[:count] + 1, layout, layout)
        tested = BlockMask.from_dense(keep, layout, layout, partial=keep, window=window)
        masks[f"all tested, {count} coordinates"] = tested
    plain = BlockMask.from_dense(keep, layout, layout)
    sparse = partial(block_sparse_attention, query, key, value, backend=backend)
    dense = partial(dense_attention, query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    calls: dict[str, Callable[[], Any]] = {name: partial(sparse, mask) for name, mask in masks.items()}
    calls["sparse, key mask"] = partial(sparse, plain, key_mask=key_mask)
    calls["dense, key mask"] = partial(dense, key_mask=key_mask)
    calls["dense, key mask, SDPA"] = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=key_mask[:, None, None])
    rows = []
    base = speed.median_ms(dense, "cuda", seconds=0.25)
    for name, call in calls.items():
        density = 1.0 if name.startswith("dense") else 0.25
        took = speed.median_ms(call, "cuda", seconds=0.25)
        rows.append(speed.Row(tokens, heads, dim, 1, "bf16", block, name,
                              "" if name.startswith("dense") else backend, density, took,
                              4 * heads * dim * tokens**2 * density / took / 1e9, base / took))
    return rows


def main() -> int:
    """Checks and speeds; 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("DIT_SPARSE_GPU_OUT"), help="folder")
    parser.add_argument("--only", choices=["checks", "speeds"])
    parser.add_argument("--kernel", choices=["portable", "hopper", "routing"], help="default: all")
    parser.add_argument("--limit", type=float, default=300, help="seconds a check may take")
    options = parser.parse_args()
    if options.out is None:
        parser.error("--out is missing (or the environment variable DIT_SPARSE_GPU_OUT)")
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was run")
        return 0
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "gpu.log").open("w") as file:
        log = Log(file)
        where = speed.environment("cuda")
        log(", ".join(f"{name} {value}" for name, value in where.items()))
        result: dict[str, Any] = {"environment": where}
        if options.only != "speeds":
            result["checks"] = run_checks(log, options.kernel, options.limit)
            failed = [check["check"] for check in result["checks"] if check["problem"]]
            log(f"{len(result['checks']) - len(failed)} checks passed, {len(failed)} failed\n")
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        if options.only != "checks":
            from tests.gpu import routing_checks

            measures = {"portable": run_speeds, "hopper": run_hopper_speeds, "routing": routing_checks.speeds}
            for name, run in measures.items():
                if options.kernel in (None, name):
                    result["speeds" if name == "portable" else f"{name}_speeds"] = run(log)
                    (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(any(check["problem"] for check in result.get("checks", [])))


if __name__ == "__main__":
    sys.exit(main())
