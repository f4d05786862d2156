"""Delta attention: the formula, its limits, what it repairs, accuracy, densities; its way through a run."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from dit_sparse.blockmask import BlockLayout
from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference, block_sparse_reference, soft_reference
from dit_sparse.methods import all_methods, build
from dit_sparse.methods.base import Call
from dit_sparse.methods.delta import Delta
from dit_sparse.operators import Drop, Soft
from dit_sparse.operators_delta import DeltaRows, nearest_rows, row_groups
from dit_sparse.order import token_major
from dit_sparse.processor import SparseProc
from dit_sparse.report import summarize
from dit_sparse.session import RunSession

GRID = TokenGrid(3, 9, 11, text=20, text_at="front")
INNER = ["gna", "svg", "rainfusion2", "radial", "sol"]
EVERY = sorted(set(all_methods()) - {"dense", "delta"})


def _attend(call: Call):
    return functools.partial(block_sparse_attention, scale=call.scale, key_mask=call.key_mask)


def twin(call: Call, mask, group: int, sparse: torch.Tensor, anchor: str = "nearest") -> torch.Tensor:
    """O(i) = O_sparse(i) + O_dense(anchor of its group) - O_sparse(anchor of its group), row by row."""
    dense, _ = attention_reference(call.query, call.key, call.value, None, call.scale, call.key_mask)
    out, index = sparse.clone(), mask.query.token_of_slot
    batch, heads = sparse.shape[0], sparse.shape[2]
    index = index.expand(batch, heads, -1)
    size = mask.query.block_size
    for b in range(batch):
        for h in range(heads):
            for block in index[b, h].split(size):
                tokens = [t for t in block.tolist() if t >= 0]
                for k in range(0, len(tokens), group):
                    rows = tokens[k : k + group]
                    queries = call.query[b, rows, h].float()
                    distance = (queries - queries.mean(0)).norm(dim=-1)
                    near = (distance <= distance.min() * (1 + 1e-6)).nonzero()[0]
                    one = rows[0] if anchor == "first" else rows[near]
                    delta = dense[b, one, h] - sparse[b, one, h]
                    for i in rows:
                        out[b, i, h] = sparse[b, i, h] + delta
    return out


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("group", [None, 64, 7, 3])
@pytest.mark.parametrize("anchor", ["nearest", "first"])
def test_output_is_the_formula(inner: str, group: int | None, anchor: str, make_call) -> None:
    key_mask = torch.rand(2, GRID.tokens) < 0.8
    call = make_call(GRID, batch=2, head_dim=16, key_mask=key_mask)
    call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
    plan = Delta(inner=inner, group=group, anchor=anchor, block_size=32).plan(call)
    out, lse = plan.operator.run(call, plan.mask, _attend(call))
    base = soft_reference if inner == "sol" else block_sparse_reference
    sparse, want_lse = base(call.query, call.key, call.value, plan.mask, call.scale, key_mask)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out, twin(call, plan.mask, min(group or 32, 32), sparse, anchor), atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("inner", EVERY)
def test_every_row_its_own_group_is_dense_attention(inner: str, make_call) -> None:
    call = make_call(GRID, batch=2, head_dim=16)
    plan = Delta(inner=inner, group=1).plan(call)
    out, _ = plan.operator.run(call, plan.mask, _attend(call))
    want, _ = attention_reference(call.query, call.key, call.value, None, call.scale)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-4)


def test_anchors_are_dense_and_full_masks_stay_as_they_are(make_call) -> None:
    call = make_call(GRID, head_dim=16)
    dense, _ = attention_reference(call.query, call.key, call.value, None, call.scale)
    plan = Delta(block_size=32).plan(call)
    out, _ = plan.operator.run(call, plan.mask, _attend(call))
    nearest = nearest_rows(call.query, plan.mask.query, 64)
    assert nearest.shape == (1, 2, plan.mask.query.blocks)
    for head in range(2):
        rows = nearest[0, head]
        torch.testing.assert_close(out[0, rows, head], dense[0, rows, head], atol=2e-6, rtol=1e-4)
    plan = Delta(density=1.0, block_size=32).plan(call)
    out, _ = plan.operator.run(call, plan.mask, _attend(call))
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-4)


def test_equal_queries_are_repaired_completely_and_similar_ones_mostly() -> None:
    """Groups of alike queries: the correction removes what dropping keys did."""
    generator = torch.Generator().manual_seed(0)
    grid, dim = TokenGrid(16, 8, 8), 32
    query, key, value = torch.randn(3, 1, grid.tokens, 2, dim, generator=generator).unbind(0)
    value += torch.linspace(-2, 2, grid.tokens)[:, None, None]  # what is dropped matters
    query = query[:, ::32].repeat_interleave(32, 1)
    errors = []
    for noise in (0.0, 0.1):
        noisy = query + noise * torch.randn(query.shape, generator=generator)
        call = Call(noisy, key, value, grid, dim**-0.5)
        dense, _ = attention_reference(noisy, key, value, None, call.scale)
        plan = Delta(inner="radial", group=32, block_size=32).plan(call)
        for operator in (plan.operator, Drop()):
            out, _ = operator.run(call, plan.mask, _attend(call))
            errors.append(float((out - dense).norm() / dense.norm()))
    assert errors[0] < 1e-5 < 0.1 < errors[1]
    assert errors[2] < errors[3] / 3


def test_groups_of_rows() -> None:
    """No group spans two blocks; short blocks and orders per head too."""
    grid = TokenGrid(3, 5, 7)
    raster = BlockLayout.from_order(torch.arange(105), 16, lengths=[40, 65])
    first, group = row_groups(raster, 6)
    assert first.tolist()[:9] == [0, 6, 12, 16, 22, 28, 32, 38, -1]
    assert first.tolist()[9:12] == [40, 46, 52]
    for token in range(105):
        start = int(first[group[token]])
        assert start <= token < start + 6 and int(raster.block_of_token[token]) == int(raster.block_of_token[start])
    orders = torch.stack((torch.arange(105), token_major(grid)))[None]
    both = BlockLayout.from_order(orders, 16)
    first, group = row_groups(both, None)
    assert first.shape == (1, 2, 7) and group.shape == (1, 2, 105)
    assert torch.equal(first, both.token_of_slot[..., ::16])
    assert torch.equal(group, both.block_of_token)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, make_call) -> None:
    """At most twice the error of the formula in plain PyTorch in the same dtype."""
    call = make_call(GRID, head_dim=64)
    half = dataclasses.replace(
        call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype)
    )
    exact = dataclasses.replace(
        half, query=half.query.float(), key=half.key.float(), value=half.value.float()
    )
    plan = Delta(block_size=32, group=8, anchor="first").plan(half)
    out, _ = plan.operator.run(half, plan.mask, _attend(half))
    sparse, _ = block_sparse_reference(exact.query, exact.key, exact.value, plan.mask, call.scale)
    want = twin(exact, plan.mask, 8, sparse, "first")

    def plain(token_mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (half.query, half.key, half.value))
        scores = q @ k.mT * call.scale
        if token_mask is not None:
            scores = scores.masked_fill(~token_mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    first, group = row_groups(plan.mask.query, 8)
    listed, dense = plain(plan.mask.token_mask()), plain(None)
    naive = listed + (dense - listed)[:, first.clamp(min=0)][:, group]
    assert out.dtype == dtype
    error, allowed = ((x.float() - want).abs().max() for x in (out, naive))
    assert error <= 2 * allowed


@pytest.mark.parametrize("grid", [TokenGrid(9, 16, 16), TokenGrid(13, 20, 31, text=226, text_at="front")], ids=str)
def test_density_counts_the_dense_rows(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, heads=1, head_dim=4)
    for inner, near in (("gna", 0.15), ("sol", 0.01)):
        text = 1 - (grid.video / grid.tokens) ** 2
        for density in (0.25, 0.5):
            plan = Delta(inner=inner, density=density).plan(call)
            if text < density / 2:
                assert float(plan.operator.density(plan.mask)) == pytest.approx(density, rel=near, abs=0.03)
    mask = Delta(block_size=32).plan(call).mask
    whole, one = DeltaRows(1).density(mask), DeltaRows(None).density(mask)
    assert float(whole) == pytest.approx(1) and float(mask.density()) < float(one) < float(mask.density()) + 0.05


def test_run_and_its_summary(make_call) -> None:
    call = make_call(GRID, batch=2, head_dim=16)
    session = RunSession(SparseProc("delta", block_size=32, strict=True, refresh=2))
    session.layers = 3
    video = dataclasses.replace(GRID, text=0)
    session.begin_forward(ForwardInfo(grid=video, reason="", step=5, num_steps=10, branch="", new_run=False,
                                      family="wan"))
    plan = build("delta", block_size=32).plan(call)
    sparse, _ = block_sparse_reference(call.query, call.key, call.value, plan.mask, call.scale)
    for _ in range(2):
        out = session.attention(1, call.query, call.key, call.value, None, call.scale)
        torch.testing.assert_close(out, twin(call, plan.mask, 32, sparse), atol=5e-6, rtol=1e-4)
    found = summarize("delta", [session.report])
    assert found.sparse_calls == 2 and found.sparse_density == pytest.approx(
        float(plan.operator.density(plan.mask)), abs=1e-6
    )
    assert any("dense, to correct" in title for title in found.operators)


def test_inner_method_sees_dense_calls(make_call) -> None:
    """Centroids of dense steps serve the first sparse one, as when the inner method runs by itself."""
    call = make_call(GRID)
    Delta(inner=build("svg2", dense_init=True)).observe(call, call.value, None)
    assert Delta.observes and call.state.recall("centroids") is not None


def test_operators_are_options() -> None:
    call = Call(*torch.randn(3, 1, 60, 1, 8).unbind(0), TokenGrid(3, 4, 5), 0.3)
    assert Delta().plan(call).operator == DeltaRows(64, "nearest", Drop())
    assert Delta(inner="sol", group=None, anchor="first").plan(call).operator == DeltaRows(None, "first", Soft())


def test_never_waits(make_call, no_waiting) -> None:
    call = make_call(TokenGrid(5, 6, 11, text=40, text_at="front"), batch=2)
    plan = build("delta").plan(call)
    out, lse = torch.zeros_like(call.value), torch.zeros(2, 2, call.grid.tokens)
    with no_waiting():
        plan = build("delta").plan(call)
        plan.operator.run(call, plan.mask, lambda *_: (out, lse))
        plan.operator.density(plan.mask)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"group": 0}, "group=0 is not allowed; use None or a whole number >= 1"),
        ({"group": 2.0}, "group=2.0"),
        ({"anchor": "last"}, "anchor='last' is not allowed; use one of nearest, first"),
        ({"density": 0}, "density=0"),
        ({"inner": "dense"}, "inner='dense'"),
        ({"inner": "delta"}, "inner='delta'"),
        ({"inner": "radial", "density": 0.2}, "radial"),
        ({"block_size": 48}, "block_size=48"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("delta", **options)
    assert "\n" not in str(caught.value)
