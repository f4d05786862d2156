"""Runs the portable kernel's tests in Triton's interpreter.

TRITON_INTERPRET is read when triton is imported and breaks torch.compile in the same process: hence the processes.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.kernels.toolchain import interprets_numpy_2_4, needs_triton

SUITE = pathlib.Path(__file__).with_name("interpreted_portable.py")


@pytest.mark.slow
@needs_triton
@interprets_numpy_2_4
@pytest.mark.parametrize("part", ["test_sizes", "test_layouts"])
def test_portable_kernel_in_the_interpreter(part: str) -> None:
    # Compiled kernels and interpreted ones must not meet in one cache, nor two workers in one report.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part, str(SUITE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=SUITE.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
