"""What TeaCache looks at: for each kind of first block, the signals that its authors use.

Source: the forward functions of https://github.com/ali-vilab/TeaCache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

MODULATED, MODULATION, EMBEDDING = "modulated", "modulation", "embedding"
Signal = Callable[[Any, Tensor, Tensor], Tensor]


def _normed(block: Any, hidden: Tensor, conditioning: Tensor) -> Tensor:
    """Input of the first block's attention, where its norm applies shift and scale."""
    return block.norm1(hidden, emb=conditioning)[0]  # type: ignore[no-any-return]


def _mochi(block: Any, hidden: Tensor, conditioning: Tensor) -> Tensor:
    return block.norm1(hidden, conditioning)[0]  # type: ignore[no-any-return]


def _ltx(block: Any, hidden: Tensor, conditioning: Tensor) -> Tensor:
    """The same where the block itself applies shift and scale, the first two of its six."""
    table = block.scale_shift_table
    values = table[None, None].to(conditioning.device) + conditioning.reshape(
        hidden.shape[0], conditioning.shape[1], table.shape[0], -1)
    shift, scale = values[:, :, 0], values[:, :, 1]
    return block.norm1(hidden) * (1 + scale) + shift  # type: ignore[no-any-return]


def _conditioning(block: Any, hidden: Tensor, conditioning: Tensor) -> Tensor:
    """The time embedding as the block receives it: for Wan the six shifts, scales and gates before its own table."""
    return conditioning


# For every class of first block: its signals, the one that is taken when nothing is said first. Wan's "embedding" is
# not among the block's arguments: TeaCache's own hook fetches it.
SIGNALS: Mapping[str, Mapping[str, Signal]] = {
    "WanTransformerBlock": {MODULATION: _conditioning, EMBEDDING: _conditioning},
    "FluxTransformerBlock": {MODULATED: _normed},
    "HunyuanVideoTransformerBlock": {MODULATED: _normed},
    "CogVideoXBlock": {EMBEDDING: _conditioning},
    "LTXVideoTransformerBlock": {MODULATED: _ltx},
    "MochiTransformerBlock": {MODULATED: _mochi},
}


def signal_of(block: Any, name: str | None) -> Signal:
    """The signal of a first block.

    Args:
        block: the block (unwrapped).
        name: "modulated", "modulation", "embedding", or None for the one that the authors use.

    Raises:
        ValueError: no signal is known for the block, or not this one; one line.
    """
    kind = type(block).__name__
    if kind not in SIGNALS:
        raise ValueError(f"TeaCache knows no signal for {kind}; it works for {', '.join(sorted(SIGNALS))}")
    known = SIGNALS[kind]
    if name is not None and name not in known:
        raise ValueError(f"signal={name!r} is not allowed for {kind}; use {' or '.join(known)}")
    return known[name] if name is not None else next(iter(known.values()))


def default_signal(block: Any) -> str:
    """Name of the signal that is taken when nothing is said."""
    signal_of(block, None)
    return next(iter(SIGNALS[type(block).__name__]))
