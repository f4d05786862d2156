"""Sliding tiles against FlexAttention, an attention that shares no code with ours. Runs on a CPU too, small."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.methods.gna import GNA

Triple = tuple[int, int, int]


def against_flex(
    sizes: Triple, tile: Triple, windows: Triple, heads: int, dim: int, dtype: torch.dtype, device: str = "cuda"
) -> str:
    """"" when our attention over sliding tiles is FlexAttention's, or what differs.

    In half precision both are held against FlexAttention in fp32: our error is at most twice its own, and no number
    is further away than 4e-2, as in Sliding Tile Attention's own test. FlexAttention is told the paper's rule for each
    pair of tokens in raster order.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    grid = TokenGrid(*sizes)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, grid.tokens, heads, dim, device=device, generator=generator).to(dtype) for _ in range(3)
    )
    mask = GNA(tile_windows=windows, tile=tile, block_size=128 if device == "cuda" else 32).build(grid).to(device)
    got = block_sparse_attention(query, key, value, mask)
    got = got[0] if isinstance(got, tuple) else got

    at = (grid.coordinates().long() // torch.tensor(tile)).to(device)
    counts = [-(-size // edge) for size, edge in zip(sizes, tile, strict=True)]

    def sees(batch, head, q, k):
        allowed = q >= 0
        for axis, (tiles, window) in enumerate(zip(counts, windows, strict=True)):
            half = window // 2
            centre = at[q, axis].clamp(half, max(tiles - 1 - half, half))
            allowed = allowed & ((at[k, axis] - centre).abs() <= half)
        return allowed

    rule = create_block_mask(sees, None, None, grid.tokens, grid.tokens, device=device, _compile=device == "cuda")
    flex = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention

    def reference(kind: torch.dtype) -> torch.Tensor:
        heads_first = (x.to(kind).transpose(1, 2) for x in (query, key, value))
        return flex(*heads_first, block_mask=rule).transpose(1, 2).float()

    exact = reference(torch.float32)
    ours = (got.float() - exact).abs()
    allowed = 1e-5 if dtype == torch.float32 else 2 * float((reference(dtype) - exact).abs().mean())
    mean, most = float(ours.mean()), float(ours.max())
    good = mean <= allowed and most < (1e-5 if dtype == torch.float32 else 4e-2)
    return "" if good else f"differs by {mean:.2e} in the mean ({allowed:.2e} allowed), {most:.2e} at most"


def all_checks() -> dict[str, Callable[[], str]]:
    """The checks by name."""
    shape, tile = (18, 48, 80), (6, 8, 8)
    return {
        f"gna sliding tiles {windows} against FlexAttention": partial(
            against_flex, shape, tile, windows, 2, 128, torch.bfloat16
        )
        for windows in ((3, 3, 5), (3, 1, 10))
    }
