"""Hopper kernel: block-sparse attention forward with LSE for compute capability 9.0, launched from here.

The kernel itself is `hopper_kernel`, what it can run and is launched with `hopper_plan`; calls for which it is faster
go to its twin in CUDA C++, `hopper_cuda`. Imported only when used: importing this module needs triton 3.6 or later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .blocks import Blocks, empty_results
from .hopper_cuda import block_sparse_attention_cuda, starting, takes_cuda
from .hopper_kernel import MAX_REGISTERS, attention_kernel
from .hopper_plan import (
    QUERY_BLOCK,
    Plan,
    Tuning,
    bulk_readable,
    bulk_strides,
    half_of,
    hopper_reasons,
    kind_of,
    make_plan,
    prefers_persistent,
    runs_persistent,
)
from .portable import LOG2_E, _broadcast_strides, _on_device, gather_slots, launch_order

__all__ = ["block_sparse_attention_hopper", "hopper_reasons"]


def block_sparse_attention_hopper(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, tuning: Tuning | None = None
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention by the Hopper kernel.

    Raster layouts are read and written straight from and to the activations by bulk copies. Queries and outputs of a
    permuted layout go through its index, each row once; its keys and values are put in slot order once before. Tiles
    that fill their blocks and divide the grid are copied straight from the activations too.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D), value (B, Lk, H, Dv): bfloat16 or float16, any strides; strides that
            bulk copies cannot read cost a copy.
        blocks: which key blocks each query block computes; `hopper_reasons` says what is not allowed.
        scale: factor of the scores, positive.

    Expert args:
        tuning: how to compute it; None: as measured to be fastest.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, LSE (B, H, Lq) float32.

    Raises:
        ValueError: when `tuning` asks for the kernel in CUDA C++ and that cannot run the call.
    """
    tuning = tuning or Tuning()
    call = (query, key, value, blocks, scale, tuning)
    if not takes_cuda(query, key, value, blocks, tuning):
        return _by_gluon(*call)
    if tuning.cuda:
        return block_sparse_attention_cuda(*call)
    return starting.run(kind_of(query, value, blocks), lambda: block_sparse_attention_cuda(*call),
                        lambda: _by_gluon(*call))


def _by_gluon(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, tuning: Tuning
) -> tuple[Tensor, Tensor]:
    out, lse = empty_results(query, key, value)
    if not out.numel() or not key.numel():
        return out, lse
    with _on_device(query.device):
        programs = torch.cuda.get_device_properties(query.device).multi_processor_count
        for arguments, constants, tiles in launches(query, key, value, blocks, scale, out, lse, tuning):
            grid = (min(tiles, programs) if constants["PERSISTENT"] else tiles,)
            attention_kernel[grid](*arguments, **constants, num_warps=4, maxnreg=MAX_REGISTERS)
    return out, lse


def launches(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, out: Tensor, lse: Tensor,
    tuning: Tuning | None = None,
) -> Iterator[tuple[list[Any], dict[str, Any], int]]:
    """Arguments, compile-time values and number of tiles of each launch: one, or one per batch element with tiles.

    A descriptor has five dimensions at most, which the grid, the heads and the head dim use up.
    """
    tuning = tuning or Tuning()
    plan = make_plan(blocks, key.shape[1], query.shape[3], value.shape[3], ragged_boxes=tuning.ragged_boxes)
    persistent = prefers_persistent(blocks, plan) if tuning.persistent is None else tuning.persistent
    permuted = plan.box is None and blocks.query_index is not None
    if plan.box is None and blocks.key_index is not None:
        # Slots without a key that may be seen are written as 0.
        index = blocks.key_index if plan.key_ok is None else torch.where(plan.key_ok, blocks.key_index, -1)
        key, value = gather_slots(key, value, index, blocks.key_blocks * blocks.key_block)
    elif blocks.key_mask is not None:
        # What is masked may be NaN, and 0 * NaN is NaN.
        value = torch.where(blocks.key_mask[..., None, None], value, 0)
    key, value = bulk_readable(key), bulk_readable(value)
    if permuted:
        query = query if query.stride(3) == 1 else query.contiguous()
    else:
        query = bulk_readable(query)
    constants = dict(
        D=query.shape[3], DV=value.shape[3], WIDTH=plan.width, BN=blocks.key_block, STAGES=plan.stages,
        PERMUTED=permuted, PERSISTENT=persistent and runs_persistent(blocks, plan),
        COORDINATE_COUNT=blocks.coordinates, ALWAYS=blocks.always is not None,
        TILE=None if plan.box is None else plan.box[3:6])
    if plan.box is None:
        tiles = query.shape[0] * query.shape[2] * blocks.query_blocks
        yield _arguments(query, key, value, blocks, plan, scale, out, lse, tuning), constants, tiles
        return
    for b in range(query.shape[0]):
        q, k, v, o, sums = (x[b : b + 1] for x in (query, key, value, out, lse))
        yield (_arguments(q, k, v, blocks, plan.element(b), scale, o, sums, tuning), constants,
               query.shape[2] * blocks.query_blocks)


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, plan: Plan, scale: float, out: Tensor, lse: Tensor,
    tuning: Tuning,
) -> list[Any]:
    """Positional arguments of `attention_kernel`."""
    B, Lq, H, _ = query.shape
    rows, width = QUERY_BLOCK // 2, plan.width
    index = None if plan.box is not None else blocks.query_index
    grid = (0, 0, 0, 0, 0, 0, 0)
    boxes: list[TensorDescriptor | None] = [None] * 4
    activations: list[Any] = [query, key, value, out]
    if plan.box is not None:
        frames, height, columns, *tile, video_start, text_start, text = plan.box
        grid = (frames, height, columns, plan.video_blocks, video_start, text_start, text)
        half = half_of(tile)
        boxes = [_describe_tiles(x, plan.box, shape, width)
                 for x, shape in zip(activations, (half, tile, tile, half), strict=True)]
        activations = [x[:, text_start : text_start + text] for x in activations]
    sizes = (rows, blocks.key_block, blocks.key_block, rows)
    # An index is read, and written through, by pointers.
    pointers = (index is not None, False, False, index is not None)
    queries, keys, values, outputs = (
        x if pointer else _describe(x, size, width)
        for x, size, pointer in zip(activations, sizes, pointers, strict=True))
    index_strides, flag_strides = ((0, 0) if x is None else _broadcast_strides(x)[:2] for x in (index, plan.flags))
    return [
        queries, keys, values, outputs, lse, plan.lists, plan.whole, plan.boundary, plan.exempt,
        launch_order(plan.whole + plan.boundary, B, H, longest_first=tuning.longest_first), index,
        blocks.key_lengths, plan.flags,
        blocks.key_coordinates, blocks.query_low, blocks.query_high, *query.stride()[:3],
        *_broadcast_strides(plan.lists)[:3], *_broadcast_strides(plan.whole), *index_strides, *flag_strides,
        *boxes, *grid, H, Lq, blocks.query_blocks, blocks.query_blocks * QUERY_BLOCK,
        blocks.key_blocks * blocks.key_block, B * H * blocks.query_blocks, scale * LOG2_E,
    ]


def _describe(x: Tensor, rows: int, width: int) -> TensorDescriptor | None:
    """Descriptor of x (B, L, H, D) as (B, H, L, D), copied `rows` tokens of one head at a time; None without tokens."""
    B, L, H, D = x.shape
    return _descriptor(x, [B, H, L, D], bulk_strides(x), [1, 1, rows, width]) if L else None


def _describe_tiles(x: Tensor, box: tuple[int, ...], tile: Sequence[int], width: int) -> TensorDescriptor:
    """Descriptor of the video tokens of x (1, L, H, D) as (frames, rows, columns, H, D), copied tile by tile."""
    frames, height, columns, *_, video_start, _, _ = box
    _, heads, step, _ = bulk_strides(x)
    shape = [frames, height, columns, x.shape[2], x.shape[3]]
    strides = [height * columns * step, columns * step, step, heads, 1]
    return _descriptor(x[:, video_start:], shape, strides, [*tile, 1, width])


def _descriptor(x: Tensor, shape: list[int], strides: list[int], box: list[int]) -> TensorDescriptor:
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    return TensorDescriptor(x, shape, strides, box, gl.NVMMASharedLayout.get_default_for(box, dtype))
