"""Sparse-vDiT: the choice of modes, their masks, the search in a run and before it, the file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.headmodes import (
    DIAGONAL,
    FULL,
    MODES,
    MULTI,
    SKIP,
    STRIPE,
    HeadModes,
    choose,
    load_modes,
    relative_cost,
)
from dit_sparse.inspect import planted_call
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.sparse_vdit import SparseVDiT, search
from dit_sparse.operators import ZeroHeads
from dit_sparse.processor import SparseProc
from dit_sparse.session import RunSession

GRID = TokenGrid(4, 8, 8, text=20, text_at="front")


def attend_of(call: Call):
    return lambda *x: block_sparse_attention(*x, scale=call.scale, key_mask=call.key_mask)


# -- the choice ----------------------------------------------------------------------------------------------------

SPARSITY = torch.tensor([1, 0.75, 0.75, 0.70])
TRUTH = [
    ((1.2, 0.30, 0.10, 0.25), (1.2, 0.425, 0.225, 0.40), MULTI),
    ((0.05, 0.02, 0.02, 0.02), (0.05, 0.145, 0.145, 0.17), SKIP),
    ((2, 1.5, 1.4, 1.2), (2, 1.625, 1.525, 1.35), FULL),
    ((1.01, 0.88, 0.90, 0.88), (1.01, 1.005, 1.025, 1.03), FULL),
    ((0.9, 0.2, 0.2, 0.1), (0.9, 0.325, 0.325, 0.25), STRIPE),
    ((9, 0.2, 0.2, 0.25), (9, 0.325, 0.325, 0.40), DIAGONAL),
]


@pytest.mark.parametrize("errors, losses, mode", TRUTH)
def test_truth_table(errors, losses, mode: int) -> None:
    errors = torch.tensor(errors)
    torch.testing.assert_close(errors + 0.5 * (1 - SPARSITY), torch.tensor(losses, dtype=torch.float32))
    assert int(choose(errors, 1 - SPARSITY, 0.5, 1.0)) == mode
    assert int(choose(errors, 1 - SPARSITY, 0.0, 1e9)) == 1 + int(errors.argmin())


def test_most_skipped_heads() -> None:
    """Of the heads that would be skipped only those of the least loss are; the others take their next best mode."""
    errors = torch.tensor([[0.3, 0.9, 0.2, 0.9], [0.1, 0.9, 0.9, 0.2], [0.2, 0.9, 0.9, 0.9], [5, 0.1, 0.1, 0.1]])
    cost = torch.tensor([0.0, 0.3, 0.3, 0.3])
    found = [choose(errors[None], cost, 1.0, 0.6, n)[0].tolist() for n in (0, 1, 2, 9)]
    assert found == [[MULTI, STRIPE, FULL, DIAGONAL], [MULTI, SKIP, FULL, DIAGONAL], [MULTI, SKIP, SKIP, DIAGONAL],
                     [SKIP, SKIP, SKIP, DIAGONAL]]


def test_costs() -> None:
    """The measured table at its points and between them; the paper's cost is the density."""
    assert relative_cost("density", 0.25) == 0.25
    assert relative_cost("hopper-h200", 0.25) == pytest.approx(1 / 3.98, abs=1e-4)
    assert relative_cost("hopper-h200", 0.25, permuted=True) == pytest.approx(1 / 3.80, abs=1e-4)
    assert relative_cost("hopper-h200", 0) == 0 and relative_cost("hopper-h200", 1) == pytest.approx(1 / 1.05, abs=1e-4)
    assert relative_cost("hopper-h200", 0.375) == pytest.approx((0.2513 + 0.4878) / 2)


def test_costs_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    table = {"format": "dit-sparse costs 1", "raster": [[0.5, 0.6], [1, 1]], "permuted": [[1, 2]]}
    file.write_text(json.dumps(table))
    assert relative_cost(str(file), 0.25) == pytest.approx(0.3) and relative_cost(str(file), 0.5, True) == 1
    assert build("sparse_vdit", cost=str(file)).cost == str(file)
    for change, words in (({"format": "other"}, "format"), ({"raster": [[1, 1], [0.5, 1]]}, "rising"),
                          ({"permuted": []}, "permuted")):
        bad = tmp_path / f"{words}.json"
        bad.write_text(json.dumps(table | change))
        with pytest.raises(ValueError, match=words) as caught:
            build("sparse_vdit", cost=str(bad))
        assert "\n" not in str(caught.value)


# -- the masks -----------------------------------------------------------------------------------------------------


def token_mask(mode: int, grid: TokenGrid, reach: int, block: int, stripe: torch.Tensor) -> torch.Tensor:
    """bool (L, L): a mode's mask written token by token; bands cover whole blocks of their order."""
    frame = grid.frame_tokens
    token = torch.arange(grid.video)
    place = token % frame * grid.frames + token // frame if mode == MULTI else token
    q, k = (place // block)[:, None], (place // block)[None]
    video = {
        FULL: torch.ones(1, 1, dtype=torch.bool),
        SKIP: q == k,
        DIAGONAL: (q - k).abs() * block <= reach + block - 1,
        MULTI: (q - k).abs() * block <= reach + block - 1,
        STRIPE: (q == k) | stripe[token // block][None],
    }[mode]
    found = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    found[grid.video_slice, grid.video_slice] = video
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 7, 9, text=33, text_at="back"), TokenGrid(2, 9, 17)], ids=str)
def test_every_mode_is_dense_attention_under_its_mask(grid: TokenGrid, dtype: torch.dtype, tolerance: float, make_call
                                                      ) -> None:
    """All modes in one call, heads of equal mode among them; skipped heads give 0 for the video's queries."""
    call = make_call(grid, heads=7, head_dim=16)
    call.query, call.key, call.value = (x.to(dtype) for x in (call.query, call.key, call.value))
    method = SparseVDiT(density=0.4, block_size=16)
    modes = torch.tensor([[FULL, SKIP, DIAGONAL, MULTI, STRIPE, MULTI, STRIPE]])
    blocks = -(-grid.video // 16)
    stripes = torch.rand(1, 7, blocks) < 0.3
    plan = method.planned(call, modes, stripes)
    out, lse = plan.operator.run(call, plan.mask, attend_of(call))
    share = 1 - (1 - _video_density(0.4, grid)) ** 0.5
    reach = 16 * max(0, round(share * grid.video / 16 - 0.5))
    masks = plan.mask.token_mask()
    for head, mode in enumerate(modes[0].tolist()):
        seen = token_mask(mode, grid, reach, 16, stripes[0, head])
        assert torch.equal(masks[0, head], seen), MODES[mode]
        parts = (x[:, :, head : head + 1] for x in (call.query, call.key, call.value))
        want, want_lse = attention_reference(*parts, seen, call.scale)
        if mode == SKIP:
            assert not out[:, grid.video_slice, head].any() and (lse[:, head, grid.video_slice] == -torch.inf).all()
            text = grid.text_slice
            torch.testing.assert_close(out[:, text, head], want[:, text, 0], atol=tolerance, rtol=0)
            continue
        torch.testing.assert_close(out[:, :, head], want[:, :, 0], atol=tolerance, rtol=0)
        torch.testing.assert_close(lse[:, head], want_lse[:, 0], atol=tolerance, rtol=1e-4)
    assert torch.allclose(plan.mask.head_density().double(), masks.double().mean((-2, -1)), atol=1e-6)


def _video_density(density: float, grid: TokenGrid) -> float:
    left = (density * grid.tokens**2 - (grid.tokens**2 - grid.video**2)) / grid.video**2
    return max(left, density / 2)


def test_heads_together_equal_heads_alone(make_call) -> None:
    call = make_call(GRID, heads=5, head_dim=16)
    method, stripes = SparseVDiT(block_size=16), torch.rand(1, 5, 16) < 0.3
    modes = torch.tensor([[MULTI, FULL, STRIPE, DIAGONAL, MULTI]])
    together, _ = attend_of(call)(call.query, call.key, call.value, method.planned(call, modes, stripes).mask)
    for head in range(5):
        one = slice(head, head + 1)
        mask = method.planned(call, modes[:, one], stripes[:, one]).mask
        alone, _ = attend_of(call)(call.query[:, :, one], call.key[:, :, one], call.value[:, :, one], mask)
        assert torch.equal(together[:, :, one], alone)


@pytest.mark.parametrize("grid", [TokenGrid(9, 16, 16), TokenGrid(13, 30, 45, text=226, text_at="front")], ids=str)
def test_density_of_the_sparse_modes(grid: TokenGrid, make_call) -> None:
    for density in (0.15, 0.25, 0.5):
        call = make_call(grid, heads=3, head_dim=4)
        method = SparseVDiT(density=density)
        _, stripes, _ = method.measure(call)
        mask = method.planned(call, torch.tensor([[DIAGONAL, MULTI, STRIPE]]), stripes).mask
        assert (mask.head_density()[0] - density).abs().max() <= 0.03


# -- the search ----------------------------------------------------------------------------------------------------


def planted(seed: int) -> Call:
    """Heads that look at their frame, at their place, at one set of keys; whose values are 0; at one random key."""
    grid = TokenGrid(8, 16, 16)
    call = planted_call(grid, 5, head_dim=64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    # All queries look at the same fifth of the key blocks.
    blocks = torch.randperm(grid.tokens // 64, generator=generator)[: grid.tokens // 64 // 5, None]
    hot = torch.zeros(grid.tokens)
    hot[blocks * 64 + torch.arange(64)] = 1
    call.query[0, :, 2], call.key[0, :, 2] = 0, 0
    call.query[0, :, 2, 0], call.key[0, :, 2, 0] = 8, 12 * hot
    call.value[0, :, 3] = 0
    # Every query looks at one random key.
    names = torch.nn.functional.normalize(torch.randn(grid.tokens, 64, generator=generator), dim=-1) * 16
    call.key[0, :, 4] = names
    call.query[0, :, 4] = names[torch.randperm(grid.tokens, generator=generator)]
    return call


def test_planted_heads_take_their_modes() -> None:
    """Normalised errors, eps .5, lam .5, density .25."""
    for seed in range(3):
        call = planted(seed)
        method = SparseVDiT(eps=0.5, cost="density", skip_share=1.0, rows=256, block_size=64)
        errors, stripes, _ = method.measure(call)
        assert method.decide(call, errors)[0].tolist() == [DIAGONAL, MULTI, STRIPE, SKIP, FULL]
        assert float(errors[0, 4, 0]) == pytest.approx(1) and (errors[0, 4, 1:] >= 0.7).all() and not errors[0, 3].any()


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
def test_errors_are_those_of_the_modes(masked: bool, make_call) -> None:
    """With every row sampled, the search's errors are those of attention under the modes' masks."""
    call = make_call(GRID, batch=2, heads=2, head_dim=16)
    if masked:
        key_mask = torch.rand(2, GRID.tokens) < 0.8
        call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
        call = dataclasses.replace(call, key_mask=key_mask)
    for normalise in (True, False):
        method = SparseVDiT(rows=10_000, block_size=16, normalise=normalise)
        errors, stripes, mass = method.measure(call)
        dense, dense_lse = dense_attention(call.query, call.key, call.value, scale=call.scale, key_mask=call.key_mask)
        dense = dense[:, GRID.video_slice]
        size = dense.square().mean((1, 3)) if normalise else 1
        for mode in (DIAGONAL, MULTI, STRIPE):
            plan = method.planned(call, torch.full((1, 2), mode), stripes)
            out, _ = plan.operator.run(call, plan.mask, attend_of(call))
            want = ((out[:, GRID.video_slice] - dense).square().mean((1, 3)) / size).mean(0)
            torch.testing.assert_close(errors[0, :, mode - 1], want, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(errors[0, :, 0], (dense.square().mean((1, 3)) / size).mean(0))
        best = mass.sort(descending=True).indices[..., : int(stripes[0, 0].sum())]
        assert stripes.gather(-1, best).all()


def session_of(proc: SparseProc, grid: TokenGrid, layers: int = 2) -> RunSession:
    session = RunSession(proc)
    session.layers = layers
    video = dataclasses.replace(grid, text=0)
    session.begin_forward(
        ForwardInfo(grid=video, reason="", step=5, num_steps=10, branch="cond", new_run=False, family="wan"))
    return session


def test_later_layers_see_the_errors_of_earlier_ones(make_call) -> None:
    """Layer 1 is forced to a lossy mode; layer 2 searches on what comes out of it, not on the dense activations."""
    method = SparseVDiT(eps=1e9, density=0.1, cost="density", block_size=16)
    session = session_of(SparseProc(method, dense_layers=0, dense_steps=0, strict=True), GRID)
    call = make_call(GRID, head_dim=16)

    def forward(attention) -> Call:
        out = attention(0, call.query, call.key, call.value)
        return dataclasses.replace(call, query=3 * out, key=out, value=call.value + out, state=State(), layer=1)

    second = forward(lambda layer, *x: session.attention(layer, *x, None, call.scale))
    session.attention(1, second.query, second.key, second.value, None, call.scale)
    dense = forward(lambda layer, *x: dense_attention(*x, scale=call.scale)[0])
    lossy, ideal = (method.measure(x)[0] for x in (second, dense))
    assert not torch.allclose(lossy, ideal, rtol=1e-2)
    place = [key for key in session.memory._kept if key[1] == "head modes" and key[2][0] == 1]
    modes, stripes = session.memory.get(place[0], step=5, max_age=99, shape=GRID)
    assert torch.equal(modes, method.decide(second, lossy)) and torch.equal(stripes, method.measure(second)[1])


def test_modes_stay_for_the_run(make_call) -> None:
    memory, method = Memory(), SparseVDiT(block_size=16, skip_share=1.0)
    first, later, other = (make_call(GRID, seed=seed, step=seed, state=State(memory, place, step=seed))
                           for seed, place in ((0, (0, "cond")), (1, (0, "cond")), (1, (0, "uncond"))))
    plans = [method.plan(call) for call in (first, later, other)]
    assert torch.equal(plans[0].notes["modes"], plans[1].notes["modes"])
    assert torch.equal(plans[0].mask.to_dense(), plans[1].mask.to_dense())
    assert later.state.recall("head modes")[1] is not other.state.recall("head modes")[1]


def test_nothing_waits(make_call, no_waiting) -> None:
    call = make_call(GRID, batch=2, key_mask=torch.rand(2, GRID.tokens) < 0.8)
    method = SparseVDiT(block_size=16)
    method.plan(call)
    out, lse = torch.zeros_like(call.value), torch.zeros(2, 2, GRID.tokens)
    fresh = dataclasses.replace(call, state=State())
    with no_waiting():
        plan = method.plan(fresh)
        plan.operator.run(fresh, plan.mask, lambda *_: (out, lse))
        plan.operator.density(plan.mask)


# -- the file ------------------------------------------------------------------------------------------------------


def table() -> HeadModes:
    modes = torch.randint(5, (3, 2, 4))
    modes[0, 1, 2] = STRIPE
    places = (modes == STRIPE).any(0).nonzero().tolist()
    stripes = {(layer, head): sorted(torch.randperm(16)[:4].tolist()) for layer, head in places}
    return HeadModes((4, 8, 8), 16, 0.25, modes, stripes)


def test_file_round_trip(tmp_path: Path, make_call) -> None:
    held, file = table(), tmp_path / "modes.json"
    held.save(file)
    read = load_modes(file)
    assert torch.equal(read.modes, held.modes) and read.stripes == held.stripes
    assert (read.grid, read.block_size, read.density) == (held.grid, held.block_size, held.density)
    method = build("sparse_vdit", table=str(file))
    call = make_call(GRID, heads=4, layer=1, layers=2, step=2, num_steps=3)
    plan = method.plan(call)
    assert plan.notes["modes"][0].tolist() == held.modes[2, 1].tolist()
    want = method.planned(call, held.modes[2, 1][None], held.stripe_map(1)[None]).mask
    assert torch.equal(plan.mask.token_mask(), want.token_mask()) and plan.mask.query.block_size == 16
    assert isinstance(plan.operator, ZeroHeads)


def test_what_a_file_was_not_made_for_is_refused(tmp_path: Path, make_call) -> None:
    file = tmp_path / "modes.json"
    table().save(file)
    method = build("sparse_vdit", table=str(file))
    good = dict(heads=4, layer=1, layers=2, step=2, num_steps=3)
    method.plan(make_call(GRID, **good))
    method.check(GRID)
    with pytest.raises(ValueError, match="grid 4x8x8, not 4x8x9"):
        method.check(TokenGrid(4, 8, 9))
    for change, words in (({"heads": 3}, "heads 4, not 3"), ({"layers": 3}, "layers 2, not 3"),
                          ({"num_steps": 4}, "steps 3, not 4"), ({"num_steps": None, "step": 3}, "step 3 is beyond")):
        with pytest.raises(ValueError, match=words) as caught:
            method.plan(make_call(GRID, **(good | change)))
        assert "\n" not in str(caught.value)


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    held, file = table(), tmp_path / "modes.json"
    held.save(file)
    content = json.loads(file.read_text())
    for name, change, words in (
        ("format", {"format": "x"}, "format"), ("modes", {"modes": [["0123", "01"]]}, "cannot be read"),
        ("digit", {"modes": [["0193"]]}, "0 ... 4"), ("stripes", {"stripes": {}}, "missing"),
        ("block", {"stripes": {key: [16] for key in content["stripes"]}}, "no blocks"),
        ("size", {"block_size": 0}, "whole numbers"),
    ):
        bad = tmp_path / f"{name}.json"
        bad.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words) as caught:
            build("sparse_vdit", table=str(bad))
        assert "\n" not in str(caught.value)
    (tmp_path / "text.json").write_text("no json")
    for bad in ("text.json", "none.json"):
        with pytest.raises(ValueError, match=bad):
            build("sparse_vdit", table=str(tmp_path / bad))


def test_search_before_a_run(tmp_path: Path) -> None:
    """Through a pipeline: a table for every step, layer and head, which then decides a run of the same size."""
    from dit_sparse.pipelines.text_to_video import text_to_video
    from dit_sparse.processor import enable, summary
    from tests.tiny_wan import build_tiny_wan

    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    shape = dict(height=32, width=32, frames=5, steps=3, guidance_scale=3.0)

    def generate() -> torch.Tensor:
        return text_to_video(pipe, "a red circle", seed=1, **shape)

    before = generate()
    found = search(pipe, generate, block_size=16, eps=0.5, skip_share=0.5)
    assert torch.equal(generate(), before), "the search leaves the pipeline as it was"
    assert found.modes.shape[0] == 3
    file = tmp_path / "modes.json"
    found.save(file)
    enable(pipe, "sparse_vdit", table=str(file), strict=True, dense_steps=0, dense_layers=0)
    assert generate().isfinite().all()
    assert summary(pipe).sparse_calls and not summary(pipe).fallbacks


@pytest.mark.parametrize(
    "options, words",
    [
        ({"density": 0}, "density=0"),
        ({"lam": -1}, "lam=-1"),
        ({"eps": "1"}, "eps='1'"),
        ({"skip_share": 2}, "skip_share=2"),
        ({"normalise": 1}, "True or False"),
        ({"rows": 0}, "rows=0"),
        ({"cost": "h100"}, "density, hopper-h200"),
        ({"cost": None}, "cost=None"),
        ({"table": 3}, "table=3"),
        ({"block_size": 48}, "block_size=48"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("sparse_vdit", **options)
    assert "\n" not in str(caught.value)
