"""Twilight: the fewest candidates that hold the share, whatever method proposes them; estimates, densities, options."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.inner import inner_method
from dit_sparse.inspect import planted_call
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import block_sparse_reference
from dit_sparse.memory import State
from dit_sparse.methods import all_methods, build
from dit_sparse.methods.radial import Radial
from dit_sparse.methods.twilight import NO_CANDIDATE, Twilight, count_by_share, log_mass, share_of_count
from dit_sparse.operators import Soft
from dit_sparse.processor import SparseProc
from dit_sparse.routing import lists_of_scores
from dit_sparse.scoring import block_mass, keys_held
from dit_sparse.selection import Rule, blocks_holding
from dit_sparse.session import RunSession


def fewest(shares: list[float], p: float) -> set[int]:
    """The paper's rule: the smallest set whose shares add up to p, best first."""
    kept, held = set(), 0.0
    for j in sorted(range(len(shares)), key=lambda j: -shares[j]):
        if kept and held > p:
            break
        kept.add(j)
        held += shares[j]
    return kept


def by_threshold(weights: torch.Tensor, p: float) -> torch.Tensor:
    """The paper's search without a sort: the largest threshold whose weights still hold p, by halving."""
    low, high = 0.0, float(weights.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(weights[weights >= middle].sum()) >= p else (low, middle)
    return weights >= low


def _chosen(shares: torch.Tensor, p: float) -> torch.Tensor:
    """What the method's rule keeps of log shares: bool (n,)."""
    layout = BlockLayout.raster(shares.numel(), 1)
    mask = lists_of_scores(shares.log()[None, None, None], BlockLayout.raster(1, 1), layout,
                           Rule("top_p", p, softmax=True))
    return mask.to_dense()[0, 0, 0]


def test_the_paper_s_example() -> None:
    shares = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    assert _chosen(shares, 0.8).tolist() == [True, True, True, False, False]
    assert torch.equal(_chosen(shares, 0.8), by_threshold(shares, 0.8))


def test_sorted_and_searched_top_p_agree() -> None:
    for seed in range(20):
        shares = (torch.randn(113, generator=torch.Generator().manual_seed(seed)) * 2).softmax(-1)
        for p in (0.3, 0.85, 0.99):
            kept = _chosen(shares, p)
            assert torch.equal(kept, by_threshold(shares, p))
            assert set(kept.nonzero()[:, 0].tolist()) == fewest(shares.tolist(), p)


@pytest.mark.parametrize("inner", ["rainfusion2", "svg", "radial", "gna", "sol"])
@pytest.mark.parametrize("estimate", ["means", "tokens"])
def test_mask_is_the_formula(inner: str, estimate: str, make_call) -> None:
    """Row by row: the inner method's blocks, the softmax over those that hold no text, the fewest that hold p."""
    grid = TokenGrid(3, 9, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, head_dim=16, key_mask=torch.rand(2, grid.tokens) < 0.8)
    call.query.mul_(3)
    method = Twilight(p=0.6, inner=inner, estimate=estimate, block_size=32)
    proposed = method.selector().plan(dataclasses.replace(call, generator=torch.Generator().manual_seed(7))).mask
    mask = method.plan(dataclasses.replace(call, generator=torch.Generator().manual_seed(7))).mask
    text = blocks_holding(mask.query, 0, 40).expand(2, 2, -1)
    shape = (2, 2, mask.query.blocks, mask.key.blocks)
    candidates, got = proposed.to_dense().expand(shape), mask.to_dense().expand(shape)
    mass = log_mass(call, mask.query, mask.key, slice(None), estimate)
    fewer = 0
    for b, h, i in torch.cartesian_prod(*map(torch.arange, shape[:3])).tolist():
        row = candidates[b, h, i].nonzero()[:, 0].tolist()
        ranked = [j for j in row if not text[b, h, j]]
        if text[b, h, i]:
            want = set(row)
        else:
            shares = mass[b, h, i, ranked].double().softmax(-1).tolist()
            want = {ranked[k] for k in fewest(shares, 0.6)} | set(row) - set(ranked)
        assert set(got[b, h, i].nonzero()[:, 0].tolist()) == want
        fewer += len(row) - len(want)
    assert fewer > 0
    assert (mask.token_mask() <= proposed.token_mask()).all(), "boundary blocks are tested as the inner method asks"


def test_estimates(make_call) -> None:
    """Both are the log of the mass of the mean query, the means up to the spread of a block's keys."""
    grid = TokenGrid(2, 7, 9)
    call = make_call(grid, batch=2, head_dim=16, key_mask=torch.rand(2, grid.tokens) < 0.7)
    call.key_mask[1, 32:64] = False
    layout = BlockLayout.raster(grid.tokens, 32)
    mean = call.block_mean("query", layout)
    scores = mean @ call.key.permute(0, 2, 3, 1) * call.scale
    means, tokens = (log_mass(call, layout, layout, slice(None), kind) for kind in ("means", "tokens"))
    for b in range(2):
        for j, part in enumerate(torch.arange(grid.tokens).split(32)):
            real = part[call.key_mask[b, part]]
            assert keys_held(layout, call.key_mask)[b, 0, j] == pytest.approx(len(real), abs=1e-4)
            if not len(real):
                assert (means[b, :, :, j] < -1e29).all() and (tokens[b, :, :, j] < -1e29).all()
                continue
            torch.testing.assert_close(tokens[b, :, :, j], scores[b][..., real].logsumexp(-1), atol=1e-5, rtol=1e-4)
            want = scores[b][..., real].mean(-1) + torch.tensor(float(len(real))).log()
            torch.testing.assert_close(means[b, :, :, j], want, atol=1e-5, rtol=1e-4)
            assert (tokens[b, :, :, j] >= means[b, :, :, j] - 1e-5).all(), "Jensen"


def test_tokens_estimate_is_exact_when_queries_of_a_block_agree(make_call) -> None:
    grid = TokenGrid(4, 8, 8)
    call = make_call(grid, head_dim=16)
    call.query.copy_(call.query[:, ::32].repeat_interleave(32, 1) * 2)
    layout = BlockLayout.raster(grid.tokens, 32)
    exact = block_mass(call.query, call.key, layout, layout, call.scale)
    found = log_mass(call, layout, layout, slice(None), "tokens").softmax(-1)
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-4)
    mask = Twilight(p=0.7, inner="radial", estimate="tokens", block_size=32).plan(call).mask
    candidates = Radial(block_size=32).plan(call).mask.to_dense()
    held = (exact * mask.to_dense()).sum(-1) / (exact * candidates).sum(-1)
    assert (held > 0.7).all(), "every row holds the share"


def test_spread_heads_get_longer_lists() -> None:
    """A head that looks at its own frame, and one that looks nowhere in particular."""
    density = Twilight().plan(planted_call(TokenGrid(9, 16, 16))).mask.head_density()[0]
    assert density[0] < 0.15 and 0.4 < density[2] < 0.5


def test_share_one_keeps_all_candidates_and_p_is_monotone(make_call) -> None:
    call = make_call(TokenGrid(5, 9, 11, text=20, text_at="back"), head_dim=16)
    whole = Twilight(p=1.0, block_size=32)
    assert torch.equal(whole.plan(call).mask.to_dense(), whole.selector().plan(call).mask.to_dense())
    kept = [Twilight(p=p, block_size=32).plan(call).mask.to_dense() for p in (0.3, 0.6, 0.9)]
    assert (kept[0] <= kept[1]).all() and (kept[1] <= kept[2]).all() and kept[0].any(-1).all()


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(9, 16, 16), TokenGrid(1, 64, 64), TokenGrid(13, 20, 31, text=226, text_at="front")],
    ids=str,
)
@pytest.mark.parametrize("inner", ["rainfusion2", "sol", "svg"])
def test_density_is_near_the_asked_one(grid: TokenGrid, inner: str, make_call) -> None:
    call = make_call(grid, heads=3, head_dim=8)
    call.query[:, :, 0] *= 4
    forced = 1 - (grid.video / grid.tokens) ** 2
    for density in (0.15, 0.3):
        asked = max(density, forced + density / 2 * (1 - forced))
        got = Twilight(density=density, inner=inner).plan(call).mask
        assert abs(float(got.density()) - asked) <= 0.03


def test_share_of_a_count() -> None:
    """One share for rows of different peakedness, so that their lists together have the asked length."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 3, 40, 64, generator=generator) * torch.tensor([1.0, 3.0, 6.0])[:, None, None]
    scores[..., 50:] = NO_CANDIDATE
    pairs = torch.ones(40, 64, dtype=torch.int64)
    counts = count_by_share(scores, pairs)
    assert int(counts.sum()) == 3 * 40 * 50
    share = share_of_count(counts, 1200)
    layouts = BlockLayout.raster(40, 1), BlockLayout.raster(64, 1)
    work = lists_of_scores(scores, *layouts, Rule("top_p", share, softmax=True)).work()
    assert abs(int(work.sum()) - 1200) <= 12
    assert work[0, 0].float().mean() > 2 * work[0, 2].float().mean()
    assert float(share_of_count(counts, 3 * 40 * 50)) > 0.999


def test_run_equals_the_twin_and_keeps_the_operator(make_call) -> None:
    grid = TokenGrid(3, 9, 11, text=12, text_at="back")
    call = make_call(grid, batch=2, head_dim=16)
    session = RunSession(SparseProc("twilight", block_size=32, strict=True))
    session.layers = 3
    video = dataclasses.replace(grid, text=0)
    session.begin_forward(ForwardInfo(grid=video, reason="", step=5, num_steps=10, branch="", new_run=False,
                                      family="wan"))
    out = session.attention(1, call.query, call.key, call.value, None, call.scale)
    mask = build("twilight", block_size=32).plan(call).mask
    want, _ = block_sparse_reference(call.query, call.key, call.value, mask, call.scale)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)
    assert build("twilight", inner="sol").plan(call).operator == Soft()


@pytest.mark.parametrize("options", [{}, {"estimate": "tokens"}, {"density": 0.2}, {"inner": "svg"}], ids=str)
def test_planning_never_waits(options: dict, make_call, no_waiting) -> None:
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.8)
    method = build("twilight", **options)
    method.plan(call)
    with no_waiting():
        method.plan(dataclasses.replace(call)).mask.density()


def test_masks_that_are_more_than_lists_are_refused(make_call) -> None:
    class Levels(BlockMask):
        """Lists with something beside them."""

    call = make_call(TokenGrid(3, 7, 5))
    mask = build("rainfusion2").plan(call).mask
    parts = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}
    with pytest.raises(ValueError, match="a Levels is more than lists of blocks"):
        Twilight().prune(call, Levels(**parts))


@pytest.mark.parametrize("name", sorted(set(all_methods()) - {"dense", "twilight", "psa"}))
def test_every_method_can_propose(name: str) -> None:
    """A share of 1 gives the inner method's own output, whatever it computes for its masks."""
    call = planted_call(TokenGrid(5, 9, 11, text=20, text_at="back"))
    outs = []
    for method in (Twilight(inner=name, p=1.0, candidates=None), build(name)):
        now = dataclasses.replace(call, state=State(), generator=torch.Generator().manual_seed(0))
        plan = method.plan(now)
        outs.append(plan.operator.run(now, plan.mask, functools.partial(block_sparse_attention, scale=call.scale))[0])
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-5)


def test_inner_method_sees_dense_calls() -> None:
    """What the inner method keeps of calls that the schedule leaves dense is there at the first sparse one."""
    call = planted_call(TokenGrid(5, 9, 11))
    lse = torch.randn(*call.query.transpose(1, 2).shape[:3])
    Twilight(inner="adaspa").observe(call, call.value, lse)
    assert Twilight.observes and torch.equal(call.state.recall("lse"), lse)


def test_inner_method() -> None:
    assert inner_method("twilight", "svg", block_size=64, density=0.4) == build("svg", block_size=64, density=0.4)
    assert inner_method("twilight", Radial(decay=0.5)).decay == 0.5
    assert Twilight(candidates=None).selector() == build("rainfusion2")
    assert Twilight(density=0.4, block_size=32).selector() == build("rainfusion2", density=0.8, block_size=32)
    with pytest.raises(ValueError, match="window 9 .* does not fit the grid"):
        Twilight(inner=build("gna", window=(9, 9, 9)), candidates=None).check(TokenGrid(2, 3, 3))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"p": 0}, r"p=0 is not allowed; use a number in \(0, 1\]"),
        ({"p": 1.5}, "p=1.5"),
        ({"inner": "nope"}, "inner: unknown method 'nope'.*rainfusion2"),
        ({"inner": "dense"}, "inner='dense'"),
        ({"inner": "twilight"}, "inner='twilight'"),
        ({"inner": 3}, "inner=3"),
        ({"inner": "psa"}, "inner='psa' is not allowed; its masks are more than lists of blocks"),
        ({"candidates": 0}, "candidates=0"),
        ({"density": 2}, "density=2"),
        ({"inner": "radial", "density": 0.2}, "radial"),
        ({"estimate": "rows"}, "means, tokens"),
        ({"block_size": 48}, "block_size=48"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("twilight", **options)
    assert "\n" not in str(caught.value)
