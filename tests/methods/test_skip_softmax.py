"""Skip-softmax: its calibration, the filter in a run, carried lists; for the filter see tests/kernels/test_skip.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference, skip_reference
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build, family_options
from dit_sparse.methods.base import Call
from dit_sparse.operators_skip import TRIALS, CarryBlocks, Fit

GRID = TokenGrid(4, 9, 11, text=20, text_at="front")


def attend(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    return block_sparse_attention(*arguments)


def steps_of(make_call, seed: int = 0, count: int = 4, grid: TokenGrid = GRID) -> list[Call]:
    """Calls of one layer in consecutive steps, with frames whose scores lie apart."""
    memory, calls = Memory(), []
    for step in range(count):
        call = make_call(grid, seed=seed, head_dim=16, state=State(memory, (0, "cond"), step=step))
        height = torch.randn(grid.tokens // 32 + 1, generator=torch.Generator().manual_seed(seed))
        call.query[..., 0] = 8
        call.key[..., 0] += 2 * height.repeat_interleave(32)[: grid.tokens, None]
        calls.append(call)
    return calls


# -- calibration ---------------------------------------------------------------------------------------------------


def test_fit_finds_the_curve() -> None:
    """12 points of 5 exp(8 S); the threshold of target .5 at three lengths."""
    share = torch.linspace(0.12, 0.88, 12, dtype=torch.float64)
    fit = Fit.of(5 * (8 * share).exp(), share)
    assert fit.a == pytest.approx(5, rel=1e-6) and fit.b == pytest.approx(8, rel=1e-6)
    assert fit.r2 == pytest.approx(1) and (fit.low, fit.high) == (pytest.approx(0.12), pytest.approx(0.88))
    for keys, threshold, log2 in ((32760, 0.0083331, -6.907), (75600, 0.0036110, -8.113), (118800, 0.0022979, -8.765)):
        assert fit.threshold(0.5, keys) == pytest.approx(threshold, abs=1e-7)
        assert math.log2(fit.threshold(0.5, keys)) == pytest.approx(log2, abs=1e-3)
    assert fit.threshold(0.5, 1) == 1.0 and 5 * math.exp(4) == pytest.approx(272.991, abs=1e-3)


def test_fit_leaves_out_the_ends_and_refuses_too_few_points() -> None:
    share = torch.linspace(0.12, 0.88, 12, dtype=torch.float64)
    points = 5 * (8 * share).exp()
    wild = torch.cat((points, points.new_tensor([1e9, 1e-9]))), torch.cat((share, share.new_tensor([0.02, 0.97])))
    assert Fit.of(*wild).b == pytest.approx(8, rel=1e-6)
    for n, inside in ((9, share[:9]), (12, torch.cat((share[:2], torch.full((10,), 0.95, dtype=torch.float64))))):
        with pytest.raises(ValueError, match="too few"):
            Fit.of(points[:n], inside)


def test_trials() -> None:
    assert len(TRIALS) == 22 and TRIALS[0] == pytest.approx(0.99) and TRIALS[-1] == pytest.approx(1e-12)
    assert list(TRIALS) == sorted(TRIALS, reverse=True)


def test_first_call_measures_and_the_next_hits_the_target(make_call) -> None:
    grid = TokenGrid(8, 16, 32)
    method = build("skip_softmax", target=0.3, block_size=32)
    first, second = steps_of(make_call, count=2, grid=grid)
    plan = method.plan(first)
    out, lse = plan.operator.run(first, plan.mask, attend)
    want, want_lse = attention_reference(first.query, first.key, first.value)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    assert plan.operator.computed(first, plan.mask) == 1
    plan = method.plan(second)
    plan.operator.run(second, plan.mask, attend)
    assert float(plan.operator.computed(second, plan.mask)) == pytest.approx(0.85, abs=0.05)


def test_calibration_of_a_transformer_is_the_curve_of_its_counts(make_call) -> None:
    """One point per run and threshold: the mean over all calls; everything is computed meanwhile."""
    from dit_sparse.methods.skip_softmax import _Counter

    counter = _Counter(build("skip_softmax", block_size=32))
    calls = steps_of(make_call)[:2]
    for call in calls:
        plan = counter.plan(call)
        out, _ = plan.operator.run(call, plan.mask, attend)
        torch.testing.assert_close(out, attention_reference(call.query, call.key, call.value)[0], atol=1e-5, rtol=1e-4)
    assert [tokens for tokens, _ in counter.found] == [GRID.tokens] * 2
    for (_, shares), call in zip(counter.found, calls, strict=True):
        for j in (0, 1, 2):
            plan = build("skip_softmax", block_size=32, threshold=TRIALS[j]).plan(call)
            plan.operator.run(call, plan.mask, attend)
            left_out = 2 * (1 - plan.operator.computed(call, plan.mask))
            assert float(shares[j]) == pytest.approx(float(left_out), abs=1e-6)


def test_calibration_through_a_pipeline() -> None:
    from dit_sparse.methods.skip_softmax import calibrate
    from dit_sparse.pipelines.text_to_video import text_to_video
    from tests.tiny_wan import build_tiny_wan

    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        return text_to_video(pipe, "a red circle", seed=1, height=32, width=32, frames=5, steps=2, guidance_scale=1.0)

    before = run()
    # Random weights spread attention evenly: no threshold leaves out a tenth.
    with pytest.raises(ValueError, match="too few"):
        calibrate(pipe, run, block_size=16)
    with pytest.raises(ValueError, match="no self-attention call"):
        calibrate(pipe, lambda: None)
    with pytest.raises(ValueError, match="runs is empty"):
        calibrate(pipe)
    assert torch.equal(run(), before), "the pipeline is as it was"


# -- the filter in a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"threshold": 0.1}, {"scale_factor": 40.0}, {"fit": (5.0, 4.0), "target": 0.4}],
                         ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
def test_call_equals_the_twin(options: dict, masked: bool, make_call) -> None:
    call = steps_of(make_call)[0]
    if masked:
        key_mask = torch.rand(1, GRID.tokens) < 0.8
        call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
        call = dataclasses.replace(call, key_mask=key_mask)
    plan = build("skip_softmax", block_size=32, **options).plan(call)
    out, lse = plan.operator.run(call, plan.mask, attend)
    threshold = options.get("threshold", min(1, options.get("scale_factor", 5 * math.exp(1.6)) / GRID.tokens))
    want, want_lse, skipped = skip_reference(
        call.query, call.key, call.value, plan.mask, threshold, call.scale, call.key_mask)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    # Pairs that were left out count half.
    lengths = plan.mask.query.lengths
    pairs = lengths[:, None] * lengths[plan.mask.lists.long()]
    share = (skipped * pairs).sum((-2, -1)).double().mean() / GRID.tokens**2
    assert share > 0.05
    assert float(plan.operator.computed(call, plan.mask)) == pytest.approx(1 - float(share) / 2, abs=1e-6)


def test_density_of_a_run_counts_what_was_left_out_half(make_call) -> None:
    from dit_sparse.bridge import ForwardInfo
    from dit_sparse.processor import SparseProc
    from dit_sparse.report import summarize
    from dit_sparse.session import RunSession

    session = RunSession(SparseProc("skip_softmax", threshold=0.1, block_size=32, strict=True, dense_layers=0))
    session.layers = 1
    grid = dataclasses.replace(GRID, text=0)
    session.begin_forward(
        ForwardInfo(grid=grid, reason="", step=5, num_steps=10, branch="cond", new_run=False, family="wan"))
    call = steps_of(make_call)[0]
    session.attention(0, call.query, call.key, call.value, None, call.scale)
    found = summarize("skip_softmax", [session.report])
    assert found.sparse_calls == 1 and 0.5 < found.sparse_density < 0.99
    assert list(found.operators) == [build("skip_softmax").operator(GRID).title]


def test_recall_is_that_of_what_was_computed(make_call) -> None:
    """The filter does not ask the run's kernel; recall and error then come from what it returns."""
    from dit_sparse.eval.attention import attention_quality
    from dit_sparse.operators import SkipBlocks

    call = steps_of(make_call)[0]
    mask = build("skip_softmax", block_size=32).plan(call).mask
    found = [attention_quality(call.query, call.key, call.value, mask, call.scale,
                               operate=lambda m, a, t=t: SkipBlocks(t).run(call, m, a)) for t in (0.0, 0.01, 1.0)]
    assert (found[0].recall - 1).abs().max() < 1e-5 and (found[0].relative_error < 1e-5).all()
    assert (found[2].recall < found[1].recall).all() and (found[1].recall > 0.95).all()


# -- carried lists -------------------------------------------------------------------------------------------------


def test_carried_lists_are_nested_and_are_the_masks_of_the_next_step(make_call) -> None:
    method = build("skip_softmax", carry=True, threshold=2.0**-3, block_size=32)
    before = None
    for call in steps_of(make_call):
        call.query.mul_(1 + 0.3 * call.state.step)  # scores move from step to step
        plan = method.plan(call)
        kept = plan.mask.to_dense()
        left = CarryBlocks.carried(call, plan.mask.key.blocks)
        assert left is not None or kept.all()
        if before is not None:
            assert not (kept & ~before).any() and kept.sum() < before.sum() or call.state.step > 1
        text = plan.mask.query.blocks - 1
        assert kept[..., text, :].all() and kept[..., text].all(), "text stays"
        out, _ = plan.operator.run(call, plan.mask, attend)
        want, _ = attention_reference(call.query, call.key, call.value, plan.mask.token_mask())
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
        assert plan.operator.computed(call, plan.mask) == plan.mask.density()
        before = kept.expand(1, 2, -1, -1)
    assert before.float().mean() < 0.9


def test_carried_lists_begin_anew(make_call) -> None:
    """A threshold that nothing reaches keeps everything; `renew` steps later, and in a new run, the list is whole."""
    for call in steps_of(make_call):
        plan = build("skip_softmax", carry=True, threshold=1e-30, block_size=32).plan(call)
        plan.operator.run(call, plan.mask, attend)
        assert plan.mask.to_dense().all()
    whole = []
    method = build("skip_softmax", carry=True, threshold=2.0**-3, renew=2, block_size=32)
    for call in steps_of(make_call, count=5):
        plan = method.plan(call)
        plan.operator.run(call, plan.mask, attend)
        whole.append(bool(plan.mask.to_dense().all()))
    assert whole == [True, False, True, False, True]
    assert method.plan(steps_of(make_call)[3]).mask.to_dense().all(), "another run"


def test_carried_target_measures_first(make_call) -> None:
    method = build("skip_softmax", carry=True, target=0.4, block_size=32)
    densities = []
    for call in steps_of(make_call):
        plan = method.plan(call)
        plan.operator.run(call, plan.mask, attend)
        densities.append(float(plan.mask.density()))
    assert densities[:2] == [1, 1] and densities[2] < 0.9 and densities[3] <= densities[2]


@pytest.mark.parametrize("options", [{}, {"threshold": 0.1}, {"carry": True}], ids=str)
def test_nothing_waits(options: dict, make_call, no_waiting) -> None:
    method = build("skip_softmax", block_size=32, **options)
    first, *later = steps_of(make_call)
    plan = method.plan(first)
    plan.operator.run(first, plan.mask, attend)
    for call in later:
        call = dataclasses.replace(call, cached=first.cached)
        with no_waiting():
            plan = method.plan(call)
            plan.operator.run(call, plan.mask, attend)
            plan.operator.computed(call, plan.mask)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target": 1}, "target=1"),
        ({"threshold": 0}, "threshold=0"),
        ({"scale_factor": -1}, "scale_factor=-1"),
        ({"threshold": 0.1, "target": 0.5}, "target and threshold exclude"),
        ({"fit": (1.0, 2.0), "threshold": 0.1}, "fit and threshold exclude"),
        ({"fit": (1.0,)}, "two numbers"),
        ({"carry": 1}, "True or False"),
        ({"renew": 0}, "renew=0"),
        ({"first": "near"}, "own, list"),
        ({"block_size": 48}, "block_size=48"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("skip_softmax", **options)
    assert "\n" not in str(caught.value)


def test_family_defaults() -> None:
    assert family_options("skip_softmax", "wan") == {"target": 0.5, "dense_layers": 2}
