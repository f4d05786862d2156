"""Ulysses context parallelism: Diffusers' exchange around the operator, and the token order it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Order:
    """The order of tokens after the exchange, for models that split text and image separately.

    Rank r holds [text_r, image_r] (or [image_r, text_r]), so the gathered sequence is [text_0, image_0, text_1,
    image_1, ...]; the session expects [text, image].

    Args:
        tokens: S, length of the gathered sequence, a multiple of `world`.
        video: image or video tokens among them, a multiple of `world`.
        world: number of ranks.
        text_at: "front" or "back", within each rank and within the whole.
    """

    tokens: int
    video: int
    world: int
    text_at: str

    def _pieces(self) -> tuple[int, int]:
        video, all_local = self.video // self.world, self.tokens // self.world
        text = all_local - video
        return (text, video) if self.text_at == "front" else (video, text)

    def to_one_process(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, H, D) from the ranks' order into [text, image] or [image, text]."""
        local = x.unflatten(1, (self.world, -1))
        first, second = local.split(self._pieces(), dim=2)
        return torch.cat((first.flatten(1, 2), second.flatten(1, 2)), dim=1)

    def to_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, H, D) back into the ranks' order."""
        first, second = (n * self.world for n in self._pieces())
        parts = (part.unflatten(1, (self.world, -1)) for part in x.split((first, second), dim=1))
        return torch.cat(tuple(parts), dim=2).flatten(1, 2)

    def mask_to_one_process(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask over keys, (..., S), into the order of one process; other masks pass."""
        if mask is None or mask.shape[-1] != self.tokens or (mask.dim() == 4 and mask.shape[-2] != 1):
            return mask
        return self.to_one_process(mask.reshape(1, -1, self.tokens).transpose(1, 2)).transpose(1, 2).reshape(mask.shape)


def exchange(operator: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
             mask: torch.Tensor | None, scale: float, handle: torch.Tensor, backend: str, world: int,
             parallel: Any) -> torch.Tensor:
    """Run `operator` on whole sequences with a share of the heads, inside Diffusers' all-to-all.

    Args:
        operator: the attention operator; sees (B, S, H / world, D).
        query, key, value: (B, S / world, H, D), this rank's tokens.
        mask, scale, handle, backend, world: handed to the operator.
        parallel: Diffusers' ParallelConfig.

    Returns:
        (B, S / world, H, D).
    """
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    def forward_op(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
                   *args: Any, **kwargs: Any) -> torch.Tensor:
        return operator(query, key, value, mask, scale, handle, backend, world)

    def backward_op(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("dit-sparse has no backward pass; call disable(...) before training")

    return _templated_context_parallel_attention(query, key, value, mask, scale=scale, forward_op=forward_op,
                                                 backward_op=backward_op, _parallel_config=parallel)
