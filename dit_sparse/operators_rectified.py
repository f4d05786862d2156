"""The rectified operator: attention over the listed blocks, scaled and completed by what block means say of the rest.

Block-sparse attention divides by the mass of the keys it kept, so every kept weight is too large and what was dropped
is missing. Attention between block means estimates both: the share R of the true mass that the kept keys hold, and the
output C of the dropped blocks. The result is R * sparse + C. Source: Rectified SpaAttn, arXiv 2511.19835.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .blockmask import BlockLayout, BlockMask
from .operators import Attend, Operator, scale_and_add
from .order import video_blocks
from .scoring import head_chunks, mean_deviation, pool

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["Rectify", "pooled_shares"]


def pooled_shares(call: Call, blocks: BlockLayout, heads: slice, ipar: bool) -> Tensor:
    """How a query block's mass is shared among the video's key blocks and the text, from means.

    Args:
        call: the activations.
        blocks: from `order.layout`.
        heads: for which heads.
        ipar: a block's mean stands for all of its keys: log(keys) is added to its score (isolated pooling, then
            reallocation). False: it counts as one key beside those of the text, which is not pooled.

    Returns:
        float32 (B, h, video, video + 1), rows sum to 1; the last column is the whole text, 0 without one.
    """
    video = video_blocks(blocks, call.grid)
    query = call.block_mean("query", blocks)[:, heads, :video] * call.scale
    scores = query @ call.block_mean("key", blocks)[:, heads, :video].mT
    if call.key_mask is None:
        count = blocks.lengths[:video].to(torch.float32)[None, None]
    else:
        real = call.key_mask[..., None, None].to(torch.float32)
        count = (pool(real, blocks)[..., 0] * blocks.lengths)[..., :video]
    scores += (count.log() if ipar else torch.where(count > 0, 0, -torch.inf))[:, :, None]
    text = torch.full_like(scores[..., :1], -torch.inf)
    if call.grid.text:
        # [B, h, video, D] x [B, h, D, text]
        words = query @ call.key[:, call.grid.text_slice, heads].permute(0, 2, 3, 1).to(torch.float32)
        if call.key_mask is not None:
            words = words.masked_fill_(~call.key_mask[:, None, None, call.grid.text_slice], -torch.inf)
        text = words.logsumexp(-1, keepdim=True)
    return torch.cat((scores, text), dim=-1).softmax(-1)


@dataclass(frozen=True)
class Rectify(Operator):
    """Drop, then a share R and an addend C per query block from pooled attention.

    Args:
        ipar: as in `pooled_shares`.
        gapr: a dropped block is put back by its mean value only where that helps: where the product of the means is
            larger than the error that the spread of queries and keys about them can make (gain-aware rectification).
            Elsewhere its mass is given to the kept keys. False: every dropped block is put back.
    """

    ipar: bool = True
    gapr: bool = True

    name: ClassVar[str] = "rectified"
    title: ClassVar[str] = "rectified: kept mass and dropped blocks estimated from means"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE is that of the listed pairs over their share, an estimate of the full one."""
        out, lse = attend(call.query, call.key, call.value, mask)
        blocks = mask.query
        share, addend = self.correction(call, mask)
        B, H, _, D = addend.shape
        block = blocks.block_of_token.expand(B, H, -1)

        def of_tokens(rows: slice) -> tuple[Tensor, Tensor]:
            here = block[..., rows]
            return share.gather(2, here), addend.gather(2, here[..., None].expand(-1, -1, -1, D)).transpose(1, 2)

        scale_and_add(out, of_tokens)
        return out, lse - share.clamp(min=torch.finfo(share.dtype).tiny).log().gather(2, block)

    def correction(self, call: Call, mask: BlockMask) -> tuple[Tensor, Tensor]:
        """R, float32 (B, H, blocks), and C, float32 (B, H, blocks, Dv): 1 and 0 for the blocks of the text."""
        blocks, value = mask.query, call.block_mean("value", mask.key)
        B, H, n = value.shape[:3]
        video = video_blocks(blocks, call.grid)
        listed = mask.to_dense().expand(B, H, -1, -1)[..., :video, :video]
        share, addend = torch.ones(B, H, n, device=call.device), torch.zeros_like(value)
        spread = self.spread(call, blocks) if self.gapr else None
        for heads in head_chunks(H, 8 * B * video**2):
            mass = pooled_shares(call, blocks, heads, self.ipar)
            back = ~listed[:, heads]  # dropped, and put back by their means
            if spread is not None:
                back &= self.worth(call, blocks, spread, heads, video)
            held = mass[..., :video] * back
            share[:, heads, :video] = (mass[..., :video] * ~back).sum(-1) + mass[..., video]
            addend[:, heads, :video] = held @ value[:, heads, :video]
        return share, addend

    def spread(self, call: Call, blocks: BlockLayout) -> tuple[Tensor, Tensor]:
        """Mean distance of queries, and of keys, from the mean of their block, per channel: (B, H, blocks, D) each."""
        query = mean_deviation(call.query, blocks, call.block_mean("query", blocks))
        return query, mean_deviation(call.key, blocks, call.block_mean("key", blocks), mask=call.key_mask)

    def worth(
        self, call: Call, blocks: BlockLayout, spread: tuple[Tensor, Tensor], heads: slice, video: int
    ) -> Tensor:
        """bool (B, h, video, video): the product of the means is larger than what the spread can make of it."""
        query, key, query_spread, key_spread = (
            x[:, heads, :video] for x in (call.block_mean("query", blocks), call.block_mean("key", blocks), *spread))
        error = (query_spread @ key.mT).abs() + (query @ key_spread.mT).abs()
        return (query @ key.mT).abs() > error
