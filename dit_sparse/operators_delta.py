"""Delta attention (arXiv 2505.11254): a few rows run dense, and correct the sparse rows near them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .blocklayout import BlockLayout
from .blockmask import BlockMask
from .kernels.dense import dense_attention
from .operators import Attend, Drop, Operator
from .scoring import gather_tokens, head_chunks

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["ANCHORS", "DeltaRows", "nearest_rows", "row_groups"]

ANCHORS = ("nearest", "first")


def row_groups(layout: BlockLayout, group: int | None) -> tuple[Tensor, Tensor]:
    """Runs of queries that share a correction; none spans two blocks.

    Args:
        layout: how the queries sit in blocks.
        group: queries of a run; None: a whole block.

    Returns:
        First token of every run, int64 (n,) or (B|1, H|1, n), -1 for runs without tokens; and the run of every token,
        int64 (tokens,) or (B|1, H|1, tokens).
    """
    size = layout.block_size
    group = size if group is None else min(group, size)
    runs = -(-size // group)
    first = layout.token_of_slot.unflatten(-1, (layout.blocks, size))[..., ::group].flatten(-2)
    slot = layout.slot_of_token
    block = torch.div(slot, size, rounding_mode="floor")
    return first, block * runs + torch.div(slot - block * size, group, rounding_mode="floor")


def nearest_rows(query: Tensor, layout: BlockLayout, group: int | None) -> Tensor:
    """The token of every run whose query lies nearest to the run's mean query.

    Args:
        query: (B, L, H, D).
        layout, group: as in `row_groups`.

    Returns:
        int64 (B, H, n), -1 for runs without tokens; of equally near ones the first.
    """
    size = layout.block_size
    group = size if group is None else min(group, size)
    batch, _, heads, dim = query.shape
    token = layout.token_of_slot.unflatten(-1, (layout.blocks, size))
    token = torch.nn.functional.pad(token, (0, -size % group), value=-1).flatten(-2)
    start = torch.arange(0, token.shape[-1], group, device=query.device)
    found = []
    for part in head_chunks(heads, 4 * batch * token.shape[-1] * dim):
        index = token if token.dim() == 1 or token.shape[1] == 1 else token[:, part]
        # (B, n, group, h, D), and which of them are tokens, (B|1, n, group, h|1)
        x = gather_tokens(query[:, :, part], index).to(torch.float32).unflatten(1, (-1, group))
        real = (index >= 0).reshape(-1, index.shape[-2] if index.dim() == 3 else 1, len(start), group)
        real = real.permute(0, 2, 3, 1)
        mean = x.sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)[..., None]
        distance = (x - mean).square_().sum(-1).masked_fill_(~real, torch.inf)
        # Two queries are always equally near to their mean: rounding must not decide.
        near = distance <= distance.amin(2, keepdim=True) * (1 + 1e-5)
        place = (near.to(torch.uint8).argmax(2) + start[:, None]).transpose(1, 2)
        found.append(index.expand(*place.shape[:2], -1).gather(-1, place))
    return torch.cat(found, dim=1)


@dataclass(frozen=True)
class DeltaRows(Operator):
    """The difference between dense and sparse output on one row of every group is added to the whole group.

    Source: Delta attention, arXiv 2505.11254. It is exact where the queries of a group are equal.

    Args:
        group: queries that share a correction, at most a block; None: a whole block.
        anchor: which row of a group runs dense: the "first" (the paper), or the one with the query "nearest" to the
            group's mean (ours).
        base: what is computed for the mask.
    """

    group: int | None = None
    anchor: str = "nearest"
    base: Operator = field(default_factory=Drop)

    name: ClassVar[str] = "delta"

    @property
    def title(self) -> str:  # type: ignore[override]
        """What the summary prints."""
        return f"{self.base.title}; one row in {self.group or 'each block'} dense, to correct those near it"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE is that of the sparse rows."""
        out, lse = self.base.run(call, mask, attend)
        rows, group = row_groups(mask.query, self.group)
        if self.anchor == "nearest":
            rows = nearest_rows(call.query, mask.query, self.group)
        dense, _ = dense_attention(
            gather_tokens(call.query, rows), call.key, call.value, scale=call.scale, key_mask=call.key_mask
        )
        delta = dense.to(torch.float32) - gather_tokens(out, rows).to(torch.float32)
        batch, tokens, heads, dim = out.shape
        for part in head_chunks(heads, 3 * batch * tokens * dim):
            of_head = group if group.dim() == 1 or group.shape[1] == 1 else group[:, part]
            correction = gather_tokens(delta[:, :, part], of_head)
            out[:, :, part] = correction.add_(out[:, :, part]).to(out.dtype)
        return out, lse

    def density(self, mask: BlockMask) -> float | Tensor:
        """The base's, and the dense rows' other pairs, as if their lists were of mean length."""
        return self._with_rows(mask, self.base.density(mask))

    def computed(self, call: Call, mask: BlockMask) -> float | Tensor:
        """As `density`, of what the base computed."""
        return self._with_rows(mask, self.base.computed(call, mask))

    def _with_rows(self, mask: BlockMask, listed: float | Tensor) -> Tensor:
        """Density with the dense rows, when the others' is `listed`."""
        size = mask.query.block_size
        group = size if self.group is None else min(self.group, size)
        rows = ((mask.query.lengths + group - 1) // group).sum() / mask.query.tokens
        return listed + rows * (1 - listed)
