"""Compiles the kernels for Hopper without a GPU: nothing may spill, and matrix products must stay overlapped."""

import pathlib
import subprocess
import sys

import pytest

from tests.kernels.toolchain import needs_assembler

SCRIPT = pathlib.Path(__file__).with_name("offline_compile.py")


@pytest.mark.slow
@needs_assembler
@pytest.mark.parametrize("case", ["bf16-128", "bf16-128-everything", "fp16-64"])
def test_portable_kernel_compiles_for_hopper_without_spills(case: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--cases", case], capture_output=True, text=True)
    assert done.returncode == 0 and "spills 0" in done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
@needs_assembler
def test_hopper_kernel_compiles_without_spills_and_with_overlapped_products() -> None:
    """One variant of each kind of order; `python tests/kernels/offline_compile.py` compiles all of them."""
    cases = ["hopper-bf16-128-128-raster", "hopper-bf16-everything", "hopper-fp16-64-tiles-ragged",
             "hopper-bf16-persistent"]
    done = subprocess.run([sys.executable, str(SCRIPT), "--cases", *cases], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("spills 0") == done.stdout.count("waits 12") == len(cases), done.stdout
