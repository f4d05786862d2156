"""Dense attention by the best kernel present: what dense steps, dense layers and fallbacks run on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .blocks import Blocks

# PyTorch's own order prefers FlashAttention-2, which on Hopper reaches 347 TFLOP/s where cuDNN reaches 610 (H200,
# torch 2.11, head dim 128, bf16, November 2026).
_HOPPER_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                 SDPBackend.MATH]


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention, (B, L, H, D) in and out.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D). value: (B, Lk, H, Dv).
        scale: factor of the scores; None: 1 / sqrt(D).
        key_mask: bool (B, Lk), True where the key is a real token; None: all are.
        attn_mask: bool or additive mask that broadcasts to (B, H, Lq, Lk), as models give it.

    Returns:
        out (B, Lq, H, Dv), and the LSE (B, H, Lq) float32 where the kernel gives it for free (CPU without attn_mask,
        or a key mask on the portable kernel), else None.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is None and query.device.type == "cpu":
        return _dense_cpu(query, key, value, scale, key_mask)
    if attn_mask is None and key_mask is not None and _portable_can(query, key, value, scale):
        # PyTorch's kernels take a key mask only as a bias, which costs more than it saves; the portable kernel tests
        # just the blocks that hold masked keys.
        from .portable import block_sparse_attention_triton

        blocks = Blocks.dense(query.shape[1], key.shape[1], 128, key_mask, query.device)
        return block_sparse_attention_triton(query, key, value, blocks, scale)
    if key_mask is not None:
        attn_mask = _with_key_mask(attn_mask, key_mask)
        value = torch.where(key_mask[..., None, None], value, 0)
    return _sdpa(query, key, value, scale, attn_mask), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, attn_mask: Tensor | None) -> Tensor:
    """scaled_dot_product_attention on (B, L, H, D), cuDNN first on Hopper."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is None and prefers_cudnn(query):
        with sdpa_kernel(_HOPPER_ORDER, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale).transpose(1, 2)


def prefers_cudnn(query: Tensor) -> bool:
    """Whether cuDNN has the fastest dense kernel: half precision on Hopper."""
    return (query.device.type == "cuda" and torch.version.hip is None
            and query.dtype in (torch.float16, torch.bfloat16)
            and torch.cuda.get_device_capability(query.device)[0] == 9)


def _portable_can(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the portable kernel runs these tensors."""
    from .attention import triton_reasons

    return query.device.type == "cuda" and scale > 0 and not triton_reasons(query, key, value)


def _dense_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU kernel with LSE; masked keys are left out rather than masked."""
    from .cpu import attend

    if key_mask is None or bool(key_mask.all()):
        out, lse = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale)
        return out.transpose(1, 2), lse.to(torch.float32)
    B, Lq, H, _ = query.shape
    out = torch.zeros(B, Lq, H, value.shape[3], dtype=query.dtype)
    lse = torch.full((B, H, Lq), -torch.inf)
    for b in range(B):
        kept = key_mask[b].nonzero()[:, 0]
        if kept.numel():
            q, k, v = (x[b : b + 1].transpose(1, 2) for x in (query, key, value))
            one, one_lse = attend(q, k.index_select(2, kept), v.index_select(2, kept), scale)
            out[b], lse[b] = one[0].transpose(0, 1), one_lse[0]
    return out, lse


def _with_key_mask(attn_mask: Tensor | None, key_mask: Tensor) -> Tensor:
    """attn_mask (bool or additive) with the masked keys excluded."""
    allowed = key_mask[:, None, None]
    if attn_mask is None:
        return allowed
    if attn_mask.dtype == torch.bool:
        return attn_mask & allowed
    return attn_mask.masked_fill(~allowed, -torch.inf)
