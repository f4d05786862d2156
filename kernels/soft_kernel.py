"""Soft blocks merged into block-sparse attention, one pass over the rows: Triton, on any GPU it knows, and interpreted.

One program takes a tile of queries of one head. It starts its online softmax from what attention over the listed
blocks left behind, which is that of one key with score `lse` and value `out`, and streams the blocks' mean keys and
values past it. So nothing is left to merge at the end, and every row is read and written once. Importing this module
needs triton. The twin is `reference.soft_reference`; cost and floor are in docs/soft-blocks.md.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Blocks
from .portable import LOG2_E, Tile, _broadcast_strides, _on_device, _shared_memory, _width

_COLUMNS = 128  # the number of blocks is padded to a multiple of this, so that means are read without a test


@triton.jit(do_not_specialize=["H", "NQ", "columns"])
def mark_kernel(
    LISTS, WHOLE, BOUNDARY, LISTED, stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq, H, NQ, columns,
    STEP: tl.constexpr,
):
    """Writes 1 at the blocks that one row lists. LISTED: int8 (B, H, NQ, columns), contiguous, zeros before."""
    pid = tl.program_id(0)
    i_q = (pid % NQ).to(tl.int64)
    h = (pid // NQ % H).to(tl.int64)
    b = (pid // NQ // H).to(tl.int64)
    i_count = b * stride_cb + h * stride_ch + i_q * stride_cq
    count = tl.load(WHOLE + i_count) + tl.load(BOUNDARY + i_count)
    p_list = LISTS + b * stride_lb + h * stride_lh + i_q * stride_lq
    p_listed = LISTED + pid.to(tl.int64) * columns
    one = tl.full([STEP], 1, tl.int8)
    for start in tl.range(0, count, STEP):
        place = start + tl.arange(0, STEP)
        block = tl.load(p_list + place, mask=place < count, other=0)
        tl.store(p_listed + block, one, mask=place < count)


@triton.jit(do_not_specialize=["H", "Lq", "NQ", "columns"])
def soft_kernel(
    Q, KEYS, VALUES, BIAS, LISTED, OUT, LSE, QUERY_INDEX,
    stride_qb, stride_qn, stride_qh, stride_qd, stride_ob, stride_on, stride_oh, stride_eb, stride_eh, stride_bb,
    stride_bh, stride_tb, stride_th, stride_tq, stride_ib, stride_ih,
    H, Lq, NQ, columns, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """BM queries of one head against the mean keys of the blocks that their list leaves out.

    Q (B, Lq, H, D) by strides. KEYS (B * H, columns, WIDTH) and VALUES (B * H, columns, WIDTH_V): block means in the
    dtype of Q, zeros beyond blocks and head dims. BIAS: float32 (B|1, H|1, columns), log2 of the keys in a block, -inf
    where there are none. LISTED: int8 (B|1, H|1, NQ, columns). OUT (B, Lq, H, DV) and LSE (B, H, Lq): attention over
    the listed blocks before, over everything after. QUERY_INDEX may be None (slot = token).
    """
    PARTS: tl.constexpr = QUERY_BLOCK // BM
    # Tiles of one head follow each other: its means stay in the cache.
    pid = tl.program_id(0)
    i_q = (pid // PARTS % NQ).to(tl.int64)
    h = (pid // PARTS // NQ % H).to(tl.int64)
    b = (pid // PARTS // NQ // H).to(tl.int64)
    slot = i_q * QUERY_BLOCK + (pid % PARTS) * BM + tl.arange(0, BM)
    if QUERY_INDEX is None:
        token = slot
    else:
        token = tl.load(QUERY_INDEX + b * stride_ib + h * stride_ih + slot)
    m_row = (token >= 0) & (token < Lq)
    o_d = tl.arange(0, WIDTH)
    o_dv = tl.arange(0, WIDTH_V)
    p_query = Q + b * stride_qb + h * stride_qh + token[:, None] * stride_qn + o_d[None, :] * stride_qd
    query = tl.load(p_query, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    p_out = OUT + b * stride_ob + h * stride_oh + token[:, None] * stride_on + o_dv[None, :]
    m_out = m_row[:, None] & (o_dv < DV)[None, :]
    p_lse = LSE + b * stride_eb + h * stride_eh + token

    top = tl.load(p_lse, mask=m_row, other=-float("inf")) * 1.4426950408889634
    total = tl.where(top == -float("inf"), 0.0, 1.0)
    acc = tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    first = (b * H + h) * columns
    p_key = KEYS + (first + tl.arange(0, BN))[:, None] * WIDTH + o_d[None, :]
    p_value = VALUES + (first + tl.arange(0, BN))[:, None] * WIDTH_V + o_dv[None, :]
    p_bias = BIAS + b * stride_bb + h * stride_bh + tl.arange(0, BN)
    p_listed = LISTED + b * stride_tb + h * stride_th + i_q * stride_tq + tl.arange(0, BN)
    for start in tl.range(0, columns, BN, num_stages=STAGES):
        key = tl.load(p_key + start * WIDTH)
        score = tl.dot(query, key.T, input_precision=PRECISION)
        # What is listed, and blocks without keys, get -inf: one addition per score, no test of rows and blocks.
        bias = tl.where(tl.load(p_listed + start) != 0, -float("inf"), tl.load(p_bias + start))
        score = score * scale_log2 + bias[None, :]
        new_top = tl.maximum(top, tl.max(score, 1))
        # A query that has met neither key nor soft block yet keeps -inf: subtract 0 there.
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.math.exp2(score - safe_top[:, None])
        shrink = tl.math.exp2(top - safe_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        value = tl.load(p_value + start * WIDTH_V)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        top = new_top

    total = tl.where(total == 0.0, 1.0, total)
    acc = acc * (1.0 / total)[:, None]
    tl.store(p_out, acc.to(OUT.dtype.element_ty), mask=m_out)
    tl.store(p_lse, (top + tl.math.log2(total)) * 0.6931471805599453, mask=m_row)


def listed_blocks(blocks: Blocks, columns: int) -> Tensor:
    """int8 (B|1, H|1, nq, columns): 1 where the query block lists the key block.

    Args:
        blocks: the lists.
        columns: room for at least all key blocks.
    """
    lists = blocks.lists
    batch, heads, nq, width = lists.shape
    listed = torch.zeros(batch, heads, nq, columns, dtype=torch.int8, device=lists.device)
    if listed.numel() and width:
        step = min(1024, max(16, triton.next_power_of_2(width)))
        mark_kernel[(batch * heads * nq,)](
            lists, blocks.whole, blocks.boundary, listed, *_broadcast_strides(lists)[:3],
            *_broadcast_strides(blocks.whole), heads, nq, columns, STEP=step, num_warps=max(1, step // 256))
    return listed


def tile_of(query_block: int, width: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """The cut of the kernel.

    A program of 128 rows reads half as much from the cache as two of 64; two programs of 64 fit on a processor. float32
    takes three passes per product and 16 rows at a time, which is what registers hold; of 64 rows on 8 warps
    triton 3.6 made a kernel that read foreign memory (H200, November 2026).

    Args:
        query_block: slots of a query block.
        width: head dim, padded to a power of two.
        dtype: of the activations.
        shared_memory: bytes a program may use.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 4, 2)
    queries = min(query_block, 128)
    # With 64 rows three stages take 6.66 ms, two 7.21 (H200, 75,600 tokens, 40 heads of 128, November 2026).
    keys, warps, stages = (128, 8, 2) if queries == 128 else (64, 4, 3)
    while keys > 16 and width * dtype.itemsize * (queries + 2 * stages * keys) > shared_memory - 4096:
        keys //= 2
    return Tile(queries, keys, warps, stages)


def soft_blocks_triton(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, count: Tensor, blocks: Blocks, out: Tensor, lse: Tensor,
    scale: float,
) -> None:
    """Adds one entry per unlisted block to attention over the listed ones, in place.

    Args:
        query: (B, Lq, H, D), any strides.
        mean_key, mean_value: float32 (B, H, nk, D) and (B, H, nk, Dv), block means.
        count: (B|1, H|1, nk), keys of each block.
        blocks: the lists.
        out: (B, Lq, H, Dv), innermost stride 1; lse: float32 (B, H, Lq), innermost stride 1. Both are overwritten.
        scale: factor of the scores.
    """
    B, Lq, H, D = query.shape
    nk, DV = mean_key.shape[2], mean_value.shape[3]
    if not query.numel() or not nk:
        return
    columns = triton.cdiv(nk, _COLUMNS) * _COLUMNS
    with _on_device(query.device):
        keys, values = (_padded(x, columns, query.dtype) for x in (mean_key, mean_value))
        bias = torch.nn.functional.pad(count.to(torch.float32).log2(), (0, columns - nk), value=-torch.inf)
        listed = listed_blocks(blocks, columns)
        index = blocks.query_index
        if index is not None and index.stride(-1) != 1:
            index = index.contiguous()
        constants = constants_of(blocks, D, DV, query.dtype, query.device)
        grid = (B * H * blocks.query_blocks * (blocks.query_block // constants["BM"]),)
        soft_kernel[grid](
            query, keys, values, bias, listed, out, lse, index, *query.stride(), *out.stride()[:3], *lse.stride()[:2],
            *_broadcast_strides(bias)[:2], *_broadcast_strides(listed)[:3],
            *((0, 0) if index is None else _broadcast_strides(index)[:2]),
            H, Lq, blocks.query_blocks, columns, scale * LOG2_E, **constants)


def constants_of(blocks: Blocks, head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
                 ) -> dict[str, Any]:
    """Compile-time values of `soft_kernel`, warps included."""
    width, width_v = _width(head_dim), _width(value_dim)
    tile = tile_of(blocks.query_block, max(width, width_v), dtype, _shared_memory(device))
    return dict(D=head_dim, DV=value_dim, WIDTH=width, WIDTH_V=width_v, QUERY_BLOCK=blocks.query_block,
                BM=tile.queries, BN=tile.keys, PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
                STAGES=tile.stages, num_warps=tile.warps)


def _padded(mean: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Block means (B, H, n, D) as (B, H, columns, width) of a dtype, zeros beyond."""
    B, H, n, D = mean.shape
    padded = torch.zeros(B, H, columns, _width(D), dtype=dtype, device=mean.device)
    padded[:, :, :n, :D] = mean
    return padded
