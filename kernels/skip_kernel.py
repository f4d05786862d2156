"""Block-sparse attention with an inner filter, in Triton: on any GPU it knows, and interpreted.

One program computes one query block of one head. It visits the listed key blocks with a running maximum; where the
scores of a block lie far enough below it for all rows, exponentials, values and their product are left out. Importing
this module needs triton. The twin is `reference.skip_reference`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Blocks, empty_results
from .portable import (
    LOG2_E,
    _broadcast_strides,
    _inside,
    _load_tile,
    _on_device,
    _width,
    gather_slots,
    launch_order,
)


@triton.jit(do_not_specialize=["H", "Lq", "NQ", "query_slots", "key_slots", "width"])
def skip_kernel(
    Q, K, V, OUT, LSE, LEVELS, LISTS, WHOLE, BOUNDARY, START, ORDER, QUERY_INDEX, KEY_LENGTHS, KEY_OK, COORDINATES,
    LOW, HIGH, ALWAYS, BOUNDS,
    stride_qb, stride_qn, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq,
    stride_ib, stride_ih, stride_mb, stride_mh, stride_th,
    H, Lq, NQ, query_slots, key_slots, width, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    COORDINATE_COUNT: tl.constexpr, TRIALS: tl.constexpr, APPLY: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BM queries, a whole block, of one head against the key blocks that its list names, in the order of the visit.

    Q (B, Lq, H, D), K and V (B, Lk or key slots, H, D) by strides. OUT (B, Lq, H, DV), LSE (B, H, Lq) and LEVELS
    (B, H, NQ, width), contiguous. START: int32 like WHOLE, place of the whole block that comes first. BOUNDS: float32
    (H|1, TRIALS), log2 of the thresholds; the first one filters with APPLY. ORDER: int32 (B * H * NQ,), query blocks in
    launch order. May be None: QUERY_INDEX (identity order), KEY_OK (no key mask), COORDINATES (no window), ALWAYS.
    """
    flat = tl.load(ORDER + tl.program_id(0))
    i_q = (flat % NQ).to(tl.int64)
    h = (flat // NQ % H).to(tl.int64)
    b = (flat // NQ // H).to(tl.int64)
    query_slot = i_q * BM + tl.arange(0, BM)
    if QUERY_INDEX is None:
        token = query_slot
    else:
        token = tl.load(QUERY_INDEX + b * stride_ib + h * stride_ih + query_slot)
    m_row = (token >= 0) & (token < Lq)
    o_d = tl.arange(0, WIDTH)
    p_query = Q + b * stride_qb + h * stride_qh + token[:, None] * stride_qn + o_d[None, :] * stride_qd
    query = tl.load(p_query, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)

    i_count = b * stride_cb + h * stride_ch + i_q * stride_cq
    n_whole = tl.load(WHOLE + i_count)
    n_listed = n_whole + tl.load(BOUNDARY + i_count)
    n_start = tl.load(START + i_count)
    p_list = LISTS + b * stride_lb + h * stride_lh + i_q * stride_lq
    p_level = LEVELS + ((b * H + h) * NQ + i_q) * width
    KEYS = K + b * stride_kb + h * stride_kh
    VALUES = V + b * stride_vb + h * stride_vh
    o_key = tl.arange(0, BN)

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH_V], tl.float32)
    for i in tl.range(0, n_listed, num_stages=STAGES):
        turned = i + n_start
        turned = tl.where(turned >= n_whole, turned - n_whole, turned)
        place = tl.where(i < n_whole, turned, i)
        block = tl.load(p_list + place)
        start = block * BN
        key_slot = start + o_key
        if KEY_OK is None:
            ok = o_key < tl.load(KEY_LENGTHS + block)
        else:
            ok = tl.load(KEY_OK + b * stride_mb + h * stride_mh + key_slot) != 0
        key = _load_tile(KEYS, False, b, h, start, ok, stride_kn, stride_kd, BN, D, WIDTH, True)
        score = tl.dot(query, key.T, input_precision=PRECISION) * scale_log2
        score = tl.where(ok[None, :], score, -float("inf"))
        if COORDINATE_COUNT > 0:
            free = (o_key >= 0) & (i < n_whole)
            if ALWAYS is not None:
                free |= tl.load(ALWAYS + key_slot) != 0
            for c in tl.static_range(COORDINATE_COUNT):
                inside = _inside(COORDINATES, LOW, HIGH, c * key_slots + key_slot, c * query_slots + query_slot)
                score = tl.where(inside | free[None, :], score, -float("inf"))
        tile_top = tl.max(score, 1)

        level = 0
        kept = True
        for t in tl.static_range(TRIALS):
            bound = tl.load(BOUNDS + h * stride_th + t)
            # A row that has met no key has top = -inf, and -inf < -inf is False: the first block is never left out.
            high = ((tile_top < top + bound) == 0) & m_row
            found = tl.max(high.to(tl.int32), 0) != 0
            level += (found == 0).to(tl.int32)
            if APPLY and t == 0:
                kept = found
        tl.store(p_level + place, level)
        if kept:
            new_top = tl.maximum(top, tile_top)
            safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
            weight = tl.math.exp2(score - safe_top[:, None])
            shrink = tl.math.exp2(top - safe_top)
            total = total * shrink + tl.sum(weight, 1)
            value = _load_tile(VALUES, False, b, h, start, ok, stride_vn, stride_vd, BN, DV, WIDTH_V, True)
            acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top

    # A query without a key has acc = 0 and top = -inf: dividing by 1 gives out 0 and LSE -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc * (1.0 / total)[:, None]
    o_dv = tl.arange(0, WIDTH_V)
    p_out = OUT + ((b * Lq + token) * H + h)[:, None] * DV + o_dv[None, :]
    tl.store(p_out, acc.to(OUT.dtype.element_ty), mask=m_row[:, None] & (o_dv < DV)[None, :])
    lse = (top + tl.math.log2(total)) * 0.6931471805599453
    tl.store(LSE + (b * H + h) * Lq + token, lse, mask=m_row)


def skip_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, blocks: Blocks, start: Tensor, scale: float,
    apply: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with the inner filter by the kernel.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D), value (B, Lk, H, Dv): any strides.
        thresholds: float32 (H|1, J); the first one filters with `apply`.
        blocks: which key blocks each query block computes.
        start: int32 (B|1, H|1, nq), the place of the whole block that is visited first.
        scale: factor of the scores, positive.
        apply: leave out, or only count.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, LSE (B, H, Lq) float32, levels uint8 (B, H, nq, width).
    """
    B, Lq, H, D = query.shape
    out, lse = empty_results(query, key, value)
    levels = torch.zeros(B, H, *blocks.lists.shape[2:], dtype=torch.uint8, device=query.device)
    if not out.numel():
        return out, lse, levels
    with _on_device(query.device):
        key_ok = None
        if blocks.key_mask is not None:
            key_ok = blocks.real_keys(key.shape[1]).to(torch.int8).contiguous()
        key_slots = blocks.key_blocks * blocks.key_block
        if blocks.key_index is not None:
            key, value = gather_slots(key, value, blocks.key_index, key_slots)
        counts = torch.broadcast_tensors(blocks.whole, blocks.boundary, start)
        whole, boundary, start = (x.contiguous() for x in counts)
        lists, index = blocks.lists, blocks.query_index
        bounds = thresholds.log2().contiguous()
        skip_kernel[(B * H * blocks.query_blocks,)](
            query, key, value, out, lse, levels, lists, whole, boundary, start, launch_order(whole + boundary, B, H),
            index, blocks.key_lengths, key_ok, blocks.key_coordinates, blocks.query_low, blocks.query_high,
            blocks.always, bounds, *query.stride(), *key.stride(), *value.stride(), *_broadcast_strides(lists)[:3],
            *_broadcast_strides(whole), *((0, 0) if index is None else _broadcast_strides(index)[:2]),
            *((0, 0) if key_ok is None else _broadcast_strides(key_ok)[:2]), _broadcast_strides(bounds)[0],
            H, Lq, blocks.query_blocks, blocks.query_blocks * blocks.query_block, key_slots, lists.shape[-1],
            scale * LOG2_E, **constants_of(query, value, blocks, bounds.shape[1], apply))
    return out, lse, levels


def constants_of(query: Tensor, value: Tensor, blocks: Blocks, trials: int, apply: bool) -> dict[str, Any]:
    """Compile-time values of `skip_kernel`, warps included."""
    full = query.dtype == torch.float32
    return dict(D=query.shape[3], DV=value.shape[3], WIDTH=_width(query.shape[3]), WIDTH_V=_width(value.shape[3]),
                BM=blocks.query_block, BN=blocks.key_block, COORDINATE_COUNT=blocks.coordinates, TRIALS=trials,
                APPLY=apply, PRECISION="tf32x3" if full else "tf32", STAGES=1 if full else 2,
                num_warps=8 if blocks.query_block >= 128 else 4)
