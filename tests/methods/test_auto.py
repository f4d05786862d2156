"""Budgets from sampled rows: the estimate against the truth, giving out blocks, the bound, the method in a run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse.bridge import ForwardInfo
from dit_sparse.eval.method_speed import comparable, own_options, takes_density
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.memory import State
from dit_sparse.methods import build
from dit_sparse.methods.auto import Auto, Sample, block_weight, budget_grid, lower_hull, sampled_positions, spread
from dit_sparse.methods.base import Call, Plan
from dit_sparse.methods.sol import Sol
from dit_sparse.operators import Drop, Soft
from dit_sparse.order import video_blocks
from dit_sparse.processor import SparseProc
from dit_sparse.session import RunSession

SPREADS = (0.5, 1.0, 2.0)  # of the keys in a cluster: heads from easy to hard


def planted(grid: TokenGrid, *, spreads: tuple[float, ...] = SPREADS, batch: int = 1, dim: int = 64, seed: int = 0,
            size: int = 64, dtype: torch.dtype = torch.float32) -> Call:
    """Clusters of keys, each a run of tokens, queries near one of them, values of a cluster with noise; one spread a
    head."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads = grid.tokens, len(spreads)
    clusters = -(-tokens // size)

    def random(n: int) -> torch.Tensor:
        return torch.randn(batch, n, heads, dim, generator=generator)

    def each(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(size, 1)[:, :tokens]

    centre, width = random(clusters), torch.tensor(spreads)[:, None]
    near = torch.randint(clusters, (clusters,), generator=generator)
    query = each(centre[:, near]) + random(tokens) * width
    key = each(centre) + random(tokens) * width
    value = each(random(clusters)) + random(tokens)
    store: dict[Any, Any] = {}

    def cached(name: Any, make: Any) -> Any:
        return store[name] if name in store else store.setdefault(name, make())

    query, key, value = (x.to(dtype) for x in (query, key, value))
    return Call(query, key, value, grid, dim**-0.5, cached=cached, generator=generator)


def every_row(call: Call, method: Auto) -> tuple[torch.Tensor, torch.Tensor]:
    """`Sample.errors` of all video rows."""
    blocks, counts, slots = method.static(call)
    weight = block_weight(call, blocks, method.soft)
    return Sample(call, blocks, video_blocks(blocks, call.grid), weight, slots, counts, method.soft).errors()


def true_errors(call: Call, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of every head's video rows, and their squared norm: (B, H) each."""
    attend = functools.partial(block_sparse_attention, scale=call.scale, key_mask=call.key_mask)
    out, _ = plan.operator.run(call, plan.mask, attend)
    want, _ = attention_reference(call.query.float(), call.key.float(), call.value.float(), scale=call.scale,
                                  key_mask=call.key_mask)
    rows = torch.zeros(1, call.grid.tokens, 1, 1)
    rows[:, call.grid.video_slice] = 1
    if call.key_mask is not None:
        rows = rows * call.key_mask[..., None, None]
    return (((out.float() - want) * rows).square().sum((1, 3)), (want * rows).square().sum((1, 3)))


def relative(call: Call, method: Any) -> float:
    """True relative error of a call under a method."""
    error, norm = true_errors(call, method.plan(call))
    return float((error.sum() / norm.sum()).sqrt())


# -- the estimate --------------------------------------------------------------------------------------------------


def test_sampled_rows_tell_the_error_of_all() -> None:
    """Planted clusters, densities .05, .15, .30: in 95 % of 400 draws 128 rows are within 48 % of all, 64 within 65 %,
    256 within 35 %."""
    call = planted(TokenGrid(16, 16, 16))
    method = Auto(order="raster", block_size=64)
    found = every_row(call, method)[0][0]  # [H, rows, G]
    grid = budget_grid(64)
    asked = [grid.index(n) for n in (4, 10, 20)]
    generator = torch.Generator().manual_seed(1)
    for rows, bound in ((64, 0.65), (128, 0.48), (256, 0.35)):
        drawn = torch.stack([found[:, sampled_positions(4096, rows, generator)].mean(1) for _ in range(400)])
        off = (drawn / found.mean(1) - 1).abs()[..., asked]
        assert (off.quantile(0.95, dim=0) <= bound).all(), (rows, off.quantile(0.95, dim=0))


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(5, 7, 9), TokenGrid(3, 9, 11, text=40, text_at="front"), TokenGrid(4, 8, 8, text=20, text_at="back"),
     TokenGrid(1, 7, 9)],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"soft": False}, {"order": "tiles"}, {"order": "raster"}], ids=str)
def test_estimate_on_all_rows_is_the_true_error(grid: TokenGrid, options: dict, make_call) -> None:
    """Odd grids, text, masked keys that hold NaN: the operator's own error, head by head, budget by budget."""
    call = make_call(grid, batch=2, heads=3, head_dim=16)
    key_mask = torch.rand(2, grid.tokens, generator=torch.Generator().manual_seed(0)) < 0.8
    key_mask[:, grid.video // 2] = True
    call = dataclasses.replace(call, query=call.query * torch.tensor([1.0, 3, 6])[:, None], key_mask=key_mask)
    call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
    method = Auto(block_size=16, rows=grid.tokens, density=0.4, **options)
    errors, norms = every_row(call, method)
    assert (errors[..., -1] == 0).all() and errors.isfinite().all() and (errors >= 0).all()
    counts = method.static(call)[1]
    plan = method.plan(call)
    assert isinstance(plan.operator, Soft if method.soft else Drop)
    for place in range(len(counts)):
        kept = call.state.recall("budget")
        call.state.keep("budget", kept | {"counts": torch.full((2, 3), int(counts[place]))})
        error, norm = true_errors(call, method.plan(call))
        torch.testing.assert_close(norms.sum(2), norm, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(errors[..., place].sum(2), error, rtol=1e-3, atol=1e-5)


def test_half_precision_gives_the_same_budgets() -> None:
    """bf16 products: every head's error within 5 % and 1e-4 of its norm of the one in float32."""
    grid = TokenGrid(4, 16, 16)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        call = planted(grid)
        rounded = {n: getattr(call, n).bfloat16().to(dtype) for n in ("query", "key", "value")}
        call = dataclasses.replace(call, **rounded)
        errors.append(Auto(block_size=32, rows=grid.tokens).estimate(call))
    torch.testing.assert_close(errors[1], errors[0], rtol=0.05, atol=1e-4)


def test_blocks_of_equal_keys_and_values_lose_nothing() -> None:
    call = planted(TokenGrid(8, 8, 8), size=32)
    equal = {n: getattr(call, n)[:, ::32].repeat_interleave(32, 1) for n in ("key", "value")}
    call = dataclasses.replace(call, **equal)
    errors, norms = every_row(call, Auto(order="raster", block_size=32))
    assert (errors.amax(-1) <= 1e-9 * norms + 1e-9).all()


def test_positions_are_one_of_each_stretch() -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, rows in ((1, 64), (63, 64), (64, 64), (113, 10), (75_600, 128)):
        found = sampled_positions(tokens, rows, generator)
        assert found.shape[0] == min(tokens, rows) and found.unique().shape == found.shape
        assert 0 <= int(found[0]) and int(found[-1]) < tokens
    assert budget_grid(1) == [1] and budget_grid(1182)[-1] == 1182 and len(budget_grid(591)) == 11


# -- giving out blocks ---------------------------------------------------------------------------------------------


def _greedy(errors: torch.Tensor, counts: list[int], blocks: int) -> list[int]:
    """One block after the other to the head whose next one lowers its error most, along convex curves."""
    curves = [np.interp(np.arange(counts[-1] + 1), counts, e.numpy()) for e in errors]
    found = [counts[0]] * len(curves)
    for _ in range(blocks - sum(found)):
        gains = [c[n] - c[n + 1] if n < counts[-1] else -1 for c, n in zip(curves, found, strict=True)]
        found[gains.index(max(gains))] += 1
    return found


def test_blocks_go_where_they_lower_the_error_most() -> None:
    counts = torch.tensor([1.0, 2, 4, 8, 20], dtype=torch.float64)
    errors = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(-1).flip(-1)
    errors = (errors - errors[..., -1:]) * torch.tensor([1.0, 1, 1, 1, 30])[:, None]
    hull = lower_hull(errors, counts)
    assert (hull <= errors + 1e-12).all() and (hull[..., -1] == 0).all()
    slopes = -hull.diff(dim=-1) / counts.diff()
    assert (slopes.diff(dim=-1) <= 1e-12).all(), "convex"
    for mean in (1.0, 3.4, 7.2, 12.0, 20.0):
        found = spread(errors, counts, mean=mean)
        for b in range(2):
            assert int(found[b].sum()) == pytest.approx(5 * mean, abs=1)
            best = _greedy(hull[b], [1, 2, 4, 8, 20], round(5 * mean))
            assert sum(abs(int(a) - n) for a, n in zip(found[b], best, strict=True)) <= 1


def test_bound_is_met_with_the_fewest_blocks() -> None:
    """Items of time: error {1: 0, .30: .01, .15: .04, .08: .16}, {... .05, .20, .45}, {... .002, .004, .01}."""
    counts = torch.tensor([8.0, 15, 30, 100], dtype=torch.float64)
    errors = torch.tensor([[[0.16, 0.04, 0.01, 0], [0.45, 0.20, 0.05, 0], [0.01, 0.004, 0.002, 0]]])
    before = 300
    for limit, most in ((0.0, 300), (0.02, 138), (0.05, 123), (0.1, 53), (0.25, 38), (0.62, 24), (9.0, 24)):
        found = spread(errors, counts, limit=torch.tensor([limit]))
        left = sum(np.interp(int(n), counts, e) for n, e in zip(found[0], errors[0], strict=True))
        assert left <= limit + 1e-6
        assert int(found.sum()) <= min(before, most + 1), "budgets between two of the grid only help"
        before = int(found.sum())


def _curves(seed: int, *, batch: int = 2, heads: int = 5) -> torch.Tensor:
    """Falling curves of unequal heads over `PULLED`."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(batch, heads, len(PULLED), generator=generator, dtype=torch.float64)
    errors = steps.cumsum(-1).flip(-1)
    return (errors - errors[..., -1:]) * torch.tensor([0.01, 0.3, 1, 3, 30], dtype=torch.float64)[:heads, None]


PULLED = torch.tensor([1.0, 2, 4, 8, 20, 40], dtype=torch.float64)
PULLS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize("mean", [1.0, 3.4, 7.2, 12.0, 40.0])
def test_a_pull_keeps_the_mean_and_brings_budgets_together(mean: float) -> None:
    """Towards the layer's mean curve: as many blocks in all, never further apart in their order, at 1 the same step of
    the grid for every head."""
    for seed in range(5):
        found = [spread(_curves(seed), PULLED, mean=mean, pull=pull) for pull in PULLS]
        for one in found:
            assert (one.sum(1) - 5 * mean).abs().max() <= 1 + 1e-9
        # At 1 a tie goes to one head after the other: no further apart than one step of the grid.
        place = torch.bucketize(found[-1].double(), PULLED)
        assert (place.amax(1) - place.amin(1)).max() <= 1
        apart = [float(one.double().std(1).mean()) for one in found]
        assert apart[-1] <= apart[3] <= apart[0] + 1e-9


def test_a_pull_keeps_the_bound() -> None:
    """The bound is on the heads' own errors: met at every pull, with no fewer blocks than without, and with more the
    tighter it is."""
    for seed in range(5):
        errors = _curves(seed)
        hull, whole = lower_hull(errors, PULLED), errors[..., 0].sum(1)
        for pull in PULLS:
            before = None
            for share in (1.1, 0.5, 0.2, 0.05, 0.01, 0.0):
                found = spread(errors, PULLED, limit=share * whole, pull=pull)
                for b in range(2):
                    left = sum(np.interp(int(n), PULLED, e) for n, e in zip(found[b], hull[b], strict=True))
                    assert left <= float(share * whole[b]) + 1e-6 * float(whole[b]), (seed, pull, share)
                assert (found.sum(1) + 5 >= spread(errors, PULLED, limit=share * whole).sum(1)).all(), "rounded up"
                assert before is None or (found >= before).all()
                before = found


def test_a_head_that_seems_to_lose_nothing_gets_a_share() -> None:
    """Whose sampled rows all fell on easy places: with a pull it has more than the least, for a number and a bound."""
    errors = torch.tensor([[[0.0, 0, 0, 0], [0.4, 0.1, 0.02, 0], [0.3, 0.1, 0.03, 0]]])
    counts = torch.tensor([2.0, 5, 10, 40], dtype=torch.float64)
    for kind in ({"mean": 8.0}, {"limit": torch.tensor([0.05])}):
        assert int(spread(errors, counts, **kind)[0, 0]) == 2
        pulled = spread(errors, counts, pull=0.25, **kind)[0]
        assert pulled[0] >= 5 and (pulled[1:] >= pulled[0]).all()


def test_a_pull_helps_where_estimates_are_rough() -> None:
    """Heads of error c / n with c from 1 to 4, each known to within a factor of about two: the true error, mean of 200
    draws, is lower with the default pull than without; with exact curves it is higher."""
    counts = torch.tensor(budget_grid(136), dtype=torch.float64)
    true = torch.tensor([1.0, 1.5, 2, 4], dtype=torch.float64)[:, None] * (1 / counts - 1 / counts[-1])

    def lost(errors: torch.Tensor, pull: float) -> float:
        found = spread(errors, counts, mean=20.0, pull=pull)
        place = true.expand(len(found), -1, -1)
        return float(np.mean([[np.interp(int(n), counts, e) for n, e in zip(b, c, strict=True)]
                              for b, c in zip(found, place, strict=True)]))

    noise = torch.randn(200, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(0.8).exp()
    assert lost(true * noise, Auto().pull) < 0.99 * lost(true * noise, 0.0)
    assert lost(true[None], 0.0) <= lost(true[None], Auto().pull) <= 1.05 * lost(true[None], 0.0)


def test_one_budget_alone() -> None:
    assert spread(torch.zeros(2, 3, 1), torch.tensor([1.0], dtype=torch.float64), mean=1.0).tolist() == [[1] * 3] * 2


# -- the method ----------------------------------------------------------------------------------------------------


def test_hard_heads_get_more_and_all_err_less() -> None:
    """At the same mean density the true error is below that of equal budgets; easy heads give to hard ones."""
    gains = []
    for seed in range(2):
        call = planted(TokenGrid(8, 16, 16), seed=seed, size=32, dim=32)
        method = Auto(density=0.15, order="raster", block_size=32)
        counts = method.budget(call)["counts"][0]
        assert counts[0] <= counts[1] < counts[2]
        plan = method.plan(call)
        assert float(plan.mask.density()) == pytest.approx(0.15, abs=0.01)
        assert torch.equal(plan.mask.work()[0, :, 5].long(), counts)
        kept = call.state.recall("budget")
        mean = torch.full_like(kept["counts"], round(float(counts.double().mean())))
        call.state.keep("budget", kept | {"counts": mean})
        equal = relative(call, method)
        call.state = State()
        gains.append(relative(call, method) / equal)
        assert relative(call, Sol(density=0.15, order="raster", block_size=32)) > gains[-1] * equal
    assert max(gains) < 0.9, gains


@pytest.mark.parametrize("bound", [0.05, 0.1, 0.2])
def test_bound_holds_on_average(bound: float) -> None:
    grid, method = TokenGrid(4, 16, 16), Auto(max_error=bound, block_size=32, rows=256)
    errors = [relative(planted(grid, seed=seed, size=32, dim=32), method) for seed in range(5)]
    assert sum(errors) / len(errors) <= 1.1 * bound, errors
    assert sum(errors) / len(errors) >= 0.25 * bound, "hardly more is bought than the bound asks"


def test_density_falls_as_the_bound_rises() -> None:
    found = []
    for bound in (0, 0.01, 0.05, 0.1, 0.2, 1):
        plan = Auto(max_error=bound, block_size=32).plan(planted(TokenGrid(4, 16, 16)))
        found.append(float(plan.mask.density()))
    assert found[0] == 1 and found == sorted(found, reverse=True) and found[-1] < 0.1


@pytest.mark.parametrize(
    "grid", [TokenGrid(9, 16, 16), TokenGrid(13, 30, 45, text=226, text_at="front"), TokenGrid(17, 32, 32)], ids=str
)
def test_density_is_near_the_asked_one(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, heads=2, head_dim=4)
    for density in (0.15, 0.3, 0.5):
        call.state = State()
        method = Auto(rows=8).at_density(density)
        assert float(method.plan(call).mask.density()) == pytest.approx(density, abs=0.03)


def test_what_else_is_in_the_batch_changes_nothing() -> None:
    grid = TokenGrid(4, 8, 9, text=10, text_at="back")
    both = planted(grid, batch=2, size=32)
    both.key[1] *= 3
    method = Auto(block_size=32)
    generator = torch.Generator()
    whole = method.plan(dataclasses.replace(both, generator=generator.manual_seed(5))).mask.to_dense()
    for b in range(2):
        one = {n: getattr(both, n)[b : b + 1] for n in ("query", "key", "value")}
        alone = dataclasses.replace(both, **one, state=State(), generator=generator.manual_seed(5))
        assert torch.equal(method.plan(alone).mask.to_dense()[0], whole[b])


def test_rows_are_those_of_the_seed() -> None:
    masks = []
    for seed in (0, 0, 1):
        call = dataclasses.replace(planted(TokenGrid(4, 16, 16)), generator=torch.Generator().manual_seed(seed))
        masks.append(Auto(block_size=32, rows=8).budget(call)["errors"])
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    call = dataclasses.replace(planted(TokenGrid(4, 16, 16)), generator=None)
    assert Auto(block_size=32).plan(call).mask is not None


def test_estimating_never_waits(make_call, no_waiting) -> None:
    """Also at the steps that renew the estimate, with a bound and with a density."""
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.8)
    for method in (Auto(), Auto(density=0.3), Auto(soft=False, order="tiles")):
        method.plan(dataclasses.replace(call, state=State()))
        fresh = dataclasses.replace(call, state=State())
        with no_waiting():
            plan = method.plan(fresh)
            plan.mask.density()


def test_few_heads_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    call, masks = planted(TokenGrid(4, 16, 16), batch=2), []
    for numbers in (2**26, 500):
        monkeypatch.setattr("dit_sparse.scoring._NUMBERS_AT_ONCE", numbers)
        fresh = dataclasses.replace(call, state=State(), generator=torch.Generator().manual_seed(0))
        masks.append(Auto(block_size=32).plan(fresh).mask.to_dense())
    assert torch.equal(*masks)


def test_estimates_are_renewed_and_averaged(make_call) -> None:
    """Estimates at the first sparse step and five steps later; in between budgets stay and masks follow the call."""
    grid = TokenGrid(3, 9, 11)
    session = RunSession(SparseProc("auto", block_size=16, rows=8, density=0.4, strict=True))
    session.layers, budgets = 3, []
    for step in range(2, 9):
        session.begin_forward(
            ForwardInfo(grid=grid, reason="", step=step, num_steps=10, branch="cond", new_run=step == 2, family="wan")
        )
        call = make_call(grid, head_dim=16, seed=step)
        session.attention(1, call.query, call.key, call.value, None, call.scale)
        (place,) = [key for key in session.memory.keys() if key[1] == "budget"]
        budgets.append(session.memory.get(place, step=step, max_age=10, shape=grid))
    assert all(b is budgets[0] for b in budgets[:5]) and budgets[5] is not budgets[0] and budgets[6] is budgets[5]
    assert not torch.equal(budgets[5]["errors"], budgets[0]["errors"])
    assert all(record.kind == "sparse" for record in session.report.records)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_error": -0.1}, ["max_error=-0.1", "[0, 1]"]),
        ({"max_error": 2}, ["max_error=2"]),
        ({"max_error": None}, ["max_error=None"]),
        ({"density": 0}, ["density=0", "(0, 1]"]),
        ({"soft": 1}, ["soft=1", "True or False"]),
        ({"rows": 0}, ["rows=0", ">= 1"]),
        ({"pull": 1.5}, ["pull=1.5", "[0, 1]"]),
        ({"every": 2.5}, ["every=2.5"]),
        ({"order": "hilbert"}, ["order='hilbert'", "morton"]),
        ({"block_size": 48}, ["block_size=48"]),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        build("auto", **options)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_it_takes_part_in_the_comparison_of_methods() -> None:
    assert "auto" in comparable() and takes_density("auto")
    assert own_options("auto") == {"max_error": 0.05}
    build("auto", **own_options("auto"))
