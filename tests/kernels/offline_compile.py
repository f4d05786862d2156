"""Compiles the portable Triton kernel for sm_90 on any machine, without a GPU, and counts registers and spills.

    python tests/kernels/offline_compile.py [--cases bf16-128 fp16-64 ...]

Exits with 1 when a compile fails or spills more than the case may. Works with triton 3.6 and later.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dit_sparse.kernels import portable  # noqa: E402

BINARIES = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER_SHARED = 232448
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = dict(LSE="*fp32", LISTS="*i32", WHOLE="*i32", BOUNDARY="*i32", ORDER="*i32", KEY_LENGTHS="*i32")


@dataclass(frozen=True)
class Case:
    """One specialisation of the kernel."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    query_block: int = 128
    key_block: int = 128
    coordinates: int = 0
    key_mask: bool = False
    permuted: bool = False
    descriptors: bool = True
    spills: int = 0  # instructions that may spill


CASES = {
    "bf16-128": Case(),
    "fp16-128": Case(dtype=torch.float16),
    "bf16-128-window": Case(coordinates=3, permuted=True),
    "bf16-128-key-mask": Case(key_mask=True),
    "bf16-128-everything": Case(coordinates=3, permuted=True, key_mask=True),
    "bf16-128-pointers": Case(descriptors=False),
    "bf16-96": Case(head_dim=96),
    "bf16-64": Case(head_dim=64),
    "fp16-64": Case(dtype=torch.float16, head_dim=64),
    "bf16-128-blocks-64": Case(query_block=64, key_block=64),
    "bf16-128-blocks-128x64": Case(key_block=64),
    "bf16-128-blocks-32": Case(query_block=32, key_block=32),
    # Products in three passes keep both halves of the queries in registers; what spills lies outside of the main loop.
    "fp32-128": Case(dtype=torch.float32, spills=70),
    "fp32-64-blocks-64": Case(dtype=torch.float32, head_dim=64, query_block=64, key_block=64, coordinates=1),
}


@dataclass(frozen=True)
class Figures:
    """What the assembler made of a case."""

    registers: int
    stack: int
    spills: int
    shared: int
    wgmma: int
    bulk_copies: int


def compile_case(case: Case) -> Figures:
    """Compiles one case for sm_90 and reads the machine code."""
    name, width = TYPES[case.dtype], portable._width(case.head_dim)
    tile = portable.choose_tile(case.query_block, case.key_block, width, case.dtype, HOPPER_SHARED)
    constants: dict[str, Any] = dict(
        D=case.head_dim, DV=case.head_dim, WIDTH=width, WIDTH_V=width, QUERY_BLOCK=case.query_block,
        KEY_BLOCK=case.key_block, BM=tile.queries, BN=tile.keys, COORDINATE_COUNT=case.coordinates,
        DESCRIPTORS=case.descriptors, PRECISION="tf32x3" if case.dtype == torch.float32 else "tf32",
        STAGES=tile.stages, TESTED_STAGES=portable.tested_stages(tile, case.coordinates, case.key_mask),
        stride_qd=1, stride_kd=1, stride_vd=1)
    kinds = POINTERS | dict(Q=f"*{name}", K=f"*{name}", V=f"*{name}", OUT=f"*{name}", scale_log2="fp32")
    if case.descriptors:
        kinds |= dict.fromkeys("KV", f"tensordesc<{name}[1, 1, {tile.keys}, {width}]>")
    window = dict(COORDINATES="*i32", LOW="*i32", HIGH="*i32", ALWAYS="*i1")
    optional = window if case.coordinates else {}
    optional = optional | (dict(KEY_OK="*i8", EXEMPT="*i32") if case.key_mask else {})
    optional = optional | (dict(QUERY_INDEX="*i64") if case.permuted else {})
    kinds |= optional
    constants |= dict.fromkeys({*window, "KEY_OK", "EXEMPT", "QUERY_INDEX"} - set(optional), None)

    names = portable.attention_kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    # As at run time: pointers and strides are multiples of 16, unless the kernel says not to look.
    fixed = {"H", "Lq", "NQ", "query_slots", "key_slots"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
             if signature[n].startswith("*") or (signature[n] == "i32" and n not in fixed)}
    source = ASTSource(portable.attention_kernel, signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=tile.warps))
    return read_figures(compiled.asm["cubin"], compiled.metadata.shared)


def read_figures(cubin: bytes, shared: int) -> Figures:
    """Registers, stack and spills from the tools that come with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([BINARIES / "nvdisasm", file.name], capture_output=True, text=True).stdout

    def count(word: str) -> int:
        return len(re.findall(rf"\b{word}\b", code))

    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    return Figures(registers, stack, count("STL") + count("LDL"), shared, count("HGMMA"), count("UTMALDG"))


def main() -> int:
    """Compiles the cases asked for and prints a table; 1 when one fails or spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    bad = 0
    print(f"triton {triton.__version__}, target sm_90")
    for name in parser.parse_args().cases:
        try:
            figures = compile_case(CASES[name])
        except Exception as error:
            bad += 1
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        bad += figures.spills > CASES[name].spills
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(figures).items()), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
