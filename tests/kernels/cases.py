"""Random calls of block-sparse attention, and the accuracy rule, shared by CPU, interpreter and GPU tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.blockmask import BlockLayout, BlockMask, TokenWindow
from dit_sparse.kernels.reference import attention_reference

# Errors that are no errors, however exact plain PyTorch happens to be.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
LSE_FLOOR = 4e-6


@dataclass(frozen=True)
class Case:
    """One random call.

    Args:
        order: "raster", "permuted" (one order for all heads) or "heads" (an order per head), ragged blocks included.
        lists: "shared" by all heads and batch elements, "heads", or "all" (own lists per batch element and head).
        window: coordinates of the exact test of boundary blocks, 0 to 3; `always`: some keys pass for everyone.
        masked: with a key mask; masked keys and values are NaN.
        strided: query, key and value are views whose heads lie outside of the tokens, with NaN around them.
    """

    query_tokens: int = 113
    key_tokens: int = 239
    batch: int = 1
    heads: int = 2
    head_dim: int = 64
    query_block: int = 64
    key_block: int = 64
    dtype: torch.dtype = torch.float32
    order: str = "raster"
    lists: str = "heads"
    window: int = 0
    always: bool = False
    masked: bool = False
    strided: bool = False
    value_dim: int = 0

    @property
    def name(self) -> str:
        """Readable id: what differs from the defaults."""
        parts = [f"{self.query_tokens}x{self.key_tokens}"]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(field.name if value is True else f"{field.name}={str(value).removeprefix('torch.')}")
        return "-".join(parts)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    key_mask: Tensor | None
    scale: float


def build(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """The tensors of a case; one query block sees nothing, one sees everything."""
    generator = torch.Generator().manual_seed(seed)
    query_layout = _layout(case, case.query_tokens, case.query_block, generator)
    key_layout = _layout(case, case.key_tokens, case.key_block, generator)
    window = _window(case, query_layout, key_layout, generator) if case.window else None
    shape = {"shared": (1, 1), "heads": (1, case.heads), "all": (case.batch, case.heads)}[case.lists]
    keep = torch.rand(*shape, query_layout.blocks, key_layout.blocks, generator=generator) < 0.5
    if query_layout.blocks > 1:
        keep[..., 0, :], keep[:, -1, 1, :] = True, False
    partial = torch.rand(keep.shape, generator=generator) < 0.5
    mask = BlockMask.from_dense(keep, query_layout, key_layout, partial=partial, window=window)
    key_mask = None
    if case.masked:
        key_mask = torch.rand(case.batch, case.key_tokens, generator=generator) < 0.8
        key_mask[-1, : case.key_tokens // 3] = True
    value_dim = case.value_dim or case.head_dim
    sizes = ((case.query_tokens, case.head_dim), (case.key_tokens, case.head_dim), (case.key_tokens, value_dim))
    query, key, value = (_tensor(case, n, d, generator) for n, d in sizes)
    if key_mask is not None:
        key[~key_mask], value[~key_mask] = torch.nan, torch.nan
    query, key, value = (x.to(device) if not case.strided else _strided(x, device) for x in (query, key, value))
    return Inputs(query, key, value, mask.to(device), None if key_mask is None else key_mask.to(device),
                  1.3 * case.head_dim**-0.5)


def check(inputs: Inputs, out: Tensor, lse: Tensor) -> str:
    """The accuracy rule: error against float64 at most twice the error of plain PyTorch in the same dtype.

    Returns:
        "" when the result is right, else what is wrong.
    """
    seen = inputs.mask.token_mask()
    arguments = (inputs.query, inputs.key, inputs.value, seen, inputs.scale, inputs.key_mask)
    want, want_lse = attention_reference(*arguments, dtype=torch.float64)
    plain, plain_lse = plain_attention(*arguments)
    empty = want_lse == -torch.inf
    if out.shape != want.shape or lse.shape != want_lse.shape or lse.dtype != torch.float32:
        return f"shapes {tuple(out.shape)} {tuple(lse.shape)} {lse.dtype}"
    if not torch.equal(lse == -torch.inf, empty):
        return "the LSE is not -inf exactly where queries see no key"
    if not torch.isfinite(out).all() or out.transpose(1, 2)[empty].any():
        return "the output is not finite, or not 0 where queries see no key"
    found = []
    for name, got, plainly, wanted, least in (
        ("out", out, plain, want, FLOOR[inputs.query.dtype]),
        ("lse", lse[~empty], plain_lse[~empty], want_lse[~empty], LSE_FLOOR),
    ):
        error, plain_error = ((x.double() - wanted).abs().max().item() if x.numel() else 0.0 for x in (got, plainly))
        if not error <= 2 * plain_error + least:
            found.append(f"{name}: error {error:.2e}, plain PyTorch {plain_error:.2e}")
    return "; ".join(found)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention written with ordinary PyTorch operations in the dtype of the inputs."""
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
        key, value = (torch.where(key_mask[..., None, None], x, 0) for x in (key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2), lse


def _layout(case: Case, tokens: int, block: int, generator: torch.Generator) -> BlockLayout:
    if case.order == "raster":
        return BlockLayout.raster(tokens, block)
    orders = [torch.randperm(tokens, generator=generator) for _ in range(case.heads if case.order == "heads" else 1)]
    lengths, left = [], tokens
    while left:
        lengths.append(min(left, int(torch.randint(1, 2 * block, (), generator=generator))))
        left -= lengths[-1]
    return BlockLayout.from_order(torch.stack(orders)[None], block, lengths=lengths)


def _window(case: Case, query: BlockLayout, key: BlockLayout, generator: torch.Generator) -> TokenWindow:
    reach, side = 6, 9
    coordinates = [torch.stack([torch.arange(n) * 200 // max(n, 1) // side**c % side for c in range(case.window)])
                   for n in (query.tokens, key.tokens)]
    always = torch.rand(key.tokens, generator=generator) < 0.05 if case.always else None
    window = TokenWindow.from_tokens(coordinates[1], coordinates[0] - reach, coordinates[0] + reach // 2,
                                     *(dataclasses.replace(x, index=None if x.index is None else x.index[:1, :1])
                                       for x in (query, key)), always=always)
    return window


def _tensor(case: Case, tokens: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(case.batch, tokens, case.heads, dim, generator=generator).to(case.dtype)


def _strided(x: Tensor, device: str) -> Tensor:
    """The same numbers as a view of (B, H, L + 5, D + 8) memory that is NaN outside."""
    B, L, H, D = x.shape
    room = torch.full((B, H, L + 5, D + 8), torch.nan, dtype=x.dtype, device=device)
    view = room.transpose(1, 2)[:, :L, :, :D]
    view.copy_(x)
    return view
