"""CUDA C++ kernels of the package: compiled at run time by NVRTC, kept on disk, launched through the driver.

The sources lie in `kernels/cuda` and need no header but their own. NVRTC comes with PyTorch's CUDA wheels, the driver's
library with the driver: both are called through ctypes, and only when a kernel is wanted. Importing this module needs
neither.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Kernel", "TensorMap", "compile_source", "load", "missing", "tensor_map"]

SOURCES = pathlib.Path(__file__).parent / "cuda"
ARCHITECTURE = "sm_90a"
OPTIONS = (f"-arch={ARCHITECTURE}", "--std=c++17", "-default-device", "--use_fast_math")

# Names of cuda.h.
_FUNC_MAX_DYNAMIC_SHARED = 8
_SWIZZLE_128 = 3
_PROMOTE_L2_256 = 3
_TENSOR_TYPES = {torch.uint8: 0, torch.int8: 0, torch.float8_e4m3fn: 0, torch.float16: 6, torch.float32: 7,
                 torch.bfloat16: 9}


class TensorMap(ctypes.Structure):
    """What a bulk copy must know of a tensor; the driver fills it. Lies at multiples of 64 bytes."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


class Kernel:
    """A compiled kernel on one device.

    Args:
        function: the driver's handle.
        shared: bytes of shared memory of one program.
    """

    def __init__(self, function: ctypes.c_void_p, shared: int) -> None:
        self._function, self._shared = function, shared

    def launch(self, programs: int, threads: int, arguments: ctypes.Structure) -> None:
        """Starts the kernel on the current stream of the current device; it takes one structure by value."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _call("cuLaunchKernel", self._function, programs, 1, 1, threads, 1, 1, self._shared, stream, pointers, None)


@torch.compiler.assume_constant_result  # what a compiler traces ends here
def missing() -> str:
    """Why kernels in CUDA C++ cannot be compiled and started here, "" when they can."""
    return _missing()


@functools.cache
def _missing() -> str:
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA, which brings the compiler NVRTC along"
    for what, find in (("compiler NVRTC", _nvrtc), ("CUDA driver", _driver)):
        try:
            find()
        except OSError as error:
            return f"the {what} cannot be loaded: {str(error).splitlines()[0]}"
    return ""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC: that of the wheels beside PyTorch if there, else the system's."""
    major = (torch.version.cuda or "13").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or [] if spec else []):
        for found in sorted(glob.glob(f"{root}/*/lib/libnvrtc.so.{major}*")):
            # NVRTC looks for its second half by name only, so that it must be there before.
            for half in glob.glob(f"{os.path.dirname(found)}/libnvrtc-builtins.so.{major}*"):
                ctypes.CDLL(half, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(found)
    return ctypes.CDLL(f"libnvrtc.so.{major}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    """A function of the driver.

    Raises:
        RuntimeError: with the driver's word for what went wrong.
    """
    driver = _driver()
    if status := getattr(driver, name)(*arguments):
        word = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(word))
        raise RuntimeError(f"{name}: {(word.value or b'unknown error').decode()} ({status})")


def compile_source(
    name: str, defines: Mapping[str, int], options: Sequence[str] = OPTIONS
) -> tuple[bytes, str]:
    """Compiles one of the sources; needs NVRTC, but neither a GPU nor the driver.

    Args:
        name: file in `kernels/cuda`.
        defines: macros that choose the variant.
        options: of NVRTC.

    Returns:
        the machine code and what the compiler said.

    Raises:
        RuntimeError: when it does not compile, with the compiler's words.
    """
    nvrtc = _nvrtc()
    headers = sorted(SOURCES.glob("*.cuh"))
    names, texts = ((ctypes.c_char_p * len(headers))(*(word(path) for path in headers))
                    for word in (lambda path: path.name.encode(), lambda path: path.read_bytes()))
    program = ctypes.c_void_p()
    _checked(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), (SOURCES / name).read_bytes(), name.encode(),
                                             len(headers), texts, names))
    try:
        words = [*options, *(f"-D{key}={value}" for key, value in sorted(defines.items()))]
        status = nvrtc.nvrtcCompileProgram(program, len(words),
                                           (ctypes.c_char_p * len(words))(*(word.encode() for word in words)))
        log = _text(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise RuntimeError(f"{name} does not compile: {log.strip()}")
        return _text(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _checked(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _cubin(name: str, defines: Mapping[str, int]) -> bytes:
    """The machine code of a variant, from disk if it was compiled before by the same compiler from the same text."""
    version = (ctypes.c_int(), ctypes.c_int())
    _checked(_nvrtc(), _nvrtc().nvrtcVersion(*(ctypes.byref(number) for number in version)))
    content = hashlib.sha256(repr((name, sorted(defines.items()), OPTIONS, [x.value for x in version])).encode())
    for path in (SOURCES / name, *sorted(SOURCES.glob("*.cuh"))):
        content.update(path.read_bytes())
    # Beside Triton's own: one folder to clear, one variable to move it.
    folder = pathlib.Path(os.environ.get("TRITON_CACHE_DIR") or pathlib.Path.home() / ".triton" / "cache")
    kept = folder / f"dit_sparse-{content.hexdigest()}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        code, _ = compile_source(name, defines)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            file.write(code)
        os.replace(file.name, kept)  # another process sees all of it or nothing
    except OSError:
        pass  # a folder that cannot be written costs a compile per process
    return code


def load(name: str, function: str, defines: Mapping[str, int], shared: int) -> Kernel:
    """A kernel of one of the sources on the current device, compiled on first use.

    Args:
        name: file in `kernels/cuda`. function: the kernel's name in it.
        defines: macros that choose the variant.
        shared: bytes of shared memory of one program.

    Raises:
        RuntimeError: when it does not compile or load.
    """
    return _loaded(torch.cuda.current_device(), name, function, tuple(sorted(defines.items())), shared)


@functools.cache
def _loaded(device: int, name: str, function: str, defines: tuple[tuple[str, int], ...], shared: int) -> Kernel:
    torch.cuda.synchronize(device)  # makes the device's context current in this thread, once
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), _cubin(name, dict(defines)))
    _call("cuModuleGetFunction", ctypes.byref(handle), module, function.encode())
    _call("cuFuncSetAttribute", handle, _FUNC_MAX_DYNAMIC_SHARED, shared)
    return Kernel(handle, shared)


def tensor_map(x: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """How bulk copies find boxes of a tensor, which come to lie in shared memory with the 128-byte swizzle.

    Args:
        x: where it begins; 16-byte aligned.
        shape: sizes, innermost first, 3 to 5 of them; what a box holds beyond them is read as 0 and never written.
        strides: in elements, of all dimensions but the innermost, whose step is 1; multiples of 16 bytes.
        box: elements copied at once along each dimension, the innermost at most 128 bytes.

    Raises:
        RuntimeError: when the driver refuses them.
    """
    rank, size = len(shape), x.element_size()
    # The driver writes to a place aligned to 64 bytes (128 since CUDA 13); ctypes aligns a structure of bytes to less.
    raw = (ctypes.c_char * (2 * ctypes.sizeof(TensorMap)))()
    offset = -ctypes.addressof(raw) % 128
    _call("cuTensorMapEncodeTiled", ctypes.byref(raw, offset), _TENSOR_TYPES[x.dtype], rank,
          ctypes.c_void_p(x.data_ptr()), (ctypes.c_uint64 * rank)(*shape),
          (ctypes.c_uint64 * (rank - 1))(*(step * size for step in strides)),
          (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank), 0, _SWIZZLE_128, _PROMOTE_L2_256, 0)
    return TensorMap.from_buffer_copy(raw, offset)
