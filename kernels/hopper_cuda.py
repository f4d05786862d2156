"""Hopper kernel in CUDA C++: block-sparse attention forward with LSE for compute capability 9.0, launched from here.

It runs what most calls are: blocks of 128 queries by 128 or 64 keys without window and key mask, in raster order or
through an index, and soft blocks with them. The source is `cuda/attention.cu`, the compiler `nvrtc`. Importing this
module needs neither.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import nvrtc
from .blocks import Blocks, SoftMeans, empty_results
from .hopper_plan import (
    QUERY_BLOCK,
    Tuning,
    bulk_readable,
    bulk_strides,
    common_box,
    hopper_reasons,
    kind_of,
    prefers_cuda,
)
from .starting import Starting

__all__ = ["block_sparse_attention_cuda", "cuda_reasons", "note", "soft_starting", "starting", "takes_cuda",
           "takes_soft", "with_soft_blocks"]

starting = Starting("the Hopper kernel in CUDA C++", "the kernel in Gluon")
soft_starting = Starting("the Hopper kernel in CUDA C++ with soft blocks", "listed blocks and a merge of soft ones")

THREADS = 384
SHARED = 232448
_POINTERS = ("query_rows", "out_rows", "lse", "lists", "whole", "boundary", "order", "key_lengths", "index", "counter")
_STRIDES = ("list_b", "list_h", "list_q", "count_b", "count_h", "count_q", "index_b", "index_h", "query_b", "query_n",
            "query_h")
_NUMBERS = ("heads", "tokens", "query_blocks", "tiles", "head_dim", "value_dim")


MOST_SOFT_BLOCKS = 2048  # which blocks a tile lists is a bit each in shared memory
STEP = 128  # keys, or means, that are computed together


def filled(fields: list[Any]) -> list[Any]:
    """The fields, and what fills a structure up to a multiple of 64 bytes, at which the sources' structures lie."""
    plain = type("_Plain", (ctypes.Structure,), {"_fields_": fields})
    return [*fields, ("rest", ctypes.c_char * (-ctypes.sizeof(plain) % 64))]


FIELDS: list[Any] = [
    *((name, nvrtc.TensorMap) for name in ("query", "key", "value", "out")),
    *((name, ctypes.c_void_p) for name in _POINTERS),
    *((name, ctypes.c_int64) for name in _STRIDES),
    *((name, ctypes.c_int32) for name in _NUMBERS),
    ("scale_log2", ctypes.c_float),
]


class _Arguments(ctypes.Structure):
    """`Arguments` of the source."""

    _fields_ = filled(FIELDS)


class _SoftArguments(ctypes.Structure):
    """The same under SOFT."""

    _fields_ = filled([
        *FIELDS[:4], *((name, nvrtc.TensorMap) for name in ("mean_key", "mean_value")), *FIELDS[4:],
        ("chunks", ctypes.c_int32), *((name, ctypes.c_void_p) for name in ("mean_bias", "soft_heads")),
        *((name, ctypes.c_int64) for name in ("bias_b", "bias_h")),
    ])


def cuda_reasons(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> list[str]:
    """Why this kernel cannot run these tensors, in words; empty when it can."""
    reasons = hopper_reasons(query, key, value, blocks)
    if why := nvrtc.missing():
        reasons.append(why)
    for what, there in (("a window", blocks.coordinates), ("a key mask", blocks.key_mask is not None),
                        ("tiles copied as boxes", common_box(blocks) is not None),
                        ("an index on one side only", (blocks.query_index is None) != (blocks.key_index is None))):
        if there:
            reasons.append(f"the CUDA kernel computes no call with {what}")
    return reasons


def takes_cuda(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, tuning: Tuning) -> bool:
    """Whether a call goes to this kernel. One that would, but for the machine, is counted in `fallbacks`.

    Args:
        query, key, value, blocks: as for `block_sparse_attention_cuda`.
        tuning: whether it is asked for, or tiles copied as boxes are.

    Raises:
        ValueError: when this kernel is asked for and cannot run the call, with its reasons.
    """
    width = max(query.shape[3], value.shape[3])
    if tuning.cuda is None and not prefers_cuda(blocks, width, ragged_boxes=tuning.ragged_boxes):
        return False
    return starting.takes(tuning.cuda, cuda_reasons(query, key, value, blocks), nvrtc.missing(), "Tuning(cuda=True)")


def takes_soft(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> bool:
    """Whether soft blocks of a call are computed by this kernel, beside the listed ones. What keeps them from it is
    counted when the listed ones are computed."""
    wanted = blocks.key_blocks <= MOST_SOFT_BLOCKS and prefers_cuda(blocks, max(query.shape[3], value.shape[3]))
    return wanted and not cuda_reasons(query, key, value, blocks)


def with_soft_blocks(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, soft: SoftMeans,
    otherwise: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """A call that `takes_soft`; what is run where the kernel does not start, counted in `fallbacks`: `otherwise`."""
    return soft_starting.run(
        kind_of(query, value, blocks),
        lambda: block_sparse_attention_cuda(query, key, value, blocks, scale, soft=soft), otherwise)


def note() -> str:
    """What to know about this kernel on a machine whose Hopper kernel runs, for the list of backends."""
    if why := nvrtc.missing():
        return f"; all calls run on the kernel in Gluon, as {why}"
    return "".join(f"; {len(each.failed)} kind(s) of calls run on {each.other}: {next(iter(each.failed.values()))}"
                   for each in (starting, soft_starting) if each.failed)


def variant(
    dtype: torch.dtype, head_dim: int, value_dim: int, permuted: bool, key_block: int = QUERY_BLOCK,
    soft: bool = False,
) -> dict[str, int]:
    """The macros of the source for a call."""
    width = 64 if max(head_dim, value_dim) <= 64 else 128
    # Beside the queries of two tiles, five blocks of 128 numbers a token fill the shared memory.
    found = dict(WIDTH=width, STAGES=5 if width == 128 else 8, PERMUTED=int(permuted), KEY_BLOCK=key_block,
                 ARGUMENT_BYTES=ctypes.sizeof(_SoftArguments if soft else _Arguments), SHARED_BYTES=SHARED)
    return found | ({"FP16": 1} if dtype == torch.float16 else {}) | ({"SOFT": MOST_SOFT_BLOCKS} if soft else {})


def block_sparse_attention_cuda(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, tuning: Tuning | None = None,
    soft: SoftMeans | None = None,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention by the Hopper kernel in CUDA C++.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D), value (B, Lk, H, Dv): bfloat16 or float16, any strides; strides that
            bulk copies cannot read cost a copy.
        blocks: which key blocks each query block computes; `cuda_reasons` says what is not allowed.
        scale: factor of the scores, positive.

    Expert args:
        tuning: of it, whether programs are persistent (they are unless told not to be), and the order of tiles.
        soft: means of all blocks, at most `MOST_SOFT_BLOCKS`; those that are not listed enter the softmax as theirs.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, LSE (B, H, Lq) float32.
    """
    from .portable import LOG2_E, _broadcast_strides, _on_device, gather_slots, launch_order

    tuning = tuning or Tuning()
    persistent = tuning.persistent is not False
    B, Lq, H, D = query.shape
    DV = value.shape[3]
    out, lse = empty_results(query, key, value)
    if not out.numel() or not key.numel():
        return out, lse
    index = blocks.query_index
    with _on_device(query.device):
        if blocks.key_index is not None:
            key, value = gather_slots(key, value, blocks.key_index, blocks.key_blocks * blocks.key_block)
        key, value = bulk_readable(key), bulk_readable(value)
        query = bulk_readable(query)
        a = _Arguments() if soft is None else _SoftArguments()
        macros = variant(query.dtype, D, DV, index is not None, blocks.key_block, soft is not None)
        tiles = B * H * blocks.query_blocks
        a.key, a.value = (_describe(x, blocks.key_block) for x in (key, value))
        if index is None:
            a.query, a.out = _describe(query, QUERY_BLOCK), _describe(out, 16)
        order = launch_order(blocks.whole + blocks.boundary, B, H, longest_first=tuning.longest_first)
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        # Persistent programs take the next free tile; on an H200 (November 2026) 0 to 1 % better than every n-th.
        counter = torch.zeros(1, dtype=torch.int32, device=query.device) if persistent else None
        tensors = (query, out, lse, blocks.lists, blocks.whole, blocks.boundary, order, blocks.key_lengths, index,
                   counter)
        for name, x in zip(_POINTERS, tensors, strict=True):
            setattr(a, name, None if x is None else x.data_ptr())
        steps = (*_broadcast_strides(blocks.lists)[:3], *_broadcast_strides(blocks.whole),
                 *((0, 0) if index is None else _broadcast_strides(index)[:2]), *query.stride()[:3])
        for name, number in zip(_STRIDES, steps, strict=True):
            setattr(a, name, number)
        for name, number in zip(_NUMBERS, (H, Lq, blocks.query_blocks, tiles, D, DV), strict=True):
            setattr(a, name, number)
        a.scale_log2 = scale * LOG2_E
        kept = None if soft is None else _add_means(a, soft, blocks, query.dtype, scale)
        kernel = nvrtc.load("attention.cu", "attention", macros, macros["SHARED_BYTES"])
        kernel.launch(min(tiles, processors) if persistent else tiles, THREADS, a)
        del kept  # what the launch has read by address
    return out, lse


def _add_means(a: Any, soft: SoftMeans, blocks: Blocks, dtype: torch.dtype, scale: float) -> list[Tensor | None]:
    """Writes what the kernel must know of the blocks' means to its arguments; returns what must live until it started.
    """
    assert blocks.key_blocks <= MOST_SOFT_BLOCKS  # more bits than there is room for
    # (B, H, blocks, D) as (B, blocks, H, D), the dimensions of keys and values
    means = [bulk_readable(x.to(dtype)).transpose(1, 2) for x in (soft.key, soft.value)]
    a.mean_key, a.mean_value = (_describe(x, blocks.key_block) for x in means)
    a.chunks = -(-blocks.key_blocks // STEP)
    # Scores are in natural units: the kernel multiplies them by the scale.
    bias = soft.counts.to(torch.float32).log() / scale
    bias = torch.nn.functional.pad(bias, (0, a.chunks * STEP - blocks.key_blocks), value=-torch.inf)
    B, H = soft.key.shape[:2]
    a.mean_bias = bias.data_ptr()
    a.bias_b, a.bias_h = bias.expand(B, H, -1).stride()[:2]
    flags = None
    if soft.heads is not None:
        flags = torch.zeros(H, dtype=torch.int32, device=bias.device).index_fill_(0, soft.heads, 1)
        a.soft_heads = flags.data_ptr()
    return [*means, bias, flags]


def _describe(x: Tensor, rows: int) -> nvrtc.TensorMap:
    """Map of x (B, L, H, D), copied `rows` tokens of one head and 64 numbers of each at a time."""
    B, L, H, D = x.shape
    b, h, n, _ = bulk_strides(x)
    return nvrtc.tensor_map(x, (D, L, H, B), (n, h, b), (64, rows, 1, 1))
