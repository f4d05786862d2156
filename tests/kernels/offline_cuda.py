"""Compiles the kernels in CUDA C++ for sm_90a without a GPU: nothing may spill, and products must stay overlapped.

    python tests/kernels/offline_cuda.py [--cases bf16-128 ...]

Needs NVRTC (the wheel nvidia-cuda-nvrtc), and triton for NVIDIA's disassembler. Exits with 1 when a case is not as it
must be.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dit_sparse.kernels import fp8_cuda, nvrtc  # noqa: E402
from dit_sparse.kernels.hopper_cuda import variant  # noqa: E402
from tests.kernels.offline_compile import read_figures  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16
CASES: dict[str, tuple[torch.dtype, int, bool, int, bool]] = {
    f"{name}-{dim}{'-permuted' * permuted}{'-64-keys' * (keys == 64)}{'-soft' * soft}":
    (dtype, dim, permuted, keys, soft)
    for name, dtype in (("bf16", BF16), ("fp16", FP16)) for dim in (64, 128) for permuted in (False, True)
    for keys in (128, 64) for soft in (False, True)
}
# Output and queries of the 8-bit kernel.
CASES_8: dict[str, tuple[torch.dtype, torch.dtype]] = {
    f"{scores}-{name}": (dtype, stored) for scores, stored in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8))
    for name, dtype in (("bf16", BF16), ("fp16", FP16))
}
# The first block's scores and the last one's output, and two in each of the loops of whole and of boundary blocks.
WAITS = 6


def problem(case: str) -> tuple[str, str]:
    """What the machine code of a case is, and what is wrong with it."""
    if case in CASES_8:
        macros, source, numbers = fp8_cuda.variant(*CASES_8[case]), "attention_fp8.cu", 32
    else:
        dtype, dim, permuted, keys, soft = CASES[case]
        macros, source, numbers = variant(dtype, dim, dim, permuted, keys, soft), "attention.cu", 16
    code, log = nvrtc.compile_source(source, macros, (*nvrtc.OPTIONS, "--ptxas-options=-v"))
    figures = read_figures(code, macros["SHARED_BYTES"])
    # A matrix instruction takes so many columns, or keys; scores and outputs stand three times in the code.
    products = 3 * (macros["WIDTH"] + 128) // numbers
    wrong = [f"{name} must be {value}" for name, found, value in (
        ("spills", figures.spills, 0), ("stack", figures.stack, 0), ("wgmma", figures.wgmma, products),
        ("waits", figures.waits, WAITS)) if found != value]
    if "serialized" in log:
        wrong.append("products wait for each other")
    return f"registers {figures.registers}, spills {figures.spills}, wgmma {figures.wgmma}, waits {figures.waits}", \
        ", ".join(wrong)


def main() -> int:
    """Compiles the cases asked for; 1 when one is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, *CASES_8]
    parser.add_argument("--cases", nargs="*", choices=names, default=names)
    bad = 0
    for case in parser.parse_args().cases:
        text, wrong = problem(case)
        bad += bool(wrong)
        print(f"{case}: {text}" + (f": {wrong}" if wrong else ""), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
