"""Activations in 8 bits for attention on tensor cores, and the same in plain PyTorch.

    query, key     one scale per block of 128 slots: x is stored as e4m3(x / s), s = max |x| / 448, or as the integer
                   next to x / s, s = max |x| / 127 (INT8)
    key            centred first: the mean over the keys of a head is subtracted. Softmax does not see it; the LSE
                   does, so that scale * query . mean is kept beside the queries
    value          e4m3, one scale per channel of a head; transposed, keys permuted inside groups of 16, so that the
                   weights leave one matrix product in the registers where the next one wants them

Quantising copies anyway, so it also puts tokens in the order of the slots: blocks, tiles of a grid or any permutation
lie in one piece afterwards. Padding slots, and keys that the key mask leaves out, are stored as 0, whatever lies in
memory there.

e4m3 has three mantissa bits: rounding moves a number by at most 2^-4 of itself, or by 2^-10 of its scale where it is
small (below 2^-6 of the scale); the largest number that shares the scale is 448 of it. INT8 moves every number by at
most half of the scale: less than e4m3 where numbers are more than a sixteenth of the largest, more where they are
smaller. One channel of the keys that is a hundred times as large as the others leaves INT8 next to nothing of those.
Numbers that are not finite stay so, and may make all that shares their scale NaN; INT8, which has no NaN, makes the
scale NaN.

Importing this module needs neither triton nor a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks

__all__ = ["BLOCK", "SCORES", "Quantised", "dequantise", "key_mean", "quantise", "quantise_reference",
           "rounding_bound", "stored_dtype", "value_order"]

BLOCK = 128
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LARGEST_INTEGER = 127.0  # of INT8, without -128: as far below 0 as above
# How queries and keys may be stored: what the scores are computed from.
SCORES = {"e4m3": DTYPE, "int8": torch.int8}
SMALLEST = 2.0**-40  # of a block's largest magnitude: two scales of 0 would multiply to 0, and 0 * -inf is NaN
# Enough programs to keep the memory busy, and parts of a head: each program reads several hundred tokens.
_STATISTICS_PROGRAMS = 1024
_STATISTICS_PARTS = 100
_STATISTICS_ROWS = 32


@dataclass(frozen=True)
class Quantised:
    """Queries, keys and values of one call in 8 bits, in slot order, with their scales in float32.

    Args:
        query (B, H, query slots, stored), key (B, H, key slots, stored): e4m3, or both int8; stored is the head dim as
            a multiple of 16.
        value (B, H, Dv, key slots): e4m3, keys in `value_order` inside each group of 16.
        query_scale (B, H, query blocks), key_scale (B, H, key blocks), value_scale (B, H, Dv).
        shift (B, H, query slots): what the LSE lacks because the keys are centred, natural log.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_scale: Tensor
    key_scale: Tensor
    value_scale: Tensor
    shift: Tensor


def value_order(slots: int, device: torch.device | None = None) -> Tensor:
    """int64 (slots,): the slot whose key is stored at each place of the values.

    Key 8 j + 2 t + e of a group of 16 (j, e < 2, t < 4) is stored at place 4 t + 2 j + e.
    """
    slot = torch.arange(slots, device=device)
    return slot.unflatten(0, (-1, 2, 4, 2)).transpose(1, 2).flatten()


def key_mean(key: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """float32 (B, H, D): mean of key (B, Lk, H, D) over the keys that key_mask, bool (B, Lk), allows."""
    if key_mask is None:
        return key.float().mean(1)
    real = key_mask[..., None, None]
    return torch.where(real, key, 0).float().sum(1) / real.sum(1).clamp(min=1)


def quantise_reference(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, mean: Tensor | None = None,
    scores: str = "e4m3",
) -> Quantised:
    """`quantise` in plain PyTorch: the specification.

    Args:
        query, key, value, blocks, scale, scores: as for `quantise`, on any device.
        mean: float32 (B, H, D), what is subtracted from the keys; None: `key_mean`.
    """
    dtype = stored_dtype(scores)
    if mean is None:
        mean = key_mean(key, blocks.key_mask)
    seen = blocks.real_keys(key.shape[1])
    queries = _slot_order(query, blocks.query_index, None, blocks.query_blocks)
    keys, values = (_slot_order(x, blocks.key_index, seen, blocks.key_blocks) for x in (key, value))
    # What is no key stays 0 when the others are centred.
    token = _token_of_slot(blocks.key_index, key.shape[1], seen, keys.device)
    keys = torch.where((token >= 0)[..., None], keys - mean[:, :, None], 0)
    query_scale, key_scale = (
        _scale_of(x.unflatten(2, (-1, BLOCK)).abs().amax((3, 4)), dtype) for x in (queries, keys))
    value_scale = _scale_of(values.abs().amax(2), DTYPE)

    def stored(x: Tensor, scales: Tensor) -> Tensor:
        rows = x * (1 / scales.repeat_interleave(BLOCK, 2))[..., None]
        rows = rows.nan_to_num(0).round().to(dtype) if dtype == torch.int8 else rows.to(dtype)
        return torch.nn.functional.pad(rows.view(torch.uint8), (0, -x.shape[3] % 16)).view(dtype)

    order = value_order(values.shape[2], values.device)
    transposed = (values * (1 / value_scale)[:, :, None]).to(DTYPE).transpose(2, 3)[..., order].contiguous()
    shift = (queries * mean[:, :, None]).sum(-1) * scale
    return Quantised(stored(queries, query_scale), stored(keys, key_scale), transposed, query_scale, key_scale,
                     value_scale, shift)


def dequantise(quantised: Quantised, blocks: Blocks, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the 8-bit numbers stand for, in token order: for small sizes.

    Returns:
        query (B, Lq, H, D), centred key (B, Lk, H, D), value (B, Lk, H, Dv) and shift (B, H, Lq), float32.
    """
    rows = ((x.float() * s.repeat_interleave(BLOCK, 2)[..., None])[..., :head_dim] for x, s in
            ((quantised.query, quantised.query_scale), (quantised.key, quantised.key_scale)))
    slots = quantised.value.shape[3]
    place = value_order(slots, quantised.value.device).argsort()
    value = quantised.value.float()[..., place].transpose(2, 3) * quantised.value_scale[:, :, None]
    query_slot = blocks._slots(blocks.query_index, blocks.query_lengths, blocks.query_block)
    key_slot = blocks._slots(blocks.key_index, blocks.key_lengths, blocks.key_block)

    def tokens(x: Tensor, slot: Tensor) -> Tensor:
        slot = slot.expand(*x.shape[:2], -1)[..., None].expand(-1, -1, -1, x.shape[3])
        return x.gather(2, slot).transpose(1, 2)

    query, key = rows
    shift = tokens(quantised.shift[..., None], query_slot)[..., 0].transpose(1, 2)
    return tokens(query, query_slot), tokens(key, key_slot), tokens(value, key_slot), shift


def rounding_bound(x: Tensor, largest: Tensor | float, scores: str = "e4m3") -> Tensor:
    """How far rounding may move each number of x, given the largest magnitude that shares its scale.

    e4m3: half a step of three mantissa bits, half the smallest step for small numbers, and 2^-20 for the float32
    arithmetic. INT8: half a step, the same for all numbers, and 2^-20 of the number.
    """
    if stored_dtype(scores) == torch.int8:
        return torch.as_tensor(largest) * (0.5 / LARGEST_INTEGER) + x.abs() * 2.0**-20
    return torch.maximum(x.abs() * 2.0**-4, torch.as_tensor(largest) * (2.0**-10 / LARGEST)) * (1 + 2.0**-20)


def stored_dtype(scores: str) -> torch.dtype:
    """Type of the stored queries and keys; ValueError for a name that `SCORES` does not have."""
    if scores not in SCORES:
        raise ValueError(f"scores={scores!r} is not allowed; use one of {', '.join(SCORES)}")
    return SCORES[scores]


def quantise(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, key_ok: Tensor | None = None,
    scores: str = "e4m3",
) -> Quantised:
    """Queries, keys and values in 8 bits, by five launches of Triton kernels; nothing waits for the device.

    Keys and values are read twice, queries once: 10 bytes of reading and 3 of writing per number of a bf16 call.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D), value (B, Lk, H, Dv): any strides, at least one key; D and Dv up to 128.
        blocks: layouts and key mask; query and key blocks of 128.
        scale: factor of the scores.
        key_ok: bool (B|1, H|1, key slots), `blocks.real_keys` when there is a key mask; None: without key mask.
        scores: "e4m3" or "int8", how queries and keys are stored. Values are e4m3.

    Raises:
        ValueError: for another name of `scores`.
    """
    from . import quantise_kernel as kernels
    from .portable import _broadcast_strides, _on_device, _width

    B, _, H, D = query.shape
    Lk, DV = value.shape[1], value.shape[3]
    stored, dtype = -(-D // 16) * 16, stored_dtype(scores)
    query_slots, key_slots = blocks.query_blocks * BLOCK, blocks.key_blocks * BLOCK

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(B, H, *shape, dtype=dtype, device=query.device)

    result = Quantised(
        fresh(query_slots, stored, dtype=dtype), fresh(key_slots, stored, dtype=dtype),
        fresh(DV, key_slots, dtype=DTYPE), fresh(blocks.query_blocks), fresh(blocks.key_blocks), fresh(DV),
        fresh(query_slots))
    with _on_device(query.device):
        mean = _statistics(key, value, blocks.key_mask, result.value_scale)
        ok = None if key_ok is None else key_ok.to(torch.int8)
        ok_strides = (0, 0) if ok is None else _broadcast_strides(ok)[:2]
        for x, index, out, scales, shift in (
            (query, blocks.query_index, result.query, result.query_scale, result.shift),
            (key, blocks.key_index, result.key, result.key_scale, None),
        ):
            strides = (0, 0) if index is None else _broadcast_strides(index)[:2]
            kernels.rows_kernel[(H, scales.shape[2], B)](
                x, index, None if shift is not None else ok, mean, out, scales, shift, *x.stride(), *strides,
                *ok_strides, H, x.shape[1], scale, D=D, WIDTH=_width(stored), STORED=stored, BLOCK=BLOCK, num_warps=8)
        words = result.value.view(torch.int32)
        strides = (0, 0) if blocks.key_index is None else _broadcast_strides(blocks.key_index)[:2]
        kernels.values_kernel[(H, blocks.key_blocks, B)](
            value, blocks.key_index, ok, result.value_scale, words, *value.stride(), *strides, *ok_strides, H, Lk,
            D=DV, WIDTH=_width(DV), BLOCK=BLOCK, num_warps=4)
    return result


def _statistics(key: Tensor, value: Tensor, key_mask: Tensor | None, value_scale: Tensor) -> Tensor:
    """Mean of the keys, float32 (B, H, D); writes value_scale (B, H, Dv)."""
    from . import quantise_kernel as kernels
    from .portable import _width

    B, Lk, H, D = key.shape
    DV, rows = value.shape[3], _STATISTICS_ROWS
    span = -(-Lk // max(_STATISTICS_PARTS, _STATISTICS_PROGRAMS // (B * H)))
    span = -(-span // rows) * rows
    parts = -(-Lk // span)
    sums, tops, mean = (torch.empty(B, H, *shape, dtype=torch.float32, device=key.device)
                        for shape in ((parts, D), (parts, DV), (D,)))
    widths = dict(D=D, DV=DV, WIDTH=_width(D), WIDTH_V=_width(DV))
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    kernels.statistics_kernel[(H, parts, B)](
        key, value, key_mask, sums, tops, *key.stride(), *value.stride(), *mask_strides, H, Lk, span, **widths,
        ROWS=rows, num_warps=4)
    counts = None if key_mask is None else key_mask.sum(1)
    kernels.finish_kernel[(H, B)](sums, tops, counts, mean, value_scale, H, Lk, parts, **widths, ROWS=16, num_warps=8)
    return mean


def _scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        finite = torch.where(largest < torch.inf, largest, torch.nan)
        return finite.clamp(min=SMALLEST) * (1 / LARGEST_INTEGER)
    return largest.clamp(min=SMALLEST) * (1 / LARGEST)


def _token_of_slot(index: Tensor | None, tokens: int, seen: Tensor | None, device: torch.device) -> Tensor:
    """int64 (B|1, H|1, slots): the token at each slot, -1 where there is none that may be seen."""
    assert index is not None or seen is not None
    if index is None:
        assert seen is not None
        slot = torch.arange(seen.shape[-1], device=device)
        index = torch.where(slot < tokens, slot, -1)[None, None]
    return index if seen is None else torch.where(seen, index, -1)


def _slot_order(x: Tensor, index: Tensor | None, seen: Tensor | None, blocks: int) -> Tensor:
    """x (B, L, H, D) as float32 (B, H, slots, D), 0 where a slot holds no token that may be seen."""
    B, L, H, D = x.shape
    if seen is None:
        seen = torch.ones(1, 1, blocks * BLOCK, dtype=torch.bool, device=x.device)
    token = _token_of_slot(index, L, seen, x.device).expand(B, H, -1)[..., None]
    rows = x.float().transpose(1, 2).gather(2, token.clamp(min=0).expand(-1, -1, -1, D))
    return torch.where(token >= 0, rows, 0)
