"""What of Triton this machine has, as marks for tests that need it."""

import importlib.metadata
import importlib.util
import pathlib

import pytest

_SPEC = importlib.util.find_spec("triton")
VERSION = tuple(map(int, importlib.metadata.version("triton").split(".")[:3])) if _SPEC else ()
_ASSEMBLER = pathlib.Path(_SPEC.origin).parent / "backends/nvidia/bin/ptxas" if _SPEC and _SPEC.origin else None

needs_triton = pytest.mark.skipif(not VERSION, reason="triton is not installed")
interprets_numpy_2_4 = pytest.mark.skipif(bool(VERSION) and VERSION < (3, 7, 1),
                                          reason="triton < 3.7.1 does not interpret with numpy 2.4")
needs_assembler = pytest.mark.skipif(_ASSEMBLER is None or not _ASSEMBLER.exists(),
                                     reason="needs triton with NVIDIA's assembler")
