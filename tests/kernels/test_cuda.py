"""The kernel in CUDA C++: its source on a CPU, its machine code without a GPU, and what it leaves to the other one."""

import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from dit_sparse.kernels import nvrtc
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import Tuning
from tests.gpu import random_cases
from tests.kernels.cases import Case, build, check
from tests.kernels.toolchain import needs_assembler, needs_triton

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SCRIPT = pathlib.Path(__file__).with_name("offline_cuda.py")


def nvrtc_missing() -> bool:
    try:
        nvrtc._nvrtc()
    except OSError:
        return True
    return False


@needs_triton
@needs_compiler
@pytest.mark.parametrize(("kinds", "persistent"), [((1, 3, 15), True), ((0, 11), False)])
def test_the_source_computes_random_calls(kinds: tuple[int, ...], persistent: bool) -> None:
    """Raster, permuted, segments and head dims that do not fill shared memory; short blocks and empty lists in all."""
    from tests.kernels.cuda_emulator.emulator import emulated

    lines: list[str] = []
    with emulated() as attention:
        def attend(drawn: random_cases.Drawn) -> tuple[torch.Tensor, torch.Tensor]:
            inputs = drawn.inputs
            return attention(inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask), inputs.scale,
                             Tuning(persistent=persistent))

        seeds = [kind + round * len(random_cases.KINDS) for round in range(2) for kind in kinds]
        totals = random_cases.run(seeds, "cpu", lines.append, most=300, kernels=lambda _: {"cuda": attend})
    assert lines == [] and totals["cuda"]["calls"] == len(seeds)


@needs_triton
@needs_compiler
def test_the_ring_and_the_tiles_go_round() -> None:
    """More blocks in a list than the ring holds, more tiles than programs."""
    from tests.kernels.cuda_emulator.emulator import emulated

    inputs = build(Case(513, 1023, head_dim=64, dtype=torch.bfloat16, query_block=128, key_block=128), "cpu")
    with emulated(processors=1) as attention:
        found = attention(inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask), inputs.scale)
    assert check(inputs, *found) == ""


@pytest.mark.slow
@needs_assembler
@pytest.mark.skipif(nvrtc_missing(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
def test_compiles_without_spills_and_with_overlapped_products() -> None:
    cases = ["bf16-128", "bf16-128-permuted", "fp16-64"]
    done = subprocess.run([sys.executable, str(SCRIPT), "--cases", *cases], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("spills 0") == len(cases), done.stdout + done.stderr[-2000:]


@needs_triton
def test_says_what_it_leaves_to_the_other_kernel() -> None:
    from dit_sparse.kernels.hopper_cuda import cuda_reasons

    for changes, words in ((dict(window=1), "a window"), (dict(masked=True), "a key mask"),
                           (dict(key_block=64), "blocks of 64 keys")):
        inputs = build(Case(**{**dict(dtype=torch.bfloat16, query_block=128, key_block=128), **changes}), "cpu")
        reasons = cuda_reasons(inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask, inputs.key_mask))
        assert any(words in reason for reason in reasons)
