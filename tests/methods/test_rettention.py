"""Re-ttention: the windows' counts, the share and the residual, equal and changed input, the schedule."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build, family_options
from dit_sparse.methods.base import Call
from dit_sparse.methods.rettention import Rettention
from dit_sparse.operators import scale_and_add
from dit_sparse.operators_statistics import MeasureShare, ReuseShare
from dit_sparse.processor import SparseProc
from dit_sparse.report import summarize
from dit_sparse.session import RunSession


def _attend(call: Call) -> functools.partial:
    return functools.partial(block_sparse_attention, scale=call.scale, key_mask=call.key_mask)


def _paper_mask(grid: TokenGrid, width: int) -> Tensor:
    """bool (tokens, tokens), as the authors' code builds it: one window in a frame, repeated for all; text kept."""
    frame = torch.arange(grid.frame_tokens)
    one = (frame[:, None] - frame).abs() <= width // 2
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    mask[grid.video_slice, grid.video_slice] = one.repeat(grid.frames, grid.frames)
    return mask


def _random_mask(tokens: int, heads: int = 2) -> BlockMask:
    blocks = BlockLayout.from_order(torch.randperm(tokens), 16)
    keep = torch.rand(1, heads, blocks.blocks, blocks.blocks) < 0.3
    return BlockMask.from_dense(keep | torch.eye(blocks.blocks, dtype=torch.bool), blocks, blocks)


# -- masks ---------------------------------------------------------------------------------------------------------


def test_published_counts() -> None:
    image = Rettention(mask="tokens").build(TokenGrid(1, 64, 64))
    assert float(image.density()) == pytest.approx(0.031246, abs=1e-6)
    grid = TokenGrid(13, 30, 45, text=226, text_at="front")
    video = Rettention(mask="tokens").build(grid)
    assert float(video.density()) == pytest.approx(0.05607, abs=1e-5)
    rows = (float(video.density()) * grid.tokens**2 - 226 * grid.tokens) / (grid.video * grid.tokens)
    assert rows == pytest.approx(0.0439, abs=1e-4)


@pytest.mark.parametrize(
    "grid", [TokenGrid(1, 9, 14), TokenGrid(3, 7, 9, text=5, text_at="front"),
             TokenGrid(4, 5, 5, text=9, text_at="back")], ids=str)
def test_window_is_that_of_the_paper(grid: TokenGrid) -> None:
    """Exact to the token, or covered by whole blocks: then every key of a touched block is seen."""
    want = _paper_mask(grid, int(grid.frame_tokens * 0.2))
    exact = Rettention(window=0.2, mask="tokens", block_size=16).build(grid)
    assert torch.equal(exact.token_mask()[0, 0], want)
    whole = Rettention(window=0.2, block_size=16).build(grid)
    blocks = whole.query
    token = blocks.token_of_slot.reshape(-1, 16)
    for i, j in torch.cartesian_prod(*2 * [torch.arange(blocks.blocks)]).tolist():
        rows, columns = token[i][token[i] >= 0], token[j][token[j] >= 0]
        assert bool(whole.to_dense()[0, 0, i, j]) == bool(want[rows][:, columns].any())


@pytest.mark.parametrize(
    "grid", [TokenGrid(21, 30, 52), TokenGrid(13, 30, 45, text=226, text_at="front"), TokenGrid(9, 16, 16),
             TokenGrid(1, 64, 64)], ids=str)
@pytest.mark.parametrize("mask", ["blocks", "tokens"])
def test_density_is_near_the_asked_one(grid: TokenGrid, mask: str) -> None:
    for density in (0.15, 0.25, 0.5):
        assert abs(float(Rettention(density=density, mask=mask).build(grid).density()) - density) <= 0.03


# -- share and residual --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_measured_step_is_dense_and_can_be_put_together(dtype: torch.dtype, tolerance: float, make_call) -> None:
    grid = TokenGrid(3, 7, 9)
    call = make_call(grid, batch=2, head_dim=16)
    call = Call(*(x.to(dtype) for x in (call.query, call.key, call.value)), grid, call.scale)
    mask = _random_mask(grid.tokens)
    out, lse = MeasureShare().run(call, mask, _attend(call))
    full = [x.float() for x in (call.query, call.key, call.value)]
    want, want_lse = attention_reference(*full, scale=call.scale)
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, want_lse, atol=max(tolerance, 1e-4), rtol=tolerance)
    share, residual = call.state.recall("share"), call.state.recall("residual")
    weights = torch.einsum("bqhd,bkhd->bhqk", *full[:2]).mul(call.scale).softmax(-1)
    torch.testing.assert_close(share, (weights * mask.token_mask()).sum(-1), atol=1e-5 if dtype == torch.float32
                               else tolerance, rtol=tolerance)
    dropped = torch.einsum("bhqk,bkhd->bqhd", weights * ~mask.token_mask(), full[2])
    torch.testing.assert_close(residual.float(), dropped, atol=tolerance, rtol=tolerance)
    assert residual.dtype == dtype
    again, again_lse = ReuseShare().run(call, mask, _attend(call))
    torch.testing.assert_close(again.float(), out.float(), atol=2 * tolerance, rtol=tolerance)
    torch.testing.assert_close(again_lse, lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [TokenGrid(5, 7, 9), TokenGrid(3, 11, 31, text=17, text_at="front")], ids=str)
def test_half_precision_costs_no_more_than_in_dense_attention(grid: TokenGrid, dtype: torch.dtype, make_call) -> None:
    """With the same input as when it was measured: at most twice the error of PyTorch's own attention in the dtype."""
    call = make_call(grid, head_dim=32)
    call = Call(*(x.to(dtype) for x in (call.query, call.key, call.value)), grid, call.scale)
    mask = Rettention(density=0.3, block_size=32).build(grid)
    MeasureShare().run(call, mask, _attend(call))
    out, _ = ReuseShare().run(call, mask, _attend(call))
    want, _ = attention_reference(*(x.float() for x in (call.query, call.key, call.value)), scale=call.scale)
    rows = [x.transpose(1, 2) for x in (call.query, call.key, call.value)]
    plain = torch.nn.functional.scaled_dot_product_attention(*rows, scale=call.scale).transpose(1, 2)
    assert (out.float() - want).norm() <= 2 * (plain.float() - want).norm()


@pytest.mark.parametrize("lam", [0.0, 0.04, 0.3])
def test_steps_with_the_same_input(lam: float, make_call) -> None:
    """The n-th sparse step differs by n * lam * O_M; from a share of 1 on nothing grows."""
    grid, memory = TokenGrid(1, 12, 13), Memory()
    method = Rettention(window=0.1, lam=lam, block_size=16)
    mask = method.build(grid)
    call = make_call(grid, head_dim=16)
    dense, _ = attention_reference(call.query, call.key, call.value, scale=call.scale)
    sparse, sparse_lse = attention_reference(call.query, call.key, call.value, mask.token_mask(), call.scale)
    for step in range(5):
        now = dataclasses.replace(call, step=step, state=State(memory, (0, "cond"), step=step))
        plan = method.plan(now)
        assert isinstance(plan.operator, ReuseShare if step else MeasureShare)
        out, _ = plan.operator.run(now, plan.mask, _attend(now))
        if step == 0:
            torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
            share = now.state.recall("share")
            continue
        grown = (share + lam * (step - 1)).clamp(max=1) - share
        want = dense + grown.transpose(1, 2)[..., None] * sparse
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert lam < 0.3 or bool((share + lam * 3 > 1).any())


def test_statistics_beat_residuals_beat_plain_windows() -> None:
    """Gaussian activations of 256 tokens, a window of 17, everything perturbed by a tenth."""
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, 3, 1, 256, 4, 32, generator=generator)
    grid, memory = TokenGrid(1, 16, 16), Memory()
    method = Rettention(window=17 / 256, mask="tokens", block_size=16, lam=0.0)
    calls = [Call(*x.unbind(0), grid, 32**-0.5, step=i, state=State(memory, 0, step=i))
             for i, x in enumerate((first, first + 0.1 * noise))]
    outs = []
    for call in calls:
        plan = method.plan(call)
        outs.append(plan.operator.run(call, plan.mask, _attend(call))[0])
    assert float(method.build(grid).work().sum()) > 0 and method.reach(grid, plan.mask.query) == 8
    dense = [attention_reference(c.query, c.key, c.value, scale=c.scale)[0] for c in calls]
    sparse = [_attend(c)(c.query, c.key, c.value, plan.mask)[0] for c in calls]

    def error(out: Tensor) -> float:
        return float((out - dense[1]).abs().sum() / dense[1].abs().sum())

    plain, residual, both = error(sparse[1]), error(sparse[1] + dense[0] - sparse[0]), error(outs[1])
    assert plain == pytest.approx(3.2, abs=0.3) and residual == pytest.approx(0.5, abs=0.1)
    assert both == pytest.approx(0.15, abs=0.05)


def test_masked_keys_and_rows_without_keys(make_call) -> None:
    """NaN behind the key mask never gets in; rows whose window holds masked keys only live on the residual."""
    grid, memory = TokenGrid(1, 12, 13, text=6, text_at="back"), Memory()
    key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
    key_mask[0, :80] = False
    key_mask[1, -3:] = False
    made = make_call(grid, batch=2, head_dim=16)
    made.key[~key_mask], made.value[~key_mask] = torch.nan, torch.nan
    method = Rettention(window=0.1, lam=0.0, mask="tokens", block_size=16)
    want, _ = attention_reference(made.query, made.key.nan_to_num(), made.value, scale=made.scale, key_mask=key_mask)
    for step in range(3):
        call = dataclasses.replace(made, key_mask=key_mask, step=step, state=State(memory, 0, step=step))
        plan = method.plan(call)
        out, _ = plan.operator.run(call, plan.mask, _attend(call))
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    nothing = torch.zeros(2, grid.tokens, dtype=torch.bool)
    call = dataclasses.replace(made, key_mask=nothing, state=State())
    out, _ = MeasureShare().run(call, plan.mask, _attend(call))
    assert (out == 0).all() and call.state.recall("residual").isfinite().all()


def test_scaled_sums_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_sparse.operators._NUMBERS_AT_ONCE", 2 * 3 * 4 * 7)
    out, addend = torch.randn(2, 2, 45, 3, 4).to(torch.bfloat16).unbind(0)
    factor = torch.rand(2, 3, 45)
    want = out.float() * factor.transpose(1, 2)[..., None] + addend.float()
    got = scale_and_add(out.clone(), lambda rows: (factor[..., rows], addend[:, rows]))
    assert torch.equal(got, want.to(torch.bfloat16))


# -- steps of a run ------------------------------------------------------------------------------------------------


def _run(session: RunSession, call: Call, grid: TokenGrid, steps: list[int], num_steps: int, new: bool = True) -> None:
    for i, step in enumerate(steps):
        for branch in ("cond", "uncond"):
            session.begin_forward(ForwardInfo(grid=grid, reason="", step=step, num_steps=num_steps, branch=branch,
                                              new_run=new and not i and branch == "cond", family="cogvideox"))
            session.attention(0, call.query, call.key, call.value, None, call.scale)


@pytest.mark.parametrize(
    "family, num_steps, dense, measured",
    [("cogvideox", 50, 15, [15, 20, 25, 30, 35, 40, 45]), ("pixart", 20, 5, [5, 10, 15])],
)
def test_schedule_of_the_paper(family: str, num_steps: int, dense: int, measured: list[int], make_call) -> None:
    grid = TokenGrid(1, 5, 7)
    session = RunSession(SparseProc("rettention", block_size=16, strict=True, **family_options("rettention", family)))
    session.layers = 1
    _run(session, make_call(grid), grid, list(range(num_steps)), num_steps)
    for branch in ("cond", "uncond"):
        records = [r for r in session.report.records if r.branch == branch]
        assert [r.step for r in records if r.kind == "dense"] == list(range(dense))
        assert [r.step for r in records if r.operator == MeasureShare.title] == measured
        assert sum(r.operator == ReuseShare.title for r in records) == num_steps - dense - len(measured)
    found = summarize("rettention", [session.report])
    assert len(found.operators) == 2 and 0 < found.density < 1
    assert {float(r.density) for r in session.report.records if r.operator == MeasureShare.title} == {1.0}


def test_skipped_steps_count_and_a_new_run_starts_anew(make_call) -> None:
    grid = TokenGrid(1, 5, 7)
    session = RunSession(SparseProc("rettention", block_size=16, strict=True, dense_steps=0, dense_layers=0))
    session.layers = 1
    call = make_call(grid)

    def measured() -> list[int]:
        return [r.step for r in session.report.records if r.operator == MeasureShare.title and r.branch == "cond"]

    _run(session, call, grid, [0, 1, 2, 7, 8, 11, 12], 20)
    assert measured() == [0, 7, 12]
    session.end_run()
    _run(session, call, grid, [0, 1], 20)
    assert measured() == [0], "no statistics of the last prompt"
    assert session.memory.nbytes >= 2 * call.value.numel() * 4, "residuals are counted"


def test_statistics_of_another_shape_are_not_used(make_call) -> None:
    memory, method = Memory(), Rettention(block_size=16)
    for tokens, operator in ((7, MeasureShare), (7, ReuseShare), (8, MeasureShare)):
        call = make_call(TokenGrid(1, 5, tokens))
        call = dataclasses.replace(call, state=State(memory, 0, shape=call.grid))
        plan = method.plan(call)
        assert isinstance(plan.operator, operator)
        plan.operator.run(call, plan.mask, _attend(call))
    fresh = make_call(TokenGrid(1, 5, 7))
    with pytest.raises(ValueError, match="nothing was measured"):
        ReuseShare().run(fresh, plan.mask, _attend(fresh))


def test_offloaded_statistics_serve_as_well(make_call) -> None:
    grid, memory = TokenGrid(3, 5, 7), Memory(offload=True)
    method, outs = Rettention(block_size=16, lam=0.0), []
    for step in range(2):
        call = dataclasses.replace(make_call(grid), step=step, state=State(memory, 0, step=step))
        plan = method.plan(call)
        outs.append(plan.operator.run(call, plan.mask, _attend(call))[0])
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_measuring_and_using_never_wait(make_call, no_waiting) -> None:
    grid, memory = TokenGrid(5, 6, 11, text=40, text_at="front"), Memory()
    made = make_call(grid, batch=2)
    method = build("rettention")
    method.plan(made)
    for step in range(2):
        out, lse = torch.zeros_like(made.value), torch.zeros(2, 2, grid.tokens)
        call = dataclasses.replace(made, step=step, state=State(memory, 0, step=step))

        def attend(*_: object, out: Tensor = out, lse: Tensor = lse) -> tuple[Tensor, Tensor]:
            return out.clone(), lse

        with no_waiting():
            plan = method.plan(call)
            plan.operator.run(call, plan.mask, attend)
        assert isinstance(plan.operator, ReuseShare if step else MeasureShare)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"window": -0.1}, r"window=-0.1 .*\[0, 2\]"),
        ({"density": 0}, r"density=0 .*\(0, 1\]"),
        ({"period": 0}, "period=0"),
        ({"period": 2.5}, "period=2.5"),
        ({"lam": -1}, "lam=-1"),
        ({"mask": "rows"}, "blocks, tokens"),
        ({"block_size": 48}, "block_size=48"),
        ({"sink": True}, "window, density, period"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("rettention", **options)
    assert "\n" not in str(caught.value)
