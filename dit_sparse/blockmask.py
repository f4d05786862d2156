"""`BlockMask`: which key blocks each query block sees, as plain tensors that every kernel can read.

A mask has three parts. Two `BlockLayout`s say how query and key tokens sit in blocks. Lists of key blocks,
per (batch, head, query block), hold the whole blocks first and the boundary blocks after. A `TokenWindow`,
when there is one, is the exact test that boundary blocks apply to each (query, key) pair.
No function that builds a mask waits for the device: shapes never depend on tensor contents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .blocklayout import HIGHEST, LOWEST, BlockLayout, TokenWindow, storage_bytes

__all__ = ["HIGHEST", "LOWEST", "BlockLayout", "BlockMask", "TokenWindow", "storage_bytes"]


def _unexpanded(x: Tensor) -> Tensor:
    """x with batch and head dimensions of stride 0 cut back to size 1: equal maps are built once."""
    for dim in (0, 1):
        if x.shape[dim] > 1 and x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    return x


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Key blocks that each query block sees.

    A whole block is full (block_size real keys) and every pair in it is allowed. A boundary block is tested for
    its length and, when there is a window, pair by pair. Short query blocks need no care: rows beyond are never
    written.

    Args:
        lists: int32 (B|1, H|1, nq, width), key block ids, whole blocks first; beyond the counts any id, never read.
        whole, boundary: int32 (B|1, H|1, nq), how many there are of each.
        query, key: the layouts.
        window: exact test of boundary blocks, or None when only their length is tested.
    """

    lists: Tensor
    whole: Tensor
    boundary: Tensor
    query: BlockLayout
    key: BlockLayout
    window: TokenWindow | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.lists.shape)
        if len(shape) != 4 or shape[2] != self.query.blocks:
            raise ValueError(f"BlockMask: lists is {shape}; use (B|1, H|1, {self.query.blocks}, width)")
        for name in ("whole", "boundary"):
            if tuple(getattr(self, name).shape) != shape[:3]:
                raise ValueError(f"BlockMask: {name} is {tuple(getattr(self, name).shape)}; use {shape[:3]}")
        if self.window is not None:
            slots = self.window.query_low.shape[1], self.window.key_coordinates.shape[1]
            if slots != (self.query.slots, self.key.slots):
                layouts = self.query.slots, self.key.slots
                raise ValueError(f"BlockMask: window is for {slots} slots, the layouts have {layouts}")

    @classmethod
    def from_dense(
        cls,
        keep: Tensor,
        query: BlockLayout,
        key: BlockLayout,
        *,
        partial: Tensor | None = None,
        window: TokenWindow | None = None,
        max_width: int | None = None,
    ) -> BlockMask:
        """The mask that keeps the given pairs of blocks, built without waiting for the device.

        Args:
            keep: bool (B|1, H|1, nq, nk), or (nq, nk) for all heads. Expanded dimensions are built once.
            query, key: the layouts.
            partial: bool of a shape that broadcasts to keep: blocks to list as boundary. Blocks short of keys
                always are. None with a window: the window decides, and blocks it empties are dropped.
            window: exact test of boundary blocks.
            max_width: most blocks that any row keeps, when known: it makes the lists narrower. Blocks beyond it
                would be lost.
        """
        keep = _unexpanded(keep if keep.dim() == 4 else keep[None, None])
        if tuple(keep.shape[2:]) != (query.blocks, key.blocks):
            want = f"(B|1, H|1, {query.blocks}, {key.blocks})"
            raise ValueError(f"BlockMask: keep has shape {tuple(keep.shape)}; use {want}")
        keep = keep & (key.lengths > 0) & (query.lengths > 0)[:, None]
        if window is not None and partial is None:
            counts = window.pair_counts(query, key)
            keep, partial = keep & (counts > 0), counts < query.lengths[:, None] * key.lengths
        short = key.lengths < key.block_size
        boundary = keep & (short if partial is None else short | partial)

        # Every block goes to its place in the list: whole ones, then boundary ones, then those not kept.
        rank = keep.cumsum(-1, dtype=torch.int32)
        boundary_rank = boundary.cumsum(-1, dtype=torch.int32)
        kept, n_boundary = rank[..., -1:], boundary_rank[..., -1:]
        block = torch.arange(key.blocks, dtype=torch.int32, device=keep.device)
        place = torch.where(keep, rank - boundary_rank - 1, kept + block - rank)
        place = torch.where(boundary, kept - n_boundary + boundary_rank - 1, place)
        lists = torch.empty_like(place).scatter_(-1, place.to(torch.int64), block.expand_as(place))
        width = key.blocks if max_width is None else max(1, min(max_width, key.blocks))
        lists = torch.where(block[:width] < kept, lists[..., :width], 0)
        whole = (kept - n_boundary).squeeze(-1).clamp(max=width)
        return cls(lists, whole, torch.minimum(n_boundary.squeeze(-1), width - whole), query, key, window)

    @classmethod
    def from_window(cls, window: TokenWindow, query: BlockLayout, key: BlockLayout) -> BlockMask:
        """The mask of exactly the pairs that the window allows, for all heads."""
        every = torch.ones(1, 1, query.blocks, key.blocks, dtype=torch.bool, device=query.device)
        return cls.from_dense(every, query, key, window=window)

    @classmethod
    def full(cls, query: BlockLayout, key: BlockLayout) -> BlockMask:
        """The mask that keeps everything, for all heads."""
        every = torch.ones(1, 1, query.blocks, key.blocks, dtype=torch.bool, device=query.device)
        return cls.from_dense(every, query, key)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.lists.device

    def _scatter(self, first: Tensor | int, last: Tensor) -> Tensor:
        """bool (B|1, H|1, nq, nk): True at the list entries from `first` up to, not including, `last`."""
        place = torch.arange(self.lists.shape[-1], device=self.device)
        listed = (place >= first) & (place < last.unsqueeze(-1))
        # Entries outside go to one column beyond the blocks, which is cut off.
        target = torch.where(listed, self.lists, self.key.blocks).to(torch.int64)
        found = torch.zeros(*self.lists.shape[:3], self.key.blocks + 1, dtype=torch.bool, device=self.device)
        return found.scatter_(-1, target, True)[..., : self.key.blocks]

    def to_dense(self) -> Tensor:
        """bool (B|1, H|1, nq, nk): the listed pairs of blocks."""
        return self._scatter(0, self.whole + self.boundary)

    def boundary_dense(self) -> Tensor:
        """bool (B|1, H|1, nq, nk): the pairs of blocks that are listed as boundary."""
        return self._scatter(self.whole.unsqueeze(-1), self.whole + self.boundary)

    def token_mask(self) -> Tensor:
        """bool (B|1, H|1, Lq, Lk) in token order: the twin of what a kernel computes, for small sizes."""
        query_slot, key_slot = (s.reshape(*([1] * (3 - s.dim())), *s.shape)
                                for s in (self.query.slot_of_token, self.key.slot_of_token))
        batch, heads = torch.broadcast_shapes(query_slot.shape[:2], key_slot.shape[:2], self.lists.shape[:2])
        rows = query_slot.expand(batch, heads, -1)[..., :, None]
        columns = key_slot.expand(batch, heads, -1)[..., None, :]
        b = torch.arange(batch, device=self.device)[:, None, None, None]
        h = torch.arange(heads, device=self.device)[:, None, None]

        def expand(dense: Tensor) -> Tensor:
            dense = dense.expand(batch, heads, -1, -1)
            return dense[b, h, rows // self.query.block_size, columns // self.key.block_size]

        if self.window is None:
            return expand(self.to_dense())
        boundary = expand(self.boundary_dense())
        return expand(self.to_dense()) & (~boundary | self.window.allowed(rows, columns))

    def work(self) -> Tensor:
        """int32 (B|1, H|1, nq): blocks that each query block computes."""
        return self.whole + self.boundary

    @cached_property
    def pairs(self) -> Tensor:
        """int64 (B|1, H|1): allowed pairs of real tokens per head, exact, counted once, when first asked for."""
        return self.entry_pairs().sum((-2, -1))

    def entry_pairs(self) -> Tensor:
        """int64 (B|1, H|1, nq, width): allowed pairs of real tokens of every list entry, 0 beyond the lists."""
        query_lengths, key_lengths = self.query.lengths[:, None], self.key.lengths.to(torch.int64)
        place = torch.arange(self.lists.shape[-1], device=self.device)
        listed = place < self.work().unsqueeze(-1)
        count = key_lengths[self.lists] * query_lengths
        if self.window is not None:
            counts = self.window.pair_counts(self.query, self.key)
            rows = torch.arange(self.query.blocks, device=self.device)[:, None]
            count = torch.where(place < self.whole.unsqueeze(-1), count, counts[rows, self.lists])
        return torch.where(listed, count, 0)

    def density(self) -> Tensor:
        """float32 (): allowed pairs of real tokens over all pairs, mean over batch and heads; no synchronisation."""
        return self.head_density().mean()

    def head_density(self) -> Tensor:
        """float32 (B|1, H|1): the density of every head."""
        return self.pairs / (self.query.tokens * self.key.tokens)

    def balance(self) -> Tensor:
        """Work of the busiest query block over the mean: float32 (), 1 when all lists are equally long."""
        work = self.work().to(torch.float32)
        return work.max() / work.mean().clamp(min=1e-9)

    def _same_frame(self, other: BlockMask, verb: str) -> None:
        """Raise unless the two masks speak of the same blocks and the same window."""
        for name in ("query", "key"):
            mine, theirs = getattr(self, name), getattr(other, name)
            sizes = [(x.block_size, x.tokens, x.blocks) for x in (mine, theirs)]
            if mine.index is not theirs.index or sizes[0] != sizes[1]:
                raise ValueError(f"BlockMask.{verb}: the {name} layouts differ; build both masks from one")
        if self.window is not other.window:
            raise ValueError(f"BlockMask.{verb}: the windows differ; build both masks from one")

    def union(self, other: BlockMask) -> BlockMask:
        """The pairs that one mask or the other allows; same layouts and window."""
        self._same_frame(other, "union")
        mine, theirs = self.to_dense(), other.to_dense()
        whole = (mine & ~self.boundary_dense()) | (theirs & ~other.boundary_dense())
        return self.from_dense(mine | theirs, self.query, self.key, partial=~whole, window=self.window)

    def intersection(self, other: BlockMask) -> BlockMask:
        """The pairs that both masks allow; same layouts and window. Rows may become empty."""
        self._same_frame(other, "intersection")
        partial = self.boundary_dense() | other.boundary_dense()
        keep = self.to_dense() & other.to_dense()
        return self.from_dense(keep, self.query, self.key, partial=partial, window=self.window)

    def complement(self) -> BlockMask:
        """The pairs that this mask leaves out; rows that see everything become empty.

        Raises:
            ValueError: for a mask with a window, which cuts blocks: what it leaves out of them is no list of blocks.
        """
        if self.window is not None:
            raise ValueError("BlockMask.complement: the mask has a window; lists of blocks cannot leave out its pairs")
        return self.from_dense(~self.to_dense(), self.query, self.key)

    def without_rows(self, rows: Tensor) -> BlockMask:
        """The same lists, with nothing listed for some query blocks.

        Args:
            rows: bool that broadcasts to (B, H, nq), True where a query block computes nothing.
        """
        whole, boundary = (torch.where(rows, 0, count) for count in (self.whole, self.boundary))
        lists = self.lists.expand(*whole.shape[:2], -1, -1)
        return dataclasses.replace(self, lists=lists, whole=whole, boundary=boundary)

    def with_layouts(self, query: BlockLayout, key: BlockLayout) -> BlockMask:
        """The same lists over other orders of the tokens, of equal block lengths; a count of pairs is kept."""
        mask = dataclasses.replace(self, query=query, key=key)
        same = query.lengths is self.query.lengths and key.lengths is self.key.lengths
        if same and "pairs" in self.__dict__:
            mask.__dict__["pairs"] = self.pairs
        return mask

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the mask, layouts and window included."""
        window = [] if self.window is None else self.window.tensors()
        return [self.lists, self.whole, self.boundary, *self.query.tensors(), *self.key.tensors(), *window]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the mask holds, layouts and window included."""
        return storage_bytes(self.tensors())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BlockMask:
        """The mask on another device."""
        query = self.query.to(device, non_blocking=non_blocking)
        key = query if self.key is self.query else self.key.to(device, non_blocking=non_blocking)
        lists, whole, boundary = (t.to(device, non_blocking=non_blocking) for t in
                                  (self.lists, self.whole, self.boundary))
        window = None if self.window is None else self.window.to(device, non_blocking=non_blocking)
        return BlockMask(lists, whole, boundary, query, key, window)
