"""Block-sparse attention forward with LSE in 8 bits for Hopper GPUs: quantise, then one kernel.

The kernel is `fp8_kernel`, or its twin in CUDA C++, `fp8_cuda`; what they read is made by `quantise`. Weights and
values are 8-bit floats (e4m3); queries and keys are e4m3 or 8-bit integers (INT8), as `scores` says. Both have twice
the matrix rate of bf16, at an error of a few per cent. In e4m3 queries, keys, weights and values are each rounded by at
most 2^-4 of themselves: on white noise with scores of unit variance together by 2 * 2^-4 / sqrt(3) = 7 % (root mean
square, relative to the output). INT8 rounds queries and keys by at most a 254th of the largest in their block of 128:
by less than e4m3 where numbers are more than a sixteenth of the largest, by more where they are smaller. `python -m
dit_sparse.eval.eight_bits` compares both.
Importing this module needs neither triton nor a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks
from .fp8_cuda import attend_cuda, starting, takes_cuda
from .hopper_plan import Plan, hopper_reasons, make_plan
from .quantise import BLOCK, Quantised, dequantise, quantise, quantise_reference, stored_dtype
from .reference import attention_reference

__all__ = ["attend", "attend_gluon", "block_sparse_attention_fp8", "block_sparse_fp8_reference", "fp8_plan",
           "fp8_reasons"]

# What queries and keys are rounded to unless a call says it: a name of `quantise.SCORES`.
SCORES = "e4m3"
# Blocks of keys, and of values, in flight: with queries and outputs they take 176 of 227 kB of shared memory.
STAGES = 4


def fp8_reasons(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks | None = None) -> list[str]:
    """Why the fp8 kernel cannot run these tensors, in words; empty when it can."""
    reasons = hopper_reasons(query, key, value)
    if blocks is not None:
        for name, size in (("query", blocks.query_block), ("key", blocks.key_block)):
            if size != BLOCK:
                reasons.append(f"{name} block size {size} is not {BLOCK}")
    return reasons


def fp8_plan(blocks: Blocks, key_tokens: int, head_dim: int, value_dim: int) -> Plan:
    """What the kernel is launched with: the plan of the bf16 kernel, without tiles of the grid.

    Quantising writes the slots of tiles one after the other, as of any other order.
    """
    plain = dataclasses.replace(blocks, query_box=None, key_box=None)
    return make_plan(plain, key_tokens, head_dim, value_dim)


def block_sparse_attention_fp8(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, *, scores: str = SCORES,
    cuda: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention whose products are computed in 8 bits.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D), value (B, Lk, H, Dv): bfloat16 or float16, any strides; D and Dv
            multiples of 8 up to 128.
        blocks: which key blocks each query block computes, blocks of 128; any order, window and key mask.
        scale: factor of the scores, positive.
        scores: what queries and keys are rounded to, "e4m3" or "int8". Weights and values are e4m3.

    Expert args:
        cuda: as for `attend`.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, LSE (B, H, Lq) float32, natural log. Queries without a key give 0 and
        -inf.

    Raises:
        ValueError: when the kernel cannot run the call, or for another name of `scores`, with what is allowed.
    """
    stored_dtype(scores)
    if reasons := fp8_reasons(query, key, value, blocks):
        raise ValueError(f"fp8 attention cannot run this call: {'; '.join(reasons)}")
    B, Lq, H, _ = query.shape
    Lk, DV = value.shape[1], value.shape[3]
    if not (B * Lq * H * DV and Lk):
        out = torch.zeros(B, Lq, H, DV, dtype=query.dtype, device=query.device)
        return out, torch.full((B, H, Lq), -torch.inf, device=query.device)
    plan = fp8_plan(blocks, Lk, query.shape[3], DV)
    quantised = quantise(query, key, value, blocks, scale, plan.key_ok, scores)
    return attend(quantised, blocks, plan, scale, Lq, query.dtype, cuda=cuda)


def attend(
    quantised: Quantised, blocks: Blocks, plan: Plan, scale: float, query_tokens: int, dtype: torch.dtype, *,
    cuda: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over what `quantise` made.

    Args:
        quantised: the activations; the type of queries and keys decides how scores are computed.
        blocks, scale: as they were quantised with. plan: `fp8_plan` of the call.
        query_tokens: Lq. dtype: of the output, bfloat16 or float16.

    Expert args:
        cuda: take the kernel in CUDA C++, or the one in Gluon; None: the former where it can run, see `takes_cuda`.

    Returns:
        out (B, Lq, H, Dv) and LSE (B, H, Lq), as `block_sparse_attention_fp8`.

    Raises:
        ValueError: when the kernel in CUDA C++ is asked for and cannot run the call.
    """
    call = (quantised, blocks, plan, scale, query_tokens, dtype)
    if not takes_cuda(blocks, plan, cuda):
        return attend_gluon(*call)
    if cuda:
        return attend_cuda(*call)
    kind = (quantised.value.device, dtype, quantised.query.dtype)
    return starting.run(kind, lambda: attend_cuda(*call), lambda: attend_gluon(*call))


def attend_gluon(
    quantised: Quantised, blocks: Blocks, plan: Plan, scale: float, query_tokens: int, dtype: torch.dtype, *,
    stages: int = STAGES, fresh: bool = True
) -> tuple[Tensor, Tensor]:
    """`attend` by the kernel in Gluon.

    Args:
        quantised, blocks, plan, scale, query_tokens, dtype: as for `attend`.

    Expert args:
        stages: blocks of keys, and of values, in flight: 2 or 4.
        fresh: add the products of each block in float32, outside of the matrix unit, which keeps fewer bits.

    Returns:
        out (B, Lq, H, Dv) and LSE (B, H, Lq), as `block_sparse_attention_fp8`.
    """
    from .fp8_kernel import MAX_REGISTERS, attention_kernel
    from .portable import _on_device

    B, H, DV, _ = quantised.value.shape
    device = quantised.value.device
    out = torch.empty(B, query_tokens, H, DV, dtype=dtype, device=device)
    lse = torch.empty(B, H, query_tokens, dtype=torch.float32, device=device)
    with _on_device(device):
        arguments, constants = launch(quantised, blocks, plan, scale, out, lse, stages, fresh)
        attention_kernel[(B * H * blocks.query_blocks,)](*arguments, **constants, num_warps=4, maxnreg=MAX_REGISTERS)
    return out, lse


def launch(
    quantised: Quantised, blocks: Blocks, plan: Plan, scale: float, out: Tensor, lse: Tensor, stages: int, fresh: bool
) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments and compile-time values of `fp8_kernel.attention_kernel`."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper import _describe
    from .portable import LOG2_E, _broadcast_strides, launch_order

    B, H, DV, _ = quantised.value.shape
    rows, width = BLOCK // 2, plan.width
    index = blocks.query_index

    def describe(x: Tensor, box: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(box, gl.int8 if x.dtype == torch.int8 else gl.float8e4nv)
        return TensorDescriptor.from_tensor(x.flatten(0, 1), box, layout)

    index_strides, flag_strides = ((0, 0) if x is None else _broadcast_strides(x)[:2] for x in (index, plan.flags))
    arguments = [
        describe(quantised.query, [1, rows, width]), describe(quantised.key, [1, BLOCK, width]),
        describe(quantised.value, [1, width, BLOCK]), quantised.query_scale, quantised.key_scale,
        quantised.value_scale, quantised.shift, _describe(out, rows, width) if index is None else out, lse,
        plan.lists, plan.whole, plan.boundary, plan.exempt, launch_order(plan.whole + plan.boundary, B, H), index,
        blocks.key_lengths, plan.flags, blocks.key_coordinates, blocks.query_low, blocks.query_high,
        *_broadcast_strides(plan.lists)[:3], *_broadcast_strides(plan.whole), *index_strides, *flag_strides,
        H, out.shape[1], blocks.query_blocks, blocks.key_blocks, blocks.query_blocks * BLOCK,
        blocks.key_blocks * BLOCK, scale * LOG2_E,
    ]
    constants = dict(DV=DV, WIDTH=width, STAGES=stages, FRESH=fresh, COORDINATE_COUNT=blocks.coordinates,
                     ALWAYS=blocks.always is not None)
    return arguments, constants


def block_sparse_fp8_reference(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, quantised: Quantised | None = None, *,
    scores: str = SCORES
) -> tuple[Tensor, Tensor]:
    """The twin: attention in float32 over what the rounded numbers stand for; weights are not rounded.

    Args:
        query, key, value, blocks, scale, scores: as for `block_sparse_attention_fp8`, on any device, small sizes.
        quantised: the rounded numbers, None: by `quantise_reference`.

    Returns:
        out (B, Lq, H, Dv) and LSE (B, H, Lq), float32.
    """
    quantised = quantised or quantise_reference(query, key, value, blocks, scale, scores=scores)
    q, k, v, shift = dequantise(quantised, blocks, query.shape[3])
    out, lse = attention_reference(q, k, v, blocks.token_mask(), scale, blocks.key_mask)
    return out, lse + shift
