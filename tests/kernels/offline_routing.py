"""Compiles the routing kernels for sm_90 on any machine, without a GPU, and counts registers and spills.

    python tests/kernels/offline_routing.py [--cases pool-bf16 select-top-k ...]

Exits with 1 when a compile fails or spills. Works with triton 3.6 and later.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dit_sparse.kernels import budgets, mass, pooling, routing, sampling  # noqa: E402
from tests.kernels.offline_compile import Figures, read_figures  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
TYPES = {BF16: "bf16", torch.float16: "fp16", FP32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel.

    Args:
        kernel: the kernel.
        types: pointer arguments with their types, other arguments that are no int32.
        constants: compile-time values, None for tensors that are left out.
        warps: of a program; stages: of its loops where they do not say it; most: registers of a thread, None for all.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    most: int | None = None


def pool(
    dtype: torch.dtype = BF16, index: bool = True, mask: bool = False, head_dim: int = 128, squares: bool = False
) -> Case:
    """Block means, with or without those of squares."""
    width = pooling._width(head_dim)
    types = {"X": f"*{TYPES[dtype]}", "OUT": "*fp32"}
    constants: dict[str, Any] = dict(D=head_dim, WIDTH=width, BLOCK=128, stride_xd=1,
                                     **pooling.tile(128, width, dtype, squares=squares))
    warps = constants.pop("num_warps")
    for name, kind, used in (("INDEX", "*i64", index), ("MASK", "*i1", mask), ("SQUARES", "*fp32", squares)):
        (types if used else constants)[name] = kind if used else None
    return Case(pooling.pool_kernel, types, constants, warps)


def score(head_dim: int = 128, weight: bool = False) -> Case:
    """Products of means."""
    width = routing._width(head_dim)
    types = dict(QUERY="*fp32", KEY="*fp32", SCORES="*fp32", scale="fp32") | ({"WEIGHT": "*fp32"} if weight else {})
    constants = routing.TILE | dict(D=head_dim, WIDTH=width, STEP=min(routing.TILE["STEP"], width), PRECISION="tf32x3")
    warps = constants.pop("num_warps")
    return Case(routing.score_kernel, types, constants if weight else constants | {"WEIGHT": None}, warps)


def select(kind: str, blocks: int = 591, forced: bool = False, **options: Any) -> Case:
    """Lists from scores."""
    columns = triton.next_power_of_2(blocks)
    types = dict.fromkeys(("QUERY_LENGTHS", "KEY_LENGTHS", "LISTS", "WHOLE", "BOUNDARY"), "*i32")
    types |= {"SCORES": "*fp32", "PAIRS": "*i64", "amount": {"top_p": "i64", "threshold": "fp32"}.get(kind, "i32")}
    constants = dict(KIND=routing._KINDS.index(kind), SOFTMAX=False, LEAST=1, OWN=False, NEAR=0, FORCED=forced,
                     KEY_BLOCK=128, ROWS=routing.TILE["BM"], COLUMNS=columns, AMOUNT=None) | options
    for name in ("FORCED_ROWS", "FORCED_COLUMNS"):
        (types if forced else constants)[name] = "*i1" if forced else None
    if forced:  # and amounts of their own for every row
        constants.pop("AMOUNT")
        types["AMOUNT"] = "*fp32" if kind == "threshold" else "*i64"
    given = routing.resources_of_row(columns, kind, forced)
    return Case(routing.select_kernel, types, constants, given["num_warps"] or 0, most=given["maxnreg"])


def sampled(dtype: torch.dtype = BF16, head_dim: int = 128, key_mask: bool = False) -> Case:
    """Sampled rows."""
    name, width = TYPES[dtype], sampling._width(head_dim)
    types = dict.fromkeys("QKV", f"*{name}") | dict.fromkeys(("ACC", "MASS", "TOP"), "*fp32")
    types |= {"ROWS": "*i64", "ALLOWED": "*i1", "scale_log2": "fp32"}
    constants = dict(D=head_dim, DV=head_dim, WIDTH=width, WIDTH_V=width, stride_qd=1, stride_kd=1,
                     stride_vd=1, **sampling.tile(dtype))
    warps = constants.pop("num_warps")
    (types if key_mask else constants)["KEY_OK"] = "*i1" if key_mask else None
    return Case(sampling.sampled_kernel, types, constants, warps)


def merged(pieces: int = 8, head_dim: int = 128) -> Case:
    """Splits of sampled rows put together."""
    constants = dict(DV=head_dim, WIDTH_V=sampling._width(head_dim), PIECES=pieces)
    return Case(sampling.merge_kernel, dict.fromkeys(("ACC", "MASS", "TOP", "OUT"), "*fp32"), constants, warps=1)


def pieces(dtype: torch.dtype = BF16, head_dim: int = 128, block: int = 128, key_mask: bool = False) -> Case:
    """Sampled rows, key block by key block."""
    name, width = TYPES[dtype], budgets._width(head_dim)
    types = dict.fromkeys(("Q", "K", "V", "OUT"), f"*{name}")
    types |= {"ROWS": "*i64", "INDEX": "*i64", "LSE": "*fp32", "scale_log2": "fp32"}
    constants = dict(D=head_dim, DV=head_dim, WIDTH=width, WIDTH_V=width, stride_qd=1, stride_kd=1, stride_vd=1,
                     BLOCK=block, **budgets.tile(dtype, block))
    warps = constants.pop("num_warps")
    (types if key_mask else constants)["MASK"] = "*i1" if key_mask else None
    return Case(budgets.piece_kernel, types, constants, warps)


def combined(dtype: torch.dtype = BF16, head_dim: int = 128, blocks: int = 591, soft: bool = True) -> Case:
    """Errors of sampled rows at every budget."""
    types = {"OUT": f"*{TYPES[dtype]}", "LEFT": "*i32"} | dict.fromkeys(("LSE", "ERRORS", "NORMS"), "*fp32")
    constants: dict[str, Any] = dict(DV=head_dim, REAL=None, COLUMNS=triton.next_power_of_2(blocks),
                                     **budgets.combining(dtype, budgets._width(head_dim)))
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    for name in ("ENTRY", "MEAN"):
        (types if soft else constants)[name] = "*fp32" if soft else None
    return Case(budgets.combine_kernel, types, constants, warps, stages)


def masses(dtype: torch.dtype = BF16, head_dim: int = 128, per_row: bool = False, index: bool = True) -> Case:
    """Exact mass."""
    name, width = TYPES[dtype], mass._width(head_dim)
    types = dict.fromkeys("QK", f"*{name}") | dict.fromkeys(("LISTS", "WHOLE", "BOUNDARY", "QUERY_LENGTHS"), "*i32")
    types |= {"LSE": "*fp32", "scale_log2": "fp32", "ROW_MASS" if per_row else "MASS": "*fp32"}
    constants = dict(D=head_dim, WIDTH=width, QUERY_BLOCK=128, KEY_BLOCK=128, KEY_MASK=None, stride_qd=1, stride_kd=1,
                     stride_en=1, **mass.tile(dtype, 128, 128))
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    constants["MASS" if per_row else "ROW_MASS"] = None
    for key in ("QUERY_INDEX", "KEY_INDEX"):
        (types if index else constants)[key] = "*i64" if index else None
    return Case(mass.mass_kernel, types, constants, warps, stages)


CASES = {
    "pool-bf16": pool(),
    "pool-bf16-raster": pool(index=False),
    "pool-bf16-masked-96": pool(mask=True, head_dim=96),
    "pool-bf16-squares": pool(squares=True),
    "pool-fp32": pool(FP32),
    "pool-fp32-squares": pool(FP32, mask=True, squares=True),
    "score-128": score(),
    "score-64": score(64),
    "score-128-weight": score(weight=True),
    "select-top-k": select("top_k"),
    "select-top-k-forced": select("top_k", forced=True, OWN=True),
    "select-top-p": select("top_p", SOFTMAX=True),
    "select-top-p-4096": select("top_p", 4096, SOFTMAX=True, LEAST=4),
    "select-threshold": select("threshold", SOFTMAX=True),
    "select-threshold-forced": select("threshold", forced=True),
    "select-top-k-near-300": select("top_k", 300, NEAR=2),
    "select-top-k-8192": select("top_k", 8192, forced=True),
    "sampled-bf16": sampled(),
    "sampled-bf16-key-mask": sampled(key_mask=True),
    "sampled-bf16-64": sampled(head_dim=64),
    "sampled-fp32": sampled(FP32),
    "sampled-merged": merged(),
    "pieces-bf16": pieces(),
    "pieces-bf16-key-mask": pieces(key_mask=True),
    "pieces-bf16-64": pieces(head_dim=64, block=64),
    "pieces-fp32": pieces(FP32),
    "combined-bf16": combined(),
    "combined-fp32-drop": combined(FP32, blocks=8192, soft=False),
    "mass-bf16": masses(),
    "mass-bf16-rows": masses(per_row=True, index=False),
    "mass-bf16-64": masses(head_dim=64),
    "mass-fp32": masses(FP32),
}


def compile_case(case: Case) -> Figures:
    """Compiles one case for sm_90 and reads the machine code."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, "i32") for n in names}
    # As at run time: pointers and strides are multiples of 16, numbers that the kernel says not to look at are not.
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
             if signature[n].startswith("*") or (signature[n] == "i32" and n.startswith(("stride", "split")))}
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attrs)
    options = dict(num_warps=case.warps, num_stages=case.stages, maxnreg=case.most)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return read_figures(compiled.asm["cubin"], compiled.metadata.shared)


def run(cases: Mapping[str, Case], description: str, half: Collection[str] = ()) -> int:
    """Compiles the cases that the command line names and prints a table; 1 when one fails or spills.

    Args:
        half: cases that must use Hopper's matrix products.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(cases), default=list(cases))
    bad = 0
    print(f"triton {triton.__version__}, target sm_90")
    for name in parser.parse_args().cases:
        try:
            figures = compile_case(cases[name])
        except Exception as error:
            bad += 1
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        bad += figures.spills > 0 or (name in half and not figures.wgmma)
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(figures).items()), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(run(CASES, __doc__))
