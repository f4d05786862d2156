"""Sparse attention between ranks: heads spread by cost (Ulysses), rows shared (ring), equal to one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dit_sparse import SparseProc
from dit_sparse.balance import HeadBalance, spread_heads, ulysses_degree
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.methods import build
from dit_sparse.operators import SkipBlocks
from dit_sparse.ring import Share, against
from tests.bridge.workers import run_two

ROOT = Path(__file__).resolve().parents[2]


def config(ulysses: int = 1, ring: int = 1, **more: bool) -> SimpleNamespace:
    names = {"ring_anything": False, "ulysses_anything": False}
    return SimpleNamespace(context_parallel_config=SimpleNamespace(ulysses_degree=ulysses, ring_degree=ring,
                                                                   **names | more))


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    for output in run_two("tests.bridge.parallel_worker", tmp_path, timeout=200):
        assert "ulysses: ok" in output and "ring: ok" in output


@pytest.mark.parametrize(("heads", "world"), [(2, 2), (6, 2), (40, 2), (40, 4), (24, 8), (12, 3)])
def test_heads_are_spread_evenly(heads: int, world: int) -> None:
    costs = torch.rand(5, heads, generator=torch.Generator().manual_seed(heads)).square()
    costs[1] = 1.0
    costs[2] = torch.arange(heads)
    order = spread_heads(costs, world)
    assert torch.equal(order.sort(1).values, torch.arange(heads).expand(5, -1)), "every head once"
    loads = costs.gather(1, order).unflatten(1, (world, -1)).sum(-1)
    assert (loads.amax(1) <= loads.mean(1) + costs.amax(1) / 2 + 1e-4).all()
    if heads >= 24:
        assert (loads.amax(1) / loads.mean(1)).max() < (1.02 if heads == 40 else 1.25)
    assert torch.equal(order, spread_heads(costs, world)), "all ranks find the same"


def test_heads_keep_their_place_while_they_remember_or_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    balance = HeadBalance()
    balance.world = 2
    x = torch.arange(4.0).reshape(1, 1, 4, 1)
    assert torch.equal(balance.place(0, x, False, 3), x), "the model's own order at first"
    theirs = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])  # of the other rank, for three layers

    def gather(found: torch.Tensor, mine: torch.Tensor, group: object) -> None:
        found.copy_(torch.cat((mine, theirs)))

    monkeypatch.setattr("dit_sparse.balance.all_gather", gather)
    balance._costs = torch.tensor([[5.0, 4.0], [5.0, 4.0], [0.0, 0.0]])
    balance._agree(lambda layer: layer == 0)
    assert balance._order.tolist() == [[0, 1, 2, 3], [0, 3, 1, 2], [0, 1, 2, 3]]
    moved = balance.place(1, x, False, 3)
    assert moved.flatten().tolist() == [0, 3, 1, 2] and torch.equal(balance.place(1, moved, True, 3), x)
    assert balance.heads(1, 2, torch.device("cpu")).tolist() == [0, 3]
    other = torch.randn(1, 3, 6, 2)
    assert torch.equal(balance.place(2, other, False, 3), other), "a layer with other heads keeps its order"
    assert "busiest rank" in balance.notes()[0]


def test_known_costs_fix_the_order() -> None:
    balance = HeadBalance()
    balance.world, balance.rank = 2, 1
    balance._fix(torch.tensor([[8.0, 7.0, 1.0, 1.0]]))
    x = torch.arange(4.0).reshape(1, 1, 4, 1)
    assert balance.place(0, x, False, 1).flatten().tolist() == [0, 3, 1, 2]
    held = balance.heads(0, 2, torch.device("cpu"))
    assert tuple(held.tolist()) == balance.host_heads(0) == (1, 2)


@pytest.mark.parametrize(("parallel", "degree"), [
    (None, 1), (config(2), 2), (config(1, 2), 1), (config(2, 2), 1), (config(2, ulysses_anything=True), 1)])
def test_degree_of_a_configuration(parallel: object, degree: int) -> None:
    assert ulysses_degree(parallel) == degree


@pytest.mark.parametrize(("method", "options", "parallel", "reason"), [
    ("svg", {}, None, ""), ("svg", {}, config(2), ""), ("sol", {}, config(1, 2), ""),
    ("svg", {}, config(2, 2), "leave ulysses_degree"), ("svg", {}, config(1, 2, ring_anything=True), "ring_anything"),
    ("adaspa", {}, config(2), "head_adaptive=False"), ("adaspa", {"head_adaptive": False}, config(2), ""),
    ("adaspa", {"head_adaptive": False}, config(1, 2), "whole dense calls"),
    ("twilight", {"density": 0.3}, config(2), "use p"), ("twilight", {}, config(2), ""),
    ("skip_softmax", {}, config(2), "fit"), ("skip_softmax", {"threshold": 1e-3}, config(2), ""),
    ("sparse_vdit", {}, config(2), "skip_share=0"), ("sparse_vdit", {"skip_share": 0.0}, config(2), ""),
    ("delta", {"inner": "adaspa"}, config(2), "head_adaptive=False"),
])
def test_what_cannot_be_spread_says_why(method: str, options: dict, parallel: object, reason: str) -> None:
    found = against(build(method, **options), parallel)
    assert reason in found if reason else not found
    assert "\n" not in found


def test_a_cache_that_looks_at_activations_is_refused() -> None:
    assert "first_block" in against(SparseProc("svg").method, config(2), "first_block")
    assert not against(SparseProc("svg").method, None, "first_block")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_all_rows_of_a_mask(world: int) -> None:
    layout = BlockLayout.raster(113, 16)
    keep = torch.rand(1, 2, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(0)) > 0.4
    mask = BlockMask.from_dense(keep, layout, layout)
    parts = [Share(rank, world).blocks(mask).to_dense() for rank in range(world)]
    assert torch.equal(torch.stack(parts).sum(0), mask.to_dense().long())
    x = torch.randn(1, 113, 2, 8)
    rows = [Share(rank, world).dense(x, lambda part: x[:, part]) for rank in range(world)]
    assert torch.equal(torch.stack(rows).sum(0), x)
    assert "needs more than its own rows" in Share(0, 2).refusal(SkipBlocks())
