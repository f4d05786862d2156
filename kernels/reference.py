"""The twins: attention written as its formula, in float32 or float64; the specification and the test oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.blockmask import BlockMask


class HasTokenMask(Protocol):
    """Anything that can write itself out as a mask over tokens: a `BlockMask`, or the operator's own `Blocks`."""

    def token_mask(self) -> Tensor:
        """bool (B|1, H|1, Lq, Lk), True where the query sees the key, in token order."""


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key.T, over the allowed keys) @ value, and the log of the softmax's denominator.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D). value: (B, Lk, H, Dv).
        token_mask: bool that broadcasts to (B, H, Lq, Lk), True where the query sees the key; None: everywhere.
        scale: factor of the scores; None: 1 / sqrt(D).
        key_mask: bool (B, Lk), True where the key is a real token; None: all are.
        dtype: precision of the computation, float32 or float64.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype (float64 when computed so), and the natural-log LSE (B, H, Lq), in
        `dtype`. Queries without a key give 0 and -inf.
    """
    allowed = torch.ones(1, 1, 1, key.shape[1], dtype=torch.bool, device=query.device)
    if token_mask is not None:
        allowed = allowed & token_mask
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
        value = torch.where(key_mask[..., None, None], value, 0)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    # (B, H, Lq, Lk)
    scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1)
    # A query without a key has lse = -inf: subtract 0 there, so that its weights are exp(-inf) = 0.
    weights = (scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()
    out = (weights @ v).transpose(1, 2)
    return out.to(query.dtype if dtype == torch.float32 else dtype), lse


def block_sparse_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: HasTokenMask,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`attention_reference` over the pairs that a block mask allows.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D). value: (B, Lk, H, Dv).
        mask: the block mask.
        scale, key_mask, dtype: as in `attention_reference`.

    Returns:
        out (B, Lq, H, Dv) and LSE (B, H, Lq).
    """
    return attention_reference(query, key, value, mask.token_mask(), scale, key_mask, dtype=dtype)


def soft_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """One softmax over the keys that a query sees and, for every block that its own block does not list, one entry.

    The entry is the block's mean key with log(keys in the block) added to its score, and the block's mean value.
    Source: Sol-Attn, arXiv 2607.24027.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D). value: (B, Lk, H, Dv).
        mask: the block mask.
        scale, key_mask, dtype: as in `attention_reference`.

    Returns:
        out (B, Lq, H, Dv) and LSE (B, H, Lq), as in `attention_reference`. Queries with neither give 0 and -inf.
    """
    B, Lk, H, D = key.shape
    scale = D**-0.5 if scale is None else scale
    real = torch.ones(B, Lk, dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, *(x.where(real[..., None, None], 0) for x in (key, value))))

    # Means of the blocks' real keys and values: (B, H, nk, D) and (B, H, nk, Dv)
    block_of_key = mask.key.block_of_token.expand(B, H, Lk)
    every_block = torch.arange(mask.key.blocks, device=key.device)[:, None]
    member = (block_of_key[:, :, None] == every_block) & real[:, None, None]
    count = member.sum(-1).to(dtype)
    mean_k, mean_v = (member.to(dtype) @ x / count.clamp(min=1)[..., None] for x in (k, v))

    # Which keys a query sees, (B|1, H|1, Lq, Lk), and which blocks are one entry for it, (B, H, Lq, nk)
    seen = mask.token_mask() & real[:, None, None]
    block_of_query = mask.query.block_of_token.expand(B, H, -1)[..., None].expand(-1, -1, -1, mask.key.blocks)
    soft = ~mask.to_dense().expand(B, H, -1, -1).gather(2, block_of_query)

    hard_scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    soft_scores = (q @ mean_k.mT * scale + count.log()[:, :, None]).masked_fill(~soft, -torch.inf)
    scores = torch.cat([hard_scores, soft_scores], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()
    out = (weights @ torch.cat([v, mean_v], -2)).transpose(1, 2)
    return out.to(query.dtype if dtype == torch.float32 else dtype), lse


def skip_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    threshold: float,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    *,
    first: str = "own",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax over the listed blocks, without those whose scores lie too far below the running maximum.

    Source: BLASST, arXiv 2512.12087: block j is left out when max_j < m + log(threshold) for every row, with m the
    row's maximum over the blocks visited before.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D). value: (B, Lk, H, Dv).
        mask: the block mask; its lists are visited whole blocks first.
        threshold: lambda, in [0, 1].
        scale, key_mask, dtype: as in `attention_reference`.
        first: "list": whole blocks in list order; "own": the same order turned so that the query block's own, or the
            next one behind it, comes first.

    Returns:
        out (B, Lq, H, Dv) and LSE (B, H, Lq), as in `attention_reference`, and bool (B, H, nq, width): which list
        entries were left out.
    """
    B, Lq, H, D = query.shape
    scale = D**-0.5 if scale is None else scale
    bound = math.log(threshold) if threshold > 0 else -math.inf
    real = torch.ones(B, key.shape[1], dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, *(x.where(real[..., None, None], 0) for x in (key, value))))
    seen = (mask.token_mask() & real[:, None, None]).expand(B, H, -1, -1)
    tokens = [x.token_of_slot.expand(B, H, -1).unflatten(-1, (-1, x.block_size)) for x in (mask.query, mask.key)]
    lists, whole, work = (x.expand(B, H, *x.shape[2:]) for x in (mask.lists, mask.whole, mask.work()))
    out, lse = torch.zeros(B, H, Lq, v.shape[-1], dtype=dtype), torch.full((B, H, Lq), -torch.inf, dtype=dtype)
    skipped = torch.zeros(lists.shape, dtype=torch.bool)
    for b, h, i in itertools.product(range(B), range(H), range(lists.shape[2])):
        rows = tokens[0][b, h, i]
        rows = rows[rows >= 0]
        top = torch.full((len(rows),), -torch.inf, dtype=dtype)
        total, acc = torch.zeros_like(top), torch.zeros(len(rows), v.shape[-1], dtype=dtype)
        order, n = list(range(int(work[b, h, i]))), int(whole[b, h, i])
        if first == "own":
            own = i * mask.query.block_size // mask.key.block_size
            behind = [p for p in order[:n] if int(lists[b, h, i, p]) >= own]
            order = behind + [p for p in order[:n] if p not in behind] + order[n:]
        for place in order:
            columns = tokens[1][b, h, int(lists[b, h, i, place])]
            columns = columns[columns >= 0]
            score = (q[b, h, rows] @ k[b, h, columns].T * scale).masked_fill(~seen[b, h][rows][:, columns], -torch.inf)
            tile_top = score.amax(-1)
            if bool((tile_top < top + bound).all()):
                skipped[b, h, i, place] = True
                continue
            new_top = torch.maximum(top, tile_top)
            safe = torch.where(new_top == -torch.inf, 0, new_top)
            weight, shrink = (score - safe[:, None]).exp(), (top - safe).exp()
            total, acc = total * shrink + weight.sum(-1), acc * shrink[:, None] + weight @ v[b, h, columns]
            top = new_top
        out[b, h, rows], lse[b, h, rows] = acc / torch.where(total == 0, 1, total)[:, None], top + total.log()
    return out.transpose(1, 2).to(query.dtype if dtype == torch.float32 else dtype), lse, skipped


def merge_by_lse(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the attention over each set.

    out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).

    Args:
        parts: pairs of out (B, L, H, Dv) and lse (B, H, L).

    Returns:
        out (B, L, H, Dv) in the dtype of the first part and lse (B, H, L). Queries without a key give 0 and -inf.

    Raises:
        ValueError: when there are no parts.
    """
    if not parts:
        raise ValueError("merge_by_lse: parts is empty; give at least one (out, lse)")
    every = torch.stack([lse for _, lse in parts])
    lse = every.logsumexp(0)
    # (parts, B, L, H, 1)
    weights = (every - torch.where(lse == -torch.inf, 0, lse)).exp().transpose(-1, -2)[..., None]
    out = sum(weight * out.to(weight.dtype) for weight, (out, _) in zip(weights, parts, strict=True))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), lse
