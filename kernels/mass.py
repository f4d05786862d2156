"""Exact attention mass of listed blocks from the log-sum-exp of the rows, one pass over queries and keys: Triton.

The twin is `dit_sparse.scoring.listed_mass`. Importing this module needs triton.
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
from .portable import LOG2_E, _broadcast_strides, _on_device, _width


@triton.jit(do_not_specialize=["H", "Lq", "Lk", "NQ", "width"])
def mass_kernel(
    Q, K, LSE, LISTS, WHOLE, BOUNDARY, QUERY_INDEX, KEY_INDEX, QUERY_LENGTHS, KEY_MASK, MASS, ROW_MASS,
    stride_qb, stride_qn, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_eb, stride_eh, stride_en, stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq,
    stride_ib, stride_ih, stride_jb, stride_jh, stride_mb,
    H, Lq, Lk, NQ, width, scale_log2,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):
    """What BM rows of a query block add to the mass of every listed key block.

    MASS (B, H, NQ, QUERY_BLOCK // BM, width) or ROW_MASS (B, H, Lq), float32, contiguous, the other None. May be None:
    QUERY_INDEX and KEY_INDEX (slot = token), KEY_MASK bool (B, Lk).
    """
    PARTS: tl.constexpr = QUERY_BLOCK // BM
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
    p_query = Q + b * stride_qb + h * stride_qh + token[:, None] * stride_qn + o_d[None, :] * stride_qd
    query = tl.load(p_query, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    lse = tl.load(LSE + b * stride_eb + h * stride_eh + token * stride_en, mask=m_row, other=-float("inf"))
    # Rows without a key, and padding, count 0: nothing is left of exp2(x - inf).
    lse = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)

    i_count = b * stride_cb + h * stride_ch + i_q * stride_cq
    count = tl.load(WHOLE + i_count) + tl.load(BOUNDARY + i_count)
    p_list = LISTS + b * stride_lb + h * stride_lh + i_q * stride_lq
    share = 1.0 / tl.maximum(tl.load(QUERY_LENGTHS + i_q), 1).to(tl.float32)
    rows = tl.zeros([BM], tl.float32)
    for i in tl.range(0, count):
        block = tl.load(p_list + i).to(tl.int64)
        held = tl.zeros([BM], tl.float32)
        for start in tl.static_range(0, KEY_BLOCK, BN):
            key_slot = block * KEY_BLOCK + start + tl.arange(0, BN)
            if KEY_INDEX is None:
                place = key_slot
            else:
                place = tl.load(KEY_INDEX + b * stride_jb + h * stride_jh + key_slot)
            ok = (place >= 0) & (place < Lk)
            if KEY_MASK is not None:
                ok &= tl.load(KEY_MASK + b * stride_mb + place, mask=ok, other=0) != 0
            p_key = K + b * stride_kb + h * stride_kh + place[:, None] * stride_kn + o_d[None, :] * stride_kd
            key = tl.load(p_key, mask=ok[:, None] & (o_d < D)[None, :], other=0.0)
            score = tl.dot(query, key.T, input_precision=PRECISION) * scale_log2
            held += tl.sum(tl.where(ok[None, :], tl.math.exp2(score - lse[:, None]), 0.0), 1)
        if MASS is not None:
            tl.store(MASS + pid.to(tl.int64) * width + i, tl.sum(held, 0) * share)
        rows += held
    if MASS is None:
        tl.store(ROW_MASS + (b * H + h) * Lq + token, rows, mask=m_row)


def tile(dtype: torch.dtype, query_block: int, key_block: int) -> dict[str, Any]:
    """Rows and keys of one step, precision, warps and stages; float32 needs smaller tiles."""
    if dtype == torch.float32:
        return dict(BM=min(query_block, 64), BN=min(key_block, 32), PRECISION="tf32x3", num_warps=8, num_stages=1)
    return dict(BM=query_block, BN=min(key_block, 64), PRECISION="tf32", num_warps=8 if query_block == 128 else 4,
                num_stages=2)


def listed_mass_triton(
    query: Tensor, key: Tensor, lse: Tensor, blocks: Blocks, scale: float, *, per_row: bool = False
) -> Tensor:
    """Exact attention mass of the listed blocks.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D): any strides.
        lse: float32 (B, H, Lq), natural logarithm.
        blocks: which blocks, block sizes 16, 32, 64 or 128; the window is not looked at.
        scale: softmax scale.
        per_row: add up every row's mass over its list.

    Returns:
        float32 (B, H, nq, width), mean over the real rows of the query block, 0 beyond the lists; or (B, H, Lq).
    """
    B, Lq, H, D = query.shape
    nq, lists = blocks.query_blocks, blocks.lists
    constants = tile(query.dtype, blocks.query_block, blocks.key_block)
    parts = blocks.query_block // constants["BM"]
    shape = (B, H, Lq) if per_row else (B, H, nq, parts, lists.shape[-1])
    mass = torch.zeros(shape, dtype=torch.float32, device=query.device)
    if not mass.numel():
        return mass if per_row else mass[:, :, :, 0]
    width = _width(D)
    indices = (blocks.query_index, blocks.key_index)
    key_mask = None if blocks.key_mask is None else blocks.key_mask.expand(B, key.shape[1]).contiguous()
    with _on_device(query.device):
        mass_kernel[(B * H * nq * parts,)](
            query, key, lse, lists, blocks.whole, blocks.boundary, *indices, blocks.query_lengths, key_mask,
            *((None, mass) if per_row else (mass, None)), *query.stride(), *key.stride(), *lse.stride(),
            *_broadcast_strides(lists)[:3], *_broadcast_strides(blocks.whole),
            *(s for x in indices for s in ((0, 0) if x is None else _broadcast_strides(x)[:2])),
            0 if key_mask is None else key_mask.stride(0),
            H, Lq, key.shape[1], nq, lists.shape[-1], scale * LOG2_E,
            D=D, WIDTH=width, QUERY_BLOCK=blocks.query_block, KEY_BLOCK=blocks.key_block, **constants)
    return mass if per_row else mass.sum(3)
