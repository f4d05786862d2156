"""Portable Triton kernel: block-sparse attention forward with LSE, on any GPU that Triton knows, and interpreted.

One program computes one tile of queries of one head. It loops over the whole blocks of its list without any test,
then over the boundary blocks with the length, key-mask and window tests. Keys and values come through tensor
descriptors where the GPU has them and the strides allow it, through pointers otherwise. Imported only when used:
importing this module needs triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself: only compile-time arguments may have one.

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .blocks import Blocks, empty_results
from .launch_order import launch_order

LOG2_E = 1.4426950408889634


@triton.jit
def _load_tile(X, use_descriptor: tl.constexpr, b, h, start, row_ok, stride_row, stride_d,
               ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TESTED: tl.constexpr):
    """[ROWS, WIDTH] keys or values from row `start`; columns beyond D are 0."""
    if use_descriptor:
        # Leading dimensions of size 1 vanish in the load itself, nothing passes through registers.
        tile = X.load([b.to(tl.int32), h.to(tl.int32), start, 0]).reshape(ROWS, WIDTH)
    else:
        o_row = (start + tl.arange(0, ROWS)).to(tl.int64)
        o_d = tl.arange(0, WIDTH)
        p_tile = X + o_row[:, None] * stride_row + o_d[None, :] * stride_d
        if TESTED:
            tile = tl.load(p_tile, mask=row_ok[:, None] & (o_d < D)[None, :], other=0.0)
        elif D == WIDTH:
            tile = tl.load(p_tile)
        else:
            tile = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    return tile


@triton.jit
def _inside(COORDINATES, LOW, HIGH, key_slot, query_slot):
    """[queries, keys]: the key's coordinate lies between the query's low and high."""
    place = tl.load(COORDINATES + key_slot)[None, :]
    return (place >= tl.load(LOW + query_slot)[:, None]) & (place <= tl.load(HIGH + query_slot)[:, None])


@triton.jit(do_not_specialize=["H", "Lq", "NQ", "query_slots", "key_slots"])
def attention_kernel(
    Q, K, V, OUT, LSE, LISTS, WHOLE, BOUNDARY, EXEMPT, ORDER, QUERY_INDEX, KEY_LENGTHS, KEY_OK, COORDINATES, LOW, HIGH,
    ALWAYS,
    stride_qb, stride_qn, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_lb, stride_lh, stride_lq, stride_cb, stride_ch, stride_cq,
    stride_ib, stride_ih, stride_mb, stride_mh,
    H, Lq, NQ, query_slots, key_slots, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    COORDINATE_COUNT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    TESTED_STAGES: tl.constexpr,
):
    """One tile of BM queries of one head against the key blocks that its list names.

    Q (B, Lq, H, D) by strides; K, V (B, Lk or key slots, H, D), as pointers or as descriptors over (B, H, rows, D).
    OUT (B, Lq, H, DV) and LSE (B, H, Lq), contiguous. ORDER: int32 (B * H * NQ,), the query blocks in launch order.
    EXEMPT: how many of the boundary blocks, first in the list, are tested for masked keys but not by the window.
    May be None: QUERY_INDEX (identity order), KEY_OK and EXEMPT (no key mask), COORDINATES (no window), ALWAYS.
    """
    SUB_M: tl.constexpr = QUERY_BLOCK // BM
    SUB_N: tl.constexpr = KEY_BLOCK // BN
    pid = tl.program_id(0)
    flat = tl.load(ORDER + pid // SUB_M)
    i_q = (flat % NQ).to(tl.int64)
    h = (flat // NQ % H).to(tl.int64)
    b = (flat // NQ // H).to(tl.int64)

    # A slot's token is the slot itself, or what the index says; -1 is padding.
    query_slot = i_q * QUERY_BLOCK + (pid % SUB_M) * BM + tl.arange(0, BM)
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
    n_boundary = tl.load(BOUNDARY + i_count)
    p_list = LISTS + b * stride_lb + h * stride_lh + i_q * stride_lq
    if DESCRIPTORS:
        KEYS = K
        VALUES = V
    else:
        KEYS = K + b * stride_kb + h * stride_kh
        VALUES = V + b * stride_vb + h * stride_vh
    o_key = tl.arange(0, BN)
    every = o_key >= 0

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH_V], tl.float32)
    for i in tl.range(0, n_whole * SUB_N, num_stages=STAGES):
        start = tl.load(p_list + i // SUB_N) * KEY_BLOCK + (i % SUB_N) * BN
        key = _load_tile(KEYS, DESCRIPTORS, b, h, start, every, stride_kn, stride_kd, BN, D, WIDTH, False)
        score = tl.dot(query, key.T, input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        weight = tl.math.exp2(score * scale_log2 - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        value = _load_tile(VALUES, DESCRIPTORS, b, h, start, every, stride_vn, stride_vd, BN, DV, WIDTH_V, False)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        top = new_top

    p_list += n_whole
    if EXEMPT is not None:
        n_exempt = tl.load(EXEMPT + i_count) * SUB_N
    for i in tl.range(0, n_boundary * SUB_N, num_stages=TESTED_STAGES):
        block = tl.load(p_list + i // SUB_N)
        place = (i % SUB_N) * BN + o_key
        start = block * KEY_BLOCK + (i % SUB_N) * BN
        key_slot = start + o_key
        if KEY_OK is None:
            ok = place < tl.load(KEY_LENGTHS + block)
        else:
            ok = tl.load(KEY_OK + b * stride_mb + h * stride_mh + key_slot) != 0
        key = _load_tile(KEYS, DESCRIPTORS, b, h, start, ok, stride_kn, stride_kd, BN, D, WIDTH, True)
        score = tl.dot(query, key.T, input_precision=PRECISION) * scale_log2
        score = tl.where(ok[None, :], score, -float("inf"))
        # [BN]: keys that the window does not test.
        if ALWAYS is not None:
            free = tl.load(ALWAYS + key_slot) != 0
            if EXEMPT is not None:
                free |= i < n_exempt
        elif EXEMPT is not None:
            free = every & (i < n_exempt)
        # One coordinate after the other: fewer tests are alive at once, which is what keeps them in registers.
        for c in tl.static_range(COORDINATE_COUNT):
            inside = _inside(COORDINATES, LOW, HIGH, c * key_slots + key_slot, c * query_slots + query_slot)
            if ALWAYS is not None or EXEMPT is not None:
                inside |= free[None, :]
            score = tl.where(inside, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # A query that has met no key yet keeps -inf: subtract 0 there, so that its weights are exp2(-inf) = 0.
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.math.exp2(score - safe_top[:, None])
        shrink = tl.math.exp2(top - safe_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        value = _load_tile(VALUES, DESCRIPTORS, b, h, start, ok, stride_vn, stride_vd, BN, DV, WIDTH_V, True)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        top = new_top

    # A query without a key has acc = 0 and top = -inf: dividing by 1 gives out 0 and LSE -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc * (1.0 / total)[:, None]
    lse = (top + tl.math.log2(total)) * 0.6931471805599453
    o_dv = tl.arange(0, WIDTH_V)
    p_out = OUT + ((b * Lq + token) * H + h)[:, None] * DV + o_dv[None, :]
    tl.store(p_out, acc.to(OUT.dtype.element_ty), mask=m_row[:, None] & (o_dv < DV)[None, :])
    tl.store(LSE + (b * H + h) * Lq + token, lse, mask=m_row)


@triton.jit(do_not_specialize=["slots", "H"])
def gather_kernel(
    K, V, KEYS, VALUES, INDEX, stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd,
    stride_ib, stride_ih, slots, H,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr,
):
    """Keys and values (B, Lk, H, D) into slot order, (B, H, slots, D) contiguous; padding slots are 0."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.load(INDEX + b * stride_ib + h * stride_ih + slot, mask=slot < slots, other=-1)
    m_real = (token >= 0)[:, None]
    m_slot = (slot < slots)[:, None]
    row = ((b * H + h) * slots + slot)[:, None]
    o_d = tl.arange(0, WIDTH)[None, :]
    key = tl.load(K + b * stride_kb + h * stride_kh + token[:, None] * stride_kn + o_d * stride_kd,
                  mask=m_real & (o_d < D), other=0.0)
    tl.store(KEYS + row * D + o_d, key, mask=m_slot & (o_d < D))
    o_dv = tl.arange(0, WIDTH_V)[None, :]
    value = tl.load(V + b * stride_vb + h * stride_vh + token[:, None] * stride_vn + o_dv * stride_vd,
                    mask=m_real & (o_dv < DV), other=0.0)
    tl.store(VALUES + row * DV + o_dv, value, mask=m_slot & (o_dv < DV))


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut: queries and keys of one step, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def choose_tile(query_block: int, key_block: int, width: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """The cut of the kernel for these blocks.

    Args:
        query_block, key_block: block sizes, powers of two from 16.
        width: head dim, padded to a power of two.
        dtype: of the activations.
        shared_memory: bytes a program may use.

    Returns:
        The tile. 128 x 128, 8 warps, 2 stages was the fastest of the portable kernels on an H200 in bf16 (November
        2026); float32 needs smaller tiles, as its products take three passes.
    """
    if dtype == torch.float32:
        queries, keys, warps, stages = min(query_block, 64), min(key_block, 32), 4, 2
    else:
        queries, keys = min(query_block, 128), min(key_block, 128)
        warps, stages = (8 if queries == 128 else 4), (2 if keys == 128 else 3)

    def used() -> int:
        return width * dtype.itemsize * (queries + 2 * stages * keys)

    while used() > shared_memory - 4096 and keys > 16:
        keys, stages = keys // 2, 2
    return Tile(queries, keys, warps, stages)


def tested_stages(tile: Tile, coordinates: int, key_mask: bool) -> int:
    """Pipeline stages of the boundary loop: with every test at once, a second stage would spill registers."""
    return 1 if coordinates and key_mask else tile.stages


def can_describe(x: Tensor) -> bool:
    """Whether a tensor descriptor can read x (B, L, H, D): 16-byte aligned, rows contiguous."""
    aligned = all(n == 1 or s * x.element_size() % 16 == 0 for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
    return aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.numel() > 0


def describe(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Descriptor of x (B, L, H, D) as (B, H, L, D), read in boxes of `rows` tokens of one head."""
    # The stride of a dimension of size 1 is never used, but must be a multiple of 16 bytes.
    b, n, h = (stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    B, L, H, D = x.shape
    return TensorDescriptor(x, [B, H, L, D], [b, h, n, 1], [1, 1, rows, width])


def demote_masked(blocks: Blocks, key_ok: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists with every whole block that holds a masked key moved to the front of the boundary blocks.

    Args:
        blocks: the lists.
        key_ok: bool (B|1, H|1, key slots), True where the slot holds a key that may be seen.

    Returns:
        lists (B|1, H|1, nq, width); whole, boundary and exempt (B|1, H|1, nq): how many blocks are whole, how many
        are tested, and how many of the tested ones the window must not test. int32.
    """
    clean = key_ok.unflatten(-1, (-1, blocks.key_block)).all(-1)
    batch, heads = torch.broadcast_shapes(clean.shape[:2], blocks.lists.shape[:2])
    lists, whole, boundary = (x.expand(batch, heads, *x.shape[2:]) for x in
                              (blocks.lists, blocks.whole, blocks.boundary))
    nq = lists.shape[2]
    clean = clean.expand(batch, heads, -1)[:, :, None].expand(-1, -1, nq, -1).gather(-1, lists.long())
    place = torch.arange(lists.shape[-1], dtype=torch.int32, device=lists.device)
    stays = clean & (place < whole[..., None])
    rank = stays.cumsum(-1, dtype=torch.int32)
    staying = rank[..., -1:]
    # Clean whole blocks close up at the front, all others follow in their order.
    target = torch.where(stays, rank - 1, staying + place - rank)
    lists = torch.empty_like(lists, memory_format=torch.contiguous_format).scatter_(-1, target.long(), lists)
    exempt = whole - staying[..., 0]
    return lists, staying[..., 0].contiguous(), boundary + exempt, exempt.contiguous()


def gather_slots(key: Tensor, value: Tensor, index: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, Lk, H, D) in slot order, as (B, slots, H, D) views of (B, H, slots, D); padding is 0."""
    B, _, H, D = key.shape
    DV = value.shape[3]
    keys, values = (torch.empty(B, H, slots, x.shape[3], dtype=x.dtype, device=x.device) for x in (key, value))
    rows = 32
    gather_kernel[(triton.cdiv(slots, rows), H, B)](
        key, value, keys, values, index, *key.stride(), *value.stride(), *_broadcast_strides(index)[:2], slots, H,
        D=D, DV=DV, WIDTH=_width(D), WIDTH_V=_width(DV), ROWS=rows, num_warps=4)
    return keys.transpose(1, 2), values.transpose(1, 2)


def block_sparse_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, *, descriptors: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention by the portable kernel.

    Queries are read, and outputs written, through the query index inside the kernel: each row once. Keys and values
    of a permuted layout are read by many query blocks, so they are put in slot order once, by a fused pass that
    costs about a fiftieth of the attention it serves and keeps the inner loop on bulk copies.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D), value (B, Lk, H, Dv): any strides.
        blocks: which key blocks each query block computes.
        scale: factor of the scores, positive.
        descriptors: read keys and values through tensor descriptors; None: wherever the GPU and the strides allow.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, LSE (B, H, Lq) float32.
    """
    B, _, H, _ = query.shape
    out, lse = empty_results(query, key, value)
    if not out.numel():
        return out, lse
    with _on_device(query.device):
        arguments, constants = _arguments(query, key, value, blocks, scale, out, lse, descriptors)
        grid = (B * H * blocks.query_blocks * (blocks.query_block // constants["BM"]),)
        attention_kernel[grid](*arguments, **constants)
    return out, lse


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, out: Tensor, lse: Tensor,
    descriptors: bool | None,
) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments and compile-time values of `attention_kernel`."""
    B, Lq, H, D = query.shape
    lists, whole, boundary = blocks.lists, blocks.whole, blocks.boundary
    key_ok = exempt = None
    if blocks.key_mask is not None:
        real = blocks.real_keys(key.shape[1])
        lists, whole, boundary, exempt = demote_masked(blocks, real)
        boundary = boundary.contiguous()
        key_ok = real.to(torch.int8).contiguous()
        if blocks.key_index is None:
            # What is masked may be NaN, and 0 * NaN is NaN.
            value = torch.where(blocks.key_mask[..., None, None], value, 0)
    key_slots = blocks.key_blocks * blocks.key_block
    if blocks.key_index is not None:
        # Slots without a key that may be seen are written as 0.
        index = blocks.key_index if key_ok is None else torch.where(key_ok > 0, blocks.key_index, -1)
        key, value = gather_slots(key, value, index, key_slots)

    width, width_v = _width(D), _width(value.shape[3])
    tile = choose_tile(blocks.query_block, blocks.key_block, max(width, width_v), query.dtype,
                       _shared_memory(query.device))
    if descriptors is None:
        descriptors = _has_descriptors(query.device)
    descriptors = descriptors and can_describe(key) and can_describe(value)
    keys, values = ((describe(key, tile.keys, width), describe(value, tile.keys, width_v)) if descriptors
                    else (key, value))
    index_strides = (0, 0) if blocks.query_index is None else _broadcast_strides(blocks.query_index)[:2]
    ok_strides = (0, 0) if key_ok is None else _broadcast_strides(key_ok)[:2]
    order = launch_order(whole + boundary, B, H)
    arguments = [
        query, keys, values, out, lse, lists, whole, boundary, exempt, order, blocks.query_index, blocks.key_lengths,
        key_ok, blocks.key_coordinates, blocks.query_low, blocks.query_high, blocks.always,
        *query.stride(), *key.stride(), *value.stride(), *_broadcast_strides(lists)[:3], *_broadcast_strides(whole),
        *index_strides, *ok_strides,
        H, Lq, blocks.query_blocks, blocks.query_blocks * blocks.query_block, key_slots, scale * LOG2_E,
    ]
    constants = dict(
        D=D, DV=value.shape[3], WIDTH=width, WIDTH_V=width_v, QUERY_BLOCK=blocks.query_block,
        KEY_BLOCK=blocks.key_block, BM=tile.queries, BN=tile.keys, COORDINATE_COUNT=blocks.coordinates,
        DESCRIPTORS=descriptors, PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32", STAGES=tile.stages,
        TESTED_STAGES=tested_stages(tile, blocks.coordinates, key_ok is not None), num_warps=tile.warps)
    return arguments, constants


def _width(head_dim: int) -> int:
    """Head dim padded to a power of two, at least the 16 that a matrix product needs."""
    return max(16, 1 << math.ceil(math.log2(head_dim)))


def _broadcast_strides(x: Tensor) -> list[int]:
    """Strides of x with 0 for every dimension of size 1, so that it broadcasts."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Shared memory of one program in bytes; the interpreter has no limit, it takes Hopper's."""
    if device.type != "cuda":
        return 232448
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _has_descriptors(device: torch.device) -> bool:
    """Whether the GPU copies boxes of a tensor by itself (Hopper and later)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
