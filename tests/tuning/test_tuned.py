"""The method that runs a plan: a mixture of heads equals running each head alone."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference, soft_reference
from dit_sparse.methods import all_methods
from dit_sparse.methods.base import Call
from dit_sparse.methods.tuned import HeadGroups, PresetMismatch, Tuned, candidate_layout, kept_blocks
from dit_sparse.tuning.candidates import DENSE, Candidate, candidates_of, patterns_of
from dit_sparse.tuning.headplan import HeadPlan
from tests.waits import Waits

KINDS = (DENSE, Candidate("drop", "tile", 0.2), Candidate("soft", "tile", 0.3), Candidate("band", "morton", 0.4),
         Candidate("soft", "morton", 0.15), Candidate("drop", "tile", 0.6), Candidate("spread", "tile", 0.15),
         Candidate("spread", "morton", 0.3), Candidate("band", "tile", 0.1))
GRIDS = [TokenGrid(5, 7, 9), TokenGrid(5, 7, 9, text=11, text_at="back"), TokenGrid(3, 8, 8, text=5, text_at="front")]


def one_layer(*heads: int, kinds: tuple[Candidate, ...] = KINDS, **options: Any) -> Tuned:
    return Tuned(HeadPlan(kinds, (0, 10), np.array([[heads]], dtype=np.uint8)), **options)


def call_of(grid: TokenGrid, heads: int, batch: int = 2) -> Call:
    generator = torch.Generator().manual_seed(0)
    qkv = (torch.randn(batch, grid.tokens, heads, 16, generator=generator) for _ in range(3))
    store: dict[Any, Any] = {}

    def cached(name: Any, make: Any) -> Any:
        return store[name] if name in store else store.setdefault(name, make())

    return Call(*qkv, grid, 0.25, num_steps=10, cached=cached)


def run(method: Tuned, call: Call) -> tuple[torch.Tensor, torch.Tensor, float]:
    plan = method.plan(call)
    assert plan.mask is not None
    out, lse = plan.operator.run(call, plan.mask, functools.partial(block_sparse_attention, scale=call.scale))
    return out, lse, float(plan.operator.computed(call, plan.mask))


def alone(call: Call, head: int) -> Call:
    return Call(*(x[:, :, head : head + 1] for x in (call.query, call.key, call.value)), call.grid, call.scale,
                num_steps=10)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_mixture_equals_each_head_alone(grid: TokenGrid) -> None:
    call = call_of(grid, len(KINDS))
    out, lse, density = run(one_layer(*range(len(KINDS))), call)
    densities = [1.0]
    for head in range(1, len(KINDS)):
        want, want_lse, one = run(one_layer(head), alone(call, head))
        assert torch.allclose(out[:, :, head], want[:, :, 0], atol=1e-6, rtol=0)
        assert torch.allclose(lse[:, head], want_lse[:, 0], atol=1e-5, rtol=0)
        densities.append(one)
    assert density == pytest.approx(sum(densities) / len(densities), abs=1e-6)
    dense, _ = attention_reference(call.query[:, :, :1], call.key[:, :, :1], call.value[:, :, :1],
                                   torch.ones(1, 1, grid.tokens, grid.tokens, dtype=torch.bool), call.scale, None)
    assert torch.allclose(out[:, :, :1], dense, atol=1e-6)


def test_a_band_of_one_width_stands_beside_ranked_heads() -> None:
    """Lists that all of its heads share are spread over them."""
    call = call_of(TokenGrid(5, 7, 9), 4)
    kinds = (1, 8, 6, 8)  # drop, band, spread, band, all in tiles
    out, _, _ = run(one_layer(*kinds), call)
    for head, kind in enumerate(kinds):
        assert torch.allclose(out[:, :, head], run(one_layer(kind), alone(call, head))[0][:, :, 0], atol=1e-6, rtol=0)


def test_heads_agree_with_the_twins() -> None:
    call = call_of(TokenGrid(5, 7, 9), 1)
    for head in range(1, len(KINDS)):
        method = one_layer(head)
        out, _, _ = run(method, call)
        plan = method.plan(call)
        assert plan.mask is not None
        if KINDS[head].pattern in ("soft", "spread"):
            want, _ = soft_reference(call.query, call.key, call.value, plan.mask, call.scale)
        else:
            want, _ = attention_reference(call.query, call.key, call.value, plan.mask.token_mask(), call.scale, None)
        assert torch.allclose(out, want.to(out.dtype), atol=1e-5)


def test_every_head_keeps_as_many_blocks_as_it_was_given() -> None:
    grid = TokenGrid(5, 7, 9)
    plan = one_layer(1, 5, 0).plan(call_of(grid, 3))
    assert isinstance(plan.operator, HeadGroups) and len(plan.operator.groups) == 1
    assert plan.mask is not None
    blocks = candidate_layout(grid, "tile")
    want = [kept_blocks(KINDS[i], blocks, grid) for i in (1, 5, 0)]
    assert want[2] == blocks.blocks
    assert [set(row.tolist()) for row in plan.mask.work()[0]] == [{n} for n in want]


def test_nothing_waits_for_the_device() -> None:
    call = call_of(TokenGrid(5, 7, 9), len(KINDS))
    method = one_layer(*range(len(KINDS)))
    method.plan(call)
    fresh = Call(call.query, call.key, call.value, call.grid, call.scale, num_steps=10, cached=call.cached)
    with Waits():
        plan = method.plan(fresh)
        assert plan.mask is not None
        plan.operator.density(plan.mask)


def test_all_dense_heads_leave_the_call_dense() -> None:
    assert one_layer(0, 0).plan(call_of(TokenGrid(2, 4, 4), 2)).mask is None


def test_the_step_decides_the_bucket() -> None:
    plan = HeadPlan(KINDS, (0, 2, 5, 8, 15, 20), np.zeros((5, 1, 1), dtype=np.uint8))
    assert [plan.bucket_of(s, 20) for s in (0, 1, 2, 4, 5, 8, 14, 15, 19)] == [0, 0, 1, 1, 2, 3, 3, 4, 4]
    assert [plan.bucket_of(s, 40) for s in (0, 3, 4, 9, 10, 39)] == [0, 0, 1, 1, 2, 4]


def test_a_wrong_place_is_refused() -> None:
    call = call_of(TokenGrid(2, 4, 4), 2)
    with pytest.raises(ValueError, match="1 layers of 3 heads, not 1 of 2"):
        one_layer(1, 1, 1).plan(call)
    two = HeadPlan(KINDS, (0, 1, 2), np.ones((2, 1, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="num_steps="):
        Tuned(two).plan(Call(call.query, call.key, call.value, call.grid, call.scale))


def test_another_grid_is_carried_over_or_refused() -> None:
    method = one_layer(1, 2, grid=(5, 7, 9))
    exact, near, far = TokenGrid(5, 7, 9), TokenGrid(4, 7, 9), TokenGrid(2, 7, 9)
    assert method.remarks(exact, 10) == [] and "transferred" in method.remarks(near, 10)[0]
    assert "mapped to 20" in method.remarks(exact, 20)[0]
    assert [c.density for c in method.chosen(call_of(near, 2))] == [0.3, 0.4]  # the next larger budgets
    with pytest.raises(PresetMismatch, match="5x7x9 .* not 2x7x9 .* dit-sparse tune"):
        method.plan(call_of(far, 2))
    assert method.remarks(far, 10) == []


def test_denser_ends_at_dense() -> None:
    plan = one_layer(0, 1, 5).table.denser()
    assert [str(c) for c in plan.of(0, 0)] == ["dense", "drop 0.3 (tile)", "dense"]


def test_it_is_in_no_list() -> None:
    assert "tuned" not in all_methods()


def test_candidates_are_checked() -> None:
    for wrong in ({"pattern": "blur"}, {"pattern": "drop", "order": "snake"}, {"pattern": "soft", "density": 0},
                  {"pattern": "dense", "density": 0.5}):
        with pytest.raises(ValueError, match="is not allowed"):
            Candidate(**wrong)
    found = candidates_of(("soft", "drop"), ("tile",), (0.2, 0.1, 1.0))
    assert [str(c) for c in found] == ["dense", "soft 0.1 (tile)", "soft 0.2 (tile)", "drop 0.1 (tile)",
                                       "drop 0.2 (tile)"]
    assert patterns_of("auto") == ("drop", "soft", "spread", "band") and patterns_of(["soft", "dense"]) == ("soft",)
    with pytest.raises(ValueError, match="leaves nothing sparse"):
        patterns_of("dense")
    with pytest.raises(ValueError, match="patterns='sof'"):
        patterns_of("sof")
