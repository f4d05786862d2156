"""Coarse and fine attention (VSA, arXiv 2505.13389): gated attention between block means beside the listed blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .blockmask import BlockMask
from .operators import Attend, Operator
from .scoring import gather_tokens, head_chunks, keys_held

if TYPE_CHECKING:
    from .methods.base import Call

__all__ = ["CoarseFine", "Gate", "TrainedGates", "coarse_attention"]

Gate = Callable[["Call"], Tensor]


def coarse_attention(call: Call, mask: BlockMask) -> Tensor:
    """Attention between the means of blocks; every block counts as one, whatever its size.

    Args:
        call: the activations.
        mask: whose layouts make the blocks; its lists are not looked at.

    Returns:
        float32 (B, nq, H, Dv). Key blocks without a real key take no part.
    """
    query, key, value = (call.block_mean(name, layout) for name, layout in
                         (("query", mask.query), ("key", mask.key), ("value", mask.key)))
    held = keys_held(mask.key, call.key_mask)[:, :, None]
    parts = []
    for part in head_chunks(query.shape[1], 3 * query.shape[0] * mask.query.blocks * mask.key.blocks):
        scores = query[:, part] @ key[:, part].transpose(-1, -2) * call.scale
        empty = (held if held.shape[1] == 1 else held[:, part]) <= 0
        parts.append(scores.masked_fill(empty, torch.finfo(torch.float32).min).softmax(-1) @ value[:, part])
    return torch.cat(parts, dim=1).transpose(1, 2)


@dataclass(frozen=True)
class CoarseFine(Operator):
    """Attention over the listed blocks and, times a trained gate, attention between block means, one for a block.

    The two softmaxes are each normalised, and added: a wrong gate changes brightness, not only detail.
    Source: VSA, arXiv 2505.13389.

    Args:
        gate: what a layer's trained gate gives for a call, (B|1, L|1, H|1, Dv|1); None: the listed blocks alone,
            which is what a gate of zero, as training starts with, would give.
    """

    gate: Gate | None = None

    name: ClassVar[str] = "coarse-fine"

    @property
    def title(self) -> str:  # type: ignore[override]
        """What the summary prints; it says when the trained gate is missing."""
        if self.gate is None:
            return "fine branch only: the coarse branch needs a trained gate, and none was given"
        return "listed blocks, plus gated attention between block means"

    def run(self, call: Call, mask: BlockMask, attend: Attend) -> tuple[Tensor, Tensor]:
        """See `Operator.run`; the LSE is that of the listed blocks.

        Raises:
            ValueError: when the gate's shape does not fit the output's.
        """
        out, lse = attend(call.query, call.key, call.value, mask)
        if self.gate is None:
            return out, lse
        gate = self.gate(call)
        if gate.dim() != 4 or any(n not in (1, most) for n, most in zip(gate.shape, out.shape, strict=True)):
            raise ValueError(f"vsa: gate gave {tuple(gate.shape)}; use {tuple(out.shape)}, or 1 for any of them")
        gate, coarse, block = gate.expand(out.shape), coarse_attention(call, mask), mask.query.block_of_token
        batch, tokens, heads, dim = out.shape
        for part in head_chunks(heads, 3 * batch * tokens * dim):
            of_head = block if block.dim() == 1 or block.shape[1] == 1 else block[:, part]
            rows = gather_tokens(coarse[:, :, part], of_head) * gate[:, :, part]
            out[:, :, part] = (out[:, :, part] + rows).to(out.dtype)
        return out, lse


class TrainedGates:
    """The gates of a trained transformer: a linear map of what goes into a layer's self-attention, without a sigmoid.

    It watches the attention modules and keeps the input of the one that runs until its gate is asked for.

    Args:
        attentions: the self-attention modules in their order, such as `[b.attn1 for b in transformer.blocks]`.
        gates: the trained map of each, from hidden states (B, L, C) to (B, L, H * head_dim).

    Raises:
        ValueError: when there are not as many gates as modules.
    """

    def __init__(self, attentions: Sequence[nn.Module], gates: Sequence[nn.Module]) -> None:
        if len(attentions) != len(gates):
            raise ValueError(f"vsa: {len(gates)} gates do not fit {len(attentions)} attention modules; give one each")
        self._gates = list(gates)
        self._seen: tuple[int, Tensor] | None = None
        self._hooks = [module.register_forward_pre_hook(self._watch(layer), with_kwargs=True)
                       for layer, module in enumerate(attentions)]

    def _watch(self, layer: int) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._seen = layer, args[0] if args else kwargs["hidden_states"]

        return watch

    def __call__(self, call: Call) -> Tensor:
        """The gate of a call, (B, L, H, head_dim).

        Raises:
            ValueError: when the call is not one of the modules watched.
        """
        layer, hidden = self._seen or (-1, None)
        self._seen = None
        if hidden is None or layer != call.layer:
            raise ValueError(f"vsa: layer {call.layer} asks for its gate, but the module watched last is {layer}; give "
                             "all self-attention modules of the transformer, in their order")
        found = self._gates[layer](hidden)
        assert isinstance(found, Tensor)
        return found.unflatten(-1, (call.query.shape[2], -1))

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], None
