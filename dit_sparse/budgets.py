"""What a few query rows lose at each of several budgets of key blocks: by a kernel where it can run, else in PyTorch.

Every row attends to all keys once. From the mass and the output of each key block by itself, sums over blocks give the
row's output at every budget. Neither path waits for the device, and both take some heads at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blockmask import BlockLayout
from .routing import _MAX_HEAD_DIM, _use_kernels
from .routing_checks import check_layout, check_mask, check_pair, check_shape, index_of
from .scoring import gather_tokens, head_chunks, real_keys, to_slots

__all__ = ["budget_errors"]

_LEAST = 1e-30  # of a row's mass
_MOST_BUDGETS = 16  # the kernel's


def budget_errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    layout: BlockLayout,
    left: Tensor,
    budgets: int,
    scale: float,
    *,
    entry: Tensor | None = None,
    mean_value: Tensor | None = None,
    key_mask: Tensor | None = None,
    kernels: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared error of the sampled rows' outputs at every budget, and the squared norm of their dense outputs.

    Args:
        query: (B, Lq, H, D). key: (B, L, H, D). value: (B, L, H, Dv).
        rows: int64 (R,), query tokens. That they lie in 0 ... Lq - 1 is the caller's to see to.
        layout: how the keys sit in blocks.
        left: int32 (B, H, R, blocks), how many of the budgets, rising ones, leave the block out; at most budgets - 1.
        budgets: how many.
        scale: softmax scale.

    Expert args:
        entry: float32 (B, H, R, blocks), natural log of the mass that a block has when it is left out (as a soft
            block), -inf for none; with mean_value float32 (B, H, blocks, Dv), the value it then has. None: nothing is
            left of it.
        key_mask: bool (B, L), True where the token is real, for keys and rows; None: all are.
        kernels: as in `routing.route`. The kernel's softmax is float32 throughout, the plain path's products are
            rounded to the dtype of the activations before it.

    Returns:
        float32 (B, H, R, budgets), 0 at the last one, and (B, H, R); rows of padding count 0.
    """
    check_pair("budget_errors", query, key)
    check_layout("budget_errors: key", layout, key)
    B, L, H, _ = key.shape
    R, n = rows.shape[0], layout.blocks
    if value.dim() != 4 or value.shape[:3] != key.shape[:3] or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise ValueError(f"budget_errors: value is {value.dtype} {tuple(value.shape)}, query {query.dtype}, key "
                         f"{key.dtype} {tuple(key.shape)}; use one dtype and (B, L, H, Dv)")
    check_shape("budget_errors: left", left, (B, H, R, n), dtypes=(torch.int32,))
    if (entry is None) != (mean_value is None):
        raise ValueError("budget_errors: entry and mean_value belong together; give both or neither")
    if entry is not None and mean_value is not None:
        check_shape("budget_errors: entry", entry, (B, H, R, n), dtypes=(torch.float32,))
        check_shape("budget_errors: mean_value", mean_value, (B, H, n, value.shape[3]), dtypes=(torch.float32,))
    key_mask = check_mask("budget_errors: key_mask", key_mask, B, L)
    if not _use_kernels(query, n, kernels, also=_refused(value, layout, budgets)):
        return _plain(query, key, value, rows, layout, left, budgets, scale, entry, mean_value, key_mask)
    from .kernels.budgets import budget_errors_triton

    return budget_errors_triton(query, key, value, rows, index_of(layout), layout.block_size, n, left, budgets, scale,
                                entry=entry, mean_value=mean_value, key_mask=key_mask)


def _refused(value: Tensor, layout: BlockLayout, budgets: int) -> str:
    """Why the kernel cannot take these sizes, "" when it can."""
    if value.shape[3] > _MAX_HEAD_DIM:
        return f"value head dim {value.shape[3]} is above {_MAX_HEAD_DIM}"
    if layout.block_size < 16 or layout.block_size & layout.block_size - 1:
        return f"block size {layout.block_size} is not a power of two from 16 on"
    return f"{budgets} budgets are more than {_MOST_BUDGETS}" if budgets > _MOST_BUDGETS else ""


def _plain(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, layout: BlockLayout, left: Tensor, budgets: int,
    scale: float, entry: Tensor | None, mean_value: Tensor | None, key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`budget_errors` in PyTorch."""
    B, _, H, width = query.shape
    R, n, slots = rows.shape[0], layout.blocks, layout.slots
    numbers = R * (3 * slots + 3 * n * width + 3 * n * budgets) + 2 * slots * width
    place = torch.arange(budgets, device=query.device)[:, None]
    errors, norms = [], []
    for heads in head_chunks(H, B * numbers):
        mass, part, lse = _exact(query, key, value, rows, layout, scale, key_mask, heads)
        kept = (left[:, heads, :, None] <= place).to(torch.float32)  # [B, h, R, G, n]
        total = (kept @ mass[..., None])[..., 0]
        out = kept @ part
        if entry is not None and mean_value is not None:
            rest = (1 - kept) * (entry[:, heads] - lse).exp()[..., None, :]
            total = total + rest.sum(-1)
            out = out + (rest.flatten(2, 3) @ mean_value[:, heads]).unflatten(2, rest.shape[2:4])
        out = out / total.clamp(min=_LEAST)[..., None]
        dense = out[..., -1:, :]
        errors.append((out - dense).square().sum(-1))
        norms.append(dense[..., 0, :].square().sum(-1))
    error, norm = torch.cat(errors, dim=1), torch.cat(norms, dim=1)
    if key_mask is not None:  # whatever padding holds
        real = key_mask[:, rows][:, None]
        error, norm = error.masked_fill(~real[..., None], 0), norm.masked_fill(~real, 0)
    return error, norm


def _exact(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, layout: BlockLayout, scale: float,
    key_mask: Tensor | None, heads: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention of the rows by key block: its mass (B, h, R, n), its part of the output (B, h, R, n, Dv), and
    the rows' LSE (B, h, R, 1), float32. The products run in the activations' dtype, the softmax in float32."""
    query = gather_tokens(query[:, :, heads], rows).transpose(1, 2)  # [B, h, R, D]
    real = real_keys(layout, query.shape[0], key_mask)
    if real.shape[1] > 1:
        real = real[:, heads]
    key, value = (to_slots(x[:, :, heads], _of_heads(layout, heads)) for x in (key, value))
    # [B h, R, D] x [B h, D, slots], scaled as it is written
    scores = torch.baddbmm(query.new_zeros(1, 1, 1), query.flatten(0, 1), key.permute(0, 2, 3, 1).flatten(0, 1),
                           beta=0, alpha=scale).unflatten(0, query.shape[:2])
    scores.masked_fill_(~real[:, :, None], -torch.inf)
    top, place = scores.max(-1, keepdim=True)
    weights = scores.softmax(-1, dtype=torch.float32)
    lse = top.to(torch.float32) - weights.gather(-1, place).log()
    weights = weights.unflatten(-1, (layout.blocks, -1))  # [B, h, R, n, block]
    if key_mask is not None:
        value = value.masked_fill(~real.transpose(1, 2)[..., None], 0)  # 0 x NaN would be NaN
    values = value.unflatten(1, (layout.blocks, -1)).permute(0, 3, 1, 2, 4)  # [B, h, n, block, Dv]
    part = weights.transpose(2, 3).to(value.dtype) @ values
    return weights.sum(-1), part.transpose(2, 3).to(torch.float32), lse


def _of_heads(layout: BlockLayout, heads: slice) -> BlockLayout:
    """The layout as some of the heads see it."""
    if layout.index is None or layout.index.dim() == 1 or layout.index.shape[1] == 1:
        return layout
    return BlockLayout(layout.block_size, layout.tokens, layout.index[:, heads], layout.lengths)
