"""Queries and keys in e4m3 or in INT8? The error of 8-bit attention, on any machine.

    python -m dit_sparse.eval.eight_bits

Weights (times 2^8) and values are rounded to e4m3 as the fp8 kernel does; queries and centred keys to e4m3, to INT8
with one scale per block of 128 tokens as well, or not at all. Errors are relative to attention in float32, root mean
square over all rows, heads and channels. Activations: white noise, noise with outlier channels, and the embedded
model's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.eval.speed import table
from dit_sparse.kernels.quantise import BLOCK, DTYPE, LARGEST, LARGEST_INTEGER, key_mean
from dit_sparse.methods.base import Call, Method, Plan

COLUMNS = ("activations", "Q and K in e4m3", "Q and K in INT8", "Q and K exact", "INT8, everything else exact",
           "e4m3, everything else exact")
WEIGHT_SCALE = 2.0**8


def as_e4m3(x: Tensor) -> Tensor:
    """x (..., n, D), rounded with one scale per block of 128 rows."""
    return _by_block(x, LARGEST, lambda rows: rows.to(DTYPE).float())


def as_int8(x: Tensor) -> Tensor:
    """x (..., n, D), rounded with one scale per block of 128 rows."""
    return _by_block(x, LARGEST_INTEGER, torch.round)


def _by_block(x: Tensor, largest: float, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    parts = []
    for part in x.split(BLOCK, dim=-2):
        scale = part.abs().amax((-2, -1), keepdim=True) / largest
        parts.append(rounded(part / scale) * scale)
    return torch.cat(parts, dim=-2)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, eight_bits: bool) -> Tensor:
    """Attention in float32, (..., L, D); with `eight_bits` weights and values are rounded to e4m3."""
    scores = query @ key.mT * scale
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weight.sum(-1, keepdim=True)
    if eight_bits:
        weight = (weight * WEIGHT_SCALE).to(DTYPE).float() / WEIGHT_SCALE
        channel = value.abs().amax(-2, keepdim=True) / LARGEST
        value = (value / channel).to(DTYPE).float() * channel
    return weight @ value / total


def errors(query: Tensor, key: Tensor, value: Tensor, scale: float) -> list[float]:
    """The columns of a row, from activations (1, L, H, D)."""
    key = key.float() - key_mean(key)[:, None]
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    true = attention(q, k, v, scale, False)

    def error(change: Callable[[Tensor], Tensor], eight_bits: bool = True) -> float:
        return ((attention(change(q), change(k), v, scale, eight_bits) - true).norm() / true.norm()).item()

    return [error(as_e4m3), error(as_int8), error(lambda x: x), error(as_int8, False), error(as_e4m3, False)]


@dataclass(frozen=True)
class Collect(Method):
    """Runs dense and keeps one call of every layer, at one step."""

    at: int = 4
    found: dict[int, tuple[Tensor, Tensor, Tensor, float]] = field(default_factory=dict)

    name: ClassVar[str] = "collect"

    def plan(self, call: Call) -> Plan:
        """See `Method.plan`."""
        if call.step == self.at:
            self.found.setdefault(call.layer, (call.query, call.key, call.value, call.scale))
        return Plan(None)


def activations(tokens: int, heads: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor, float]]:
    """Name, query, key, value and scale of every row."""
    from dit_sparse import enable
    from dit_sparse.pipelines.load import load
    from dit_sparse.pipelines.text_to_video import text_to_video

    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, tokens, heads, 128, generator=generator).unbind(0)
    yield "white noise", query, key, value, 128**-0.5
    loud = torch.ones(128)
    loud[::16] = 8.0
    yield "noise, every 16th channel of Q and K 8 times as large", query * loud, key * loud, value, 128**-0.5 / 8
    pipe, collect = load("embedded"), Collect()
    enable(pipe, collect, dense_steps=0, dense_layers=0)
    prompt = "a large red star moving right on a speckled background"
    text_to_video(pipe, prompt, frames=17, height=256, width=256, steps=8)
    for layer, call in sorted(collect.found.items()):
        yield f"embedded model, layer {layer}", *call


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the noise")
    parser.add_argument("--heads", type=int, default=4)
    options = parser.parse_args(argv)
    rows = [[name, *(f"{100 * error:.2f} %" for error in errors(query, key, value, scale))]
            for name, query, key, value, scale in activations(options.tokens, options.heads)]
    print(table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
