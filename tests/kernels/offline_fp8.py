"""Compiles the fp8 kernels for sm_90 on any machine, without a GPU, and counts registers, spills, products and waits.

    python tests/kernels/offline_fp8.py [--cases fp8-128 quantise-128 ...]

Exits with 1 when a compile fails or spills, or when the matrix products of the attention kernel are not as many, or as
overlapped, as written. Byte shuffles are counted too: more than the limit mean that the weights are put together byte
by byte. Works with triton 3.6 and later.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402

from dit_sparse.blockmask import BlockLayout, BlockMask, TokenWindow  # noqa: E402
from dit_sparse.kernels import fp8, fp8_kernel, quantise, quantise_kernel  # noqa: E402
from dit_sparse.kernels.blocks import Blocks  # noqa: E402
from tests.kernels.offline_compile import BINARIES, Figures, _Sm90, read_figures  # noqa: E402

# Waits for matrix products: per consumer group one for the first scores, two in each of the two loops, one for the last
# output. More of them mean that the assembler gave up on overlapping the products: then every single one is waited for.
WAITS = 12
# Exchanges between threads: the sum and the maximum of a row take two steps each, for two rows a thread, in the two
# loops and at the end, in both groups: 2 * 3 * 8, and one of the launch itself. Weights whose bytes had to move between
# threads would take dozens more in each loop; those that had to move inside of a thread would be prmt.
EXCHANGES = 49
SHUFFLES = 22  # tests of flags, outside of the loop of whole blocks


@dataclass(frozen=True)
class Case:
    """One specialisation of the attention kernel."""

    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    permuted: bool = False
    coordinates: int = 0
    always: bool = False
    key_mask: bool = False
    stages: int = fp8.STAGES
    fresh: bool = True
    scores: str = "e4m3"

    @property
    def wgmma(self) -> dict[str, int]:
        """Matrix instructions of both groups, each over 32 columns or keys: scores and outputs stand three times.

        Products of 8-bit floats and of 8-bit integers have instructions of their own.
        """
        of_scores, of_outputs = (2 * 3 * n // 32 for n in (64 if self.head_dim <= 64 else 128, 128))
        integers = of_scores if self.scores == "int8" else 0
        return {"qgmma": of_outputs + of_scores - integers, "igmma": integers}


CASES = {
    "fp8-128": Case(),
    "fp8-128-permuted": Case(permuted=True),
    "fp8-128-fp16": Case(dtype=torch.float16),
    "fp8-96": Case(head_dim=96),
    "fp8-64": Case(head_dim=64),
    "fp8-64-permuted": Case(head_dim=64, permuted=True),
    "fp8-128-key-mask": Case(key_mask=True),
    "fp8-128-window-1": Case(coordinates=1),
    "fp8-128-window-3": Case(coordinates=3),
    "fp8-128-window-3-permuted": Case(coordinates=3, permuted=True),
    "fp8-128-everything": Case(permuted=True, coordinates=3, always=True, key_mask=True),
    "fp8-64-everything": Case(head_dim=64, permuted=True, coordinates=3, always=True, key_mask=True),
    "fp8-128-stages-2": Case(stages=2),
    "fp8-128-kept-sums": Case(fresh=False),
    "fp8-64-kept-sums": Case(head_dim=64, fresh=False),
}
CASES |= {name.replace("fp8", "int8"): dataclasses.replace(case, scores="int8") for name, case in CASES.items()}
# (head dim, permuted, key mask, scores) of the quantising kernels.
QUANTISE_CASES = {
    "quantise-128": (128, False, False, "e4m3"),
    "quantise-64": (64, False, False, "e4m3"),
    "quantise-96-permuted-key-mask": (96, True, True, "e4m3"),
    "quantise-128-int8": (128, False, False, "int8"),
    "quantise-96-permuted-key-mask-int8": (96, True, True, "int8"),
}


def call_of(case: Case) -> tuple[torch.Tensor, Blocks]:
    """Activations and blocks of a small call, on the CPU."""
    tokens, heads = 1023, 3
    x = torch.zeros(1, tokens, heads, case.head_dim, dtype=case.dtype)
    layout = BlockLayout.raster(tokens, 128)
    if case.permuted:
        layout = BlockLayout.from_order(torch.arange(tokens).flip(0), 128)
    window = None
    if case.coordinates:
        place = torch.arange(tokens).expand(case.coordinates, -1)
        always = torch.zeros(tokens, dtype=torch.bool) if case.always else None
        window = TokenWindow.from_tokens(place, place - 5, place + 5, layout, layout, always=always)
    keep = torch.ones(1, heads, layout.blocks, layout.blocks, dtype=torch.bool)
    mask = BlockMask.from_dense(keep, layout, layout, partial=keep, window=window)
    return x, Blocks.from_mask(mask, torch.ones(1, tokens, dtype=torch.bool) if case.key_mask else None)


def compile_attention(case: Case) -> Any:
    """Compiles the attention kernel as the launcher would, pointer alignments and fixed strides included."""
    x, blocks = call_of(case)
    plan = fp8.fp8_plan(blocks, x.shape[1], case.head_dim, case.head_dim)
    quantised = quantise.quantise_reference(x, x, x, blocks, 0.1, scores=case.scores)
    arguments, constants = fp8.launch(quantised, blocks, plan, 0.1, torch.empty_like(x),
                                      torch.empty(1, x.shape[2], x.shape[1]), case.stages, case.fresh)
    triton.runtime.driver.set_active(_Sm90())
    return fp8_kernel.attention_kernel.run(*arguments, grid=(1,), warmup=True, **constants, num_warps=4,
                                           maxnreg=fp8_kernel.MAX_REGISTERS)


def compile_quantise(head_dim: int, permuted: bool, key_mask: bool, scores: str) -> Iterator[tuple[str, Any]]:
    """Compiles the kernels that `quantise` launches, with what it hands them."""
    x, blocks = call_of(Case(head_dim, permuted=permuted, key_mask=key_mask))
    plan = fp8.fp8_plan(blocks, x.shape[1], head_dim, head_dim)
    found: list[tuple[str, Any]] = []

    class Compiled:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, _grid: Any) -> Any:
            return lambda *a, **k: found.append((self.name, self.kernel.run(*a, grid=(1,), warmup=True, **k)))

    names = ("statistics_kernel", "finish_kernel", "rows_kernel", "values_kernel")
    triton.runtime.driver.set_active(_Sm90())
    with mock.patch.multiple(quantise_kernel, **{n: Compiled(n, getattr(quantise_kernel, n)) for n in names}):
        quantise.quantise(x, x, x, blocks, 0.1, plan.key_ok, scores)
    yield from found


def count(cubin: bytes, *words: str) -> dict[str, int]:
    """How often instructions stand in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([BINARIES / "nvdisasm", file.name], capture_output=True, text=True).stdout
    return {word.lower(): len(re.findall(rf"\b{word}\b", code)) for word in words}


def problem_of(case: Case, figures: Figures, moves: dict[str, int]) -> str:
    """What is wrong with the machine code of a case, "" when it is as it must be; moves: what `count` found."""
    wanted = dict(spills=0, stack=0, waits=WAITS) | case.wgmma
    found = dataclasses.asdict(figures) | moves
    wrong = [f"{name} must be {value}" for name, value in wanted.items() if found[name] != value]
    most = dict(shfl=EXCHANGES, prmt=SHUFFLES if case.key_mask or case.always else 0)
    wrong += [f"{name} must be at most {limit}" for name, limit in most.items() if moves[name] > limit]
    return ", ".join(wrong)


def results(name: str) -> Iterator[tuple[str, str]]:
    """(line, problem) of every kernel of a case."""
    compiled = ([(name, compile_attention(CASES[name]))] if name in CASES else
                ((f"{name} {kernel}", made) for kernel, made in compile_quantise(*QUANTISE_CASES[name])))
    for title, made in compiled:
        figures = read_figures(made.asm["cubin"], made.metadata.shared)
        found = count(made.asm["cubin"], "SHFL", "PRMT", "QGMMA", "IGMMA")
        problem = (problem_of(CASES[name], figures, found) if name in CASES else
                   "spills must be 0" if figures.spills else "")
        text = ", ".join(f"{k} {v}" for k, v in (dataclasses.asdict(figures) | found).items())
        yield f"{title}: {text}", problem


def main() -> int:
    """Compiles the cases asked for and prints a table; 1 when one is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*CASES, *QUANTISE_CASES]
    parser.add_argument("--cases", nargs="*", choices=every, default=every)
    bad = 0
    print(f"triton {triton.__version__}, target sm_90")
    for name in parser.parse_args().cases:
        try:
            for line, problem in results(name):
                bad += bool(problem)
                print(line + (f": {problem}" if problem else ""), flush=True)
        except Exception as error:
            bad += 1
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
