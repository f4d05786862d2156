"""Soft blocks: every key block that a query block does not list enters its softmax as one entry.

The entry has the block's mean key, its mean value, and the weight of as many keys as the block holds, that is log(keys)
added to its score. So the softmax keeps the mass of what is not computed:

    denominator = sum over listed keys  exp(s q.k)     +  sum over other blocks  keys * exp(s q.mean key)
    numerator   = sum over listed keys  exp(s q.k) v   +  sum over other blocks  keys * exp(s q.mean key) * mean value

Source: Sol-Attn, arXiv 2607.24027, and PISA, arXiv 2602.01077. The error is of second order in the spread of a block's
keys in the denominator, always an under-estimate, and of first order in the numerator where values vary in the block.
The twin is `reference.soft_reference`. The Hopper kernel in CUDA C++ computes them beside the listed blocks; into what
other kernels give they are merged. Importing this module needs neither triton nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Blocks, SoftMeans

if TYPE_CHECKING:
    from dit_sparse.blockmask import BlockMask

__all__ = ["SoftMeans", "merge_means", "merge_soft_blocks", "soft_attention", "soft_means", "soft_reasons"]

_NUMBERS_AT_ONCE = 2**24  # scores of the plain path in memory at a time: 64 MB


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    mask: BlockMask,
    *,
    heads: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
    on_backend: Callable[[str], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks' keys and one entry for every other block.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D). value: (B, Lk, H, Dv). Any strides.
        mean_key, mean_value: (B, H, nk, D) and (B, H, nk, Dv), means of each block's real tokens, float32.
        mask: lists, layouts and window, on the device of the query. Keys of a listed block that a window excludes
            are left out altogether.

    Expert args:
        heads: int64 (h,), the heads that have soft blocks, on the device of the query; others drop what they do not
            list. None: all have.
        scale: factor of the scores, positive; None: 1 / sqrt(D).
        key_mask: bool (B, Lk), True where the key is a real token; None: all are. Masked keys count in no block.
        backend, on_backend: of the listed blocks, as in `block_sparse_attention`.

    Returns:
        out (B, Lq, H, Dv) in the query's dtype, and the natural-log LSE (B, H, Lq) in float32, soft entries included.
        Queries with neither a key nor a soft block give 0 and -inf.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or what was asked for cannot run; one line.
    """
    from .attention import block_sparse_attention  # which imports this module

    soft = soft_means(mean_key, mean_value, mask, key_mask, heads)
    return block_sparse_attention(query, key, value, mask, scale=scale, key_mask=key_mask, backend=backend,
                                  on_backend=on_backend, soft=soft)


def soft_means(
    mean_key: Tensor, mean_value: Tensor, mask: BlockMask, key_mask: Tensor | None = None, heads: Tensor | None = None
) -> SoftMeans:
    """The means of all blocks, with how many keys each stands for; arguments as in `soft_attention`."""
    blocks = Blocks.from_mask(mask, key_mask)
    if key_mask is None:
        counts = blocks.key_lengths[None, None]
    else:
        shape = (mean_key.shape[0], mask.key.tokens)
        if key_mask.shape != shape or key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}; use bool {shape}")
        counts = blocks.real_keys(mask.key.tokens).unflatten(-1, (blocks.key_blocks, blocks.key_block)).sum(-1)
    return SoftMeans(mean_key, mean_value, counts, heads)


def merge_soft_blocks(
    query: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    mask: BlockMask,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    kernels: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds one entry for every unlisted block to attention over the listed ones, in place.

    Args:
        query, mean_key, mean_value, mask: as in `soft_attention`.
        out: (B, Lq, H, Dv), attention over the listed blocks; lse: float32 (B, H, Lq), its natural-log LSE, -inf and
            out 0 for rows that list nothing. Both are overwritten.

    Expert args:
        scale, key_mask: as in `soft_attention`.
        kernels: True: the Triton kernel, or ValueError; False: plain PyTorch; None: the kernel on a GPU, if it can.

    Returns:
        `out` and `lse`.

    Raises:
        ValueError: when shapes do not fit, or the kernel asked for cannot run; one line.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    blocks = Blocks.from_mask(mask, key_mask)
    check_means(query, mean_key, mean_value, blocks, mask.query.tokens)
    _check(query, mean_value, out, lse)
    counts = soft_means(mean_key, mean_value, mask, key_mask).counts
    _merge(query, mean_key, mean_value, counts, blocks, out, lse, scale, kernels)
    return out, lse


def merge_means(
    query: Tensor, soft: SoftMeans, blocks: Blocks, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`merge_soft_blocks` for the heads that have soft blocks; out and lse are overwritten."""
    if soft.heads is None:
        _merge(query, soft.key, soft.value, soft.counts, blocks, out, lse, scale)
        return out, lse
    heads = soft.heads
    part = blocks.of_heads(heads)
    query, some = (x.index_select(2, heads) for x in (query, out))
    key, value, some_lse = (x.index_select(1, heads) for x in (soft.key, soft.value, lse))
    counts = soft.counts if soft.counts.shape[1] == 1 else soft.counts.index_select(1, heads)
    _merge(query, key, value, counts, part, some, some_lse, scale)
    return out.index_copy_(2, heads, some), lse.index_copy_(1, heads, some_lse)


def _merge(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, counts: Tensor, blocks: Blocks, out: Tensor, lse: Tensor,
    scale: float, kernels: bool | None = None,
) -> None:
    """Adds the soft blocks of all heads of the tensors; `kernels` as in `merge_soft_blocks`."""
    reasons = [] if kernels is False else soft_reasons(query, mean_value, blocks)
    if kernels and reasons:
        raise ValueError(f"kernels=True: the kernel of soft blocks cannot run this call: {'; '.join(reasons)}")
    if kernels is None:
        kernels = query.device.type == "cuda" and not reasons
    _operator(query, mean_key, mean_value, counts, blocks.lists, blocks.whole, blocks.boundary, blocks.query_lengths,
              blocks.key_lengths, blocks.query_index, out, lse, blocks.query_block, blocks.key_block, scale, kernels)


def soft_reasons(query: Tensor, mean_value: Tensor, blocks: Blocks) -> list[str]:
    """Why the Triton kernel cannot take the soft blocks of this call, in words; empty when it can.

    Args:
        query: (B, Lq, H, D).
        mean_value: (B, H, nk, Dv).
        blocks: the lists.
    """
    from .attention import triton_reasons  # which imports this module

    # Only the head dim of the values is looked at.
    reasons = triton_reasons(query, query, mean_value.transpose(1, 2))
    if blocks.query_block < 16 or blocks.query_block & (blocks.query_block - 1):
        reasons.append(f"query block size {blocks.query_block} is not a power of two from 16")
    return reasons


@torch.library.custom_op("dit_sparse::soft_blocks", mutates_args=("out", "lse"))
def _operator(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, count: Tensor, lists: Tensor, whole: Tensor, boundary: Tensor,
    query_lengths: Tensor, key_lengths: Tensor, query_index: Tensor | None, out: Tensor, lse: Tensor, query_block: int,
    key_block: int, scale: float, kernels: bool,
) -> None:
    # Neither order nor mask of the keys: the means hold what is left of them. A window is the listed blocks' affair.
    blocks = Blocks(lists, whole, boundary, query_lengths, key_lengths, query_index, key_index=None,
                    key_coordinates=None, query_low=None, query_high=None, always=None, key_mask=None,
                    query_block=query_block, key_block=key_block)
    if kernels:
        from .soft_kernel import soft_blocks_triton

        soft_blocks_triton(query, mean_key, mean_value, count, blocks, out, lse, scale)
    else:
        _merge_plain(query, mean_key, mean_value, count, blocks, out, lse, scale)


@_operator.register_fake
def _operator_shapes(*_: object) -> None:
    """Nothing is returned: what is written has the shapes it had."""


def check_means(query: Tensor, mean_key: Tensor, mean_value: Tensor, blocks: Blocks, tokens: int) -> None:
    """Raises ValueError, in one line, unless means and mask fit the query.

    Args:
        query: (B, Lq, H, D). mean_key, mean_value: as in `soft_attention`. blocks: the lists.
        tokens: queries of the mask.
    """
    if query.dim() != 4 or mean_value.dim() != 4 or query.shape[1] != tokens:
        raise ValueError(f"query is {tuple(query.shape)} and mean_value {tuple(mean_value.shape)}; use "
                         f"(B, {tokens}, H, D) and (B, H, nk, Dv)")
    B, _, H, D = query.shape
    nk, value_dim = blocks.key_blocks, mean_value.shape[3]
    for name, x, shape in (("mean_key", mean_key, (B, H, nk, D)), ("mean_value", mean_value, (B, H, nk, value_dim))):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}; use {shape}")
    for name, index in (("lists", blocks.lists), ("query index", blocks.query_index)):
        if index is not None and (index.shape[0] not in (1, B) or index.shape[1] not in (1, H)):
            raise ValueError(f"mask {name} has batch and heads {tuple(index.shape[:2])}; allowed: (1 or {B}, 1 or {H})")
    if len({x.device for x in (query, mean_key, mean_value, blocks.lists)}) > 1:
        raise ValueError(f"query, means and mask are on {query.device}, {mean_key.device} and {blocks.lists.device}; "
                         "use one device")


def check_soft(query: Tensor, value: Tensor, soft: SoftMeans, blocks: Blocks, tokens: int) -> None:
    """`check_means`, and that the means fit the values, their counts the means, and the heads are named as asked.

    Kernels read them by address and check nothing. Numbers on the device are not looked at, so that nothing waits.
    """
    check_means(query, soft.key, soft.value, blocks, tokens)
    B, _, H, _ = query.shape
    if soft.value.shape[3] != value.shape[3]:
        raise ValueError(f"mean_value is {tuple(soft.value.shape)}; use {(*soft.value.shape[:3], value.shape[3])}")
    shape, nk = tuple(soft.counts.shape), blocks.key_blocks
    if len(shape) != 3 or shape[0] not in (1, B) or shape[1] not in (1, H) or shape[2] != nk:
        raise ValueError(f"counts of the means are {shape}; use (1 or {B}, 1 or {H}, {nk})")
    if soft.counts.device != query.device:
        raise ValueError(f"query is on {query.device}, counts of the means on {soft.counts.device}; use one device")
    heads = soft.heads
    if heads is not None and (heads.dim() != 1 or heads.dtype != torch.int64 or heads.device != query.device):
        raise ValueError(f"heads is {heads.dtype} {tuple(heads.shape)} on {heads.device}; use torch.int64 (h,) on "
                         f"{query.device}")


def _check(query: Tensor, mean_value: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raises ValueError, in one line, unless what is overwritten fits."""
    B, Lq, H, _ = query.shape
    for name, x, shape in (("out", out, (B, Lq, H, mean_value.shape[3])), ("lse", lse, (B, H, Lq))):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}; use {shape}")
    if out.dtype != query.dtype or lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"out is {out.dtype} and lse {lse.dtype}; use {query.dtype} and torch.float32")
    if out.stride(3) != 1 or lse.stride(2) != 1:
        raise ValueError("out and lse must be contiguous along their last dimension")
    if out.device != query.device or lse.device != query.device:
        raise ValueError(f"query is on {query.device}, out and lse on {out.device} and {lse.device}; use one device")


def _merge_plain(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, count: Tensor, blocks: Blocks, out: Tensor, lse: Tensor,
    scale: float,
) -> None:
    """The same in plain PyTorch, some rows at a time; sums in float32, or float64 for float64."""
    B, Lq, H, _ = query.shape
    nk = mean_key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values, bias = mean_key.to(dtype).mT, mean_value.to(dtype), count.to(dtype).log()[:, :, None]
    listed = blocks.listed().expand(B, H, -1, -1)
    block = _block_of_token(blocks.query_index, Lq, blocks.query_block, query.device)
    step = max(1, _NUMBERS_AT_ONCE // max(1, B * H * nk))
    for start in range(0, Lq, step):
        rows = slice(start, start + step)
        # (B, H, rows, nk)
        score = (query[:, rows].transpose(1, 2).to(dtype) @ keys).mul_(scale).add_(bias)
        row_block = block[..., rows, None].expand(B, H, -1, nk)
        score.masked_fill_(listed.gather(2, row_block), -torch.inf)
        before = lse[..., rows].to(dtype)
        top = torch.maximum(before, score.amax(-1))
        top = torch.where(top == -torch.inf, 0, top)
        weight = score.sub_(top[..., None]).exp_()
        kept = (before - top).exp()
        total = kept + weight.sum(-1)
        merged = kept[..., None] * out[:, rows].transpose(1, 2) + weight @ values
        out[:, rows] = (merged / torch.where(total == 0, 1, total)[..., None]).transpose(1, 2).to(out.dtype)
        lse[..., rows] = top + total.log()


def _block_of_token(index: Tensor | None, tokens: int, block: int, device: torch.device) -> Tensor:
    """int64 (B|1, H|1, tokens): the block that holds each token; nothing waits for the device."""
    if index is None:
        return (torch.arange(tokens, device=device) // block)[None, None]
    slot = torch.arange(index.shape[-1], device=device) // block
    # Padding writes to one place beyond the tokens, which is cut off.
    found = torch.zeros(*index.shape[:2], tokens + 1, dtype=torch.int64, device=device)
    return found.scatter_(-1, torch.where(index < 0, tokens, index), slot.expand_as(index))[..., :tokens]
