"""Sol-Attn: numbers by hand, limits, order of the error, thresholds, compensation, densities; its way through a run."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

from dit_sparse import routing
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import inspect_method
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.reference import attention_reference, block_sparse_reference, soft_reference
from dit_sparse.kernels.soft import merge_means, soft_attention
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.sol import Sol, thresholds
from dit_sparse.operators import Drop, Soft
from dit_sparse.order import video_blocks
from dit_sparse.processor import SparseProc, enable, summary
from dit_sparse.report import summarize
from dit_sparse.routing import pool
from dit_sparse.scoring import pooled_moments, pooled_scores
from dit_sparse.selection import Rule
from dit_sparse.session import RunSession

FP64 = torch.float64
LN2 = math.log(2)


def test_by_hand() -> None:
    """Exact keys 0 and ln 2 with values 1 and 2; a soft block with keys ln 2 -+ .5 and values 3 and 5."""
    key = torch.tensor([0.0, LN2, LN2 - 0.5, LN2 + 0.5], dtype=FP64)[None, :, None, None]
    value = torch.tensor([1.0, 2, 3, 5], dtype=FP64)[None, :, None, None]
    query = torch.ones(1, 1, 1, 1, dtype=FP64)
    layouts = BlockLayout.raster(1, 2), BlockLayout.raster(4, 2)
    mask = BlockMask.from_dense(torch.tensor([[True, False]]), *layouts)
    out, lse = soft_reference(query, key, value, mask, 1.0, dtype=FP64)
    assert float(out) == pytest.approx(3.0, abs=1e-12) and float(lse.exp()) == pytest.approx(7.0, abs=1e-12)
    means = (x.unflatten(1, (2, 2)).mean(2).transpose(1, 2) for x in (key, value))
    out, lse = soft_attention(query, key, value, *means, mask, scale=1.0)
    assert float(out) == pytest.approx(3.0, abs=1e-6) and float(lse.exp()) == pytest.approx(7.0, abs=1e-5)
    dropped, _ = block_sparse_attention(query, key, value, mask, scale=1.0)
    assert float(dropped) == pytest.approx(5 / 3, abs=1e-6)
    true, _ = attention_reference(query, key, value, scale=1.0, dtype=FP64)
    assert float(true) == pytest.approx(3.3455, abs=1e-4)


# -- limits --------------------------------------------------------------------------------------------------------


def test_lowest_tau_is_dense(make_call) -> None:
    call = make_call(TokenGrid(4, 10, 25), head_dim=16)
    mask = Sol(tau=-1e9, block_size=64).plan(call).mask
    assert mask.token_mask().all()
    arguments = call.query, call.key, call.value
    got, _ = soft_reference(*arguments, mask, call.scale, dtype=FP64)
    want, _ = attention_reference(*arguments, scale=call.scale, dtype=FP64)
    torch.testing.assert_close(got, want, rtol=0, atol=4e-16)


def test_constant_keys_in_every_block_are_exact() -> None:
    """Nothing is lost then, whatever is listed (no forced blocks), with values at random."""
    key = torch.randn(1, 5, 2, 16, dtype=FP64).repeat_interleave(16, 1)[:, :70]
    query, value = (torch.randn(1, n, 2, 16, dtype=FP64) for n in (50, 70))
    layouts = BlockLayout.raster(50, 16), BlockLayout.raster(70, 16)
    nothing = BlockMask.from_dense(torch.zeros(4, 5, dtype=torch.bool), *layouts)
    some = BlockMask.from_dense(torch.rand(4, 5) < 0.4, *layouts)
    want = attention_reference(query, key, value, dtype=FP64)
    for mask in (nothing, some):
        for a, b in zip(soft_reference(query, key, value, mask, dtype=FP64), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-15)


def test_blocks_of_a_ragged_sequence() -> None:
    layout = Sol(block_size=64, order="raster").layout(TokenGrid(1, 25, 40))
    assert layout.blocks == 16 and int(layout.lengths[-1]) == 40
    for order in ("raster", "morton"):
        layout = Sol(block_size=64, order=order).layout(TokenGrid(21, 45, 80))
        assert layout.blocks == 1182 and int(layout.lengths[-1]) == 16


def test_forced_neighbours_alone(make_call) -> None:
    """At a tau that nothing reaches own block and neighbours are left: .2537 % of the blocks at 75,600 tokens."""
    call = make_call(TokenGrid(21, 45, 80), heads=1, head_dim=4)
    mask = Sol(tau=1e9, block_size=64).plan(call).mask
    assert float(mask.work().sum()) / 1182**2 == pytest.approx(0.002537, abs=1e-6)
    blocks = torch.arange(1182)
    assert torch.equal(mask.to_dense()[0, 0], (blocks[:, None] - blocks).abs() <= 1)


@pytest.mark.parametrize("constant, ratio", [(True, 4.0), (False, 2.0)], ids=["equal values", "values differ"])
def test_order_of_the_error(constant: bool, ratio: float) -> None:
    """All blocks soft, keys a mean with noise: half of it leaves 1/4 of the error, 1/2 if values differ."""
    generator = torch.Generator().manual_seed(0)
    blocks, size, dim = 32, 64, 16

    def random(tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, 1, dim, generator=generator, dtype=FP64)

    means, noise, query = random(blocks), random(blocks * size), random(64) / 2
    noise = noise - noise.unflatten(1, (blocks, size)).mean(2).repeat_interleave(size, 1)
    value = random(blocks).repeat_interleave(size, 1) if constant else random(blocks * size)
    layouts = BlockLayout.raster(64, size), BlockLayout.raster(blocks * size, size)
    mask = BlockMask.from_dense(torch.zeros(1, blocks, dtype=torch.bool), *layouts)
    errors = []
    for spread in (0.2, 0.1):
        key = means.repeat_interleave(size, 1) + spread * noise
        got, got_lse = soft_reference(query, key, value, mask, dtype=FP64)
        want, want_lse = attention_reference(query, key, value, dtype=FP64)
        assert (got_lse <= want_lse).all(), "the denominator is never over-estimated (Jensen)"
        errors.append(float((got - want).norm()))
    assert errors[0] / errors[1] == pytest.approx(ratio, abs=0.05)


# -- thresholds ----------------------------------------------------------------------------------------------------


def test_threshold_by_hand() -> None:
    """Mean keys +(1, 1) and -(1, 1), half each, scores in units of log 2."""
    key = torch.tensor([[1.0, 1], [1, 1], [-1, -1], [-1, -1]], dtype=FP64)[None, None]
    query = torch.tensor([[1.0, -1], [1, 1]], dtype=FP64)[None, None]
    scores = (query @ key.mT)[0, 0]
    exact, diag = (thresholds(query, key, LN2, 1.0, kind)[0, 0] / LN2 for kind in ("exact", "diag"))
    assert float(exact[0]) == pytest.approx(0.001, abs=1e-9) and float(diag[0]) == pytest.approx(1.41421, abs=1e-4)
    assert float(exact[1]) == pytest.approx(2.00000025, abs=1e-9)
    assert not (scores[1] > exact[1]).any()
    assert (scores[1] > diag[1]).tolist() == [True, True, False, False]


def test_moments_are_those_of_the_scores(make_call) -> None:
    """Both moments without the scores; blocks without keys do not count; a block's mean score is that of its means."""
    call = make_call(TokenGrid(3, 9, 17), batch=2, head_dim=16)
    blocks = BlockLayout.raster(call.grid.tokens, 32)
    key_mask = torch.rand(2, call.grid.tokens) < 0.7
    key_mask[1, 64:96] = False
    means = pool(call.query, blocks), pool(call.key, blocks, mask=key_mask)
    scores = pooled_scores(call.query, call.key, blocks, blocks, call.scale, key_mask=key_mask)
    real = torch.ones(2, 1, blocks.blocks, dtype=torch.bool)
    real[1, 0, 2] = False
    mean, variance = pooled_moments(*means, call.scale, real=real)
    for b in range(2):
        row = scores[b][..., real[b, 0]]
        torch.testing.assert_close(mean[b, ..., 0], row.mean(-1), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(variance[b, ..., 0], row.var(-1, correction=0), atol=1e-6, rtol=1e-4)
    channels = pooled_moments(*means, call.scale, real=real, diagonal=True)[1]
    spread = means[1][0].var(1, correction=0)
    want = (means[0][0].square() * spread[:, None]).sum(-1) * call.scale**2
    torch.testing.assert_close(channels[0, ..., 0], want, atol=1e-7, rtol=1e-4)
    columns = (call.query[:, :32].transpose(1, 2) @ means[1].mT * call.scale).mean(2)
    torch.testing.assert_close(columns, scores[:, :, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variance", ["diag", "exact"])
@pytest.mark.parametrize("order", ["morton", "tiles", "raster"])
def test_mask_is_the_formula(variance: str, order: str, make_call) -> None:
    """Block by block: score above the threshold, own block, a neighbour, or text."""
    grid = TokenGrid(3, 9, 11, text=40, text_at="front")
    call = make_call(grid, batch=2)
    mask = Sol(tau=0.3, variance=variance, order=order, block_size=32).plan(call).mask
    blocks, video = mask.query, video_blocks(mask.query, grid)
    scores = pooled_scores(call.query, call.key, blocks, blocks, call.scale)
    means = pool(call.query, blocks), pool(call.key, blocks)
    least = thresholds(*means, call.scale, 0.3, variance)
    got, seen = mask.to_dense(), 0
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, got.shape)).tolist():
        above = bool(scores[b, h, i, j] > least[b, h, i, 0])
        assert bool(got[b, h, i, j]) == (above or abs(i - j) <= 1 or max(i, j) >= video)
        seen += above
    assert seen
    token = blocks.token_of_slot
    assert set(token[token >= 0].tolist()) == set(range(grid.tokens))


def test_gaussian_scores_give_the_gaussian_density(make_call) -> None:
    for tau, density in ((1.0, 0.1587), (0.5, 0.3085)):
        mask = Sol(tau=tau, variance="exact", block_size=64).plan(make_call(TokenGrid(21, 45, 80), heads=1)).mask
        assert float(mask.density()) == pytest.approx(density + 0.002537 * (1 - density), abs=0.01)


def test_compensation_beats_dropping() -> None:
    """64 clusters of keys, each a block, queries near one of them."""
    generator = torch.Generator().manual_seed(0)
    dim, blocks, size = 64, 64, 64

    def random(tokens: int) -> torch.Tensor:
        return torch.randn(tokens, dim, generator=generator)

    centre = random(blocks)
    key = centre.repeat_interleave(size, 0) + random(blocks * size) / 2
    near = torch.randint(blocks, (blocks,), generator=generator).repeat_interleave(size)
    query, value = centre[near] + random(blocks * size) / 2, random(blocks).repeat_interleave(size, 0)
    value = value + random(blocks * size)
    query, key, value = (x[None, :, None] for x in (query, key, value))
    call = Call(query, key, value, TokenGrid(16, 16, 16), dim**-0.5)
    plan = Sol(variance="exact", order="raster", block_size=size).plan(call)
    want, want_lse = attention_reference(query, key, value)

    attend = functools.partial(block_sparse_attention, scale=call.scale)
    errors, lses = [], []
    for operator in (plan.operator, Drop()):
        out, lse = operator.run(call, plan.mask, attend)
        errors.append(float((out - want).norm() / want.norm()))
        lses.append(lse)
    assert float(plan.mask.density()) == pytest.approx(0.12, abs=0.01)
    assert errors[0] < 0.01 and errors[1] > 0.06
    assert (lses[1] <= lses[0]).all() and (lses[0] <= want_lse + 1e-5).all(), "never more mass than the true one"


# -- the method in a run -------------------------------------------------------------------------------------------


def _session(proc: SparseProc, grid: TokenGrid, step: int = 5) -> RunSession:
    session = RunSession(proc)
    session.layers = 3
    video = dataclasses.replace(grid, text=0)
    session.begin_forward(
        ForwardInfo(grid=video, reason="", step=step, num_steps=10, branch="cond", new_run=False, family="wan")
    )
    return session


@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(3, 9, 11),
        TokenGrid(1, 20, 23, text=5, text_at="back"),
        TokenGrid(5, 7, 13, text=40, text_at="front"),
        TokenGrid(1, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options", [{}, {"order": "tiles", "variance": "exact"}, {"soft": False}, {"density": 0.2}], ids=str
)
def test_run_equals_the_twin(grid: TokenGrid, options: dict, make_call) -> None:
    """A call of a run, with masked keys that are NaN, equals the twin of the operator; nothing falls back."""
    call = make_call(grid, batch=2, head_dim=16)
    key_mask = torch.rand(2, grid.tokens) < 0.8
    key_mask[:, grid.video // 2] = True
    call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
    session = _session(SparseProc("sol", block_size=32, strict=True, **options), grid)
    out = session.attention(1, call.query, call.key, call.value, key_mask[:, None, None], call.scale)
    plan = build("sol", block_size=32, **options).plan(dataclasses.replace(call, key_mask=key_mask))
    twin = soft_reference if options.get("soft", True) else block_sparse_reference
    want, _ = twin(call.query, call.key, call.value, plan.mask, call.scale, key_mask)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)
    found = summarize("sol", [session.report])
    assert found.sparse_calls == 1 and list(found.operators) == [plan.operator.title]


def test_remembered_masks_take_fresh_means(make_call) -> None:
    """With `refresh` the mask stays and the means are those of the call."""
    grid = TokenGrid(3, 9, 11)
    session = _session(SparseProc("sol", block_size=32, refresh=4, strict=True), grid)
    first, second = make_call(grid, head_dim=16), make_call(grid, head_dim=16, seed=1)
    session.attention(1, first.query, first.key, first.value, None, first.scale)
    out = session.attention(1, second.query, second.key, second.value, None, second.scale)
    assert session.report.records[1].reused
    mask = build("sol", block_size=32).plan(first).mask
    want, _ = soft_reference(second.query, second.key, second.value, mask, second.scale)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)


def test_means_are_pooled_once_per_call(make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def counting(x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        counted.append(x)
        return pool(x, *args, **options)

    monkeypatch.setattr("dit_sparse.methods.base.pool", counting)
    call = make_call(TokenGrid(3, 9, 11))
    plan = build("sol", block_size=32).plan(call)
    plan.operator.run(call, plan.mask, functools.partial(block_sparse_attention, scale=call.scale))
    assert [id(x) for x in counted] == [id(x) for x in (call.query, call.key, call.value)]


def test_planning_and_soft_blocks_never_wait(make_call, no_waiting) -> None:
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.8)
    method = build("sol")
    mask = method.plan(call).mask
    out, lse = torch.zeros_like(call.value), torch.zeros(2, 2, grid.tokens)
    with no_waiting():
        fresh = dataclasses.replace(call)
        plan = method.plan(fresh)
        plan.operator.run(fresh, mask, lambda query, _key, _value, mask, soft: merge_means(
            query, soft, Blocks.from_mask(mask, fresh.key_mask), out, lse, fresh.scale))


def test_embedded_model_on_an_odd_grid() -> None:
    """Through the pipeline: finite, sparse where it should be, and the summary says what is computed."""
    from dit_sparse.pipelines.load import load
    from dit_sparse.pipelines.text_to_video import text_to_video

    pipe = load("embedded", device="cpu")
    clips = []
    for soft in (True, False):
        enable(pipe, "sol", soft=soft, dense_steps=1, block_size=16, strict=True)
        shape = dict(height=80, width=112, frames=9, steps=2, guidance_scale=1.0)
        clips.append(text_to_video(pipe, "a red circle on a black background", **shape))
        found = summary(pipe)
        assert found.sparse_calls and not found.fallbacks and 0 < found.sparse_density < 1
        assert ("soft blocks" in str(found)) == soft and f"{found.density:.3f}" in str(found)
    assert all(clip.isfinite().all() for clip in clips) and not torch.equal(*clips)


# -- densities and options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(21, 45, 80),
        TokenGrid(9, 16, 16),
        TokenGrid(1, 64, 64),
        TokenGrid(13, 30, 45, text=226, text_at="front"),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["morton", "tiles"])
def test_density_is_near_the_asked_one(grid: TokenGrid, order: str, make_call) -> None:
    call = make_call(grid, heads=1, head_dim=4)
    for density in (0.15, 0.5):
        assert abs(float(Sol(density=density, order=order).plan(call).mask.density()) - density) <= 0.03


def test_inspect_says_what_is_soft() -> None:
    report = inspect_method("sol", TokenGrid(9, 16, 16))
    assert 0 < report.density < 1 and any("soft blocks" in note for note in report.notes)
    assert not any("soft" in note for note in inspect_method("sol", TokenGrid(9, 16, 16), {"soft": False}).notes)


def test_operator_is_an_option() -> None:
    call = Call(*torch.randn(3, 1, 60, 1, 8).unbind(0), TokenGrid(3, 4, 5), 0.3)
    assert Sol().plan(call).operator == Soft() and Sol(soft=False).plan(call).operator == Drop()
    assert build("rainfusion2").plan(call).operator == Drop()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tau": "1"}, "tau='1'"),
        ({"tau": math.nan}, "tau=nan"),
        ({"variance": "full"}, "diag, exact"),
        ({"density": 0}, "density=0"),
        ({"order": "hilbert"}, "morton, tiles, raster"),
        ({"soft": 1}, "True or False"),
        ({"block_size": 48}, "block_size=48"),
        ({"sigma": 1}, "tau, variance, density"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("sol", **options)
    assert "\n" not in str(caught.value)


def test_rules_with_near_blocks() -> None:
    """Near blocks take the first places of a top-k, and none with shares; kernels that cannot do it say so."""
    scores = torch.randn(1, 2, 6, 6)
    keep = Rule("top_k", 4, near=2).keep(scores)
    at = torch.arange(6)
    near = (at[:, None] - at).abs() < 2
    assert keep[:, :, near].all() and (keep.sum(-1) == 4).all()
    assert torch.equal(Rule("threshold", 99.0, near=2).keep(scores), near.expand_as(scores))
    with pytest.raises(ValueError, match="near=1"):
        Rule("top_p", 0.5, near=1)
    layouts = BlockLayout.raster(6 * 16, 16), BlockLayout.raster(7 * 16, 16)
    with pytest.raises(ValueError, match="near=2 needs as many query as key blocks"):
        routing.lists_of_scores(torch.randn(1, 2, 6, 7), *layouts, Rule("top_k", 4, near=2))
