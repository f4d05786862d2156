"""What the operators of a bound transformer look up when they are executed: its session, by number."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F

from . import ulysses

SDPA = "sdpa"  # the route of processors that call F.scaled_dot_product_attention themselves


class Runtime:
    """What the operator needs to know about one bound transformer; looked up by number when it is executed.

    Args:
        session: receives the calls; see `bridge.Session`.
        text_at: where the family keeps text tokens.
        split_text: under Ulysses each rank holds a piece of the text and a piece of the image.
    """

    _all: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()
    _next = 0

    def __init__(self, session: Any, text_at: str, split_text: bool) -> None:
        self.session, self.text_at, self.split_text = session, text_at, split_text
        self.info: Any = None
        self.rows: dict[int, int] = {}
        self.id, Runtime._next = Runtime._next, Runtime._next + 1
        Runtime._all[self.id] = self

    def begin(self, info: Any) -> None:
        """A forward begins."""
        self.info, self.rows = info, {}
        self.session.begin_forward(info)

    def close(self) -> None:
        """Forget the session: operators left in copies or compiled graphs compute dense from now on."""
        Runtime._all.pop(self.id, None)

    def refusal(self, length: int, world: int) -> str:
        """Why a call with `length` query tokens cannot go to the session, or an empty text."""
        grid = getattr(self.info, "grid", None)
        if grid is None:
            return getattr(self.info, "reason", "") or "attention called outside the transformer's forward"
        if length < grid.video:
            return f"{length} query tokens, fewer than the grid's {grid.video}"
        if length > grid.video and self.text_at == "none":
            return f"{length - grid.video} tokens beyond the grid's {grid.video} in a model without text tokens"
        if world > 1 and length > grid.video and not self.split_text:
            return "context parallelism with text tokens in an unknown order"
        if world > 1 and length > grid.video and (length % world or grid.video % world):
            return f"context parallelism over {world} ranks with unequal pieces"
        return ""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               mask: torch.Tensor | None, scale: float, world: int) -> torch.Tensor:
        """Hand one call to the session; (B, S, H, D) in the order of one process, text where the family has it."""
        info, row = self.info, self.rows.get(layer, 0)
        self.rows[layer] = row + 1
        branch = info.branch
        if row:  # a model that loops over its batch (Mochi): every row is a branch of its own
            info.branch = f"{branch}/{row}"
        try:
            if world == 1 or query.shape[1] == info.grid.video:
                return self.session.attention(layer, query, key, value, mask, scale)
            order = ulysses.Order(query.shape[1], info.grid.video, world, self.text_at)
            query, key, value = (order.to_one_process(x) for x in (query, key, value))
            out = self.session.attention(layer, query, key, value, order.mask_to_one_process(mask), scale)
            return order.to_ranks(out)
        finally:
            info.branch = branch


def find(handle: torch.Tensor) -> tuple[Runtime | None, int]:
    """The runtime that a handle names, None when it was closed, and the layer.

    Args:
        handle: CPU int64 (2,): number of the runtime, index of the layer.
    """
    number, layer = handle.tolist()[:2]
    return Runtime._all.get(number), layer


def own_dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float,
              backend: str) -> torch.Tensor:
    """The model's own attention: its backend on the dispatch route, else scaled_dot_product_attention.

    Args:
        query, key, value: (B, S, H, D).
        mask, scale: as the model passed them.
        backend: value of the model's attention backend, "" for the active one, or `SDPA`.

    Returns:
        (B, S, H, D).
    """
    if backend != SDPA:
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        chosen = AttentionBackendName(backend) if backend else None
        return dispatch_attention_fn(query, key, value, attn_mask=mask, scale=scale, backend=chosen)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
