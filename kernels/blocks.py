"""`Blocks`: a block mask as the flat tensors and numbers that the operator passes to a backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.blockmask import BlockMask


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which key blocks each query block computes, and how tokens sit in blocks.

    Args:
        lists: int32 (B|1, H|1, nq, width), key block ids, whole blocks first, then boundary blocks.
        whole, boundary: int32 (B|1, H|1, nq), how many there are of each.
        query_lengths, key_lengths: int32 (nq,) and (nk,), real tokens of each block.
        query_index, key_index: int64 (B|1, H|1, slots), token at each slot and -1 for padding; None: slot = token.
        key_coordinates: int32 (C, key slots). query_low, query_high: int32 (C, query slots). None: no window.
        always: bool (key slots,), keys that pass the window for every query; None: no such keys.
        key_mask: bool (B, Lk), True where the key is a real token; None: all are.
        query_block, key_block: slots of a block.
        query_box, key_box: where the tiles of the layout lie in the grid, see `BlockLayout.box`; None: no tiles.
    """

    lists: Tensor
    whole: Tensor
    boundary: Tensor
    query_lengths: Tensor
    key_lengths: Tensor
    query_index: Tensor | None
    key_index: Tensor | None
    key_coordinates: Tensor | None
    query_low: Tensor | None
    query_high: Tensor | None
    always: Tensor | None
    key_mask: Tensor | None
    query_block: int
    key_block: int
    query_box: tuple[int, ...] | None = None
    key_box: tuple[int, ...] | None = None

    @classmethod
    def from_mask(cls, mask: BlockMask, key_mask: Tensor | None = None) -> Blocks:
        """The flat form of a `BlockMask`; nothing is copied."""
        window = mask.window
        return cls(
            lists=mask.lists,
            whole=mask.whole,
            boundary=mask.boundary,
            query_lengths=mask.query.lengths,
            key_lengths=mask.key.lengths,
            query_index=_index(mask.query.index),
            key_index=_index(mask.key.index),
            key_coordinates=None if window is None else window.key_coordinates,
            query_low=None if window is None else window.query_low,
            query_high=None if window is None else window.query_high,
            always=None if window is None else window.always,
            key_mask=key_mask,
            query_block=mask.query.block_size,
            key_block=mask.key.block_size,
            query_box=mask.query.box,
            key_box=mask.key.box,
        )

    @classmethod
    def dense(cls, query_tokens: int, key_tokens: int, block: int, key_mask: Tensor | None,
              device: torch.device) -> Blocks:
        """Every query block sees every key block; one list, shared by all query blocks with stride 0."""
        starts = [torch.arange(0, n, block, dtype=torch.int32, device=device) for n in (query_tokens, key_tokens)]
        query_lengths, key_lengths = ((n - start).clamp(max=block)
                                      for n, start in zip((query_tokens, key_tokens), starts, strict=True))
        nq, nk = query_lengths.numel(), key_lengths.numel()
        short = int(key_tokens % block > 0)
        lists = torch.arange(nk, dtype=torch.int32, device=device).expand(1, 1, nq, nk)
        counts = (torch.full((1, 1, 1), n, dtype=torch.int32, device=device) for n in (nk - short, short))
        whole, boundary = (count.expand(1, 1, nq) for count in counts)
        return cls(lists, whole, boundary, query_lengths, key_lengths, None, None, None, None, None, None,
                   key_mask, block, block)

    def of_heads(self, heads: Tensor) -> Blocks:
        """The blocks of some heads: int64 (h,), on the device. What all heads share stays shared."""
        def part(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[1] == 1 else x.index_select(1, heads)

        names = ("lists", "whole", "boundary", "query_index", "key_index")
        parts: dict[str, Any] = {name: part(getattr(self, name)) for name in names}
        return dataclasses.replace(self, **parts)

    @property
    def query_blocks(self) -> int:
        """Number of query blocks."""
        return self.query_lengths.shape[0]

    @property
    def key_blocks(self) -> int:
        """Number of key blocks."""
        return self.key_lengths.shape[0]

    @property
    def coordinates(self) -> int:
        """Number of window coordinates, 0 when there is no window."""
        return 0 if self.key_coordinates is None else self.key_coordinates.shape[0]

    def real_keys(self, key_tokens: int) -> Tensor:
        """bool (B|1, H|1, key slots): True where the slot holds a key that `key_mask` allows."""
        place = torch.arange(self.key_block, device=self.key_lengths.device)
        real = (place < self.key_lengths[:, None]).reshape(1, 1, -1)
        if self.key_mask is None:
            return real
        if self.key_index is None:
            padded = torch.nn.functional.pad(self.key_mask, (0, real.shape[-1] - key_tokens))
            return real & padded[:, None]
        token = self.key_index.clamp(min=0)
        batch = torch.arange(self.key_mask.shape[0], device=token.device)[:, None, None]
        return real & self.key_mask[batch, token.expand(self.key_mask.shape[0], -1, -1)]

    def listed(self) -> Tensor:
        """bool (B|1, H|1, nq, nk): the pairs of blocks that are listed, whole or boundary."""
        place = torch.arange(self.lists.shape[-1], device=self.lists.device)
        return self._pairs_of(place < (self.whole + self.boundary)[..., None])

    def token_mask(self) -> Tensor:
        """bool (B|1, H|1, Lq, Lk) in token order, `key_mask` left out: for small sizes."""
        place = torch.arange(self.lists.shape[-1], device=self.lists.device)
        ends = [self.whole[..., None], (self.whole + self.boundary)[..., None]]
        seen, untested = (self._pairs_of(place < end) for end in reversed(ends))
        seen, untested = (x.repeat_interleave(self.query_block, 2).repeat_interleave(self.key_block, 3)
                          for x in (seen, untested))
        if self.key_coordinates is not None:
            assert self.query_low is not None and self.query_high is not None
            # (C, query slots, key slots)
            coordinate = self.key_coordinates[:, None]
            inside = ((coordinate >= self.query_low[..., None]) & (coordinate <= self.query_high[..., None])).all(0)
            seen = seen & (untested | inside | (False if self.always is None else self.always))
        rows = self._slots(self.query_index, self.query_lengths, self.query_block)
        columns = self._slots(self.key_index, self.key_lengths, self.key_block)
        batch, heads = torch.broadcast_shapes(seen.shape[:2], rows.shape[:2], columns.shape[:2])
        seen = seen.expand(batch, heads, -1, -1)
        rows, columns = rows.expand(batch, heads, -1), columns.expand(batch, heads, -1)
        seen = seen.gather(2, rows[..., None].expand(-1, -1, -1, seen.shape[3]))
        return seen.gather(3, columns[:, :, None].expand(-1, -1, rows.shape[2], -1))

    def _pairs_of(self, listed: Tensor) -> Tensor:
        """bool (B|1, H|1, nq, nk) from which list entries count, bool (..., nq, width)."""
        # Entries that do not count go to one column beyond the blocks, which is cut off.
        target = torch.where(listed, self.lists, self.key_blocks).long()
        found = torch.zeros(*self.lists.shape[:3], self.key_blocks + 1, dtype=torch.bool, device=self.lists.device)
        return found.scatter_(-1, target, True)[..., : self.key_blocks]

    @staticmethod
    def _slots(index: Tensor | None, lengths: Tensor, block: int) -> Tensor:
        """int64 (B|1, H|1, tokens): the slot of each token."""
        if index is None:
            return torch.arange(int(lengths.sum()), device=lengths.device).expand(1, 1, -1)
        padding = int((index[0, 0] < 0).sum())
        # Sorted by token, the -1 of padding come first.
        return index.argsort(-1)[..., padding:]


@dataclass(frozen=True, eq=False)
class SoftMeans:
    """What blocks enter a softmax as where they are not listed, see `soft`.

    Args:
        key, value: float32 (B, H, nk, D) and (B, H, nk, Dv), means of each block's real tokens.
        counts: (B|1, H|1, nk), how many keys each mean stands for; 0: the block is no entry.
        heads: int64 (h,), the heads that have soft blocks, on the device; the others drop what they do not list. None:
            all have.
    """

    key: Tensor
    value: Tensor
    counts: Tensor
    heads: Tensor | None = None


def _index(index: Tensor | None) -> Tensor | None:
    """The layout's index as (B|1, H|1, slots)."""
    return index if index is None or index.dim() == 3 else index[None, None]


def empty_results(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh memory for what an attention kernel writes.

    Args:
        query (B, Lq, H, D), key (B, Lk, H, D), value (B, Lk, H, Dv).

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, LSE (B, H, Lq) float32; 0 and -inf where there is no key.
    """
    batch, tokens, heads, _ = query.shape
    out = torch.empty(batch, tokens, heads, value.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    return (out, lse) if key.numel() else (out.zero_(), lse.fill_(-torch.inf))
