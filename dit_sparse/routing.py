"""`route`: from activations to the block mask of a call, by Triton kernels where they can run, else in plain PyTorch.

Neither path waits for the device, and neither holds more than a chunk of the scores at a time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from . import scoring
from .blockmask import BlockLayout, BlockMask
from .kernels.attention import block_sparse_attention, switched_off, triton_reasons
from .routing_checks import check_layout, check_mask, check_pair, check_rule, check_shape, index_of
from .selection import Rule

__all__ = ["Rule", "block_mass", "kernel_reasons", "listed_mass", "lists_by_chunks", "lists_of_maps",
           "lists_of_scores", "plain_calls", "pool", "pool_moments", "route", "route_means", "row_errors", "state"]

_SWITCH = "DIT_SPARSE_ROUTING"
_MAX_HEAD_DIM = 128  # of the values; `triton_reasons` tests that of the keys
_MAX_KEY_BLOCKS = 8192  # a row of scores lies in the registers of one program

# Why calls that were to use the kernels took the plain path, counted.
plain_calls: Counter[str] = Counter()


def kernel_reasons(x: Tensor, key_blocks: int = 0) -> list[str]:
    """Why the routing kernels cannot take these activations, in words; empty when they can.

    Args:
        x: (B, L, H, D).
        key_blocks: number of key blocks.
    """
    reasons = triton_reasons(x, x, x)
    if key_blocks > _MAX_KEY_BLOCKS:
        reasons.append(f"{key_blocks} key blocks are more than {_MAX_KEY_BLOCKS}")
    return reasons


def state() -> tuple[bool, str]:
    """Whether the kernels run by themselves on this machine's GPU, and in words what does."""
    x = torch.empty(1, 0, 1, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    if reasons := kernel_reasons(x):
        return False, f"masks are made in plain PyTorch: {reasons[0]}"
    if switched_off(_SWITCH):
        return False, f"switched off by {_SWITCH}={os.environ[_SWITCH]}: masks are made in plain PyTorch"
    return True, "Triton kernels make the masks"


def _use_kernels(x: Tensor, key_blocks: int, kernels: bool | None, *others: Tensor, also: str = "") -> bool:
    """Whether this call takes the kernels.

    Args:
        x, key_blocks: as in `kernel_reasons`.
        kernels: True: yes, or ValueError; False: no; None: on a GPU, if they can and are not switched off.
        others: more activations that they must be able to take.
        also: one more reason why they cannot.
    """
    if kernels is None:
        if x.device.type != "cuda" or switched_off(_SWITCH):
            return False
    elif not kernels:
        return False
    found = [reason for y in (x, *others) for reason in kernel_reasons(y, key_blocks)] + ([also] if also else [])
    reasons = list(dict.fromkeys(found))
    if reasons and kernels:
        raise ValueError(f"kernels=True: the routing kernels cannot run this call: {'; '.join(reasons)}")
    if reasons:
        plain_calls["; ".join(reasons)] += 1
    return not reasons


def pool(x: Tensor, layout: BlockLayout, *, mask: Tensor | None = None, kernels: bool | None = None) -> Tensor:
    """Mean of the real tokens of every block: `scoring.pool`, or its kernel.

    Args:
        x, layout, mask: as in `scoring.pool`.
        kernels: as in `route`.

    Returns:
        float32 (B, H, n, D).
    """
    check_layout("pool: x", layout, x)
    mask = check_mask("pool: mask", mask, x.shape[0], x.shape[1])
    if not _use_kernels(x, 0, kernels):
        return scoring.pool(x, layout, mask=mask)
    from .kernels.pooling import pool_triton

    return pool_triton(x, index_of(layout), layout.block_size, layout.blocks, mask)


def pool_moments(
    x: Tensor, layout: BlockLayout, *, mask: Tensor | None = None, kernels: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of the real tokens of every block, and the mean of their squared norms, from one reading by the kernel.

    Args:
        x, layout, mask, kernels: as in `pool`.

    Returns:
        float32 (B, H, n, D) and (B, H, n); zeros for a block without real tokens.
    """
    check_layout("pool_moments: x", layout, x)
    mask = check_mask("pool_moments: mask", mask, x.shape[0], x.shape[1])
    if not _use_kernels(x, 0, kernels):
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()
        return scoring.pool(x, layout, mask=mask), scoring.pool(squares, layout, mask=mask)[..., 0]
    from .kernels.pooling import pool_triton

    squares = torch.empty(x.shape[0], x.shape[2], layout.blocks, dtype=torch.float32, device=x.device)
    return pool_triton(x, index_of(layout), layout.block_size, layout.blocks, mask, squares), squares


def route(
    query: Tensor,
    key: Tensor,
    query_layout: BlockLayout,
    key_layout: BlockLayout,
    scale: float,
    rule: Rule,
    *,
    key_mask: Tensor | None = None,
    max_width: int | None = None,
    kernels: bool | None = None,
) -> BlockMask:
    """The mask that a rule makes of pooled scores: mean query times mean key of every pair of blocks.

    Args:
        query: (B, Lq, H, D); key: (B, Lk, H, D).
        query_layout, key_layout: how they sit in blocks.
        scale: softmax scale.
        rule: which blocks a row of scores keeps.

    Expert args:
        key_mask: bool (B, Lk), True where the key is a real token: others do not enter the means.
        max_width: most blocks that any row keeps, when known. Blocks beyond it would be lost.
        kernels: True: Triton kernels, or ValueError; False: plain PyTorch; None: kernels on a GPU, unless
            DIT_SPARSE_ROUTING=0.

    Returns:
        The mask: lists in rising order, whole blocks first, short ones after. Both paths give the same mask
        unless two scores, or a score and the threshold, lie within rounding of each other (1e-6 of the scores).
    """
    check_pair("route", query, key)
    for name, x, layout in (("query", query, query_layout), ("key", key, key_layout)):
        check_layout(f"route: {name}", layout, x)
    key_mask = check_mask("route: key_mask", key_mask, key.shape[0], key.shape[1])
    check_rule(rule, query.shape[0], query.shape[2], query_layout, key_layout)
    used = _use_kernels(query, key_layout.blocks, kernels, key)
    block_query = pool(query, query_layout, kernels=used)
    block_key = pool(key, key_layout, mask=key_mask, kernels=used)
    return _route(block_query, block_key, query_layout, key_layout, scale, rule, max_width, used)


def route_means(
    block_query: Tensor,
    block_key: Tensor,
    query_layout: BlockLayout,
    key_layout: BlockLayout,
    scale: float,
    rule: Rule,
    *,
    key_weight: Tensor | None = None,
    max_width: int | None = None,
    kernels: bool | None = None,
) -> BlockMask:
    """`route` from means that are there already, for methods that need them for more than this.

    Args:
        block_query: float32 (B, H, nq, D); block_key: float32 (B, H, nk, D), as `pool` makes them.
        query_layout, key_layout, scale, rule: as in `route`.

    Expert args:
        key_weight: float32 (B|1, H|1, nk), added to every score of the key block before the rule looks at it (the log
            of the block's keys, or of their spread); None: nothing.
        max_width, kernels: as in `route`.

    Returns:
        The mask, as `route` makes it.
    """
    B, H, _, D = block_query.shape
    for name, x, layout in (("block_query", block_query, query_layout), ("block_key", block_key, key_layout)):
        check_shape(f"route_means: {name}", x, (B, H, layout.blocks, D), dtypes=(torch.float32,))
    if key_weight is not None:
        nk = key_layout.blocks
        check_shape("route_means: key_weight", key_weight, *((b, h, nk) for b in (1, B) for h in (1, H)),
                    dtypes=(torch.float32,))
    check_rule(rule, B, H, query_layout, key_layout)
    used = _use_kernels(block_query, key_layout.blocks, kernels, block_key)
    return _route(block_query, block_key, query_layout, key_layout, scale, rule, max_width, used, key_weight)


def _route(
    block_query: Tensor, block_key: Tensor, query_layout: BlockLayout, key_layout: BlockLayout, scale: float,
    rule: Rule, max_width: int | None, kernels: bool, key_weight: Tensor | None = None,
) -> BlockMask:
    """The mask from block means, by the kernels or in plain PyTorch."""
    if kernels:
        from .kernels.routing import route_triton

        return _as_mask(route_triton(block_query, block_key, scale, rule, query_layout.lengths, key_layout.lengths,
                                     key_layout.block_size, max_width, key_weight), query_layout, key_layout)

    def chosen(scores: Tensor, heads: slice) -> Tensor:
        if key_weight is not None:
            scores += (key_weight if key_weight.shape[1] == 1 else key_weight[:, heads])[:, :, None]
        return rule.of_heads(heads).keep(scores)

    keep = scoring.select_means(block_query, block_key, scale, chosen)
    return BlockMask.from_dense(keep, query_layout, key_layout, max_width=max_width)


def lists_of_scores(
    scores: Tensor,
    query_layout: BlockLayout,
    key_layout: BlockLayout,
    rule: Rule,
    *,
    max_width: int | None = None,
    kernels: bool | None = None,
) -> BlockMask:
    """The mask that a rule makes of scores that are there already; both paths give exactly the same without softmax.

    Args:
        scores: (B, H, nq, nk), in half precision turned into float32 first.
        query_layout, key_layout, rule, max_width, kernels: as in `route`.
    """
    if scores.dim() != 4 or tuple(scores.shape[2:]) != (query_layout.blocks, key_layout.blocks):
        raise ValueError(f"lists_of_scores: scores is {tuple(scores.shape)}; use (B, H, {query_layout.blocks}, "
                         f"{key_layout.blocks})")
    check_rule(rule, scores.shape[0], scores.shape[1], query_layout, key_layout)
    scores = scores.to(torch.float32) if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if not _use_kernels(scores[..., :0], key_layout.blocks, kernels):
        return BlockMask.from_dense(rule.keep(scores), query_layout, key_layout, max_width=max_width)
    from .kernels.routing import select_triton

    return _as_mask(select_triton(scores, rule, query_layout.lengths, key_layout.lengths, key_layout.block_size,
                                  max_width), query_layout, key_layout)


def lists_by_chunks(
    scores: Callable[[slice], Tensor],
    batch: int,
    heads: int,
    query_layout: BlockLayout,
    key_layout: BlockLayout,
    rule: Rule,
    *,
    kernels: bool | None = None,
) -> BlockMask:
    """`lists_of_scores` where a method makes the scores itself: some heads at a time, never the maps of all of them.

    Args:
        scores: heads -> their scores (B, h, nq, nk).
        batch, heads: B and H.
        query_layout, key_layout, rule, kernels: as in `route`.
    """
    numbers = 4 * batch * query_layout.blocks * key_layout.blocks
    parts = [lists_of_scores(scores(part), query_layout, key_layout, rule.of_heads(part), kernels=kernels)
             for part in scoring.head_chunks(heads, numbers)]
    if len(parts) == 1:
        return parts[0]
    lists, whole, boundary = (torch.cat([getattr(part, name) for part in parts], dim=1)
                              for name in ("lists", "whole", "boundary"))
    mask = BlockMask(lists, whole, boundary, query_layout, key_layout)
    if all("pairs" in part.__dict__ for part in parts):
        mask.__dict__["pairs"] = torch.cat([part.pairs for part in parts], dim=1)
    return mask


def lists_of_maps(
    keep: Callable[[slice], Tensor],
    batch: int,
    heads: int,
    layout: BlockLayout,
    video: int,
    *,
    kernels: bool | None = None,
) -> BlockMask:
    """The mask of the pairs of video blocks that a method keeps, worked out for some heads at a time.

    Text, in the blocks after the video's, is seen by every query and sees everything.

    Args:
        keep: heads -> bool (or 0 and 1) (B, h, video, video), with at least one pair in every row.
        batch, heads: B and H.
        layout: blocks of queries and keys.
        video: how many of them, from the first on, hold video.
        kernels: as in `route`.
    """
    blocks = layout.blocks
    rule = Rule("threshold", 0.5, rows=slice(0, video), columns=slice(0, video))

    def scores(part: slice) -> Tensor:
        chosen = keep(part)
        whole = torch.zeros(*chosen.shape[:2], blocks, blocks, device=chosen.device)
        whole[..., :video, :video] = chosen
        return whole

    return lists_by_chunks(scores, batch, heads, layout, layout, rule, kernels=kernels)


def _as_mask(found: object, query_layout: BlockLayout, key_layout: BlockLayout) -> BlockMask:
    """The mask of a kernel's lists; the kernel counted the pairs on its way."""
    lists, whole, boundary, pairs = (getattr(found, name) for name in ("lists", "whole", "boundary", "pairs"))
    mask = BlockMask(lists, whole, boundary, query_layout, key_layout)
    mask.__dict__["pairs"] = pairs.sum(-1)
    return mask


def row_errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    allowed: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    *,
    kernels: bool | None = None,
) -> Tensor:
    """How far masked attention is from dense attention, on a few query rows: `scoring.row_errors`, or its kernel.

    Args:
        query, key, value, rows, allowed, scale, key_mask: as in `scoring.row_errors`. That rows lie in 0 ... Lq - 1
            is not checked on a device, which would have to wait: others read foreign memory.
        kernels: as in `route`. The kernel's softmax is float32 throughout, so in half precision its numbers are
            nearer to the true ones, and a head whose two errors nearly agree may choose the other candidate.

    Returns:
        float32 (B, H, K).
    """
    wide = f"value head dim {value.shape[-1]} is above {_MAX_HEAD_DIM}" if value.shape[-1] > _MAX_HEAD_DIM else ""
    check_pair("row_errors", query, key)
    if value.dim() != 4 or value.shape[:3] != key.shape[:3] or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise ValueError(f"row_errors: value is {value.dtype} {tuple(value.shape)}, query {query.dtype}, key "
                         f"{key.dtype} {tuple(key.shape)}; use one dtype and (B, Lk, H, Dv)")
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"row_errors: rows is {rows.dtype} {tuple(rows.shape)}; use int64 (R,)")
    check_shape("row_errors: allowed", allowed, (max(1, allowed.shape[0]), rows.shape[0], key.shape[1]),
                dtypes=(torch.bool,))
    key_mask = check_mask("row_errors: key_mask", key_mask, key.shape[0], key.shape[1])
    if not _use_kernels(query, 0, kernels, also=wide):
        return scoring.row_errors(query, key, value, rows, allowed, scale, key_mask)
    from .kernels.sampling import row_errors_triton

    if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < query.shape[1]:
        raise ValueError(f"row_errors: rows must lie in 0 ... {query.shape[1] - 1}")
    return row_errors_triton(query, key, value, rows, allowed, scale, key_mask)


def listed_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: BlockMask,
    scale: float,
    *,
    key_mask: Tensor | None = None,
    per_row: bool = False,
    kernels: bool | None = None,
) -> Tensor:
    """Exact attention mass of the listed blocks, from the log-sum-exp of the rows.

    Args:
        query: (B, Lq, H, D); key: (B, Lk, H, D).
        lse: float32 (B, H, Lq), natural logarithm, of the attention whose mass is asked for (dense, as a rule).
        mask: which blocks; its window is not looked at. `BlockMask.full` asks for all.
        scale: softmax scale.

    Expert args:
        key_mask: bool (B, Lk), True where the key is a real token.
        per_row: add up every query row's mass over its list instead.
        kernels: as in `route`.

    Returns:
        float32 (B, H, nq, width), mean over the real rows of the query block, 0 beyond the lists; or (B, H, Lq)
        with `per_row`. Rows whose LSE is -inf count 0.
    """
    sizes = (mask.query.block_size, mask.key.block_size)
    odd = "" if set(sizes) <= {16, 32, 64, 128} else f"block sizes {sizes} are not among 16, 32, 64, 128"
    check_pair("listed_mass", query, key)
    for name, x, layout in (("query", query, mask.query), ("key", key, mask.key)):
        check_layout(f"listed_mass: {name}", layout, x)
    B, Lq, H, _ = query.shape
    check_shape("listed_mass: lse", lse, (B, H, Lq), dtypes=(torch.float32, torch.float64))
    lists = mask.lists
    check_shape("listed_mass: mask.lists", lists, *((b, h, *lists.shape[2:]) for b in (1, B) for h in (1, H)))
    key_mask = check_mask("listed_mass: key_mask", key_mask, B, key.shape[1])
    mixed = "" if query.dtype == key.dtype else f"query is {query.dtype}, key {key.dtype}"
    if not _use_kernels(query, 0, kernels, key, also="; ".join(filter(None, (odd, mixed)))):
        return scoring.listed_mass(query, key, lse, mask, scale, key_mask=key_mask, per_row=per_row)
    from .kernels.blocks import Blocks
    from .kernels.mass import listed_mass_triton

    return listed_mass_triton(query, key, lse, Blocks.from_mask(mask, key_mask), scale, per_row=per_row)


def block_mass(
    query: Tensor,
    key: Tensor,
    query_layout: BlockLayout,
    key_layout: BlockLayout,
    scale: float,
    *,
    key_mask: Tensor | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Exact attention mass of every pair of blocks: `scoring.block_mass`, or two passes of kernels (LSE, then mass).

    Args:
        query, key, query_layout, key_layout, scale, key_mask: as in `scoring.block_mass`.
        kernels: as in `route`.

    Returns:
        float32 (B, H, nq, nk): for some heads at a time, see `lists_by_chunks`.
    """
    sizes = (query_layout.block_size, key_layout.block_size)
    odd = "" if set(sizes) <= {16, 32, 64, 128} else f"block sizes {sizes} are not among 16, 32, 64, 128"
    check_pair("block_mass", query, key)
    for name, x, layout in (("query", query, query_layout), ("key", key, key_layout)):
        check_layout(f"block_mass: {name}", layout, x)
    key_mask = check_mask("block_mass: key_mask", key_mask, key.shape[0], key.shape[1])
    if not _use_kernels(query, 0, kernels, key, also=odd):
        return scoring.block_mass(query, key, query_layout, key_layout, scale, key_mask=key_mask)
    every = BlockMask.full(query_layout, key_layout)
    # The LSE does not depend on the values: the keys serve as well.
    _, lse = block_sparse_attention(query, key, key, every, scale=scale, key_mask=key_mask)
    mass = listed_mass(query, key, lse, every, scale, key_mask=key_mask, kernels=True)
    # Short blocks come last in the lists.
    return torch.zeros_like(mass).scatter_(-1, every.lists.to(torch.int64).expand_as(mass), mass)
