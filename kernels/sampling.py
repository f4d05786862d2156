"""Attention of a few sampled query rows under several candidate masks, keys and values read once: Triton.

The twin is `dit_sparse.scoring.row_errors`. Importing this module needs triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .portable import LOG2_E, _on_device, _width

_PROGRAMS = 1024  # about as many as fill a Hopper GPU for several rounds


@triton.jit(do_not_specialize=["H", "R", "L", "SPLITS", "CANDIDATES"])
def sampled_kernel(
    Q, K, V, ROWS, ALLOWED, KEY_OK, ACC, MASS, TOP,
    stride_qb, stride_qn, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_ac, stride_ar, stride_mb,
    H, R, L, SPLITS, CANDIDATES, split, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """BM rows of one head against `split` keys: the sampled rows of candidate 0, which sees every key, then those of
    the next candidates, so that one reading of the keys serves several.

    ROWS int64 (R,). ALLOWED bool (CANDIDATES - 1, R, L padded to whole steps), KEY_OK bool (B, L) or None. ACC
    (B, H, C, SPLITS, R, DV), MASS and TOP (B, H, C, SPLITS, R), float32, contiguous: what the split adds to the output
    and to the sum of the softmax, and its maximum, in base 2.
    """
    # The parts of one piece run side by side: the first to come fetches the keys for all.
    parts = tl.cdiv(CANDIDATES * R, BM)
    pid = tl.program_id(0)
    i_split = pid // parts % SPLITS
    bh = (pid // parts // SPLITS).to(tl.int64)
    b = bh // H
    h = bh % H
    o_all = pid % parts * BM + tl.arange(0, BM)
    m_row = o_all < CANDIDATES * R
    c = o_all // R
    o_row = o_all % R
    token = tl.load(ROWS + o_row, mask=m_row, other=0)
    o_d = tl.arange(0, WIDTH)
    o_dv = tl.arange(0, WIDTH_V)
    p_query = Q + b * stride_qb + h * stride_qh + token[:, None] * stride_qn + o_d[None, :] * stride_qd
    query = tl.load(p_query, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    p_allowed = ALLOWED + ((c - 1).to(tl.int64) * stride_ac + o_row.to(tl.int64) * stride_ar)[:, None]
    p_key = K + b * stride_kb + h * stride_kh + o_d[None, :] * stride_kd
    p_value = V + b * stride_vb + h * stride_vh + o_dv[None, :] * stride_vd
    m_allowed = (m_row & (c > 0))[:, None]

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH_V], tl.float32)
    first = i_split * split
    for start in tl.range(first, tl.minimum(first + split, L), BN, num_stages=STAGES):
        o_key = start + tl.arange(0, BN)
        ok = o_key < L
        if KEY_OK is not None:
            ok &= tl.load(KEY_OK + b * stride_mb + o_key, mask=ok, other=0) != 0
        row = o_key.to(tl.int64)[:, None]
        key = tl.load(p_key + row * stride_kn, mask=ok[:, None] & (o_d < D)[None, :], other=0.0)
        value = tl.load(p_value + row * stride_vn, mask=ok[:, None] & (o_dv < DV)[None, :], other=0.0)
        seen = tl.load(p_allowed + o_key[None, :], mask=m_allowed, other=1) != 0
        score = tl.dot(query, key.T, input_precision=PRECISION) * scale_log2
        score = tl.where(seen & ok[None, :], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row that has met no key yet keeps -inf: subtract 0 there, so that its weights are exp2(-inf) = 0.
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.math.exp2(score - safe_top[:, None])
        shrink = tl.math.exp2(top - safe_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    at = (((bh * CANDIDATES + c) * SPLITS + i_split) * R + o_row).to(tl.int64)
    tl.store(TOP + at, top, mask=m_row)
    tl.store(MASS + at, total, mask=m_row)
    tl.store(ACC + at[:, None] * DV + o_dv[None, :], acc, mask=m_row[:, None] & (o_dv < DV)[None, :])


@triton.jit(do_not_specialize=["R", "SPLITS"])
def merge_kernel(
    ACC, MASS, TOP, OUT, R, SPLITS, DV: tl.constexpr, WIDTH_V: tl.constexpr, PIECES: tl.constexpr,
):
    """One sampled row of one head under one candidate: its splits put together.

    ACC, MASS, TOP: from `sampled_kernel`. OUT float32 (B, H, C, R, DV), contiguous. PIECES: SPLITS padded to a power of
    two.
    """
    row = tl.program_id(0).to(tl.int64)
    o_dv = tl.arange(0, WIDTH_V)
    piece = tl.arange(0, PIECES)
    m_piece = piece < SPLITS
    at = (row // R * SPLITS + piece) * R + row % R
    top = tl.load(TOP + at, mask=m_piece, other=-float("inf"))
    best = tl.max(top, 0)
    weight = tl.math.exp2(top - tl.where(best == -float("inf"), 0.0, best))
    total = tl.sum(weight * tl.load(MASS + at, mask=m_piece, other=0.0), 0)
    acc = tl.load(ACC + at[:, None] * DV + o_dv[None, :], mask=m_piece[:, None] & (o_dv < DV)[None, :], other=0.0)
    out = tl.sum(weight[:, None] * acc, 0) / tl.where(total > 0, total, 1.0)
    tl.store(OUT + row * DV + o_dv, out, mask=o_dv < DV)


def tile(dtype: torch.dtype) -> dict[str, Any]:
    """Rows and keys of one step, precision, stages and warps: two programs share a processor of a Hopper GPU."""
    if dtype == torch.float32:
        return dict(BM=16, BN=32, PRECISION="tf32x3", STAGES=2, num_warps=4)
    return dict(BM=64, BN=64, PRECISION="tf32", STAGES=2, num_warps=4)


def sampled_outputs(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, allowed: Tensor, scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention outputs of the sampled rows, dense and under every candidate mask.

    Args:
        query (B, Lq, H, D), key (B, L, H, D), value (B, L, H, DV): any strides.
        rows: int64 (R,), query tokens.
        allowed: bool (K, R, L).
        scale: softmax scale, positive.
        key_mask: bool (B, L), True where the key is a real token, or None.

    Returns:
        float32 (B, H, 1 + K, R, DV), dense first; 0 for a row without a key.
    """
    B, L, H, DV = value.shape
    D, R, C = query.shape[3], rows.shape[0], allowed.shape[0] + 1
    if not B * H * R * DV:
        return torch.zeros(B, H, C, R, DV, device=query.device)
    width, width_v = _width(D), _width(DV)
    constants = tile(query.dtype)
    parts = triton.cdiv(C * R, constants["BM"])
    splits = max(1, min(_PROGRAMS // (B * H * parts), triton.cdiv(L, 512)))
    split = triton.cdiv(triton.cdiv(L, splits), constants["BN"]) * constants["BN"]
    splits = max(1, triton.cdiv(L, split))
    out = torch.empty(B, H, C, R, DV, dtype=torch.float32, device=query.device)
    acc = torch.empty(B, H, C, splits, R, DV, dtype=torch.float32, device=query.device)
    mass, top = (torch.empty(B, H, C, splits, R, dtype=torch.float32, device=query.device) for _ in range(2))
    # Whole steps, from addresses that are multiples of 16: masks are loaded 16 keys at a time, without a test.
    allowed = torch.nn.functional.pad(allowed, (0, -L % 64)).contiguous()
    if key_mask is not None:
        key_mask = key_mask.expand(B, L).contiguous()
    with _on_device(query.device):
        sampled_kernel[(B * H * splits * parts,)](
            query, key, value, rows.contiguous(), allowed, key_mask, acc, mass, top,
            *query.stride(), *key.stride(), *value.stride(), *allowed.stride()[:2],
            0 if key_mask is None else key_mask.stride(0), H, R, L, splits, C, split, scale * LOG2_E,
            D=D, DV=DV, WIDTH=width, WIDTH_V=width_v, **constants)
        merge_kernel[(B * H * C * R,)](
            acc, mass, top, out, R, splits,
            DV=DV, WIDTH_V=width_v, PIECES=triton.next_power_of_2(splits), num_warps=1)
    return out


def row_errors_triton(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, allowed: Tensor, scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """How far masked attention is from dense attention on the sampled rows.

    Args:
        query, key, value, rows, allowed, scale, key_mask: as in `sampled_outputs`.

    Returns:
        float32 (B, H, K), mean squared difference over rows and channels.
    """
    out = sampled_outputs(query, key, value, rows, allowed, scale, key_mask)
    return (out[:, :, 1:] - out[:, :, :1]).square().mean((3, 4))
