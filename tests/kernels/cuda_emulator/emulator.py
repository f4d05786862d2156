"""The kernels in CUDA C++ on a CPU: their source, compiled by the system's C++ compiler over stand-ins for PTX."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import fp8_cuda, hopper_cuda, nvrtc, portable

HERE = pathlib.Path(__file__).parent


class _Kernel:
    """What `nvrtc.load` returns, here."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def launch(self, programs: int, _threads: int, arguments: ctypes.Structure) -> None:
        room = ctypes.create_string_buffer(ctypes.sizeof(arguments) + 64)
        at = -(-ctypes.addressof(room) // 64) * 64
        ctypes.memmove(at, ctypes.addressof(arguments), ctypes.sizeof(arguments))
        self.library.run(ctypes.c_void_p(at), programs)


def load(name: str, function: str, macros: Mapping[str, int], _shared: int) -> _Kernel:
    return _built(name, function, tuple(sorted(macros.items())))


@functools.cache
def _built(name: str, function: str, macros: tuple[tuple[str, int], ...]) -> _Kernel:
    with tempfile.TemporaryDirectory() as folder:
        for source in (*nvrtc.SOURCES.iterdir(), HERE / "common.cuh", HERE / "main.cpp"):  # the stand-ins come last
            shutil.copy(source, folder)
        library = pathlib.Path(folder, "kernel.so")
        subprocess.run(["g++", "-O2", "-std=c++17", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-pthread",
                        f'-DSOURCE="{name}"', f"-DKERNEL={function}", *(f"-D{key}={value}" for key, value in macros),
                        str(pathlib.Path(folder, "main.cpp")), "-o", str(library)], check=True)
        return _Kernel(ctypes.CDLL(str(library)))


def tensor_map(x: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> nvrtc.TensorMap:
    """What the stand-ins read of a tensor; refuses what the driver would."""
    steps = [step * x.element_size() for step in strides]
    assert x.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps) and box[0] * x.element_size() <= 128
    found = nvrtc.TensorMap()
    for i, word in enumerate((x.data_ptr(), *shape, *steps, *box, x.element_size())):
        found.words[i] = word
    return found


def gather(key: Tensor, value: Tensor, index: Tensor, _slots: int) -> tuple[Tensor, Tensor]:
    """`portable.gather_slots` by PyTorch."""
    def put(x: Tensor) -> Tensor:
        slots = index.expand(x.shape[0], x.shape[2], -1)[..., None]
        rows = x.transpose(1, 2).gather(2, slots.clamp(min=0).expand(-1, -1, -1, x.shape[3]))
        return torch.where(slots >= 0, rows, 0).contiguous().transpose(1, 2)

    return put(key), put(value)


@contextlib.contextmanager
def emulated(processors: int = 2) -> Iterator[Any]:
    """Within, `block_sparse_attention_cuda` and `attend_cuda` run CPU tensors, as on so many multiprocessors."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in = types.SimpleNamespace(TensorMap=nvrtc.TensorMap, tensor_map=tensor_map, load=load)
        for module in (hopper_cuda, fp8_cuda):
            patch.setattr(module, "nvrtc", stand_in)
        patch.setattr(portable, "gather_slots", gather)
        patch.setattr(torch.cuda, "get_device_properties",
                      lambda _: types.SimpleNamespace(multi_processor_count=processors))
        yield hopper_cuda.block_sparse_attention_cuda
