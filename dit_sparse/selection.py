"""From scores to the block pairs that are kept: top-k, top-p, threshold, random, and forced blocks.

All maps are (..., nq, nk): scores float, keep bool. Selection works along the last dimension; of equal scores the
lower index wins, and no row is ever empty. Nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .blocklayout import BlockLayout
from .grid import TokenGrid

_MOST = 2**31 - 1
_SHARE_UNIT = 2**40  # a share of 1 as a whole number: a power of two, so that scaling does not round


def count_of_density(blocks: int, density: float) -> int:
    """Blocks to keep of a row for a density in (0, 1]: the next whole number, at least 1."""
    # Floats such as 0.07 * 100 lie a hair above the whole number that is meant.
    return min(blocks, max(1, math.ceil(blocks * density - 1e-9)))


def rows_kept(density: float, video: int, sink: int, text: int, *, count_forced: bool) -> int:
    """Key blocks that the ranking gives every query block, for a density of the whole mask.

    Args:
        density: asked kept fraction.
        video, sink, text: number of blocks that hold video, those of them that are kept anyway in rows and columns
            and take no part in the ranking, and those that hold text, kept alike.
        count_forced: rows and columns of sink and text are part of the density; the ranking then looks only
            at the other blocks, and gives at least half of the density.

    Returns:
        The number, at least 1.
    """
    least = count_of_density(video, density)
    if not count_forced or sink == video:
        return least
    blocks = video + text
    left = density * blocks**2 - (sink + text) * blocks
    return min(
        video - sink, max(count_of_density(video, density / 2), round(left / (video - sink)) - sink - text)
    )


def _ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores sorted from the highest, equal ones by lower index, and their places."""
    return torch.sort(scores, dim=-1, descending=True, stable=True)


def select_top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """The k highest scores of every row.

    Args:
        scores: (..., nq, nk).
        k: how many; an int, or an int tensor that broadcasts to (..., nq, 1), for a budget per head. Values
            below 1 count as 1, values above nk as nk.

    Returns:
        bool (..., nq, nk).
    """
    place = _ranked(scores)[1]
    keep = torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(k, Tensor):
        taken = torch.arange(scores.shape[-1], device=scores.device) < k.clamp(min=1)
        return keep.scatter_(-1, place, taken.expand_as(keep))
    return keep.scatter_(-1, place[..., : max(1, k)], True)


def _share_limit(p: float | Tensor) -> int | Tensor:
    """A share as a whole number, 2**62 from 1 on: shares may add up to a hair more, and nothing may be dropped."""
    if not isinstance(p, Tensor):
        return 2**62 if p >= 1 else int(p * _SHARE_UNIT)
    p = p if p.dtype == torch.float64 else p.to(torch.float32)  # half precision cannot hold 2^40
    return torch.where(p >= 1, 2**62, (p.nan_to_num(-1).clamp(-1, 1) * _SHARE_UNIT).to(torch.int64))


def select_top_p(scores: Tensor, p: float | Tensor, *, least: int = 1, crossing: bool = True) -> Tensor:
    """The fewest blocks of every row whose shares exceed p: a block is kept while those before it hold at most p.

    Args:
        scores: (..., nq, nk), shares of the row that add up to 1 (a softmax). Other numbers are not refused, which
            would wait for the device: they count as the nearest of 0 ... 1, and NaN, which ranks first, as 0.
        p: share to hold; a float, or a tensor that broadcasts to (..., nq, 1). p >= 1 keeps everything.
        least: blocks that are kept in any case, best first.
        crossing: False: the block that takes the sum beyond p is not kept, so the kept ones hold at most p.

    Returns:
        bool (..., nq, nk).
    """
    value, place = _ranked(scores)
    # Sums of whole numbers are exact, whatever order a device adds them in.
    share = (value.to(torch.float32).nan_to_num(0).clamp_(0, 1) * _SHARE_UNIT).to(torch.int64)
    held = share.cumsum(-1)
    taken = (held - share if crossing else held) <= _share_limit(p)
    taken[..., : max(1, least)] = True
    return torch.zeros_like(taken).scatter_(-1, place, taken)


def select_threshold(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """Scores of at least the threshold, and the best of every row.

    Args:
        scores: (..., nq, nk).
        threshold: a float, or a tensor that broadcasts to the scores.

    Returns:
        bool (..., nq, nk).
    """
    best = scores.argmax(-1, keepdim=True)
    return (scores >= threshold).scatter_(-1, best, True)


def map_kept(density: float, video: int, text: int, *, count_forced: bool) -> int:
    """Pairs of video blocks that a choice over a head's whole map keeps, for a density of the whole mask.

    Args:
        density: asked kept fraction.
        video, text: number of blocks that hold video, and text, whose rows and columns are kept anyway.
        count_forced: the text's rows and columns are part of the density; the choice then keeps at least half of it,
            and at least as many pairs as there are rows.

    Returns:
        The number, at least 1.
    """
    least = count_of_density(video**2, density)
    if not count_forced:
        return least
    left = density * (video + text) ** 2 - ((video + text) ** 2 - video**2)
    return min(video**2, max(video, count_of_density(video**2, density / 2), round(left)))


def select_global(scores: Tensor, k: int) -> Tensor:
    """The k highest scores of every map, over all of its rows together: a row may keep none. Of equal scores the one
    in the lower row, then in the lower column, wins.

    Args:
        scores: (..., nq, nk).
        k: how many; values below 1 count as 1, values above nq * nk as nq * nk.

    Returns:
        bool (..., nq, nk).
    """
    flat = scores.flatten(-2)
    most = flat.shape[-1]
    k = min(max(1, k), most)
    if 2 * k <= most:
        last = flat.topk(k, sorted=False).values.amin(-1, keepdim=True)
    else:
        last = flat.topk(most - k + 1, largest=False, sorted=False).values.amax(-1, keepdim=True)
    above, equal = flat > last, flat == last
    left = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return (above | equal & (equal.cumsum(-1, dtype=torch.int32) <= left)).unflatten(-1, scores.shape[-2:])


def select_random(
    shape: Sequence[int],
    k: int | Tensor,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """k blocks of every row, uniformly at random: the baseline that any score must beat.

    Args:
        shape: (..., nq, nk).
        k: as in `select_top_k`.
        device, generator: where the numbers come from.

    Returns:
        bool of the shape.
    """
    return select_top_k(torch.rand(tuple(shape), device=device, generator=generator), k)


def force(
    keep: Tensor,
    *,
    rows: slice | Tensor | None = None,
    columns: slice | Tensor | None = None,
    own: bool = False,
) -> Tensor:
    """The map with whole rows, whole columns, or the diagonal kept too.

    Args:
        keep: bool (..., nq, nk); not changed.
        rows, columns: which query blocks see all keys, which key blocks are seen by all queries: a slice, or bool
            (..., nq) and (..., nk).
        own: keep each query block's own key block; the map must be square.

    Returns:
        bool (..., nq, nk).
    """
    if own and keep.shape[-2] != keep.shape[-1]:
        raise ValueError(f"force: own=True needs a square map, not {tuple(keep.shape[-2:])}")
    kept = keep.clone()
    for chosen, dim in ((rows, -2), (columns, -1)):
        if isinstance(chosen, Tensor):
            kept = kept | chosen.unsqueeze(-1 if dim == -2 else -2)
        elif chosen is not None:
            kept[(..., chosen, slice(None)) if dim == -2 else (..., chosen)] = True
    if own:
        kept.diagonal(dim1=-2, dim2=-1).fill_(True)
    return kept


def text_forced(
    keep: Tensor, layout: BlockLayout, grid: TokenGrid, key_layout: BlockLayout | None = None
) -> Tensor:
    """The map with the rows and columns of the text blocks kept.

    Args:
        keep: bool (..., nq, nk).
        layout: layout of queries and keys, from `order.layout` (text in the last blocks).
        grid: the token grid, with its text.
        key_layout: layout of the keys when it differs.

    Returns:
        bool (..., nq, nk).
    """
    if not grid.text:
        return keep
    key_layout = key_layout or layout
    rows, columns = (slice(x.blocks - -(-grid.text // x.block_size), None) for x in (layout, key_layout))
    return force(keep, rows=rows, columns=columns)


def blocks_holding(layout: BlockLayout, start: int, stop: int) -> Tensor:
    """Blocks that hold at least one of the tokens start ... stop - 1 of the sequence (a frame, a prefix).

    Returns:
        bool (blocks,), or (B|1, H|1, blocks) when heads have their own order.
    """
    token = layout.token_of_slot
    inside = (token >= start) & (token < stop)
    return inside.unflatten(-1, (layout.blocks, layout.block_size)).any(-1)


@dataclass(frozen=True, eq=False)
class Rule:
    """How a row of scores becomes the key blocks that a query block sees; what `routing.route` follows.

    Args:
        kind: "top_k", "top_p" or "threshold", as the functions above.
        amount: k, p, or the threshold: a number, or a tensor that broadcasts to (B, H, nq, 1).
        softmax: turn the scores of a row, over `columns`, into shares first.
        least: with top_p, blocks that are kept in any case.
        rows: the query blocks that choose, None for all; the others see everything.
        columns: the key blocks that they choose among, None for all; the others are seen by everyone.
        forced_rows: bool (nq,) or (B|1, H|1, nq), more query blocks that see everything.
        forced_columns: a slice, or bool (nk,) or (B|1, H|1, nk): key blocks that are seen by everyone, although they
            take part in the choice.
        own: each query block sees its own key block.
        near: key blocks less than so far from the query block's own rank before all others, so they are kept, and count
            among the chosen: 1 its own, 2 its neighbours as well. With top_k and threshold, without softmax.
    """

    kind: Literal["top_k", "top_p", "threshold"]
    amount: float | Tensor
    softmax: bool = False
    least: int = 1
    rows: slice | None = None
    columns: slice | None = None
    forced_rows: Tensor | None = None
    forced_columns: slice | Tensor | None = None
    own: bool = False
    near: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("top_k", "top_p", "threshold"):
            raise ValueError(f"Rule: kind={self.kind!r} is not allowed; use 'top_k', 'top_p' or 'threshold'")
        amount = self.amount
        if isinstance(amount, Tensor) and amount.dim() and amount.shape[-1] != 1:
            raise ValueError(f"Rule: amount has shape {tuple(amount.shape)}; its last dimension must be 1")
        whole = not amount.is_floating_point() if isinstance(amount, Tensor) else isinstance(amount, int)
        if self.kind == "top_k" and not whole:
            raise ValueError(f"Rule: amount={amount!r} is not allowed with top_k; use whole numbers")
        if self.near and (self.kind == "top_p" or self.softmax):
            raise ValueError(f"Rule: near={self.near} is not allowed with top_p or softmax; use own=True")
        for name in ("rows", "columns", "forced_columns"):
            part = getattr(self, name)
            if isinstance(part, slice) and part.step not in (None, 1):
                raise ValueError(f"Rule: {name}={part} has a step; use a range without one")

    def keep(self, scores: Tensor) -> Tensor:
        """bool (B, H, nq, nk): the pairs of blocks that are kept, in plain PyTorch; scores are (B, H, nq, nk)."""
        (top, end), (left, right) = self.row_range(scores.shape[-2]), self.column_range(scores.shape[-1])
        keep = torch.ones_like(scores, dtype=torch.bool)
        if self.near:
            at = torch.arange(max(scores.shape[-2:]), device=scores.device)
            distance = (at[: scores.shape[-2], None] - at[: scores.shape[-1]]).abs()
            scores = scores.masked_fill(distance < self.near, torch.inf)
        if top < end and left < right:
            part = scores[..., top:end, left:right]
            part = part.softmax(-1) if self.softmax else part
            amount: Any = self.amount
            if isinstance(amount, Tensor) and amount.dim() > 1 and amount.shape[-2] > 1:
                amount = amount[..., top:end, :]
            if self.kind == "top_k":
                chosen = select_top_k(part, amount)
            elif self.kind == "top_p":
                chosen = select_top_p(part, amount, least=self.least)
            else:
                chosen = select_threshold(part, amount)
            keep[..., top:end, left:right] = chosen
        return force(keep, rows=self.forced_rows, columns=self.forced_columns, own=self.own)

    def of_heads(self, heads: slice) -> Rule:
        """The rule as some of the heads see it."""

        def part(x: Any, dims: int) -> Any:
            return x[:, heads] if isinstance(x, Tensor) and x.dim() == dims and x.shape[1] > 1 else x

        amount = self.amount
        if isinstance(amount, Tensor) and amount.dim() == 3:
            amount = amount[None]
        return dataclasses.replace(self, amount=part(amount, 4), forced_rows=part(self.forced_rows, 3),
                                   forced_columns=part(self.forced_columns, 3))

    def limit(self) -> int | float | Tensor:
        """The amount as kernels take it: k that 32 bits hold, the threshold as it is, a share as a whole number."""
        amount = self.amount
        if self.kind == "top_p":
            return _share_limit(amount)
        if self.kind == "top_k":
            whole = amount.to(torch.int64) if isinstance(amount, Tensor) else int(amount)
            return whole.clamp(1, _MOST) if isinstance(whole, Tensor) else min(max(1, whole), _MOST)
        return amount if isinstance(amount, Tensor) else float(amount)

    def row_range(self, blocks: int) -> tuple[int, int]:
        """First and end of the query blocks that choose."""
        return (self.rows or slice(None)).indices(blocks)[:2]

    def column_range(self, blocks: int) -> tuple[int, int]:
        """First and end of the key blocks that take part in the choice."""
        return (self.columns or slice(None)).indices(blocks)[:2]

    def forced_range(self, blocks: int) -> tuple[int, int]:
        """First and end of the forced key blocks when they are a slice, else an empty range."""
        return self.forced_columns.indices(blocks)[:2] if isinstance(self.forced_columns, slice) else (0, 0)

    def forced_columns_map(self) -> Tensor | None:
        """The forced key blocks when they are a tensor."""
        return self.forced_columns if isinstance(self.forced_columns, Tensor) else None
