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

# Query and key blocks of one program of `score_kernel`, channels of a step, warps.
TILE: dict[str, int] = dict(BM=64, BN=64, STEP=32, num_warps=4)
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
def _inside(place, first, end):
    """first <= place < end, for first <= end or end <= place: one comparison."""
    return (place - first).to(tl.uint32, bitcast=True) < tl.maximum(end - first, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _float(image):
    """The float of an image, -0 and NaN left aside."""
    return tl.where(image < 0, image ^ 0x7FFFFFFF, image).to(tl.float32, bitcast=True)


@triton.jit
def _between(low, high, step, FLOATS: tl.constexpr):
    """A value above `low` and below `high`, in the middle: of the integers, or with FLOATS three times in four of the
    floats, among which scores lie more evenly; in the other turns integers, which sets a bound to the steps."""
    middle = (low + high) >> 1
    if FLOATS:
        guess = _image(_float(low.to(tl.int32)) * 0.5 + _float((high - 1).to(tl.int32)) * 0.5)
        middle = tl.where((step % 4 != 3) & (low < guess) & (guess < high), guess, middle)
    return middle.to(tl.int32)


@triton.jit
def _range(image, ranked):
    """The lowest image of what is ranked, and one more than the highest: int64, which can count on from any image."""
    return tl.min(tl.where(ranked, image, 2147483647), 0).to(tl.int64), tl.max(image, 0).to(tl.int64) + 1


@triton.jit
def _last_kept(image, ranked, candidates, count, FLOATS: tl.constexpr, PEAKS: tl.constexpr):
    """A value such that at most `count` images lie above it and at least so many at it or above; count <= candidates.

    Bisection between the lowest and the highest image, which ends as soon as just `count` images lie at it or above.
    PEAKS: every row holds some infinities, which are left out of the range: it would be far too wide.
    """
    low, high = _range(image, ranked)
    if PEAKS:
        peak = image >= 2139095040
        enough = tl.sum(peak.to(tl.int32), 0) >= count
        high = tl.where(enough, high, tl.max(tl.where(peak, -2147483648, image), 0).to(tl.int64) + 1)
        low = tl.where(enough, 2139095040, low)
    held = candidates  # images at `low` or above
    step = tl.full([], 0, tl.int32)
    while (held > count) & (high - low > 1):
        middle = _between(low, high, step, FLOATS)
        found = tl.sum((image >= middle).to(tl.int32), 0)
        low = tl.where(found >= count, middle, low)
        held = tl.where(found >= count, found, held)
        high = tl.where(found >= count, high, middle)
        step += 1
    return tl.minimum(low, high - 1).to(tl.int32)  # without candidates the range is empty


@triton.jit
def _last_of_share(image, share, ranked, candidates, limit):
    """The highest image such that the shares from it upwards add up to more than `limit`, or the lowest int32."""
    low, high = _range(image, ranked)
    enough = tl.sum(share, 0) > limit
    held = tl.where(enough, candidates, 0)  # images from `low` up
    beyond = tl.full([], 0, tl.int32)  # images from `high` up
    while (held - beyond > 1) & (high - low > 1):
        middle = _between(low, high, 0, False)
        reached = tl.sum(tl.where(image >= middle, share, 0), 0) > limit
        found = tl.sum((image >= middle).to(tl.int32), 0)
        low = tl.where(reached, middle, low)
        held = tl.where(reached, found, held)
        beyond = tl.where(reached, beyond, found)
        high = tl.where(reached, high, middle)
    return tl.where(enough, tl.max(tl.where(image < high, image, -2147483648), 0), -2147483648)


@triton.jit
def _count_of_share(image, share, last, limit):
    """How many of the best images are kept while the shares before them add up to at most `limit`."""
    above = image > last
    equal = image == last
    held = tl.sum(tl.where(above, share, 0), 0)
    one = tl.max(tl.where(equal, share, 0), 0)
    ties = tl.sum(equal.to(tl.int32), 0).to(tl.int64)
    fitting = tl.where(one > 0, (limit - held) // tl.maximum(one, 1) + 1, ties)
    # The lowest int32 marks what takes no part; below a share of 0 nothing fits, not even NaN.
    fitting = tl.where((last == -2147483648) | (limit < 0), 0, tl.minimum(fitting, ties))
    return tl.sum(above.to(tl.int32), 0) + fitting.to(tl.int32)


@triton.jit(do_not_specialize=["first_tile", "tiles", "H", "NQ", "NK"])
def score_kernel(
    QUERY, KEY, WEIGHT, SCORES, stride_wb, stride_wh, first_tile, tiles, H, NQ, NK, stride_row, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of BM query blocks by BN key blocks of one head.

    QUERY (B * H, NQ, D), KEY (B * H, NK, D): block means, float32. WEIGHT float32 (B|1, H|1, NK) by strides, added to
    every score of its key block, or None. SCORES (tiles of this launch * BM, stride_row).
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
    if WEIGHT is not None:
        p_weight = WEIGHT + bh // H * stride_wb + bh % H * stride_wh + o_key
        score += tl.load(p_weight, mask=o_key < NK, other=0.0)[None, :]
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
    FORCED: tl.constexpr, KEY_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The list of one query block, from its row of scores.

    SCORES: row r of this launch belongs to tile first_tile + r // ROWS of query blocks. LISTS (B * H, NQ, width),
    WHOLE, BOUNDARY and PAIRS (B * H, NQ), contiguous. KIND 0: top-k; 1: top-p; 2: threshold, with AMOUNT, or `amount`
    where it is None. FORCED_ROWS and FORCED_COLUMNS may be None. FORCED: the range of forced blocks is not empty.
    COLUMNS: NK padded to a power of two.
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
    candidates = tl.maximum(tl.minimum(end_column, NK) - first_column, 0)
    ranked = _inside(o_key, first_column, first_column + candidates)
    if AMOUNT is None:
        limit = amount
    else:
        limit = tl.load(AMOUNT + b * stride_ab + h * stride_ah + i_q * stride_aq)

    if SOFTMAX:
        score = tl.where(ranked, score, -float("inf"))
        score = tl.exp(score - tl.max(score, 0))
        score = score / tl.sum(tl.where(ranked, score, 0.0), 0)
    image = tl.where(ranked, _image(score), -2147483648)
    if KIND == 0:
        count = tl.minimum(tl.maximum(limit, 1).to(tl.int32), candidates)
        last = _last_kept(image, ranked, candidates, count, not SOFTMAX, NEAR > 0)
    elif KIND == 1:
        # Sums of whole numbers are exact, whatever order they are added in; 2^40 stands for a share of 1.
        share = tl.where(ranked & (score == score), tl.minimum(tl.maximum(score, 0.0), 1.0), 0.0) * 1099511627776.0
        share = share.to(tl.int64)
        limit = limit.to(tl.int64)
        last = _last_of_share(image, share, ranked, candidates, limit)
        count = tl.minimum(tl.maximum(_count_of_share(image, share, last, limit), LEAST), candidates)
        if count > tl.sum((image >= last).to(tl.int32), 0):  # more of them are asked for than the share takes
            last = _last_kept(image, ranked, candidates, count, False, False)
    else:
        count = tl.minimum(candidates, 1)
        last = tl.max(image, 0)
    above = image > last
    equal = image == last
    # Of equal scores the lower indices are kept, as many as there is room for; the lowest int32 is no score.
    found = tl.sum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    room = tl.where(last == -2147483648, 0, count - (found & 0xFFFF))
    end = NK
    if found >> 16 > room:
        end = tl.sum((tl.cumsum(equal.to(tl.int32), 0) <= room).to(tl.int32), 0)
    keep = above | (equal & (o_key < end))
    if KIND == 2:
        keep |= (image != -2147483648) & (score >= limit)

    # What lies outside of the choice is kept; slots beyond the blocks have no length.
    whole_row = (i_q < first_row) | (i_q >= end_row)
    if FORCED_ROWS is not None:
        whole_row |= tl.load(FORCED_ROWS + b * stride_rb + h * stride_rh + i_q) != 0
    keep |= (image == -2147483648) | whole_row
    if FORCED:
        keep |= _inside(o_key, first_forced, end_forced)
    if OWN:
        keep |= o_key == i_q
    if FORCED_COLUMNS is not None:
        keep |= tl.load(FORCED_COLUMNS + b * stride_cb + h * stride_ch + o_key, mask=m_key, other=0) != 0
    query_length = tl.load(QUERY_LENGTHS + i_q)
    length = tl.load(KEY_LENGTHS + o_key, mask=m_key & (query_length > 0), other=0)
    keep &= length > 0

    # Every kept block goes to its place in the list: whole ones, then short ones, then zeros.
    short = keep & (length < KEY_BLOCK)
    rank = tl.cumsum(keep.to(tl.int32) + (short.to(tl.int32) << 16), 0)
    total = tl.max(rank, 0)
    n_short = total >> 16
    n_kept = total & 0xFFFF
    short_rank = rank >> 16
    place = tl.where(short, n_kept - n_short + short_rank, (rank & 0xFFFF) - short_rank) - 1
    at = bh * NQ + i_q
    listed = keep & (place < width)
    tl.store(LISTS + at * width + place, o_key, mask=listed)
    tl.store(LISTS + at * width + o_key, tl.zeros_like(o_key), mask=_inside(o_key, n_kept, width))
    n_whole = tl.minimum(n_kept - n_short, width)
    tl.store(WHOLE + at, n_whole)
    tl.store(BOUNDARY + at, tl.minimum(n_short, width - n_whole))
    keys = tl.sum(tl.where(listed, length, 0), 0)
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


def resources_of_row(columns: int, kind: str, forced: bool) -> dict[str, int | None]:
    """Warps of a program of `select_kernel` and most registers of a thread: few, so that many rows share a processor.

    H200, 23,640 rows of 591, November 2026, ms of scores to lists: top-k .189 with one warp and 128 registers, .176
    with two and 64, .191 with two and as many as the compiler takes, .226 with four; top-p .484 with one, .368 with
    two, .391 with four; threshold .166 with one, .133 with two, .124 with four.

    Args:
        columns: of a row, a power of two.
        kind: of the rule.
        forced: whether the rule has maps of forced blocks, which do not fit into 64 registers.
    """
    warps = max(1, columns // (256 if kind == "threshold" else 512))
    few = kind == "top_k" and columns == 1024 and not forced and not torch.version.hip
    return dict(num_warps=warps, maxnreg=64 if few else None)


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
    key_block: int, width: int | None = None, key_weight: Tensor | None = None,
) -> Lists:
    """Lists from the blocks' mean queries and keys.

    Args:
        block_query: float32 (B, H, nq, D); block_key: float32 (B, H, nk, D).
        scale: softmax scale.
        rule, query_lengths, key_lengths, key_block, width: as in `select_triton`.
        key_weight: float32 (B|1, H|1, nk), added to every score of the key block, or None.
    """
    B, H, nq, D = block_query.shape
    nk = block_key.shape[2]
    found = _empty(B, H, nq, nk if width is None else max(1, min(width, nk)), block_query.device)
    if not B * H * nq * nk:
        return found
    block_query, block_key = block_query.contiguous(), block_key.contiguous()
    arguments = _Select(rule, B, H, query_lengths, key_lengths, key_block, found)
    width_d = _width(D)
    constants = TILE | dict(D=D, WIDTH=width_d, STEP=min(TILE["STEP"], width_d), PRECISION="tf32x3")
    rows = TILE["BM"]
    tiles, stride = triton.cdiv(nq, rows), triton.cdiv(nk, 16) * 16
    most = max(1, min(B * H * tiles, _NUMBERS_AT_ONCE // (rows * stride)))
    scores = torch.empty(most * rows, stride, dtype=torch.float32, device=block_query.device)
    weight_strides = [0, 0]
    if key_weight is not None:
        key_weight = key_weight if key_weight.stride(-1) == 1 else key_weight.contiguous()
        weight_strides = _broadcast_strides(key_weight)[:2]
    with _on_device(block_query.device):
        for first in range(0, B * H * tiles, most):
            count = min(most, B * H * tiles - first)
            score_kernel[(count, triton.cdiv(nk, TILE["BN"]))](
                block_query, block_key, key_weight, scores, *weight_strides, first, tiles, H, nq, nk, stride, scale,
                **constants)
            arguments.launch(scores, stride, count * rows, first, tiles, rows)
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
        forced = rule.forced_range(nk)
        self.sizes = [H, nq, nk, found.lists.shape[-1], amount, *rule.row_range(nq), *rule.column_range(nk), *forced]
        columns = max(16, triton.next_power_of_2(nk))
        self.constants: dict[str, Any] = dict(
            KIND=_KINDS.index(rule.kind), SOFTMAX=rule.softmax, LEAST=max(1, rule.least), OWN=rule.own, NEAR=rule.near,
            FORCED=forced[0] < forced[1], KEY_BLOCK=key_block, COLUMNS=columns,
            **resources_of_row(columns, rule.kind, any(x is not None for x in self.tensors[1:])))

    def launch(self, scores: Tensor, stride: int, rows: int, first_tile: int, tiles: int, tile: int) -> None:
        """One program for every row of scores."""
        select_kernel[(rows,)](scores, *self.tensors, *self.outputs, stride, *self.strides, first_tile, tiles,
                               *self.sizes, ROWS=tile, **self.constants)


def _three(x: Tensor) -> Tensor:
    """bool (n,) or (B|1, H|1, n) as (B|1, H|1, n), one element after the other in memory."""
    return x.reshape(*[1] * (3 - x.dim()), *x.shape).contiguous()
