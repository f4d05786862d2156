"""Attention with an inner filter: a listed block whose scores lie far below the row's running maximum is left out.

Query tile by query tile, the listed key blocks are visited in order with a running maximum m of the scores:

    leave the block out when, for every row of the tile,  max of its scores  <  m + log(threshold)
    else the usual step of an online softmax, which may raise m

The scores of a block that is left out are computed, its exponentials, its values and their product are not. A weight
that is dropped is below threshold * exp(m), so a row loses less than threshold * (keys left out) of its mass. A block
that is left out lies below m and cannot raise it: so one pass counts for many thresholds what each would leave out.

Source: BLASST, arXiv 2512.12087; the second filter of SpargeAttn (arXiv 2502.18137) is the same test with threshold
2^-lambda. The twin is `reference.skip_reference`. Importing this module needs neither triton nor a GPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import triton_reasons
from .blocks import Blocks

if TYPE_CHECKING:
    from dit_sparse.blockmask import BlockMask

__all__ = ["skip_attention", "skip_reasons"]

_NUMBERS_AT_ONCE = 2**24  # scores of the plain path in memory at a time: 64 MB
_MOST_THRESHOLDS = 64
FIRST = ("own", "list")


def skip_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    thresholds: Tensor,
    *,
    apply: bool = True,
    first: str = "own",
    scale: float | None = None,
    key_mask: Tensor | None = None,
    kernels: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the listed blocks without those that the filter leaves out.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D). value: (B, Lk, H, Dv). Any strides.
        mask: lists, layouts and window, on the device of the query.
        thresholds: float32 (H|1, J) on the same device, each in [0, 1] (not checked, which would wait for the device).
            The first one filters; all are counted. 0 leaves out nothing.

    Expert args:
        apply: False computes all listed blocks and only counts.
        first: which whole block of a list is visited first: "own", the one at the place of the query block, then those
            behind it and from the front again (large scores early make the filter find more); or "list", the first.
            Boundary blocks follow in list order.
        scale: factor of the scores, positive; None: 1 / sqrt(D).
        key_mask: bool (B, Lk), True where the key is a real token; None: all are.
        kernels: True: the Triton kernel, or ValueError; False: plain PyTorch; None: the kernel on a GPU, if it can.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype; the natural-log LSE (B, H, Lq), float32, of what was computed; and
        levels, uint8 (B, H, nq, width): for every list entry, for how many of the thresholds its block is left out.

    Raises:
        ValueError: when shapes do not fit, or the kernel asked for cannot run; one line.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    blocks = Blocks.from_mask(mask, key_mask)
    _check(query, key, value, mask, thresholds, first, scale)
    reasons = [] if kernels is False else skip_reasons(query, key, value, blocks)
    if kernels and reasons:
        raise ValueError(f"kernels=True: the kernel with the inner filter cannot run this call: {'; '.join(reasons)}")
    if kernels is None:
        kernels = query.device.type == "cuda" and not reasons
    start = _places_of_own(blocks) if first == "own" else torch.zeros_like(blocks.whole)
    return _operator(
        query, key, value, thresholds.to(torch.float32), blocks.lists, blocks.whole, blocks.boundary, start,
        blocks.query_lengths, blocks.key_lengths, blocks.query_index, blocks.key_index, blocks.key_coordinates,
        blocks.query_low, blocks.query_high, blocks.always, blocks.key_mask, blocks.query_block, blocks.key_block,
        scale, apply, kernels)


def skip_reasons(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> list[str]:
    """Why the Triton kernel cannot take this call, in words; empty when it can.

    Args:
        query, key, value: (B, L, H, D).
        blocks: the lists; a program takes whole blocks, so that the filter means the same everywhere.
    """
    reasons = triton_reasons(query, key, value, blocks)
    if reasons:
        return reasons
    from .portable import _shared_memory, _width

    width = max(_width(query.shape[3]), _width(value.shape[3]))
    used = width * query.element_size() * (blocks.query_block + 2 * blocks.key_block)
    if query.dtype == torch.float32:  # in half precision the weights stay in registers
        used += 4 * blocks.query_block * blocks.key_block
    if used > _shared_memory(query.device) - 4096:
        reasons.append(f"blocks of {blocks.query_block} x {blocks.key_block} in {query.dtype} take {used} bytes of "
                       "shared memory, more than the GPU has")
    return reasons


@torch.library.custom_op("dit_sparse::skip_attention", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, lists: Tensor, whole: Tensor, boundary: Tensor,
    start: Tensor, query_lengths: Tensor, key_lengths: Tensor, query_index: Tensor | None, key_index: Tensor | None,
    key_coordinates: Tensor | None, query_low: Tensor | None, query_high: Tensor | None, always: Tensor | None,
    key_mask: Tensor | None, query_block: int, key_block: int, scale: float, apply: bool, kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = Blocks(lists, whole, boundary, query_lengths, key_lengths, query_index, key_index, key_coordinates,
                    query_low, query_high, always, key_mask, query_block, key_block)
    if kernels:
        from .skip_kernel import skip_attention_triton

        return skip_attention_triton(query, key, value, thresholds, blocks, start, scale, apply)
    return _plain(query, key, value, thresholds, blocks, start, scale, apply)


@_operator.register_fake
def _operator_shapes(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, lists: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    B, Lq, H, _D = query.shape
    return (query.new_empty(B, Lq, H, value.shape[3]), query.new_empty(B, H, Lq, dtype=torch.float32),
            query.new_empty(B, H, *lists.shape[2:], dtype=torch.uint8))


def _check(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, thresholds: Tensor, first: str,
           scale: float) -> None:
    """Raises ValueError, in one line, unless the tensors fit together."""
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError("query, key and value must be (B, L, H, D); got "
                         f"{[tuple(x.shape) for x in (query, key, value)]}")
    B, Lq, H, D = query.shape
    Lk = key.shape[1]
    if key.shape != (B, Lk, H, D) or value.shape[:3] != (B, Lk, H):
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query {tuple(query.shape)}")
    if (mask.query.tokens, mask.key.tokens) != (Lq, Lk):
        raise ValueError(f"mask is for {mask.query.tokens} queries and {mask.key.tokens} keys, the tensors have {Lq} "
                         f"and {Lk}")
    if thresholds.dim() != 2 or thresholds.shape[0] not in (1, H) or not 1 <= thresholds.shape[1] <= _MOST_THRESHOLDS:
        raise ValueError(f"thresholds is {tuple(thresholds.shape)}; use (1 or {H}, 1 ... {_MOST_THRESHOLDS})")
    if len({x.device for x in (query, key, value, mask.lists, thresholds)}) > 1:
        raise ValueError(f"query, key, value, mask and thresholds are on {query.device}, {key.device}, {value.device}, "
                         f"{mask.lists.device} and {thresholds.device}; use one device")
    if first not in FIRST:
        raise ValueError(f"first={first!r} is not allowed; use one of {', '.join(FIRST)}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} is not allowed; use a positive number")


def _places_of_own(blocks: Blocks) -> Tensor:
    """int32 (B|1, H|1, nq): the place, among a row's whole blocks, of its own or of the next one behind it."""
    own = torch.arange(blocks.query_blocks, device=blocks.lists.device) * blocks.query_block // blocks.key_block
    place = torch.arange(blocks.lists.shape[-1], device=blocks.lists.device)
    before = (blocks.lists < own[:, None]) & (place < blocks.whole[..., None])
    count = before.sum(-1, dtype=torch.int32)
    return torch.where(count == blocks.whole, 0, count)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, blocks: Blocks, start: Tensor, scale: float,
    apply: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch, some query blocks at a time; what is left out is computed and not added."""
    B, Lq, H, _ = query.shape
    nq, bq, bk = blocks.query_blocks, blocks.query_block, blocks.key_block
    dtype = torch.promote_types(query.dtype, torch.float32)
    seen = blocks.real_keys(key.shape[1])
    real_rows = torch.arange(bq, device=query.device) < blocks.query_lengths[:, None]
    slots_of_keys = _slot_tokens(blocks.key_index, blocks.key_blocks * bk, key.shape[1], seen)
    # (B, H, blocks, tokens of a block, D)
    keys, values = (_in_slots(x, slots_of_keys).unflatten(2, (-1, bk)).to(dtype) for x in (key, value))
    rows = _slot_tokens(blocks.query_index, nq * bq, Lq, real_rows.reshape(1, 1, -1))
    queries = _in_slots(query, rows).unflatten(2, (-1, bq)).to(dtype) * scale
    work = _Work(queries, keys, values, seen.unflatten(-1, (-1, bk)), real_rows, blocks, start, thresholds.log(), apply)
    step = max(1, _NUMBERS_AT_ONCE // max(1, B * H * bq * bk))
    parts = [work.run(slice(i, min(i + step, nq))) for i in range(0, nq, step)]
    out, lse, levels = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    # Padding writes to one row beyond the tokens, which is cut off.
    target = torch.where(rows < 0, Lq, rows).expand(B, H, -1)
    lse = query.new_empty(B, H, Lq + 1, dtype=torch.float32).scatter_(2, target, lse.flatten(2).to(torch.float32))
    whole = query.new_empty(B, H, Lq + 1, value.shape[3])
    whole.scatter_(2, target[..., None].expand(-1, -1, -1, value.shape[3]), out.flatten(2, 3).to(query.dtype))
    return whole[:, :, :Lq].transpose(1, 2).contiguous(), lse[..., :Lq].contiguous(), levels


class _Work:
    """What the plain path has at hand for every chunk of query blocks; shapes as in `_plain`."""

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, real_rows: Tensor, blocks: Blocks,
                 start: Tensor, bounds: Tensor, apply: bool) -> None:
        self.queries, self.keys, self.values, self.blocks, self.apply = queries, keys, values, blocks, apply
        B, H, nq = queries.shape[:3]
        self.seen = seen.expand(B, H, -1, -1)
        self.padding = ~real_rows
        self.lists = blocks.lists.expand(B, H, -1, -1).long()
        self.whole, self.start, self.count = (
            x.expand(B, H, nq) for x in (blocks.whole, start, blocks.whole + blocks.boundary))
        self.bounds = bounds[:, None, None]  # (H|1, 1, 1, J): added to maxima (B, H, c, rows, 1)
        self.batch = torch.arange(B, device=queries.device)[:, None, None]
        self.heads = torch.arange(H, device=queries.device)[:, None]

    def run(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """out (B, H, c, rows, Dv), lse (B, H, c, rows) and levels (B, H, c, width) of some query blocks."""
        query = self.queries[:, :, part]
        whole, count = self.whole[:, :, part], self.count[:, :, part]
        levels = torch.zeros_like(self.lists[:, :, part], dtype=torch.uint8)
        top = query.new_full(query.shape[:-1], -torch.inf)
        total, acc = torch.zeros_like(top), query.new_zeros(*top.shape, self.values.shape[-1])
        for i in range(levels.shape[-1]):
            turned = i + self.start[:, :, part]
            place = torch.where(i < whole, torch.where(turned >= whole, turned - whole, turned), i).long()
            score, block = self._scores(query, part, place, i < count, i >= whole)
            tile_top = score.amax(-1)
            low = (tile_top[..., None] < top[..., None] + self.bounds) | self.padding[part][..., None]
            below = low.all(-2)
            level = below.sum(-1, dtype=torch.uint8) * (i < count)
            levels.scatter_(-1, place[..., None], level[..., None])
            new_top = torch.maximum(top, tile_top)
            if self.apply:
                left_out = below[..., :1]
                score = score.masked_fill(left_out[..., None], -torch.inf)
                new_top = torch.where(left_out, top, new_top)
            safe = torch.where(new_top == -torch.inf, 0, new_top)
            weight, shrink = (score - safe[..., None]).exp(), (top - safe).exp()
            total = total * shrink + weight.sum(-1)
            acc = acc * shrink[..., None] + weight @ self.values[self.batch, self.heads, block]
            top = new_top
        return acc / torch.where(total == 0, 1, total)[..., None], top + total.log(), levels

    def _scores(self, query: Tensor, part: slice, place: Tensor, listed: Tensor, boundary: Tensor
                ) -> tuple[Tensor, Tensor]:
        """Scores (B, H, c, rows, keys) against one list entry of every query block, -inf where not seen; the blocks."""
        block = self.lists[:, :, part].gather(-1, place[..., None])[..., 0]
        score = query @ self.keys[self.batch, self.heads, block].mT
        allowed = (self.seen[self.batch, self.heads, block] & listed[..., None])[..., None, :]
        if self.blocks.key_coordinates is not None:
            assert self.blocks.query_low is not None and self.blocks.query_high is not None
            bk = self.keys.shape[3]
            slot = block[..., None] * bk + torch.arange(bk, device=block.device)
            rows = torch.arange(self.queries.shape[2], device=block.device)[part, None] * query.shape[3]
            rows = rows + torch.arange(query.shape[3], device=block.device)
            inside = ~boundary[..., None, None]
            if self.blocks.always is not None:
                inside = inside | self.blocks.always[slot][..., None, :]
            within = torch.ones((), dtype=torch.bool, device=block.device)
            for axis, low, high in zip(self.blocks.key_coordinates, self.blocks.query_low, self.blocks.query_high,
                                       strict=True):
                at = axis[slot][..., None, :]
                within = within & (at >= low[rows][..., None]) & (at <= high[rows][..., None])
            allowed = allowed & (inside | within)
        return score.masked_fill(~allowed, -torch.inf), block


def _slot_tokens(index: Tensor | None, slots: int, tokens: int, real: Tensor) -> Tensor:
    """int64 (B|1, H|1, slots): the token of each slot that is real, else -1."""
    if index is None:
        slot = torch.arange(slots, device=real.device)
        index = torch.where(slot < tokens, slot, -1)[None, None]
    return torch.where(real, index, -1)


def _in_slots(x: Tensor, token: Tensor) -> Tensor:
    """(B, L, H, D) at the tokens, zeros where they are -1: (B, H, slots, D)."""
    B, _, H, D = x.shape
    where = token.expand(B, H, -1)[..., None]
    found = x.transpose(1, 2).gather(2, where.clamp(min=0).expand(-1, -1, -1, D))
    return found.masked_fill(where < 0, 0)
