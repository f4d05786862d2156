"""The PyTorch path: pieces of attention by PyTorch's own kernel, merged by LSE. Made for CPUs; runs on any device.

Tokens are put in block order without padding ("packed"), keys that the key mask excludes left out, so that a key
block is a slice, consecutive blocks are one longer slice, and no length test is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import Blocks
from .cpu_plan import Piece, plan_pieces, runs, slices

_SCORES = 2**27  # scores of one matrix product at a time, where there is no fused kernel: 0.5 GB in float32
_SMALL_BYTES = 2**20  # copied keys and values up to which a call takes up more pieces, just to spare calls

_Work = tuple[Piece, list[tuple[int, int]]]  # a piece and the ranges of packed keys that it reads


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention with LSE of one piece.

    Args:
        query (B, H, Lq, D), key (B, H, Lk, D), value (B, H, Lk, Dv).
        scale: factor of the scores.
        allowed: bool that broadcasts to (B, H, Lq, Lk), or None.

    Returns:
        out (B, H, Lq, Dv) and lse (B, H, Lq) float32 (float64 for float64). Queries without a key give 0 and -inf.
    """
    bias = None
    if allowed is not None:
        bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill_(~allowed, -torch.inf)
    if _has_kernel(query, value):
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=scale)
    else:
        rows = max(1, _SCORES // (key.shape[0] * key.shape[1] * max(1, key.shape[2])))
        parts = [_explicit(query[:, :, i : i + rows], key, value, scale,
                           None if bias is None else bias[..., i : i + rows, :])
                 for i in range(0, query.shape[2], rows)]
        out, lse = torch.cat([part for part, _ in parts], 2), torch.cat([part for _, part in parts], 2)
    if allowed is not None:
        # PyTorch's kernel reports 0 for queries without a key.
        lse = lse.masked_fill(~allowed.any(-1), -torch.inf)
    return out, lse


def _explicit(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by matrix products, for devices and shapes that PyTorch's CPU kernel does not take."""
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()
    return weights.to(value.dtype) @ value, lse


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's CPU kernel, which gives the LSE along, takes these tensors."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and query.numel() > 0


@dataclass
class _Group:
    """Batch elements and heads that share lists and order, with their tokens packed.

    query, key, value: (B, L, H, D) of the group, packed. query_order: token at each packed place, or None.
    query_offsets, key_offsets: where each block's packed tokens start. key_slots: slot of each packed key.
    """

    batch: slice
    heads: Tensor | slice
    query: Tensor
    key: Tensor
    value: Tensor
    query_order: Tensor | None
    query_offsets: np.ndarray
    key_offsets: np.ndarray
    query_slots: Tensor
    key_slots: Tensor
    tested: np.ndarray


def block_sparse_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention as dense pieces.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D), value (B, Lk, H, Dv): any strides.
        blocks: which key blocks each query block computes.
        scale: factor of the scores.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, LSE (B, H, Lq) float32.
    """
    B, Lq, H, _ = query.shape
    out = torch.zeros(B, Lq, H, value.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.full((B, H, Lq), -torch.inf, dtype=torch.float32, device=query.device)
    for batch, heads, b, h in _groups(blocks, B, H):
        group, pieces = _prepare(query, key, value, blocks, batch, heads, b, h)
        _run_group(group, pieces, blocks, scale, out, lse)
    return out, lse


def _groups(blocks: Blocks, batch: int, heads: int) -> Iterator[tuple[slice, Tensor | slice, int, int]]:
    """(batch elements, heads, a representative of both) of every set that shares lists, orders and key mask."""
    per_head = [x for x in (blocks.lists, blocks.whole, blocks.boundary, blocks.query_index, blocks.key_index)
                if x is not None]
    split_batch = any(x.shape[0] > 1 for x in per_head)
    split_batch |= blocks.key_mask is not None and blocks.key_mask.shape[0] > 1
    for b in range(batch) if split_batch else (0,):
        elements = slice(b, b + 1) if split_batch else slice(None)
        same: dict[tuple[bytes, ...], list[int]] = {}
        for h in range(heads):
            rows = (x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)] for x in per_head)
            shared = all(x.shape[1] == 1 for x in per_head)
            same.setdefault(() if shared else tuple(row.cpu().numpy().tobytes() for row in rows), []).append(h)
        for members in same.values():
            if members[-1] - members[0] + 1 == len(members):
                yield elements, slice(members[0], members[-1] + 1), b, members[0]
            else:
                yield elements, torch.tensor(members, device=blocks.lists.device), b, members[0]


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, batch: slice, heads: Tensor | slice, b: int, h: int
) -> tuple[_Group, list[Piece]]:
    """Packs the tokens of a group and plans its pieces."""

    def row(x: Tensor) -> Tensor:
        return x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]

    key_ok = row(blocks.real_keys(key.shape[1]))
    key_slots = key_ok.nonzero()[:, 0]
    key_order = key_slots if blocks.key_index is None else row(blocks.key_index)[key_slots]
    complete = blocks.key_index is None and key_order.numel() == key.shape[1]
    query_order, query_slots = None, torch.arange(query.shape[1], device=query.device)
    if blocks.query_index is not None:
        index = row(blocks.query_index)
        query_slots = (index >= 0).nonzero()[:, 0]
        query_order = index[query_slots]

    query, key, value = (x[batch][:, :, heads] for x in (query, key, value))
    if query_order is not None:
        query = query.index_select(1, query_order)
    if not complete:
        key, value = key.index_select(1, key_order), value.index_select(1, key_order)
    key_lengths = key_ok.unflatten(0, (-1, blocks.key_block)).sum(1).cpu().numpy()
    query_lengths = blocks.query_lengths.cpu().numpy().astype(np.int64)
    lists, whole, boundary = (row(x).cpu().numpy() for x in (blocks.lists, blocks.whole, blocks.boundary))
    place = np.arange(lists.shape[-1])
    seen = _listed(lists, place < (whole + boundary)[:, None], blocks.key_blocks)
    keep = seen
    if blocks.coordinates:
        keep = _listed(lists, place < whole[:, None], blocks.key_blocks)
    tested = seen & ~keep
    group = _Group(batch, heads, query, key, value, query_order, _offsets(query_lengths), _offsets(key_lengths),
                   query_slots, key_slots, tested)
    pieces = plan_pieces(keep, tested, query_lengths, key_lengths, heads=query.shape[0] * query.shape[2],
                         threads=torch.get_num_threads())
    return group, pieces


def _listed(lists: np.ndarray, counts: np.ndarray, key_blocks: int) -> np.ndarray:
    """bool (nq, nk) from lists (nq, width) and which of their entries count."""
    found = np.zeros((lists.shape[0], key_blocks), dtype=bool)
    rows, places = np.nonzero(counts)
    found[rows, lists[rows, places]] = True
    return found


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _run_group(
    group: _Group, pieces: list[Piece], blocks: Blocks, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Computes the pieces of a group into out (B, Lq, H, Dv) and lse (B, H, Lq)."""
    here, here_lse = out[group.batch][:, :, group.heads], lse[group.batch][:, group.heads]
    direct = group.query_order is None and isinstance(group.heads, slice) and out.dtype == torch.float32
    if not direct:
        here, here_lse = torch.zeros(here.shape, dtype=torch.float32, device=out.device), here_lse.clone()
    work = [(piece, runs(piece.keys, group.key_offsets)) for piece in pieces]
    if any(len(ranges) > 1 for _, ranges in work):
        # Copies of many short ranges are several times faster from contiguous memory.
        group.key, group.value = group.key.contiguous(), group.value.contiguous()
    scratch = _Scratch(), _Scratch()
    written = np.zeros(len(group.query_offsets) - 1, dtype=bool)
    for batch in _batches(group, work):
        fresh = not any(written[piece.first : piece.last].any() for piece, _ in batch)
        if len(batch) == 1:
            _run_piece(group, *batch[0], blocks, scale, scratch, here, here_lse, fresh)
        else:
            _run_batch(group, batch, scale, scratch, here, here_lse, fresh)
        for piece, _ in batch:
            written[piece.first : piece.last] = True
    if not direct:
        order = slice(None) if group.query_order is None else group.query_order
        target, target_lse = torch.empty_like(here, dtype=out.dtype), torch.empty_like(here_lse)
        target[:, order], target_lse[..., order] = here.to(out.dtype), here_lse
        out[group.batch][:, :, group.heads] = target
        lse[group.batch][:, group.heads] = target_lse


class _Scratch:
    """Memory for copies, used again and again: fresh memory costs more than the copy itself."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def take(self, x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """The given ranges of x (B, L, H, D) along L: a view when there is one, else a copy, valid until the next."""
        if len(ranges) == 1:
            return x[:, ranges[0][0] : ranges[0][1]]
        places = torch.from_numpy(_places(ranges)).to(x.device)
        shape = (x.shape[0], places.numel(), *x.shape[2:])
        size = math.prod(shape)
        if self.memory is None or self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=x.dtype, device=x.device)
        return torch.index_select(x, 1, places, out=self.memory[:size].view(shape))


def _places(ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """int64: every whole number of the ranges, one range after the other."""
    return np.concatenate([np.arange(start, stop) for start, stop in ranges])


def _batches(group: _Group, work: list[_Work]) -> list[list[_Work]]:
    """Pieces of equal shape together, as far as that gives all threads work or spares calls; all others alone."""
    B, _, H, D = group.key.shape
    bytes_per_key = B * H * (D + group.value.shape[3]) * group.key.element_size()
    alone, equal = [], dict[tuple[int, int, int], list[_Work]]()
    for piece, ranges in work:
        rows = int(group.query_offsets[piece.last] - group.query_offsets[piece.first])
        if piece.tested:
            alone.append([(piece, ranges)])
        else:
            equal.setdefault((piece.level, rows, sum(b - a for a, b in ranges)), []).append((piece, ranges))
    for (_, rows, keys), members in equal.items():
        # No more than needed: one piece's copies stay in the cache, several would not.
        busy = -(-torch.get_num_threads() // (B * H * slices(rows)))
        most = max(busy, _SMALL_BYTES // (keys * bytes_per_key))
        alone += [members[i : i + most] for i in range(0, len(members), most)]
    return alone


def _run_piece(
    group: _Group, piece: Piece, ranges: list[tuple[int, int]], blocks: Blocks, scale: float,
    scratch: tuple[_Scratch, _Scratch], out: Tensor, lse: Tensor, fresh: bool,
) -> None:
    """Merges one piece into the group's out (B, Lq, H, Dv) and lse (B, H, Lq)."""
    start, stop = (int(group.query_offsets[i]) for i in (piece.first, piece.last))
    key, value = (s.take(x, ranges).transpose(1, 2) for s, x in zip(scratch, (group.key, group.value), strict=True))
    allowed = _allowed(group, piece, ranges, blocks) if piece.tested else None
    part, part_lse = attend(group.query[:, start:stop].transpose(1, 2), key, value, scale, allowed)
    _merge(out[:, start:stop], lse[..., start:stop], part.transpose(1, 2), part_lse, fresh=fresh)


def _run_batch(
    group: _Group, batch: list[_Work], scale: float, scratch: tuple[_Scratch, _Scratch], out: Tensor, lse: Tensor,
    fresh: bool,
) -> None:
    """The same for several pieces of equal shape: they become batch elements of one call."""
    spans = [(group.query_offsets[piece.first], group.query_offsets[piece.last]) for piece, _ in batch]
    rows = torch.from_numpy(_places(spans)).to(out.device)
    ranges = [r for _, ranges in batch for r in ranges]
    query, key, value = group.query.index_select(1, rows), *(
        s.take(x, ranges) for s, x in zip(scratch, (group.key, group.value), strict=True))
    # (B, P * L, H, D) -> (B * P, H, L, D)
    query, key, value = (x.unflatten(1, (len(batch), -1)).flatten(0, 1).transpose(1, 2) for x in (query, key, value))
    part, part_lse = attend(query, key, value, scale)
    part = part.transpose(1, 2).unflatten(0, (-1, len(batch))).flatten(1, 2)
    part_lse = part_lse.unflatten(0, (-1, len(batch))).transpose(1, 2).flatten(2)
    if not fresh:
        old, old_lse = out.index_select(1, rows), lse.index_select(2, rows)
        _merge(old, old_lse, part, part_lse, fresh=False)
        part, part_lse = old, old_lse
    out.index_copy_(1, rows, part.to(out.dtype))
    lse.index_copy_(2, rows, part_lse.to(lse.dtype))


def _allowed(group: _Group, piece: Piece, ranges: list[tuple[int, int]], blocks: Blocks) -> Tensor:
    """bool (queries, keys) of a tested piece: the query block lists the key block, and the window allows the pair."""
    assert blocks.key_coordinates is not None and blocks.query_low is not None and blocks.query_high is not None
    rows = group.query_slots[group.query_offsets[piece.first] : group.query_offsets[piece.last]]
    columns = torch.cat([group.key_slots[start:stop] for start, stop in ranges])
    allowed = None
    for coordinate, low, high in zip(blocks.key_coordinates, blocks.query_low, blocks.query_high, strict=True):
        place, low, high = coordinate[columns], low[rows, None], high[rows, None]
        inside = (place >= low).logical_and_(place <= high)
        allowed = inside if allowed is None else allowed.logical_and_(inside)
    assert allowed is not None
    if blocks.always is not None:
        allowed = allowed.logical_or_(blocks.always[columns])
    if piece.last - piece.first > 1:
        listed = torch.from_numpy(group.tested[piece.first : piece.last][:, piece.keys]).to(allowed.device)
        if not listed.all():
            row_block, column_block = rows // blocks.query_block - piece.first, columns // blocks.key_block
            column = torch.searchsorted(torch.from_numpy(piece.keys).to(column_block), column_block)
            allowed = allowed.logical_and_(listed[row_block][:, column])
    return allowed


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, fresh: bool) -> None:
    """Merges a part into out (B, L, H, Dv) and lse (B, H, L), in place; `fresh`: out holds nothing yet."""
    if fresh:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse.to(lse.dtype))
    safe = total.masked_fill(total == -torch.inf, 0)
    weight, part_weight = ((x - safe).exp_().transpose(1, 2)[..., None] for x in (lse, part_lse))
    out.mul_(weight).addcmul_(part.to(out.dtype), part_weight)
    lse.copy_(total)
