"""Other people's attention kernels, to be timed in the same run as ours: cuDNN, FlashAttention-2 and -4, FlexAttention.

Each is given the layout it likes best before the clock starts: a call is the kernel alone. What cannot run says why.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """One kernel of others.

    Args:
        name: as printed.
        sparse: whether it computes block lists; dense kernels take no `keep`.
        missing: (device, dtype) -> why it cannot run there, "" when it can.
        prepare: (query, key, value (B, L, H, D), keep bool (1, H, nq, nk), block size) -> the call to time, which
            returns (B, L, H, D), or (B, H, L, D) for kernels that want heads first.
    """

    name: str
    sparse: bool
    missing: Callable[[str, torch.dtype], str]
    prepare: Callable[[Tensor, Tensor, Tensor, Tensor, int], Callable[[], Tensor]]


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors]


def _needs_gpu(device: str, dtype: torch.dtype) -> str:
    if torch.device(device).type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    return "" if dtype in (torch.float16, torch.bfloat16) else "needs bf16 or fp16"


def _needs_flash4(device: str, dtype: torch.dtype) -> str:
    if reason := _needs_gpu(device, dtype):
        return reason
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn-4 is not installed"
    try:
        from flash_attn.cute import interface  # type: ignore[import-not-found]  # noqa: F401
    except Exception as error:
        return f"flash-attn-4 cannot be imported: {first_line(error)}"
    return ""


def _sdpa(backend: str, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Callable[[], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = _heads_first(query, key, value)
    chosen = getattr(SDPBackend, backend)

    def call() -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def _listed(keep: Tensor) -> Tensor:
    """The kept blocks of every row first, in ascending order: bool (..., nk) -> int32 (..., nk)."""
    return torch.sort(keep.to(torch.int8), dim=-1, descending=True, stable=True).indices.to(torch.int32)


def flex_mask(keep: Tensor, block: int, tokens: int, keys: int) -> Any:
    """FlexAttention's mask of the kept blocks, all of them whole: bool (1, H, nq, nk) -> BlockMask."""
    from torch.nn.attention.flex_attention import BlockMask

    counts = keep.sum(-1, dtype=torch.int32)
    lists = _listed(keep)
    none = torch.zeros_like(counts)
    return BlockMask.from_kv_blocks(none, torch.zeros_like(lists), counts, lists, BLOCK_SIZE=(block, block),
                                    seq_lengths=(tokens, keys), compute_q_blocks=False)


def _flex(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, block: int) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = _heads_first(query, key, value)
    mask = flex_mask(keep, block, q.shape[2], k.shape[2])
    compiled = _compiled(flex_attention, q.shape, k.shape, q.dtype, block)
    return lambda: compiled(q, k, v, block_mask=mask)


@functools.lru_cache(maxsize=1)
def _compiled(function: Callable[..., Any], *_shape: Any) -> Callable[..., Any]:
    """Compiled for one shape: a ninth shape in one cache would meet the recompile limit and be timed uncompiled."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _flash4_dense(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Callable[[], Tensor]:
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (x.contiguous() for x in (query, key, value))
    return lambda: _first(flash_attn_func(q, k, v))


def _flash4_sparse(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, block: int) -> Callable[[], Tensor]:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # type: ignore[import-not-found]
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (x.contiguous() for x in (query, key, value))
    counts = keep.sum(-1, dtype=torch.int32)
    lists = _listed(keep)
    # All kept blocks are whole: its masked lists stay empty.
    mask = BlockSparseTensorsTorch(torch.zeros_like(counts), torch.zeros_like(lists), counts, lists,
                                   block_size=(block, block))
    return lambda: _first(flash_attn_func(q, k, v, block_sparse_tensors=mask))


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


PEERS = (
    Peer("cuDNN", False, _needs_gpu, functools.partial(_sdpa, "CUDNN_ATTENTION")),
    Peer("FlashAttention-2", False, _needs_gpu, functools.partial(_sdpa, "FLASH_ATTENTION")),
    Peer("FlashAttention-4", False, _needs_flash4, _flash4_dense),
    Peer("FlexAttention", True, _needs_gpu, _flex),
    Peer("FlashAttention-4", True, _needs_flash4, _flash4_sparse),
)


def available(device: str, dtype: torch.dtype) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run, and the reasons of those that cannot, by name."""
    reasons = {peer.name: peer.missing(device, dtype) for peer in PEERS}
    return [peer for peer in PEERS if not reasons[peer.name]], {name: why for name, why in reasons.items() if why}
