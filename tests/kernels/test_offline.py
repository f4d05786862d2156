"""Compiles the portable kernel for Hopper without a GPU: nothing may spill to memory."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("offline_compile.py")
TRITON = importlib.util.find_spec("triton")
ASSEMBLER = pathlib.Path(TRITON.origin).parent / "backends/nvidia/bin/ptxas" if TRITON and TRITON.origin else None


@pytest.mark.slow
@pytest.mark.skipif(ASSEMBLER is None or not ASSEMBLER.exists(), reason="needs triton with NVIDIA's assembler")
@pytest.mark.parametrize("case", ["bf16-128", "bf16-128-everything", "fp16-64"])
def test_portable_kernel_compiles_for_hopper_without_spills(case: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--cases", case], capture_output=True, text=True)
    assert done.returncode == 0 and "spills 0" in done.stdout, done.stdout + done.stderr[-2000:]
