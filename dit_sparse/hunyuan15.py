"""HunyuanVideo 1.5: its processor builds an S x S mask (over 10 GB at 720p); this one passes a mask of keys.

The two differ only in the rows of padding text tokens, which no other token ever sees as a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

PROCESSOR = "HunyuanVideo15AttnProcessor2_0"


def _projected(attn: Any, states: torch.Tensor, names: tuple[str, str, str]) -> list[torch.Tensor]:
    """Query, key and value of one stream: [B, S, C] -> (B, S, H, D) each."""
    return [getattr(attn, name)(states).unflatten(2, (attn.heads, -1)) for name in names]


def _rotated(x: torch.Tensor, rope: Any) -> Any:
    return apply_rotary_emb(x, rope, sequence_dim=1)


def _call(self: Any, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
          attention_mask: torch.Tensor | None = None, image_rotary_emb: Any = None) -> tuple[torch.Tensor, Any]:
    """As HunyuanVideo15AttnProcessor2_0.__call__ of Diffusers 0.42, without the S x S mask."""
    query, key, value = _projected(attn, hidden_states, ("to_q", "to_k", "to_v"))
    query, key = attn.norm_q(query), attn.norm_k(key)
    if image_rotary_emb is not None:
        query, key = (_rotated(x, image_rotary_emb) for x in (query, key))
    if encoder_hidden_states is not None:
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        text_query, text_key, text_value = _projected(attn, encoder_hidden_states, names)
        if attn.norm_added_q is not None:
            text_query = attn.norm_added_q(text_query)
        if attn.norm_added_k is not None:
            text_key = attn.norm_added_k(text_key)
        query = torch.cat([query, text_query], dim=1)
        key = torch.cat([key, text_key], dim=1)
        value = torch.cat([value, text_value], dim=1)
    if attention_mask is not None:
        # [B, text] -> [B, 1, 1, S]: every video token is a key, and the valid text tokens
        padded = F.pad(attention_mask.bool(), (query.shape[1] - attention_mask.shape[1], 0), value=True)
        attention_mask = padded[:, None, None, :]
    out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False,
                                backend=self._attention_backend, parallel_config=self._parallel_config)
    out = out.flatten(2, 3).to(query.dtype)
    if encoder_hidden_states is not None:
        out, encoder_hidden_states = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if getattr(attn, "to_out", None) is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
    return out, encoder_hidden_states


def replacement(cls: type) -> Callable[..., Any] | None:
    """The `__call__` to bind in place of the class's own; None for every other processor."""
    return _call if cls.__name__ == PROCESSOR else None
