"""8-bit attention for Hopper GPUs in CUDA C++: what of it goes to `cuda/attention_fp8.cu`, launched from here.

It reads what `quantise` wrote, as the Gluon kernel of `fp8` does, and computes the same: any layout, e4m3 or INT8
scores, but no window and no key mask. Importing this module needs neither NVRTC nor a GPU.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import hopper_cuda, nvrtc
from .blocks import Blocks
from .hopper_plan import QUERY_BLOCK, Plan
from .quantise import Quantised
from .starting import Starting

__all__ = ["attend_cuda", "fp8_cuda_reasons", "starting", "takes_cuda"]

starting = Starting("the 8-bit kernel in CUDA C++", "the one in Gluon")

# Blocks in flight, keys and values together.
STAGES = 8
_SCALES = ("query_scale", "key_scale", "value_scale", "shift")


class _Arguments(ctypes.Structure):
    """`Arguments` of the source under EIGHT_BITS: those of the bf16 kernel, and the scales."""

    _fields_ = hopper_cuda.filled([
        *hopper_cuda.FIELDS, ("key_blocks", ctypes.c_int32), *((name, ctypes.c_void_p) for name in _SCALES),
    ])


def fp8_cuda_reasons(blocks: Blocks, plan: Plan) -> list[str]:
    """Why this kernel cannot run a call that the Gluon kernel can, in words; empty when it can."""
    reasons = [why] if (why := nvrtc.missing()) else []
    for what, there in (("a window", blocks.coordinates), ("a key mask", blocks.key_mask is not None),
                        ("head dims up to 64 only", plan.width != 128)):
        if there:
            reasons.append(f"the 8-bit kernel in CUDA C++ computes no call with {what}")
    return reasons


def takes_cuda(blocks: Blocks, plan: Plan, cuda: bool | None) -> bool:
    """Whether a call goes to this kernel: all that it can run, as it was faster wherever it was measured.

    H200, 75,600 tokens, heads of 128, random lists, quantised before, November 2026, TFLOP/s Gluon -> CUDA C++, taking
    turns. e4m3, density .25: 40 heads 815 -> 863, 12 heads 794 -> 837; .1: 768 -> 785, 762 -> 789. INT8, .25: 773 ->
    840, 752 -> 837; .1: 738 -> 779, 745 -> 794. A random order, 40 heads, density .25, quantising included: e4m3 688
    -> 838, INT8 739 -> 814. Head dims up to 64 are left to Gluon, whose tiles are half as wide there. A call that only
    the machine keeps from this kernel is counted in `fallbacks`.

    Args:
        blocks, plan: of the call.
        cuda: True: this kernel, False: the one in Gluon, None: this one where it can run.

    Raises:
        ValueError: when this kernel is asked for and cannot run the call, with its reasons.
    """
    return starting.takes(cuda, fp8_cuda_reasons(blocks, plan), nvrtc.missing(), "cuda=True")


def variant(dtype: torch.dtype, scores: torch.dtype) -> dict[str, int]:
    """The macros of the source for outputs of one dtype, and queries and keys of another."""
    macros = dict(EIGHT_BITS=1, WIDTH=128, PERMUTED=0, STAGES=STAGES, ARGUMENT_BYTES=ctypes.sizeof(_Arguments),
                  SHARED_BYTES=hopper_cuda.SHARED)
    return macros | ({"FP16": 1} if dtype == torch.float16 else {}) | ({"INT8": 1} if scores == torch.int8 else {})


def attend_cuda(
    quantised: Quantised, blocks: Blocks, plan: Plan, scale: float, query_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`fp8.attend` by the kernel in CUDA C++.

    Args:
        quantised, blocks, plan, scale, query_tokens, dtype: as for `fp8.attend`; `fp8_cuda_reasons` says what is not
            allowed.

    Returns:
        out (B, Lq, H, Dv) and LSE (B, H, Lq), as `block_sparse_attention_fp8`.
    """
    from .portable import LOG2_E, _broadcast_strides, _on_device, launch_order

    B, H, DV, _ = quantised.value.shape
    device, index = quantised.value.device, blocks.query_index
    out = torch.empty(B, query_tokens, H, DV, dtype=dtype, device=device)
    lse = torch.empty(B, H, query_tokens, dtype=torch.float32, device=device)
    tiles = B * H * blocks.query_blocks
    with _on_device(device):
        a = _Arguments()
        macros = variant(dtype, quantised.query.dtype)
        a.query, a.key, a.value = (_describe(x) for x in (quantised.query, quantised.key, quantised.value))
        order = launch_order(plan.whole + plan.boundary, B, H)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        tensors = dict(
            out_rows=out, lse=lse, lists=plan.lists, whole=plan.whole, boundary=plan.boundary, order=order,
            key_lengths=blocks.key_lengths, index=index, counter=counter,
            **{name: getattr(quantised, name) for name in _SCALES})
        steps = [("list", "bhq", _broadcast_strides(plan.lists)), ("count", "bhq", _broadcast_strides(plan.whole))]
        if index is not None:
            steps.append(("index", "bh", _broadcast_strides(index)))
        numbers = dict(heads=H, tokens=query_tokens, query_blocks=blocks.query_blocks, key_blocks=blocks.key_blocks,
                       tiles=tiles, value_dim=DV, scale_log2=scale * LOG2_E)
        numbers |= {f"{name}_{axis}": step for name, axes, found in steps
                    for axis, step in zip(axes, found, strict=False)}
        for name, x in tensors.items():
            setattr(a, name, None if x is None else x.data_ptr())
        for name, number in numbers.items():
            setattr(a, name, number)
        kernel = nvrtc.load("attention_fp8.cu", "attention_fp8", macros, macros["SHARED_BYTES"])
        kernel.launch(min(tiles, processors), hopper_cuda.THREADS, a)
    return out, lse


def _describe(x: Tensor) -> nvrtc.TensorMap:
    """Map of x (B, H, rows, numbers), contiguous, copied 128 x 128 of one head at a time."""
    B, H, rows, numbers = x.shape
    return nvrtc.tensor_map(x, (numbers, rows, H, B), x.stride()[2::-1], (128, QUERY_BLOCK, 1, 1))
