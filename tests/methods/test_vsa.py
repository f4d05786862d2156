"""VSA: tiling, counts, the twin on padded tiles, limits, gradients of the gate, and what is said without a gate."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter

import pytest
import torch

from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import inspect_method, planted_call
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference, block_sparse_reference
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.vsa import CUBES, VSA
from dit_sparse.operators_coarse import CoarseFine, TrainedGates, coarse_attention
from dit_sparse.order import inverse, tile, video_blocks
from dit_sparse.processor import SparseProc, disable, enable, methods, summary
from dit_sparse.report import summarize
from dit_sparse.scoring import to_slots
from dit_sparse.session import RunSession

WAN = TokenGrid(21, 45, 80)
RAGGED = TokenGrid(5, 7, 9)


def twin(q, k, v, gate, sizes, sparsity: float, scale: float) -> torch.Tensor:
    """The paper's algorithm on padded tiles: q, k, v, gate (B, H, n * 64, D), zeros at padding; sizes (n,)."""
    n = len(sizes)
    tiles = [x.unflatten(2, (n, -1)) for x in (q, k, v)]
    qc, kc, vc = (x.sum(3) / sizes[:, None] for x in tiles)
    scores = qc @ kc.mT * scale
    coarse = (scores.softmax(-1) @ vc).repeat_interleave(tiles[0].shape[3], 2)
    count = max(1, min(math.ceil(round((1 - sparsity) * n, 6)), n))
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, -1).indices, True)
    size = tiles[0].shape[3]
    tokens = keep.repeat_interleave(size, 2).repeat_interleave(size, 3)
    tokens &= (torch.arange(size) < sizes[:, None]).flatten()
    fine = (q @ k.mT * scale).masked_fill(~tokens, -torch.inf).softmax(-1) @ v
    return coarse * gate + fine


def _attend(call: Call):
    return functools.partial(block_sparse_attention, scale=call.scale, key_mask=call.key_mask)


# -- tiling and counts ---------------------------------------------------------------------------------------------


def test_tiles_of_wan_at_720p() -> None:
    blocks, (order, _) = VSA().layout(WAN), tile(WAN, (4, 4, 4))
    assert blocks.blocks == 1440 and Counter(blocks.lengths.tolist()) == {64: 1100, 16: 320, 4: 20}
    assert int(blocks.lengths.sum()) == 75_600 and int((blocks.lengths < 64).nonzero()[0]) == 220
    assert order[:6].tolist() == [0, 1, 2, 3, 80, 81] and int(order[16]) == 3600 and int(order[64]) == 4
    assert int(blocks.slot_of_token[-1]) == 92_099
    assert torch.equal(order[inverse(order)], torch.arange(75_600))


@pytest.mark.parametrize(
    "grid, sizes",
    [(TokenGrid(20, 28, 52), {64: 455}), (TokenGrid(21, 30, 52), {64: 455, 32: 65, 16: 91, 8: 13})],
    ids=str,
)
def test_tiles_of_the_training_shapes(grid: TokenGrid, sizes: dict[int, int]) -> None:
    blocks = VSA().layout(grid)
    assert Counter(blocks.lengths.tolist()) == sizes
    assert torch.equal(blocks.token_of_slot[blocks.slot_of_token], torch.arange(grid.tokens))


@pytest.mark.parametrize(
    "cubes, density, kept", [(455, 0.2, 91), (455, 0.1, 46), (624, 0.2, 125), (624, 0.1, 63), (1440, 0.2, 288),
                             (1440, 0.1, 144), (1440, 1.0, 1440), (3, 0.01, 1), (1440, 0.3, 432)]
)
def test_cubes_kept(cubes: int, density: float, kept: int) -> None:
    assert VSA(density=density).kept_blocks(RAGGED, cubes) == kept


def test_every_block_size_has_its_cube() -> None:
    assert all(math.prod(cube) == size for size, cube in CUBES.items())


# -- the operator against the twin ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [RAGGED, TokenGrid(4, 8, 12), TokenGrid(1, 9, 11)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_output_is_the_paper_s(grid: TokenGrid, density: float, make_call) -> None:
    call = make_call(grid, batch=2, heads=3, head_dim=16)
    gate = torch.randn(2, grid.tokens, 3, 16)
    plan = VSA(density=density, gate=lambda call: gate).plan(call)
    out, lse = plan.operator.run(call, plan.mask, _attend(call))
    blocks = plan.mask.query
    padded = [to_slots(x, blocks).transpose(1, 2) for x in (call.query, call.key, call.value, gate)]
    want = twin(*padded, blocks.lengths, 1 - density, call.scale).transpose(1, 2)[:, blocks.slot_of_token]
    torch.testing.assert_close(out, want, atol=5e-6, rtol=1e-4)
    fine, want_lse = block_sparse_reference(call.query, call.key, call.value, plan.mask, call.scale)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-4)
    without = VSA(density=density).plan(call)
    torch.testing.assert_close(without.operator.run(call, without.mask, _attend(call))[0], fine, atol=2e-6, rtol=1e-4)


def test_everything_and_no_gate_is_dense_attention(make_call) -> None:
    call = make_call(RAGGED, batch=2, head_dim=16)
    want, _ = attention_reference(call.query, call.key, call.value, None, call.scale)
    for gate in (None, lambda call: torch.zeros(1, 1, 1, 1)):
        plan = VSA(density=1.0, gate=gate).plan(call)
        out, _ = plan.operator.run(call, plan.mask, _attend(call))
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)


def test_equal_values_are_scaled_by_gate_plus_one(make_call) -> None:
    call = make_call(RAGGED, batch=2, head_dim=16)
    call.value[:] = torch.randn(16)
    gate = torch.randn(2, RAGGED.tokens, 2, 16)
    plan = VSA(gate=lambda call: gate).plan(call)
    out, _ = plan.operator.run(call, plan.mask, _attend(call))
    torch.testing.assert_close(out, (gate + 1) * call.value, atol=5e-6, rtol=1e-4)


def test_text_and_masked_keys(make_call) -> None:
    """Text in front, keys that are NaN and masked, a block without keys: the coarse branch sees real keys alone."""
    grid = TokenGrid(5, 7, 9, text=70, text_at="front")
    key_mask = torch.rand(2, grid.tokens) < 0.8
    key_mask[1, 64:70] = False
    call = make_call(grid, batch=2, head_dim=16, key_mask=key_mask)
    call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
    gate = torch.randn(2, grid.tokens, 2, 16)
    plan = VSA(gate=lambda call: gate).plan(call)
    blocks, video = plan.mask.query, video_blocks(plan.mask.query, grid)
    keep = plan.mask.to_dense()
    assert keep[:, :, video:].all() and keep[..., video:].all()
    out, _ = plan.operator.run(call, plan.mask, _attend(call))
    fine, _ = block_sparse_reference(call.query, call.key, call.value, plan.mask, call.scale, key_mask)
    slots = [s[s >= 0] for s in blocks.token_of_slot.unflatten(0, (blocks.blocks, -1))]
    for b in range(2):
        real = [s[key_mask[b, s]] for s in slots]
        assert b == 0 or any(len(s) == 0 for s in real)
        means = [torch.stack([x[b, s].mean(0) for s in real if len(s)], 1) for x in (call.key, call.value)]
        queries = torch.stack([call.query[b, s].mean(0) for s in slots], 1)
        coarse = (queries @ means[0].mT * call.scale).softmax(-1) @ means[1]  # (H, n, D)
        for i, s in enumerate(slots):
            want = fine[b, s] + coarse[:, i] * gate[b, s]
            torch.testing.assert_close(out[b, s], want, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, make_call) -> None:
    """At most twice the error of the twin in plain PyTorch in the same dtype."""
    call = make_call(TokenGrid(4, 8, 12), head_dim=64)
    gate = torch.randn(1, 384, 2, 64).to(dtype)
    half = dataclasses.replace(
        call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype)
    )
    plan = VSA(density=1.0, gate=lambda call: gate).plan(half)
    out, _ = plan.operator.run(half, plan.mask, _attend(half))
    blocks = plan.mask.query
    padded = [to_slots(x, blocks).transpose(1, 2) for x in (half.query, half.key, half.value, gate)]
    exact, plain = (
        twin(*(x.to(kind) for x in padded), blocks.lengths, 0, call.scale) for kind in (torch.float32, dtype)
    )
    exact, plain = (x.transpose(1, 2)[:, blocks.slot_of_token].float() for x in (exact, plain))
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_gradients_of_the_coarse_branch_at_a_gate_of_zero(make_call) -> None:
    """The gate learns from the first step on; queries and keys get nothing through it yet."""
    call = make_call(RAGGED, head_dim=16)
    inputs = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    gate = torch.zeros(1, RAGGED.tokens, 2, 16, requires_grad=True)
    mask = VSA().plan(call).mask
    out, _ = CoarseFine(lambda call: gate).run(call, mask, lambda *_: (torch.zeros(call.value.shape), torch.zeros(())))
    weight = torch.randn(out.shape)
    found = torch.autograd.grad((out * weight).sum(), [gate, *inputs])
    coarse = coarse_attention(call, mask)[:, mask.query.block_of_token]
    torch.testing.assert_close(found[0], weight * coarse.detach())
    assert all((x == 0).all() for x in found[1:])


# -- the method in a run -------------------------------------------------------------------------------------------


def test_it_says_that_it_needs_trained_weights(make_call) -> None:
    assert "gate" in next(m for m in methods() if m.name == "vsa").needs
    call = make_call(RAGGED)
    session = RunSession(SparseProc("vsa", strict=True, dense_layers=0))
    session.layers = 1
    session.begin_forward(ForwardInfo(grid=RAGGED, reason="", step=5, num_steps=10, branch="", new_run=False,
                                      family="wan"))
    session.attention(0, call.query, call.key, call.value, None, call.scale)
    titles = list(summarize("vsa", [session.report]).operators)
    assert titles == ["fine branch only: the coarse branch needs a trained gate, and none was given"]
    assert "trained" not in CoarseFine(lambda call: call.value).title
    assert any("trained gate" in note for note in inspect_method("vsa", TokenGrid(9, 16, 16)).notes)


def test_embedded_model_with_trained_gates() -> None:
    """Every layer's gate is its linear map of what goes into its attention; zero gates change nothing."""
    from dit_sparse.pipelines.load import load
    from dit_sparse.pipelines.text_to_video import text_to_video

    pipe = load("embedded", device="cpu")
    attentions = [block.attn1 for block in pipe.transformer.blocks]
    width = attentions[0].to_q.in_features
    gates = [torch.nn.Linear(width, attentions[0].to_q.out_features) for _ in attentions]
    shape = dict(height=80, width=112, frames=9, steps=2, guidance_scale=3.0)
    clips = []
    for scale in (None, 0.0, 1.0):
        trained = None
        if scale is not None:
            for gate in gates:
                torch.nn.init.zeros_(gate.bias)
                torch.nn.init.constant_(gate.weight, scale / width)
            trained = TrainedGates(attentions, gates)
        enable(pipe, VSA(density=0.5, gate=trained), dense_steps=0, dense_layers=0, strict=True)
        with torch.no_grad():
            clips.append(text_to_video(pipe, "a red circle on a black background", **shape))
        found = summary(pipe)
        assert found.sparse_calls and not found.fallbacks and clips[-1].isfinite().all()
        disable(pipe)
        if trained is not None:
            trained.remove()
            assert not any(attention._forward_pre_hooks for attention in attentions)
    assert torch.equal(clips[0], clips[1]) and not torch.allclose(clips[0], clips[2], atol=1e-3)


def test_trained_gates_are_those_of_the_layer(make_call) -> None:
    call = make_call(RAGGED, head_dim=16)
    modules, maps = [torch.nn.Identity(), torch.nn.Identity()], [torch.nn.Linear(8, 32), torch.nn.Linear(8, 32)]
    gates, hidden = TrainedGates(modules, maps), torch.randn(1, RAGGED.tokens, 8)
    for layer in (0, 1):
        modules[layer](hidden)
        want = maps[layer](hidden).unflatten(-1, (2, 16))
        assert torch.equal(gates(dataclasses.replace(call, layer=layer)), want)
        with pytest.raises(ValueError, match="asks for its gate"):
            gates(dataclasses.replace(call, layer=layer))
    modules[0](hidden)
    with pytest.raises(ValueError, match="layer 1 asks for its gate, but the module watched last is 0"):
        gates(dataclasses.replace(call, layer=1))
    with pytest.raises(ValueError, match="1 gates do not fit 2 attention modules"):
        TrainedGates(modules, maps[:1])


def test_never_waits(make_call, no_waiting) -> None:
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.8)
    method = VSA(gate=lambda call: torch.ones(1, 1, 1, 1))
    method.plan(call)
    out, lse = torch.zeros_like(call.value), torch.zeros(2, 2, grid.tokens)
    with no_waiting():
        fresh = dataclasses.replace(call)
        plan = method.plan(fresh)
        plan.operator.run(fresh, plan.mask, lambda *_: (out, lse))


@pytest.mark.parametrize(
    "grid", [TokenGrid(12, 16, 16), TokenGrid(9, 16, 16), TokenGrid(13, 30, 45, text=226, text_at="front")], ids=str
)
def test_density_is_near_the_asked_one(grid: TokenGrid, make_call) -> None:
    """Where every cube is full the count decides; else so does how many small cubes of the edges are chosen."""
    whole = grid == TokenGrid(12, 16, 16)
    for call in (make_call(grid, heads=1, head_dim=4), planted_call(grid)):
        for density in (0.15, 0.5):
            found = float(VSA(density=density).plan(call).mask.density())
            assert abs(found - density) <= (1 / 48 if whole else 0.06)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"density": 0}, r"density=0 is not allowed; use a number in \(0, 1\]"),
        ({"gate": 0.5}, "gate=0.5 is not allowed; use None or a function"),
        ({"block_size": 48}, "block_size=48"),
        ({"sparsity": 0.9}, "density, gate, block_size"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str, make_call) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("vsa", **options)
    assert "\n" not in str(caught.value)


def test_a_gate_of_another_shape_is_refused(make_call) -> None:
    call = make_call(RAGGED)
    plan = VSA(gate=lambda call: torch.ones(1, 7, 2, 8)).plan(call)
    with pytest.raises(ValueError, match=r"gate gave \(1, 7, 2, 8\); use \(1, 315, 2, 8\)"):
        plan.operator.run(call, plan.mask, _attend(call))
