"""Everything that needs a GPU, in one go: checks, then speeds. Needs torch and triton only.

    python tests/gpu/run.py --out DIR          # about 3 minutes on an H200
    python tests/gpu/run.py --out DIR --only checks

Prints tables, and writes gpu.log and gpu.json to DIR. Exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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


class Log:
    """Prints, and writes the same lines to a file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()


def run_checks(log: Log) -> list[dict[str, Any]]:
    """Runs every check; a check that raises has failed."""
    from tests.gpu.checks import all_checks

    found = []
    for name, function in all_checks().items():
        start = time.perf_counter()
        try:
            problem = function()
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
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


def boundary_speeds() -> list[speed.Row]:
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
    sparse = partial(block_sparse_attention, query, key, value)
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
        rows.append(speed.Row(tokens, heads, dim, 1, "bf16", block, name, "", density, took,
                              4 * heads * dim * tokens**2 * density / took / 1e9, base / took))
    return rows


def main() -> int:
    """Checks and speeds; 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("DIT_SPARSE_GPU_OUT"), help="folder")
    parser.add_argument("--only", choices=["checks", "speeds"])
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
            result["checks"] = run_checks(log)
            failed = [check["check"] for check in result["checks"] if check["problem"]]
            log(f"{len(result['checks']) - len(failed)} checks passed, {len(failed)} failed\n")
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        if options.only != "checks":
            result["speeds"] = run_speeds(log)
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(any(check["problem"] for check in result.get("checks", [])))


if __name__ == "__main__":
    sys.exit(main())
