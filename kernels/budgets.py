"""What a few query rows lose at each of several budgets of key blocks, keys and values read once: Triton.

`piece_kernel` attends the rows to every key block by itself: the block's output, and the log of its mass. A row's
output at any budget is then a sum over blocks, which `combine_kernel` makes for all budgets at once, one row in a
program. The outputs of the blocks pass through memory in the dtype of the values, some heads at a time.

The twin is the plain path of `dit_sparse.budgets.budget_errors`. Importing this module needs triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .portable import LOG2_E, _broadcast_strides, _on_device, _width

MOST_BUDGETS = 16  # rows of one matrix product of `combine_kernel`
MOST_BLOCKS = 8192  # a row's blocks lie in the registers of one program
_BYTES_AT_ONCE = 2**28  # outputs of blocks in memory at a time
_PROGRAMS = 4096  # of `piece_kernel`: many short ones, so that the last ones end together


@triton.jit(do_not_specialize=["H", "R", "L", "BLOCKS", "each", "head"])
def piece_kernel(
    Q, K, V, ROWS, INDEX, MASK, OUT, LSE,
    stride_qb, stride_qn, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_ib, stride_ih, stride_mb,
    H, R, L, BLOCKS, each, head, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """BM sampled rows of one head against `each` key blocks, every block with a softmax of its own.

    ROWS int64 (R,), query tokens. May be None: INDEX int64 (B|1, H|1, slots) by strides (slot = token), MASK bool
    (B, L). OUT (B, H, BLOCKS, R, DV) in the dtype of V, 0 for a block without keys; LSE float32 (B, H, R, BLOCKS),
    base 2, -inf there. Both contiguous, for the H heads from `head` on.
    """
    # Heads lie next to each other in memory, so neighbouring programs take the heads of the same blocks.
    SUB: tl.constexpr = BLOCK // BN
    pid = tl.program_id(0)
    i_h = (pid % H).to(tl.int64)
    parts = tl.cdiv(BLOCKS, each)
    first = pid // H % parts * each
    b = (pid // H // parts).to(tl.int64)
    h = head + i_h
    o_row = tl.program_id(1) * BM + tl.arange(0, BM)
    m_row = o_row < R
    o_d = tl.arange(0, WIDTH)
    o_dv = tl.arange(0, WIDTH_V)
    token = tl.load(ROWS + o_row, mask=m_row, other=0)
    p_query = Q + b * stride_qb + h * stride_qh + token[:, None] * stride_qn + o_d[None, :] * stride_qd
    query = tl.load(p_query, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    p_key = K + b * stride_kb + h * stride_kh + o_d[None, :] * stride_kd
    p_value = V + b * stride_vb + h * stride_vh + o_dv[None, :] * stride_vd
    bh = b * H + i_h

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH_V], tl.float32)
    for i in tl.range(first * SUB, tl.minimum(first + each, BLOCKS) * SUB, num_stages=STAGES):
        slot = (i * BN + tl.arange(0, BN)).to(tl.int64)
        if INDEX is None:
            place = slot
        else:
            place = tl.load(INDEX + b * stride_ib + h * stride_ih + slot)
        ok = (place >= 0) & (place < L)
        if MASK is not None:
            ok &= tl.load(MASK + b * stride_mb + place, mask=ok, other=0) != 0
        key = tl.load(p_key + place[:, None] * stride_kn, mask=ok[:, None] & (o_d < D)[None, :], other=0.0)
        value = tl.load(p_value + place[:, None] * stride_vn, mask=ok[:, None] & (o_dv < DV)[None, :], other=0.0)
        score = tl.dot(query, key.T, input_precision=PRECISION) * scale_log2
        score = tl.where(ok[None, :], score, -float("inf"))
        if SUB > 1:
            fresh = i % SUB == 0
            old = tl.where(fresh, -float("inf"), top)
            top = tl.maximum(old, tl.max(score, 1))
            # Without a key so far, subtract 0: exp2(-inf) = 0.
            safe = tl.where(top == -float("inf"), 0.0, top)
            weight = tl.math.exp2(score - safe[:, None])
            shrink = tl.math.exp2(old - safe)
            total = total * shrink + tl.sum(weight, 1)
            acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        else:
            top = tl.max(score, 1)
            safe = tl.where(top == -float("inf"), 0.0, top)
            weight = tl.math.exp2(score - safe[:, None])
            total = tl.sum(weight, 1)
            acc = tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        # Under a mask and not a test, which would part the products of one step from the next.
        m_last = m_row & (i % SUB == SUB - 1)
        block = i // SUB
        held = tl.where(total > 0, total, 1.0)
        p_out = OUT + ((bh * BLOCKS + block) * R + o_row[:, None]) * DV + o_dv[None, :]
        out = (acc / held[:, None]).to(OUT.dtype.element_ty)
        tl.store(p_out, out, mask=m_last[:, None] & (o_dv < DV)[None, :])
        tl.store(LSE + (bh * R + o_row) * BLOCKS + block, top + tl.math.log2(total), mask=m_last)


@triton.jit(do_not_specialize=["H", "R", "BLOCKS", "G"])
def combine_kernel(
    OUT, LSE, LEFT, ENTRY, MEAN, REAL, ERRORS, NORMS,
    stride_eb, stride_eh, stride_lb, stride_lh, stride_nb, stride_nh,
    H, R, BLOCKS, G,
    DV: tl.constexpr, WIDTH_V: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr, BUDGETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Squared error of one row of one head at every budget, and the squared norm of its output.

    OUT, LSE: from `piece_kernel`. LEFT int32 (B, H, R, BLOCKS): how many of the G budgets leave the block out, which
    are the first ones. ENTRY float32 (B, H, R, BLOCKS), base 2: the log of the mass of the block's soft entry, and
    MEAN float32 (B, H, BLOCKS, DV): its value; or both None. LEFT and ENTRY and MEAN by strides of batch and head.
    REAL: bool (B, R), rows that count, or None. ERRORS (B, H, R, G), NORMS (B, H, R): float32, contiguous.
    """
    pid = tl.program_id(0)
    r = pid % R
    h = (pid // R % H).to(tl.int64)
    b = (pid // R // H).to(tl.int64)
    row = (b * H + h) * R + r
    p_lse = LSE + row * BLOCKS
    o_all = tl.arange(0, COLUMNS)
    lse = tl.load(p_lse + o_all, mask=o_all < BLOCKS, other=-float("inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    dense_log = top + tl.math.log2(tl.maximum(tl.sum(tl.math.exp2(lse - top), 0), 1e-30))

    o_dv = tl.arange(0, WIDTH_V)
    budget = tl.arange(0, BUDGETS)
    p_out = OUT + ((b * H + h) * BLOCKS * R + r) * DV + o_dv[None, :]
    p_left = LEFT + b * stride_lb + h * stride_lh + r * BLOCKS
    acc = tl.zeros([BUDGETS, WIDTH_V], tl.float32)
    soft = tl.zeros([WIDTH_V], tl.float32)
    total = tl.zeros([BUDGETS], tl.float32)
    for start in tl.range(0, BLOCKS, BN):
        o_block = start + tl.arange(0, BN)
        ok = o_block < BLOCKS
        mass = tl.math.exp2(tl.load(p_lse + o_block, mask=ok, other=-float("inf")) - dense_log)
        left = tl.load(p_left + o_block, mask=ok, other=0)
        m_tile = ok[:, None] & (o_dv < DV)[None, :]
        part = tl.load(p_out + o_block.to(tl.int64)[:, None] * R * DV, mask=m_tile, other=0.0).to(tl.float32)
        part *= mass[:, None]
        kept = left[None, :] <= budget[:, None]
        if MEAN is None:
            total += tl.sum(tl.where(kept, mass[None, :], 0.0), 1)
        else:
            entry = tl.load(ENTRY + b * stride_eb + h * stride_eh + r * BLOCKS + o_block, mask=ok, other=-float("inf"))
            entry = tl.math.exp2(entry - dense_log)
            p_mean = MEAN + b * stride_nb + h * stride_nh + o_block[:, None] * DV + o_dv[None, :]
            mean = entry[:, None] * tl.load(p_mean, mask=m_tile, other=0.0)
            soft += tl.sum(mean, 0)
            part -= mean
            total += tl.sum(tl.where(kept, mass[None, :], entry[None, :]), 1)
        acc = tl.dot(kept.to(tl.float32), part, acc, input_precision=PRECISION)

    out = (acc + soft[None, :]) / tl.maximum(total, 1e-30)[:, None]
    # The last budget keeps everything.
    dense = tl.sum(tl.where((budget == G - 1)[:, None], out, 0.0), 0)
    away = out - dense[None, :]
    error = tl.sum(away * away, 1)
    norm = tl.sum(dense * dense, 0)
    if REAL is not None:  # whatever padding holds
        real = tl.load(REAL + b * R + r) != 0
        error = tl.where(real, error, 0.0)
        norm = tl.where(real, norm, 0.0)
    tl.store(ERRORS + row * G + budget, error, mask=budget < G)
    tl.store(NORMS + row, norm)


def tile(dtype: torch.dtype, block: int) -> dict[str, Any]:
    """Rows and keys of one step, precision, stages and warps of `piece_kernel`.

    H200, 75,600 tokens, 40 heads of 128, bf16, blocks of 128, 64 rows, November 2026, ms of both kernels: 1.13 with 64
    keys a step, 1.35 with 128, which leave room for one program to a processor.
    """
    if dtype == torch.float32:
        return dict(BM=16, BN=min(block, 32), PRECISION="tf32x3", STAGES=2, num_warps=4)
    return dict(BM=64, BN=min(block, 64), PRECISION="tf32", STAGES=2, num_warps=4)


def combining(dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Channels, blocks of one step, budgets, precision, warps and stages of `combine_kernel`."""
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    return dict(WIDTH_V=width, BN=32, BUDGETS=MOST_BUDGETS, PRECISION=precision, num_warps=2, num_stages=3)


def budget_errors_triton(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, index: Tensor | None, block: int, blocks: int,
    left: Tensor, budgets: int, scale: float, *, entry: Tensor | None = None, mean_value: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared error of the sampled rows' outputs at every budget, and the squared norm of their dense outputs.

    Args:
        query (B, Lq, H, D), key (B, L, H, D), value (B, L, H, DV): any strides.
        rows: int64 (R,), query tokens.
        index: int64 (B|1, H|1, blocks * block), key at each slot and -1 for padding; None: slot = token.
        block: slots of a block, a power of two from 16 on; blocks: how many, `MOST_BLOCKS` at most.
        left: int32 (B, H, R, blocks), how many of the budgets, rising ones, leave the block out; at most budgets - 1.
        budgets: how many, `MOST_BUDGETS` at most.
        scale: softmax scale.
        entry: float32 (B, H, R, blocks), natural log of the mass that a block has when it is left out, -inf for none;
            with mean_value float32 (B, H, blocks, DV), the value it then has. None: nothing is left of such a block.
        key_mask: bool (B, L), True where the token is real, for keys and rows; None: all are.

    Returns:
        float32 (B, H, R, budgets), 0 at the last one, and (B, H, R); rows of padding count 0.
    """
    B, L, H, DV = value.shape
    D, R = query.shape[3], rows.shape[0]
    errors = torch.empty(B, H, R, budgets, dtype=torch.float32, device=query.device)
    norms = torch.empty(B, H, R, dtype=torch.float32, device=query.device)
    if not norms.numel() or not blocks:
        return errors.zero_(), norms.zero_()
    constants = tile(query.dtype, block)
    width, width_v = _width(D), _width(DV)
    rows, left = rows.contiguous(), left.contiguous()
    if index is not None and index.stride(-1) != 1:
        index = index.contiguous()
    real = None
    if key_mask is not None:
        key_mask = key_mask.expand(B, L).contiguous()
        real = key_mask[:, rows].contiguous()
    if entry is not None and mean_value is not None:
        entry, mean_value = (entry * LOG2_E).contiguous(), mean_value.contiguous()
    chunks = triton.cdiv(B * H * blocks * R * DV * value.element_size(), _BYTES_AT_ONCE)
    step = max(1, triton.cdiv(H, chunks))
    for first in range(0, H, step):
        heads = slice(first, min(first + step, H))
        some = heads.stop - first
        out = torch.empty(B, some, blocks, R, DV, dtype=value.dtype, device=query.device)
        lse = torch.empty(B, some, R, blocks, dtype=torch.float32, device=query.device)
        each = max(1, B * some * blocks // _PROGRAMS)
        error, norm = (x if some == H else torch.empty_like(x[:, heads], memory_format=torch.contiguous_format)
                       for x in (errors, norms))
        parts = [x if x is None else x[:, heads] for x in (entry, left, mean_value)]
        with _on_device(query.device):
            piece_kernel[(B * some * triton.cdiv(blocks, each), triton.cdiv(R, constants["BM"]))](
                query, key, value, rows, index, key_mask, out, lse, *query.stride(), *key.stride(), *value.stride(),
                *((0, 0) if index is None else _broadcast_strides(index)[:2]),
                0 if key_mask is None else key_mask.stride(0), some, R, L, blocks, each, first, scale * LOG2_E,
                D=D, DV=DV, WIDTH=width, WIDTH_V=width_v, BLOCK=block, **constants)
            combine_kernel[(B * some * R,)](
                out, lse, parts[1], parts[0], parts[2], real, error, norm,
                *(s for x in parts for s in ((0, 0) if x is None else x.stride()[:2])), some, R, blocks, budgets,
                DV=DV, COLUMNS=max(16, triton.next_power_of_2(blocks)), **combining(value.dtype, width_v))
        if some != H:
            errors[:, heads], norms[:, heads] = error, norm
    return errors, norms
