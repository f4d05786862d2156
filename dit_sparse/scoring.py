"""What ranks key blocks for a query block: pooled scores, sampled rows, and the exact attention mass (the oracle).

All results are float32. Activations are (B, L, H, D); padding slots of a layout are never read into a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .blocklayout import BlockLayout
from .blockmask import BlockMask

_NUMBERS_AT_ONCE = 2**26  # float32 numbers of a temporary: 256 MB


def head_chunks(heads: int, numbers_per_head: int) -> Iterator[slice]:
    """Slices of heads whose temporaries, of so many float32 numbers per head, stay near 256 MB."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, numbers_per_head))
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens at the index; zeros where it is -1.

    Args:
        x: (B, L, H, D).
        index: int64 (n,), or (B|1, H|1, n) for tokens per head.

    Returns:
        (B, n, H, D).
    """
    batch, _, heads, dim = x.shape
    token = index.clamp(min=0)
    if index.dim() == 1:
        return x.index_select(1, token).masked_fill_((index < 0)[:, None, None], 0)
    token = token.expand(batch, heads, -1).transpose(1, 2)[..., None]
    padding = (index < 0).expand(batch, heads, -1).transpose(1, 2)[..., None]
    return x.gather(1, token.expand(-1, -1, -1, dim)).masked_fill_(padding, 0)


def to_slots(x: Tensor, layout: BlockLayout) -> Tensor:
    """The tokens in slot order, zeros at padding: (B, L, H, D) -> (B, slots, H, D)."""
    return gather_tokens(x, layout.token_of_slot)


def _block_sums(x: Tensor, layout: BlockLayout) -> Tensor:
    """Sum of every block's tokens: (B, L, H, D) -> float32 (B, n, H, D)."""
    size = layout.block_size
    if layout.index is None:
        full = layout.tokens // size
        sums = [x[:, : full * size].unflatten(1, (full, size)).sum(2, dtype=torch.float32)] if full else []
        if layout.tokens % size:
            sums.append(x[:, full * size :].sum(1, keepdim=True, dtype=torch.float32))
        return torch.cat(sums, dim=1)
    step = max(1, _NUMBERS_AT_ONCE // (size * x[:, 0].numel())) * size
    parts = layout.index.split(step, dim=-1)
    return torch.cat([gather_tokens(x, p).unflatten(1, (-1, size)).sum(2, dtype=torch.float32) for p in parts], dim=1)


def pool(x: Tensor, layout: BlockLayout, *, mask: Tensor | None = None) -> Tensor:
    """Mean of the real tokens of every block.

    Args:
        x: (B, L, H, D).
        layout: how the L tokens sit in blocks.
        mask: bool (B, L), True where the token is real, or None when all are.

    Returns:
        float32 (B, H, n, D); zeros for a block without real tokens.
    """
    if x.shape[1] != layout.tokens:
        raise ValueError(f"pool: x has {x.shape[1]} tokens, the layout {layout.tokens}")
    counts = layout.lengths[:, None, None]
    if mask is not None:
        x = x.masked_fill(~mask[..., None, None], 0)
        ones = mask[..., None, None].to(torch.float32).expand(-1, -1, x.shape[2], 1)
        counts = _block_sums(ones, layout)
    return (_block_sums(x, layout) / counts.clamp(min=1)).transpose(1, 2)


def keys_held(layout: BlockLayout, key_mask: Tensor | None) -> Tensor:
    """Real keys of every block: float32 (B|1, H|1, blocks).

    Args:
        layout: how the keys sit in blocks.
        key_mask: bool (B, L), True where the key is a real token, or None when all are.
    """
    if key_mask is None:
        return layout.lengths.to(torch.float32)[None, None]
    heads = 1 if layout.index is None or layout.index.dim() == 1 else layout.index.shape[1]
    ones = key_mask[..., None, None].to(torch.float32).expand(-1, -1, heads, -1)
    return _block_sums(ones, layout).transpose(1, 2)[..., 0]


def mean_deviation(x: Tensor, layout: BlockLayout, mean: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean distance of a block's real tokens from their mean, channel by channel; some blocks at a time.

    Args:
        x: (B, L, H, D).
        layout: how the L tokens sit in blocks.
        mean: float32 (B, H, n, D), from `pool` with the same mask.
        mask: as in `pool`.

    Returns:
        float32 (B, H, n, D); zeros for a block without real tokens.
    """
    size, heads = layout.block_size, x.shape[2]
    ones = x.new_ones(1, 1, 1, 1) if mask is None else mask[..., None, None].to(x.dtype)
    if mask is not None:
        x = x.masked_fill(~mask[..., None, None], 0)
    ones = ones.expand(x.shape[0], x.shape[1], heads, 1)
    step = max(1, _NUMBERS_AT_ONCE // (4 * size * x[:, 0].numel()))
    parts = []
    for start in range(0, layout.blocks, step):
        slots = layout.token_of_slot[..., start * size : (start + step) * size]
        tokens, real = (gather_tokens(y, slots).unflatten(1, (-1, size)) for y in (x, ones))
        centre = mean[:, :, start : start + step].transpose(1, 2)[:, :, None]
        distance = (tokens.to(torch.float32) - centre).abs_().mul_(real)
        parts.append(distance.sum(2) / real.sum(2, dtype=torch.float32).clamp(min=1))
    return torch.cat(parts, dim=1).transpose(1, 2)


def pooled_scores(
    query: Tensor,
    key: Tensor,
    query_layout: BlockLayout,
    key_layout: BlockLayout,
    scale: float,
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Mean query times mean key of every pair of blocks, times the softmax scale.

    Args:
        query: (B, Lq, H, D); key: (B, Lk, H, D).
        query_layout, key_layout: how they sit in blocks.
        scale: softmax scale.
        key_mask: bool (B, Lk), True where the key is a real token.

    Returns:
        float32 (B, H, nq, nk): for one head chunk at a time, see `select_means`.
    """
    block_query = pool(query, query_layout) * scale
    return block_query @ pool(key, key_layout, mask=key_mask).transpose(-1, -2)


def select_means(
    block_query: Tensor, block_key: Tensor, scale: float, select: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """Pooled scores turned into a keep map, chunk of heads by chunk of heads.

    Args:
        block_query: float32 (B, H, nq, D); block_key: float32 (B, H, nk, D), block means from `pool`.
        scale: softmax scale.
        select: float32 (B, h, nq, nk) scores of h heads, and which heads they are -> bool of the same shape.

    Returns:
        bool (B, H, nq, nk).
    """
    batch, heads, nq, _ = block_query.shape
    block_query, block_key = block_query * scale, block_key.transpose(-1, -2)
    chunks = head_chunks(heads, 4 * batch * nq * block_key.shape[-1])
    return torch.cat([select(block_query[:, part] @ block_key[:, part], part) for part in chunks], dim=1)


def pooled_moments(
    block_query: Tensor, block_key: Tensor, scale: float, *, real: Tensor | None = None, diagonal: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and variance of every row of pooled scores, without making the scores.

    The scores of a row are scale q.k_j, so their mean is scale q.mean(k) and their variance scale^2 q^T C q, with C the
    covariance of the mean keys. Source: Sol-Attn, arXiv 2607.24027.

    Args:
        block_query: float32 (B, H, nq, D); block_key: float32 (B, H, nk, D).
        scale: softmax scale.
        real: bool, (nk,) or (B|1, H|1, nk): key blocks that hold keys; the others do not count. None: all.
        diagonal: only the diagonal of C, which takes channels for uncorrelated: D numbers of a head instead of D x D.

    Returns:
        Mean and variance over the row (population, not sample), float32 (B, H, nq, 1) each.
    """
    weight = torch.ones(1, 1, block_key.shape[2], 1, device=block_key.device, dtype=block_key.dtype)
    if real is not None:
        weight = real.reshape(*[1] * (3 - real.dim()), *real.shape)[..., None].to(block_key.dtype)
    weight = weight / weight.sum(2, keepdim=True).clamp(min=1)
    centre = (weight * block_key).sum(2, keepdim=True)
    spread = block_key - centre
    if diagonal:
        variance = block_query.square() @ (weight * spread.square()).sum(2)[..., None]
    else:
        covariance = spread.transpose(-1, -2) @ (weight * spread)
        variance = ((block_query @ covariance) * block_query).sum(-1, keepdim=True)
    return block_query @ centre.transpose(-1, -2) * scale, variance * scale**2


def sampled_row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    rows: Tensor,
    scale: float,
    *,
    allowed: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a few query rows to all keys; for many heads call it per `head_chunks`.

    The products run in the activations' dtype, as attention itself does; the softmax in float32.

    Args:
        query: (B, Lq, H, D); key: (B, Lk, H, D); value: (B, Lk, H, Dv), or None when no output is wanted.
        rows: int64 (R,), query tokens, or (B|1, H|1, R) for rows per head.
        scale: softmax scale.
        allowed: bool that broadcasts to (B, H, R, Lk): softmax over these keys only.
        key_mask: bool (B, Lk), True where the key is a real token.

    Returns:
        Probabilities, float32 (B, H, R, Lk), all zero for a row without a key; and outputs, float32
        (B, H, R, Dv), or None.
    """
    if key_mask is not None:
        real = key_mask[:, None, None, :]
        allowed = real if allowed is None else allowed & real
    # [B, H, R, D] x [B, H, D, Lk]
    logits = (gather_tokens(query, rows).transpose(1, 2) @ key.permute(0, 2, 3, 1)).to(torch.float32) * scale
    if allowed is not None:
        logits = logits.masked_fill_(~allowed, float("-inf"))
    probs = logits.softmax(-1)
    if allowed is not None:
        probs = probs.masked_fill_(~allowed, 0)  # also rows without a key, where softmax gives NaN
    if value is None:
        return probs, None
    if key_mask is not None:
        value = value.masked_fill(~key_mask[..., None, None], 0)
    return probs, (probs.to(value.dtype) @ value.transpose(1, 2)).to(torch.float32)


def row_errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    allowed: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """How far masked attention is from dense attention, on a few query rows.

    Args:
        query, key, value: (B, L, H, D).
        rows: int64 (R,), query tokens.
        allowed: bool (K, R, L), the candidates' masks for these rows.
        scale: softmax scale.
        key_mask: bool (B, L), True where the key is a real token, or None.

    Returns:
        float32 (B, H, K), mean squared difference over rows and channels; the output of a row without a key is 0.
    """
    batch, tokens, heads, _ = query.shape
    sampled = query[:, rows] * scale
    lowest = torch.finfo(query.dtype).min
    found = []
    for b in range(batch):
        parts = []
        for chunk in head_chunks(heads, 4 * len(rows) * tokens):
            # [h, R, D] x [h, D, L]; strided views of one batch element, so that nothing is copied
            logits = sampled[b, :, chunk].transpose(0, 1) @ key[b, :, chunk].permute(1, 2, 0)
            values = value[b, :, chunk].transpose(0, 1)
            if key_mask is not None:
                logits.masked_fill_(~key_mask[b], float("-inf"))
                values = values.masked_fill(~key_mask[b, :, None], 0)  # 0 x NaN would be NaN

            # A row without a key: exp(-inf) = 0
            weights = (logits - logits.amax(-1, keepdim=True).clamp_(min=lowest)).exp_()

            def output(part: Tensor, values: Tensor = values) -> Tensor:
                # A candidate may lie so far below the row's maximum that nothing of it is left: output 0.
                mass = part.sum(-1, keepdim=True, dtype=torch.float32).clamp_(min=1e-30)
                return (part @ values).to(torch.float32) / mass

            dense = output(weights)
            errors = [(output(weights * m) - dense).square().mean((1, 2)) for m in allowed]
            parts.append(torch.stack(errors, dim=-1))
        found.append(torch.cat(parts))
    return torch.stack(found)


def block_mass(
    query: Tensor,
    key: Tensor,
    query_layout: BlockLayout,
    key_layout: BlockLayout,
    scale: float,
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Exact attention mass of every pair of blocks: the share of the softmax that a query block's rows put on it.

    The oracle that scores are judged by; computed in float32, a few query blocks of one head at a time.

    Args:
        query, key, query_layout, key_layout, scale, key_mask: as in `pooled_scores`.

    Returns:
        float32 (B, H, nq, nk), mean over the real rows of the query block; every row sums to 1.
    """
    batch, heads = query.shape[0], query.shape[2]
    nq, nk, size = query_layout.blocks, key_layout.blocks, query_layout.block_size
    real = real_keys(key_layout, batch, key_mask)
    counts = query_layout.lengths.clamp(min=1)[:, None]
    mass = torch.empty(batch, heads, nq, nk, device=query.device)
    step = max(1, _NUMBERS_AT_ONCE // (batch * size * key_layout.slots))
    for head in range(heads):
        one = slice(head, head + 1)
        rows = to_slots(query[:, :, one], _head(query_layout, head))[:, :, 0].to(torch.float32) * scale
        keys = to_slots(key[:, :, one], _head(key_layout, head))[:, :, 0].to(torch.float32)
        hidden = ~real[:, head if real.shape[1] > 1 else 0, None]
        for start in range(0, nq, step):
            slots = slice(start * size, min(start + step, nq) * size)
            logits = (rows[:, slots] @ keys.transpose(1, 2)).masked_fill_(hidden, float("-inf"))
            # [B, rows, key slots] -> [B, rows, nk], rows of padding left out of the mean
            shares = logits.softmax(-1).unflatten(-1, (nk, -1)).sum(-1)
            shares = shares * query_layout.real[slots, None]
            blocks = slice(start, start + step)
            mass[:, head, blocks] = shares.unflatten(1, (-1, size)).sum(2) / counts[blocks]
    return mass


def listed_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: BlockMask,
    scale: float,
    *,
    key_mask: Tensor | None = None,
    per_row: bool = False,
) -> Tensor:
    """Exact attention mass of the listed blocks from the rows' log-sum-exp: the twin of the kernel, for small sizes.

    Args:
        query, key, lse, mask, scale, key_mask, per_row: as in `routing.listed_mass`.

    Returns:
        float32 (B, H, nq, width), or (B, H, Lq) with `per_row`.
    """
    batch, heads, layout = query.shape[0], query.shape[2], mask.query
    lists, work = (x.expand(batch, heads, *x.shape[2:]) for x in (mask.lists, mask.work()))
    real = real_keys(mask.key, batch, key_mask).expand(batch, heads, -1)
    listed = torch.arange(lists.shape[-1], device=lists.device) < work[..., None]
    mass = torch.empty(listed.shape, device=query.device)
    rows = torch.empty(lse.shape, device=query.device)
    for head in range(heads):
        one = slice(head, head + 1)
        queries, keys = (to_slots(x[:, :, one], _head(y, head))[:, :, 0].to(torch.float32)
                         for x, y in ((query, layout), (key, mask.key)))
        # A row without a key: nothing is left of exp(x - inf)
        total = lse[:, head].masked_fill(lse[:, head] == -torch.inf, torch.inf)
        total = to_slots(total[..., None, None], _head(layout, head))[:, :, 0]
        weights = (queries @ keys.transpose(1, 2) * scale - total).exp() * layout.real[:, None]
        # [B, query slots, key slots] -> [B, query slots, nk] -> [B, nq, block, nk]
        weights = weights.masked_fill(~real[:, head, None], 0)
        held = weights.unflatten(-1, (mask.key.blocks, -1)).sum(-1).unflatten(1, (layout.blocks, -1))
        chosen = held.gather(-1, lists[:, head, :, None].expand(-1, -1, held.shape[2], -1).long())
        chosen = chosen.masked_fill(~listed[:, head, :, None], 0)
        mass[:, head] = chosen.sum(2) / layout.lengths.clamp(min=1)[:, None]
        place = layout.slot_of_token if layout.index is None else _head(layout, head).slot_of_token
        rows[:, head] = chosen.sum(-1).flatten(1).gather(1, place.reshape(-1, layout.tokens).expand(batch, -1))
    return rows if per_row else mass


def real_keys(layout: BlockLayout, batch: int, key_mask: Tensor | None) -> Tensor:
    """bool (B, H|1, slots): True where the slot holds a key that the mask allows."""
    real = layout.real.expand(batch, 1, -1)
    if key_mask is None:
        return real
    index = layout.token_of_slot.clamp(min=0)
    index = index.expand(batch, *index.shape[-2:] if index.dim() == 3 else (1, -1))
    return real & key_mask[:, None].expand(-1, index.shape[1], -1).gather(-1, index)


def _head(layout: BlockLayout, head: int) -> BlockLayout:
    """The layout as one head sees it."""
    if layout.index is None or layout.index.dim() == 1 or layout.index.shape[1] == 1:
        return layout
    return BlockLayout(layout.block_size, layout.tokens, layout.index[:, head : head + 1], layout.lengths)
