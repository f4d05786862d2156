"""How tokens sit in blocks (`BlockLayout`) and the exact test of (query, key) pairs (`TokenWindow`).

Both are plain data, imported from `dit_sparse.blockmask`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LOWEST, HIGHEST = -(2**31), 2**31 - 1  # query_low and query_high of a query that sees every key
_PAIRS_AT_ONCE = 2**24  # (query, key) pairs tested at a time when a window is counted: about 100 MB


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that the tensors hold, storage shared by several of them counted once."""
    stores = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(stores.values())


def _check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"BlockLayout: block_size={block_size!r} is not allowed; use a whole number >= 1")


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """How the tokens of a sequence sit in blocks of equal size, each token exactly once.

    Args:
        block_size: slots of a block.
        tokens: real tokens.
        index: token at each slot, -1 for padding; int64 (slots,) or (B|1, H|1, slots), or None when slot i is
            token i and only the last block may be short.
        lengths: int32 (blocks,), real tokens of each block, packed at its front; the same for all heads.
        box: when the blocks are the tiles of a grid, in raster order, and text blocks after them: frames, rows and
            columns of the grid, the same of a tile, first video token, first text token, text tokens. It says what
            `index` says, for kernels that copy tiles straight from the activations. None: any other layout.
    """

    block_size: int
    tokens: int
    index: Tensor | None
    lengths: Tensor
    box: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.lengths.dim() != 1:
            raise ValueError(f"BlockLayout: lengths has shape {tuple(self.lengths.shape)}; use (blocks,)")
        if self.index is None and self.blocks != -(-self.tokens // self.block_size):
            raise ValueError(f"BlockLayout: {self.blocks} blocks cannot hold {self.tokens} tokens without an index")
        if self.index is not None and (self.index.dim() not in (1, 3) or self.index.shape[-1] != self.slots):
            shape = tuple(self.index.shape)
            raise ValueError(f"BlockLayout: index has shape {shape}; use ({self.slots},) or (B|1, H|1, {self.slots})")

    @classmethod
    def raster(cls, tokens: int, block_size: int, device: torch.device | str | None = None) -> BlockLayout:
        """Tokens in their own order, cut every `block_size`; only the last block may be short."""
        _check_block_size(block_size)
        start = torch.arange(0, tokens, block_size, dtype=torch.int32, device=device)
        return cls(block_size, tokens, None, (tokens - start).clamp(max=block_size))

    @classmethod
    def from_order(
        cls, order: Tensor, block_size: int, *, lengths: Sequence[int] | Tensor | None = None
    ) -> BlockLayout:
        """Tokens in the order given, cut into blocks.

        Args:
            order: int64 (tokens,) or (B|1, H|1, tokens), a permutation: token at each position.
            block_size: slots of a block.
            lengths: sizes of consecutive segments along the order; a block never spans two segments. Whole
                numbers of any size (longer segments are cut), or an int tensor of blocks, at most block_size each
                (not checked: that would wait for the device). None: one segment.

        Raises:
            ValueError: when whole-number lengths do not add up to the tokens.
        """
        _check_block_size(block_size)
        tokens, device = order.shape[-1], order.device
        if lengths is None:
            plain = cls.raster(tokens, block_size, device)
            index = torch.nn.functional.pad(order.to(torch.int64), (0, plain.slots - tokens), value=-1)
            return cls(block_size, tokens, index, plain.lengths)
        if not isinstance(lengths, Tensor):
            segments = [int(n) for n in lengths]
            if min(segments, default=0) < 0 or sum(segments) != tokens:
                raise ValueError(f"BlockLayout: lengths add up to {sum(segments)}, not to {tokens} tokens")
            cut = [min(block_size, n - start) for n in segments for start in range(0, n, block_size)]
            lengths = torch.tensor(cut, dtype=torch.int32).to(device, non_blocking=True)
        lengths = lengths.to(device=device, dtype=torch.int32)
        ends = lengths.cumsum(0)
        position = torch.arange(tokens, device=device)
        block = torch.searchsorted(ends, position, right=True)
        # A token's slot: the start of its block's slots, plus its place among the block's tokens.
        slot = block * block_size + position - (ends - lengths)[block]
        index = order.new_full((*order.shape[:-1], lengths.numel() * block_size), -1, dtype=torch.int64)
        index[..., slot] = order.to(torch.int64)
        return cls(block_size, tokens, index, lengths)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.lengths.shape[0]

    @property
    def slots(self) -> int:
        """Number of slots, padding included."""
        return self.blocks * self.block_size

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.lengths.device

    @cached_property
    def real(self) -> Tensor:
        """bool (slots,): True where the slot holds a token."""
        place = torch.arange(self.block_size, device=self.device)
        return (place < self.lengths[:, None]).flatten()

    @cached_property
    def token_of_slot(self) -> Tensor:
        """int64 (slots,) or (B|1, H|1, slots): `index`, written out also for the identity."""
        if self.index is not None:
            return self.index
        slot = torch.arange(self.slots, device=self.device)
        return torch.where(slot < self.tokens, slot, -1)

    @cached_property
    def slot_of_token(self) -> Tensor:
        """int64 (tokens,) or (B|1, H|1, tokens): the exact inverse of `token_of_slot`."""
        slot = torch.arange(self.slots, device=self.device)
        if self.index is None:
            return slot[: self.tokens]
        # Padding writes to one place beyond the tokens, which is cut off.
        target = torch.where(self.index < 0, self.tokens, self.index)
        inverse = torch.zeros(*target.shape[:-1], self.tokens + 1, dtype=torch.int64, device=self.device)
        return inverse.scatter_(-1, target, slot.expand_as(target))[..., : self.tokens]

    @property
    def block_of_token(self) -> Tensor:
        """int64 (tokens,) or (B|1, H|1, tokens): the block that holds each token."""
        return torch.div(self.slot_of_token, self.block_size, rounding_mode="floor")

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the layout."""
        return [self.lengths] if self.index is None else [self.lengths, self.index]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BlockLayout:
        """The layout on another device."""
        lengths = self.lengths.to(device, non_blocking=non_blocking)
        index = None if self.index is None else self.index.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, index=index, lengths=lengths)


@dataclass(frozen=True, eq=False)
class TokenWindow:
    """The exact test of boundary blocks: is the key inside the query's box?

    A pair is allowed if always[k], or if for every coordinate c
    query_low[c, q] <= key_coordinates[c, k] <= query_high[c, q].
    The tensors are in slot order of the mask's layouts and shared by all batch elements and heads.

    Args:
        key_coordinates: int32 (C, key slots), C from 1 to 3.
        query_low, query_high: int32 (C, query slots), both ends included.
        always: bool (key slots,), keys that every query sees; None: no such keys.
    """

    key_coordinates: Tensor
    query_low: Tensor
    query_high: Tensor
    always: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.key_coordinates.shape
        if len(shape) != 2 or not 1 <= shape[0] <= 3:
            raise ValueError(f"TokenWindow: key_coordinates has shape {tuple(shape)}; use (1..3, key slots)")
        if self.query_low.shape != self.query_high.shape or self.query_low.shape[:1] != shape[:1]:
            raise ValueError(f"TokenWindow: query_low and query_high must both be ({shape[0]}, query slots)")

    @classmethod
    def from_tokens(
        cls,
        key_coordinates: Tensor,
        query_low: Tensor,
        query_high: Tensor,
        query: BlockLayout,
        key: BlockLayout,
        *,
        always: Tensor | None = None,
    ) -> TokenWindow:
        """The window from tensors in token order.

        Args:
            key_coordinates: (C, Lk); query_low, query_high: (C, Lq); always: bool (Lk,) or None.
            query, key: the layouts; their order must be the same for all heads.
        """

        def to_slots(values: Tensor, layout: BlockLayout) -> Tensor:
            if layout.token_of_slot.numel() != layout.slots:
                raise ValueError("TokenWindow.from_tokens: the layouts must have one order for all heads")
            # The index may be stored as (1, 1, slots).
            slots = values[..., layout.token_of_slot.reshape(layout.slots).clamp(min=0)]
            return torch.where(layout.real, slots, torch.zeros((), dtype=slots.dtype, device=slots.device))

        return cls(
            to_slots(key_coordinates.to(torch.int32), key),
            to_slots(query_low.to(torch.int32), query),
            to_slots(query_high.to(torch.int32), query),
            None if always is None else to_slots(always, key),
        )

    def allowed(self, query_slots: Tensor, key_slots: Tensor) -> Tensor:
        """The test itself, for broadcastable slot ids of queries and keys.

        Returns:
            bool of the broadcast shape; padding is not looked at.
        """
        inside = torch.ones((), dtype=torch.bool, device=self.key_coordinates.device)
        for coordinate, low, high in zip(self.key_coordinates, self.query_low, self.query_high, strict=True):
            place = coordinate[key_slots]
            inside = inside & (place >= low[query_slots]) & (place <= high[query_slots])
        return inside if self.always is None else inside | self.always[key_slots]

    def pair_counts(self, query: BlockLayout, key: BlockLayout) -> Tensor:
        """Allowed pairs of real tokens, for every pair of blocks; counted once and kept.

        Returns:
            int32 (nq, nk).
        """
        kept = self.__dict__.get("_counts")
        if kept is None or kept[0] is not query.lengths or kept[1] is not key.lengths:
            kept = (query.lengths, key.lengths, _count_pairs(self, query, key))
            self.__dict__["_counts"] = kept
        return kept[2]

    def tensors(self) -> list[Tensor]:
        """The tensors that make up the window."""
        found = [self.key_coordinates, self.query_low, self.query_high]
        return found if self.always is None else [*found, self.always]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenWindow:
        """The window on another device."""
        return TokenWindow(*(t.to(device, non_blocking=non_blocking) for t in self.tensors()))


def _block_bounds(values: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every block's real tokens: (C, slots) -> two (C, blocks)."""
    shape = (values.shape[0], layout.blocks, layout.block_size)
    low = torch.where(layout.real, values, HIGHEST).reshape(shape).amin(-1)
    high = torch.where(layout.real, values, LOWEST).reshape(shape).amax(-1)
    return low, high


def _count_pairs(
    window: TokenWindow, query: BlockLayout, key: BlockLayout, only_mixed: bool | None = None
) -> Tensor:
    """int32 (nq, nk) allowed pairs: from the bounds of the blocks where they decide, token by token elsewhere.

    `only_mixed` picks out the block pairs that bounds do not decide, which waits for the device; without it all
    are tested. By default they are picked out on the CPU only.
    """
    key_low, key_high = _block_bounds(window.key_coordinates, key)
    low_low, low_high = _block_bounds(window.query_low, query)
    high_low, high_high = _block_bounds(window.query_high, query)
    # (C, nq, nk) -> (nq, nk): no key can be in any box; every key is in every box
    none = ((key_high[:, None] < low_low[..., None]) | (key_low[:, None] > high_high[..., None])).any(0)
    every = ((key_low[:, None] >= low_high[..., None]) & (key_high[:, None] <= high_low[..., None])).all(0)
    if window.always is not None:
        always = (window.always & key.real).reshape(key.blocks, -1).sum(-1)
        none, every = none & (always == 0), every | (always == key.lengths)
    pairs = query.lengths[:, None] * key.lengths
    counts = torch.where(every, pairs, 0).flatten()
    none = none | (pairs == 0)

    if only_mixed is None:
        only_mixed = counts.device.type == "cpu"
    mixed = ~(every | none).flatten()
    todo = mixed.nonzero()[:, 0] if only_mixed else torch.arange(counts.numel(), device=counts.device)
    step = max(1, _PAIRS_AT_ONCE // (query.block_size * key.block_size))
    query_place = torch.arange(query.block_size, device=counts.device)[:, None]
    key_place = torch.arange(key.block_size, device=counts.device)
    for chunk in todo.split(step):
        block = torch.div(chunk, key.blocks, rounding_mode="floor")[:, None, None]
        query_slots = block * query.block_size + query_place
        key_slots = (chunk[:, None, None] - block * key.blocks) * key.block_size + key_place
        allowed = window.allowed(query_slots, key_slots) & query.real[query_slots] & key.real[key_slots]
        counts[chunk] = torch.where(mixed[chunk], allowed.sum((1, 2), dtype=torch.int32), counts[chunk])
    return counts.reshape(query.blocks, key.blocks)
