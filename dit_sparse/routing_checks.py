"""What the routing kernels are given: they trust these shapes, and without the checks would read foreign memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blockmask import BlockLayout
from .selection import Rule

__all__ = ["check_layout", "check_mask", "check_pair", "check_rule", "check_shape", "index_of"]


def check_shape(name: str, x: Tensor, *allowed: Sequence[int], dtypes: Sequence[torch.dtype] = ()) -> None:
    """Raise ValueError unless the tensor has one of the shapes, and one of the dtypes if any are named."""
    if tuple(x.shape) not in {tuple(shape) for shape in allowed} or (dtypes and x.dtype not in dtypes):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        shapes = " or ".join(dict.fromkeys(str(tuple(shape)) for shape in allowed))
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; use {kinds}{' ' * bool(kinds)}{shapes}")


def check_pair(name: str, query: Tensor, key: Tensor) -> None:
    """Raise ValueError unless batch, heads and head dim of (B, L, H, D) activations are the same."""
    same = query.dim() == key.dim() == 4 and all(query.shape[i] == key.shape[i] for i in (0, 2, 3))
    if not same:
        raise ValueError(f"{name}: query is {tuple(query.shape)}, key {tuple(key.shape)}; use (B, Lq, H, D) and "
                         "(B, Lk, H, D)")


def check_mask(name: str, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """The mask as (B, L), or ValueError."""
    if mask is None:
        return None
    check_shape(name, mask, (batch, tokens), (1, tokens), dtypes=(torch.bool,))
    return mask.expand(batch, tokens)


def check_layout(name: str, layout: BlockLayout, x: Tensor) -> None:
    """Raise ValueError when activations (B, L, H, D) do not sit in the layout."""
    if x.dim() != 4 or x.shape[1] != layout.tokens:
        raise ValueError(f"{name} is {tuple(x.shape)}, its layout has {layout.tokens} tokens; use (B, L, H, D)")
    index = index_of(layout)
    if index is not None and (index.shape[0] not in (1, x.shape[0]) or index.shape[1] not in (1, x.shape[2])):
        raise ValueError(f"{name} is {tuple(x.shape)}, its layout's index {tuple(index.shape)}; use (B|1, H|1, slots)")


def check_rule(rule: Rule, batch: int, heads: int, query_layout: BlockLayout, key_layout: BlockLayout) -> None:
    """Raise ValueError when a rule does not fit the batch, the heads and the blocks."""
    nq, nk = query_layout.blocks, key_layout.blocks
    for name, x, blocks in (("forced_rows", rule.forced_rows, nq), ("forced_columns", rule.forced_columns_map(), nk)):
        if x is not None:
            check_shape(f"Rule: {name}", x, (blocks,), *((b, h, blocks) for b in (1, batch) for h in (1, heads)),
                        dtypes=(torch.bool,))
    amount = rule.amount
    if isinstance(amount, Tensor):
        fits = amount.dim() <= 4 and all(n in (1, most) for n, most in zip(
            reversed(amount.shape), (1, nq, heads, batch), strict=False))
        if not fits:
            raise ValueError(f"Rule: amount is {tuple(amount.shape)}; it must broadcast to {(batch, heads, nq, 1)}")
    if (rule.own or rule.near) and query_layout.blocks != key_layout.blocks:
        asked = "own=True" if rule.own else f"near={rule.near}"
        raise ValueError(f"Rule: {asked} needs as many query as key blocks, not "
                         f"{query_layout.blocks} and {key_layout.blocks}")


def index_of(layout: BlockLayout) -> Tensor | None:
    """The layout's order as int64 (B|1, H|1, slots), or None for the model's own."""
    index = layout.index
    return index if index is None or index.dim() == 3 else index[None, None]
