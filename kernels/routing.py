"""Pooled scores to lists of key blocks, 32 MB of scores at a time: Triton, on any GPU that it knows, and interpreted.

Two kernels. `score_kernel` multiplies mean queries by mean keys, for a chunk of query rows whose scores stay in the
cache (32 MB). `select_kernel` takes one row of them: it finds the last score to keep by bisection on the
order-preserving integer image of the float, and writes the row's list by prefix sums. Importing this module needs
triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .portable import _broadcast_strides, _on_device, _width

if TYPE_CHECKING:
    from dit_sparse.selection import Rule

TILE = 64  # query and key blocks of one program of `score_kernel`
_NUMBERS_AT_ONCE = 2**23  # scores in memory at a time: 32 MB, less than the cache of a Hopper GPU
_KINDS = ("top_k", "top_p", "threshold")


@triton.jit
def _image(x):
    """int32 that is ordered as the floats are: NaN highest, -0 equal to 0; the lowest int32 stays free."""
    bits = x.to(tl.int32, bitcast=True)
    image = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    image = tl.where(x == 0.0, 0, image)
    return tl.where(x != x, 0x7FFFFFFF, image)


@triton.jit
def _last_kept(image, weight, least):
    """The highest value such that the weights of all images from it upwards add up to `least`, or the lowest int32."""
    last = tl.where(tl.sum(tl.where(image >= 0, weight, 0), 0) >= least, 0, -2147483648)
    for i in range(31):
        bit = tl.full([], 1, tl.int32) << (30 - i)
        held = tl.sum(tl.where(image >= (last | bit), weight, 0), 0)
        last = tl.where(held >= least, last | bit, last)
    return last


@triton.jit
def _count_of_share(image, share, limit):
    """How many of the best images are kept while the shares before them add up to at most `limit`."""
    last = _last_kept(image, share, limit + 1)
    above = image > last
    equal = image == last
    held = tl.sum(tl.where(above, share, 0), 0)
    one = tl.max(tl.where(equal, share, 0), 0)
    ties = tl.sum(equal.to(tl.int32), 0).to(tl.int64)
    fitting = tl.where(one > 0, (limit - held) // tl.maximum(one, 1) + 1, ties)
    # The lowest int32 marks what takes no part; below a share of 0 nothing fits, not even NaN.
    fitting = tl.where((last == -2147483648) | (limit < 0), 0, tl.minimum(fitting, ties))
    return tl.sum(above.to(tl.int32), 0) + fitting.to(tl.int32)


@triton.jit(do_not_specialize=["first_tile", "tiles", "NQ", "NK"])
def score_kernel(
    QUERY, KEY, SCORES, first_tile, tiles, NQ, NK, stride_row, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of BM query blocks by BN key blocks of one head.

    QUERY (B * H, NQ, D), KEY (B * H, NK, D): block means, float32. SCORES (tiles of this launch * BM, stride_row).
    """
    pid = tl.program_id(0)
    tile = first_tile + pid
    bh = (tile // tiles).to(tl.int64)
    o_query = tile % tiles * BM + tl.arange(0, BM)
    o_key = tl.program_id(1) * BN + tl.arange(0, BN)
    m_query = (o_query < NQ)[:, None]
    m_key = (o_key < NK)[:, None]
    p_query = QUERY + bh * NQ * D + o_query[:, None] * D
    p_key = KEY + bh * NK * D + o_key[:, None] * D
    score = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, WIDTH, STEP):
        o_d = (start + tl.arange(0, STEP))[None, :]
        query = tl.load(p_query + o_d, mask=m_query & (o_d < D), other=0.0) * scale
        key = tl.load(p_key + o_d, mask=m_key & (o_d < D), other=0.0)
        score = tl.dot(query, key.T, score, input_precision=PRECISION)
    row = (pid * BM + tl.arange(0, BM)).to(tl.int64)
    p_score = SCORES + row[:, None] * stride_row + o_key[None, :]
    tl.store(p_score, score, mask=(o_key < NK)[None, :])


@triton.jit(do_not_specialize=["first_tile", "tiles", "H", "NQ", "NK", "width", "amount", "first_row", "end_row",
                               "first_column", "end_column", "first_forced", "end_forced"])
def select_kernel(
    SCORES, AMOUNT, FORCED_ROWS, FORCED_COLUMNS, QUERY_LENGTHS, KEY_LENGTHS, LISTS, WHOLE, BOUNDARY, PAIRS,
    stride_row, stride_ab, stride_ah, stride_aq, stride_rb, stride_rh, stride_cb, stride_ch,
    first_tile, tiles, H, NQ, NK, width, amount, first_row, end_row, first_column, end_column, first_forced, end_forced,
    KIND: tl.constexpr, SOFTMAX: tl.constexpr, LEAST: tl.constexpr, OWN: tl.constexpr, NEAR: tl.constexpr,
    KEY_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The list of one query block, from its row of scores.

    SCORES: row r of this launch belongs to tile first_tile + r // ROWS of query blocks. LISTS (B * H, NQ, width),
    WHOLE, BOUNDARY and PAIRS (B * H, NQ), contiguous. KIND 0: top-k; 1: top-p; 2: threshold, with AMOUNT, or `amount`
    where it is None. FORCED_ROWS and FORCED_COLUMNS may be None. COLUMNS: NK padded to a power of two.
    """
    pid = tl.program_id(0)
    tile = first_tile + pid // ROWS
    i_q = tile % tiles * ROWS + pid % ROWS
    if i_q >= NQ:
        return
    bh = (tile // tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    o_key = tl.arange(0, COLUMNS)
    m_key = o_key < NK
    score = tl.load(SCORES + pid.to(tl.int64) * stride_row + o_key, mask=m_key, other=0.0)
    if NEAR:  # these rank before all others
        score = tl.where((o_key < i_q + NEAR) & (i_q < o_key + NEAR), float("inf"), score)
    ranked = m_key & (o_key >= first_column) & (o_key < end_column)
    if AMOUNT is None:
        limit = amount
    else:
        limit = tl.load(AMOUNT + b * stride_ab + h * stride_ah + i_q * stride_aq)

    if SOFTMAX:
        score = tl.where(ranked, score, -float("inf"))
        score = tl.exp(score - tl.max(score, 0))
        score = score / tl.sum(tl.where(ranked, score, 0.0), 0)
    image = tl.where(ranked, _image(score), -2147483648)
    candidates = tl.sum(ranked.to(tl.int32), 0)
    if KIND == 0:
        count = tl.maximum(limit, 1).to(tl.int32)
    elif KIND == 1:
        # Sums of whole numbers are exact, whatever order they are added in; 2^40 stands for a share of 1.
        share = tl.where(ranked & (score == score), tl.minimum(tl.maximum(score, 0.0), 1.0), 0.0) * 1099511627776.0
        count = tl.maximum(_count_of_share(image, share.to(tl.int64), limit.to(tl.int64)), LEAST)
    else:
        count = tl.full([], 1, tl.int32)
    count = tl.minimum(count, candidates)
    if KIND == 2:
        last = tl.max(image, 0)
    else:
        last = _last_kept(image, ranked.to(tl.int32), count)
    above = image > last
    equal = ranked & (image == last)
    # Of equal scores the lower indices are kept, as many as there is room for.
    room = count - tl.sum(above.to(tl.int32), 0)
    keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    if KIND == 2:
        keep |= ranked & (score >= limit)

    # What lies outside of the choice is kept.
    keep |= (o_key < first_column) | (o_key >= end_column) | ((o_key >= first_forced) & (o_key < end_forced))
    keep |= (i_q < first_row) | (i_q >= end_row)
    if OWN:
        keep |= o_key == i_q
    if FORCED_ROWS is not None:
        keep |= tl.load(FORCED_ROWS + b * stride_rb + h * stride_rh + i_q) != 0
    if FORCED_COLUMNS is not None:
        keep |= tl.load(FORCED_COLUMNS + b * stride_cb + h * stride_ch + o_key, mask=m_key, other=0) != 0
    length = tl.load(KEY_LENGTHS + o_key, mask=m_key, other=0)
    query_length = tl.load(QUERY_LENGTHS + i_q)
    keep = keep & (length > 0) & (query_length > 0)

    # Every block goes to its place in the list: whole ones, then short ones, then zeros for those not kept.
    short = keep & (length < KEY_BLOCK)
    rank = tl.cumsum(keep.to(tl.int32) + (short.to(tl.int32) << 16), 0)
    n_short = tl.sum(short.to(tl.int32), 0)
    n_kept = tl.sum(keep.to(tl.int32), 0)
    kept_rank = rank & 0xFFFF
    short_rank = rank >> 16
    place = tl.where(keep, kept_rank - short_rank - 1, n_kept + o_key - kept_rank)
    place = tl.where(short, n_kept - n_short + short_rank - 1, place)
    at = bh * NQ + i_q
    listed = m_key & (place < width)
    tl.store(LISTS + at * width + place, tl.where(keep, o_key, 0), mask=listed)
    n_whole = tl.minimum(n_kept - n_short, width)
    tl.store(WHOLE + at, n_whole)
    tl.store(BOUNDARY + at, tl.minimum(n_short, width - n_whole))
    keys = tl.sum(tl.where(listed & keep, length, 0), 0)
    tl.store(PAIRS + at, keys.to(tl.int64) * query_length)


@dataclass(frozen=True)
class Lists:
    """Lists of key blocks as `BlockMask` holds them, and the allowed pairs of tokens of every query block.

    Args:
        lists: int32 (B, H, nq, width); whole, boundary: int32 (B, H, nq).
        pairs: int64 (B, H, nq).
    """

    lists: Tensor
    whole: Tensor
    boundary: Tensor
    pairs: Tensor


def warps_of_row(columns: int, kind: str) -> int:
    """Warps of a program of `select_kernel`: few, so that few threads wait.

    H200, 23,640 rows of 591, November 2026, ms of means to lists with 1, 2 and 4 warps: top-k .479, .427, .443, top-p
    .791, .854, .896, threshold .348, .301, .286.
    """
    return max(1, columns // (1024 if kind == "top_p" else 512))


def select_triton(
    scores: Tensor, rule: Rule, query_lengths: Tensor, key_lengths: Tensor, key_block: int, width: int | None = None
) -> Lists:
    """Lists from scores that are there already.

    Args:
        scores: float32 (B, H, nq, nk).
        rule: how to choose.
        query_lengths, key_lengths: int32 (nq,) and (nk,), real tokens of each block.
        key_block: tokens of a whole key block.
        width: most blocks of a list; None: all.
    """
    B, H, nq, nk = scores.shape
    found = _empty(B, H, nq, nk if width is None else max(1, min(width, nk)), scores.device)
    if scores.numel():
        arguments = _Select(rule, B, H, query_lengths, key_lengths, key_block, found)
        with _on_device(scores.device):
            arguments.launch(scores.contiguous(), nk, B * H * nq, 0, nq, 1)
    return found


def route_triton(
    block_query: Tensor, block_key: Tensor, scale: float, rule: Rule, query_lengths: Tensor, key_lengths: Tensor,
    key_block: int, width: int | None = None,
) -> Lists:
    """Lists from the blocks' mean queries and keys.

    Args:
        block_query: float32 (B, H, nq, D); block_key: float32 (B, H, nk, D).
        scale: softmax scale.
        rule, query_lengths, key_lengths, key_block, width: as in `select_triton`.
    """
    B, H, nq, D = block_query.shape
    nk = block_key.shape[2]
    found = _empty(B, H, nq, nk if width is None else max(1, min(width, nk)), block_query.device)
    if not B * H * nq * nk:
        return found
    block_query, block_key = block_query.contiguous(), block_key.contiguous()
    arguments = _Select(rule, B, H, query_lengths, key_lengths, key_block, found)
    tiles, stride = triton.cdiv(nq, TILE), triton.cdiv(nk, 16) * 16
    most = max(1, min(B * H * tiles, _NUMBERS_AT_ONCE // (TILE * stride)))
    scores = torch.empty(most * TILE, stride, dtype=torch.float32, device=block_query.device)
    width_d = _width(D)
    with _on_device(block_query.device):
        for first in range(0, B * H * tiles, most):
            count = min(most, B * H * tiles - first)
            score_kernel[(count, triton.cdiv(nk, TILE))](
                block_query, block_key, scores, first, tiles, nq, nk, stride, scale,
                D=D, WIDTH=width_d, BM=TILE, BN=TILE, STEP=min(32, width_d), PRECISION="tf32x3", num_warps=4)
            arguments.launch(scores, stride, count * TILE, first, tiles, TILE)
    return found


def _empty(B: int, H: int, nq: int, width: int, device: torch.device) -> Lists:
    lists = torch.empty(B, H, nq, width, dtype=torch.int32, device=device)
    whole, boundary = (torch.empty(B, H, nq, dtype=torch.int32, device=device) for _ in range(2))
    return Lists(lists, whole, boundary, torch.empty(B, H, nq, dtype=torch.int64, device=device))


class _Select:
    """The arguments of `select_kernel` that do not change from chunk to chunk."""

    def __init__(self, rule: Rule, B: int, H: int, query_lengths: Tensor, key_lengths: Tensor, key_block: int,
                 found: Lists) -> None:
        nq, nk = query_lengths.shape[0], key_lengths.shape[0]
        amount = rule.limit()
        self.tensors: list[Any] = [None, *(None if x is None else _three(x) for x in (rule.forced_rows,
                                                                                      rule.forced_columns_map()))]
        strides = [0, 0, 0]
        if isinstance(amount, Tensor):
            amount = amount.reshape(*[1] * (4 - amount.dim()), *amount.shape)[..., 0]
            strides = _broadcast_strides(amount)
            self.tensors[0], amount = amount, 0
        strides += [s for x in self.tensors[1:] for s in ((0, 0) if x is None else _broadcast_strides(x)[:2])]
        self.outputs = [query_lengths, key_lengths, found.lists, found.whole, found.boundary, found.pairs]
        self.strides = strides
        self.sizes = [H, nq, nk, found.lists.shape[-1], amount, *rule.row_range(nq), *rule.column_range(nk),
                      *rule.forced_range(nk)]
        columns = max(16, triton.next_power_of_2(nk))
        self.constants = dict(KIND=_KINDS.index(rule.kind), SOFTMAX=rule.softmax, LEAST=max(1, rule.least),
                              OWN=rule.own, NEAR=rule.near, KEY_BLOCK=key_block, COLUMNS=columns,
                              num_warps=warps_of_row(columns, rule.kind))

    def launch(self, scores: Tensor, stride: int, rows: int, first_tile: int, tiles: int, tile: int) -> None:
        """One program for every row of scores."""
        select_kernel[(rows,)](scores, *self.tensors, *self.outputs, stride, *self.strides, first_tile, tiles,
                               *self.sizes, ROWS=tile, **self.constants)


def _three(x: Tensor) -> Tensor:
    """bool (n,) or (B|1, H|1, n) as (B|1, H|1, n), one element after the other in memory."""
    return x.reshape(*[1] * (3 - x.dim()), *x.shape).contiguous()
