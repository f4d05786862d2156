"""Recall, error and cosine of single calls against attention written out, and on a pipeline."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dit_sparse import SparseProc
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.eval.attention import NAMES, attention_quality, grids, look, means
from dit_sparse.eval.config import CEILING
from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import planted_call
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.methods import build
from dit_sparse.methods.base import Call, Plan
from dit_sparse.methods.radial import Radial
from dit_sparse.routing import listed_mass
from tests.tiny_wan import build_tiny_wan

SHAPE = {"frames": 17, "height": 128, "width": 128, "steps": 4, "guidance_scale": 2.0}


def activations(tokens: int = 150, heads: int = 3, batch: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(batch, tokens, heads, 16) * 2 for _ in range(3))


def random_mask(tokens: int, heads: int, batch: int) -> BlockMask:
    layout = BlockLayout.raster(tokens, 64, "cpu")
    keep = torch.rand(batch, heads, layout.blocks, layout.blocks) < 0.5
    keep |= torch.eye(layout.blocks, dtype=torch.bool)
    return BlockMask.from_dense(keep, layout, layout)


def written_out(query, key, value, allowed, scale, real):
    """The definitions, with all scores at once. allowed: bool (B, H, L, L); real: bool (B, L)."""
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) * scale
    scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    dense, sparse = scores.softmax(-1), scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    a, b = (torch.einsum("bhlm,bmhd->bhld", p, value) for p in (dense, sparse))
    rows = real[:, None].expand(dense.shape[:3])
    recall = [(dense * allowed).sum(-1)[:, h][rows[:, h]].mean() for h in range(a.shape[1])]
    error = [(b - a)[:, h][rows[:, h]].norm() / a[:, h][rows[:, h]].norm() for h in range(a.shape[1])]
    cosine = [torch.cosine_similarity(a, b, dim=-1)[:, h][rows[:, h]].mean() for h in range(a.shape[1])]
    return (torch.stack(x) for x in (recall, error, cosine))


@pytest.mark.parametrize("masked", [False, True])
def test_numbers_are_their_definitions(masked: bool) -> None:
    query, key, value = activations()
    mask = random_mask(150, 3, 2)
    key_mask = torch.ones(2, 150, dtype=torch.bool)
    key_mask[0, 131:] = not masked
    allowed = mask.to_dense().repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :150, :150]
    recall, error, cosine = written_out(query, key, value, allowed, 0.25, key_mask)
    found = attention_quality(query, key, value, mask, 0.25, key_mask=key_mask if masked else None)
    torch.testing.assert_close(found.recall, recall, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.relative_error, error, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.cosine, cosine, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.density, mask.head_density().mean(0))


def test_recall_is_the_mass_of_the_lists_and_heeds_windows() -> None:
    query, key, value = activations()
    mask = random_mask(150, 3, 2)
    lse = dense_attention(query, key, value, scale=0.25)[1]
    listed = listed_mass(query, key, lse, mask, 0.25, per_row=True).mean((0, 2))
    torch.testing.assert_close(attention_quality(query, key, value, mask, 0.25).recall, listed)
    # A window keeps less than the blocks that it touches.
    call = planted_call(TokenGrid.parse("4x8x8"), heads=2)
    window = build("gna", window=(1, 3, 3)).plan(call).mask
    lse = dense_attention(call.query, call.key, call.value, scale=call.scale)[1]
    listed = listed_mass(call.query, call.key, lse, window, call.scale, per_row=True).mean((0, 2))
    exact = attention_quality(call.query, call.key, call.value, window, call.scale)
    assert (exact.recall < listed - 0.01).all() and (exact.recall > 0).all()


def test_everything_kept_is_dense_and_the_lse_may_be_unknown() -> None:
    query, key, value = activations()
    layout = BlockLayout.raster(150, 64, "cpu")
    full = attention_quality(query, key, value, BlockMask.full(layout, layout), 0.25)
    for name, want in zip(NAMES, (1, 1, 0, 1), strict=True):
        torch.testing.assert_close(getattr(full, name), torch.full((3,), float(want)), atol=1e-5, rtol=0)
    mask, dense = random_mask(150, 3, 2), dense_attention(query, key, value, scale=0.25)
    with_lse, without = (
        attention_quality(query, key, value, mask, 0.25, dense=(dense[0], lse)).stacked() for lse in (dense[1], None)
    )
    torch.testing.assert_close(with_lse, without, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["svg", "radial", "gna", "rainfusion", "rainfusion2"])
def test_every_methods_masks_without_a_known_lse(name: str) -> None:
    """Orders and lists of their own for every head, windows, short blocks."""
    call = planted_call(TokenGrid.parse("4x9x10"), heads=3)
    options = {"density": 0.3} if name in ("svg", "gna", "rainfusion", "rainfusion2") else {}
    mask = build(name, **options).plan(call).mask
    arguments = (call.query, call.key, call.value, mask, call.scale)
    out, lse = dense_attention(*arguments[:3], scale=call.scale)
    known, unknown = (attention_quality(*arguments, dense=(out, x)).stacked() for x in (lse, None))
    torch.testing.assert_close(known, unknown, atol=1e-4, rtol=1e-4)
    assert (known[1] > 0).all() and (known[1] <= 1).all() and (known[0] < 1).any()


@pytest.fixture(scope="module")
def pipe():
    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_look_changes_nothing_and_covers_every_call(pipe) -> None:
    from dit_sparse.pipelines.text_to_video import text_to_video

    before = text_to_video(pipe, "a red circle", seed=1, **SHAPE)
    calls = look(pipe, "a red circle", SparseProc("svg", density=0.3), seed=1, shape=SHAPE)
    assert torch.equal(text_to_video(pipe, "a red circle", seed=1, **SHAPE), before)
    # layers x steps x both branches of the guidance
    assert len(calls) == 2 * 4 * 2 and {c["branch"] for c in calls} == {"cond", "uncond"}
    for call in calls:
        dense = call["layer"] == 0 or call["step"] == 0
        assert call["kind"] == ("dense" if dense else "sparse") and bool(call["reason"]) == dense
        assert all(len(call[name]) == 2 for name in NAMES)
        if dense:
            assert [call[name][0] for name in NAMES] == [1, 1, 0, 1]
        else:
            assert all(0 < d < 1 for d in call["density"]) and all(0 < r < 1 for r in call["recall"])
            assert all(e > 0 for e in call["relative_error"])


def test_more_density_more_recall_less_error(pipe) -> None:
    found = [means(look(pipe, "a red circle", SparseProc("svg", density=d), shape=SHAPE)) for d in (0.1, 0.3, 0.6)]
    assert found[0]["density"] < found[1]["density"] < found[2]["density"]
    assert found[0]["recall"] < found[1]["recall"] < found[2]["recall"]
    assert found[0]["relative_error"] > found[1]["relative_error"] > found[2]["relative_error"]


def test_the_noise_ceiling_is_dense_by_another_kernel() -> None:
    """Everything is kept, and still the numbers differ in their last digits: that is the noise."""
    own = {name: value for name, value in CEILING.options.items() if not name.startswith("dense_")}
    grid = TokenGrid(3, 16, 16)
    query, key, value = (torch.randn(1, grid.tokens, 2, 64) for _ in range(3))
    plan = build(CEILING.name, **own).plan(Call(query, key, value, grid, 64**-0.5))
    assert float(plan.mask.density()) == 1
    out, _ = block_sparse_attention(query, key, value, plan.mask, scale=64**-0.5)
    away = (out - dense_attention(query, key, value, scale=64**-0.5)[0]).abs().max()
    assert 0 < away < 1e-5
    assert {CEILING.options[f"dense_{part}"] for part in ("steps", "layers", "last_steps")} == {0}  # every call


@dataclass(frozen=True)
class Watching(Radial):
    """Notes what it is shown of dense calls, and wants to have been shown them before it plans."""

    name: ClassVar[str] = "watching"
    observes: ClassVar[bool] = True
    shown: ClassVar[list] = []

    def observe(self, call, out, lse) -> None:
        Watching.shown.append((call.layer, call.step, call.branch))
        call.state.keep("out", out.mean())

    def plan(self, call) -> Plan:
        assert call.state.age("out") == call.step
        return super().plan(call)


def test_a_look_shows_a_method_the_dense_calls_as_a_run_does(pipe) -> None:
    from dit_sparse import disable, enable
    from dit_sparse.pipelines.text_to_video import text_to_video

    proc = SparseProc(Watching(), dense_steps=1, dense_layers=0)
    calls = look(pipe, "a red circle", proc, shape=SHAPE)
    seen = list(Watching.shown)
    assert {call["kind"] for call in calls} == {"dense", "sparse"}
    Watching.shown.clear()
    enable(pipe, proc)
    try:
        text_to_video(pipe, "a red circle", **SHAPE)
    finally:
        disable(pipe)
    assert Watching.shown == seen == [(layer, 0, branch) for branch in ("cond", "uncond") for layer in range(2)]


def test_recall_is_of_the_masks_pairs_however_the_operator_computes_them() -> None:
    query, key, value = activations()
    mask = random_mask(150, 3, 2)

    def twice(mask, attend):
        out, lse = attend(query, key - 1, value, mask)
        attend(query[:, :10], key, value, BlockMask.full(*(BlockLayout.raster(n, 64, "cpu") for n in (10, 150))))
        return out, lse

    plain = attention_quality(query, key, value, mask, 0.25)
    torch.testing.assert_close(attention_quality(query, key, value, mask, 0.25, operate=twice).recall, plain.recall)


def test_maps_and_means() -> None:
    def call(layer: int, step: int, kind: str, recall: list[float]) -> dict:
        return {
            "layer": layer,
            "step": step,
            "kind": kind,
            "recall": recall,
            **{name: [0.5, 0.5] for name in NAMES if name != "recall"},
        }

    calls = [call(0, 0, "dense", [1, 1]), call(0, 1, "sparse", [0.2, 0.4]), call(0, 1, "sparse", [0.4, 0.6])]
    by_step, by_head = grids(calls, "recall")
    assert by_step == {0: {0: 1.0, 1: pytest.approx(0.4)}}
    assert by_head == {0: {0: pytest.approx(0.3), 1: pytest.approx(0.5)}}
    assert means(calls)["recall"] == pytest.approx(0.4) and means(calls[:1]) == {}


def test_calls_that_cannot_run_are_told(pipe) -> None:
    calls = look(
        pipe,
        "a red circle",
        SparseProc("gna", window=(99, 99, 99), dense_steps=0, dense_layers=0),
        shape={**SHAPE, "steps": 1},
    )
    assert {c["kind"] for c in calls} <= {"fallback", "dense"} and all(c["reason"] for c in calls)
