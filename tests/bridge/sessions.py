"""Small sessions that record what the bridge hands over and compute plain attention."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dit_sparse.bridge import ForwardInfo


@dataclass
class Call:
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    info: ForwardInfo


class Recorder:
    """Dense attention; `scale` multiplies the softmax scale, `hide` (S,) bool hides key tokens."""

    def __init__(self, scale: float = 1.0, hide: torch.Tensor | None = None) -> None:
        self.scale, self.hide = scale, hide
        self.infos: list[ForwardInfo] = []
        self.calls: list[Call] = []
        self.fallbacks: list[tuple[int, str]] = []
        self.ended = 0

    def begin_forward(self, info: ForwardInfo) -> None:
        self.infos.append(info)

    def end_run(self) -> None:
        self.ended += 1

    def attention(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        self.calls.append(Call(layer, query.detach().clone(), key.detach().clone(), value.detach().clone(), mask,
                               copy.copy(self.infos[-1])))
        if self.hide is not None:
            keep = ~self.hide[: key.shape[1]][None, None, None]
            mask = keep if mask is None else mask & keep
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale * self.scale)
        return out.transpose(1, 2).contiguous()

    def fallback(self, layer: int, reason: str) -> None:
        self.fallbacks.append((layer, reason))

    def places(self) -> list[tuple[int, str, bool]]:
        """(step, branch, new run) of every forward."""
        return [(i.step, i.branch, i.new_run) for i in self.infos]


def processors_of(model: Any) -> dict[str, Any]:
    """Path -> processor object of every attention layer."""
    return {path: module.processor for path, module in model.named_modules()
            if getattr(module, "processor", None) is not None}
