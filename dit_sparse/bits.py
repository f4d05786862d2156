"""Masks of blocks kept as one bit for a pair: what methods remember from step to step, or read from a file."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(keep: Tensor) -> Tensor:
    """Eight booleans to a byte, the first in the lowest bit: bool (..., nq, nk) -> uint8 (..., ceil(nq * nk / 8))."""
    flat = keep.flatten(-2).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8))
    weight = 2 ** torch.arange(8, device=keep.device, dtype=torch.uint8)
    return (padded.unflatten(-1, (-1, 8)) * weight).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, blocks: int) -> Tensor:
    """The inverse of `pack_bits` for square maps: uint8 (..., bytes) -> uint8 (..., blocks, blocks), zeros and ones."""
    place = torch.arange(8, device=packed.device, dtype=torch.uint8)
    flat = ((packed[..., None] >> place) & 1).flatten(-2)[..., : blocks**2]
    return flat.unflatten(-1, (blocks, blocks))
