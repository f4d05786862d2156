"""No two methods are the same under two names: what they keep differs on the attention of the included model."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import bridge
from dit_sparse.kernels.attention import dense_attention
from dit_sparse.memory import Memory, State
from dit_sparse.methods import all_methods, build
from dit_sparse.methods.base import Call
from dit_sparse.processor import SparseProc
from dit_sparse.session import RunSession

pytestmark = pytest.mark.slow

DENSITY, MOST = 0.25, 0.99
LAYER = 3  # of 8
# Pairs of methods that keep the same pairs of tokens, and what sets them apart.
ALIKE: dict[frozenset[str], str] = {
    frozenset({"gna", "delta"}): "delta takes the masks of gna by default, and corrects what they give",
}


class Recorder(RunSession):
    """Runs dense, and keeps the activations of one layer."""

    kept: Call | None = None

    def attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        grid, _ = self._grid_of(query, key)
        if layer == LAYER and grid is not None:
            activations = (x.clone() for x in (query, key, value))
            self.kept = Call(*activations, grid, scale, layer=layer, layers=self.layers, num_steps=10, branch="cond")
        return super().attention(layer, query, key, value, mask, scale)


@pytest.fixture(scope="module")
def captured() -> Call:
    """One attention call of the included model at a small size, at its first step."""
    from dit_sparse.pipelines.load import load
    from dit_sparse.pipelines.text_to_video import text_to_video

    pipe = load("embedded", device="cpu")
    (_, model, scheduler), *_ = bridge.transformers_of(pipe)
    recorder = Recorder(SparseProc("dense"))
    binding = bridge.bind(model, recorder, scheduler=scheduler)
    recorder.layers = sum(layer.index >= 0 for layer in binding.layers)
    text_to_video(pipe, "a red circle moves to the right on a blue background", frames=17, height=256, width=256,
                  steps=1, guidance_scale=1.0)
    binding.unbind()
    assert recorder.kept is not None
    return recorder.kept


def kept_pairs(name: str, call: Call) -> Tensor:
    """bool (H, R, L): what the method keeps of some rows at its second step; everything where it runs dense."""
    method = build(name)
    if "density" in {field.name for field in dataclasses.fields(method)}:
        method = method.at_density(DENSITY)
    store: dict[Any, Any] = {}

    def cached(key: Any, make: Any) -> Any:
        if key not in store:
            store[key] = make()
        return store[key]

    memory, mask = Memory(), None
    out, lse = dense_attention(call.query, call.key, call.value, scale=call.scale)
    for step in (0, 1):
        state = State(memory, (LAYER, "cond"), step=step, shape=call.grid)
        generator = torch.Generator().manual_seed(step)
        now = dataclasses.replace(call, step=step, cached=cached, state=state, generator=generator)
        if step == 0 and method.observes:
            method.observe(now, out, lse)
        mask = method.plan(now).mask
    heads, tokens = call.query.shape[2], call.grid.tokens
    rows = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:64]
    every = torch.ones(1, 1, tokens, tokens, dtype=torch.bool) if mask is None else mask.token_mask()
    pairs = every[0, :, rows].expand(heads, -1, -1)
    assert pairs.any(-1).all(), name
    return pairs


@pytest.fixture(scope="module")
def kept(captured: Call) -> dict[str, Tensor]:
    """What every method keeps."""
    return {name: kept_pairs(name, captured) for name in all_methods() if name != "dense"}


def agreement(a: Tensor, b: Tensor) -> float:
    """Pairs that both keep, of those that the one which keeps more keeps."""
    return float((a & b).sum() / torch.maximum(a.sum(), b.sum()))


def test_no_two_methods_keep_the_same(kept: dict[str, Tensor]) -> None:
    found = {frozenset(pair): agreement(*(kept[name] for name in pair)) for pair in itertools.combinations(kept, 2)}
    same = {pair for pair, value in found.items() if value > MOST}
    unexplained = sorted(" and ".join(sorted(pair)) for pair in same - set(ALIKE))
    assert not unexplained, f"these keep the same pairs: {', '.join(unexplained)}"
    assert not set(ALIKE) - same, "explained, but not alike"
