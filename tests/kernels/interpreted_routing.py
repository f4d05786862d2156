"""The routing kernels in Triton's interpreter. Run by test_routing.py in a process that has TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import routing, scoring
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.budgets import budget_errors
from dit_sparse.grid import TokenGrid
from dit_sparse.methods import rainfusion2
from dit_sparse.methods.base import Call
from dit_sparse.selection import Rule

FP16, FP32 = torch.float16, torch.float32
NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_layout(kind: str, tokens: int, block: int, heads: int = 1) -> BlockLayout:
    """Raster; one order with segments that end inside blocks, one of them empty; or an order per head."""
    if kind == "raster":
        return BlockLayout.raster(tokens, block)
    orders = torch.stack([torch.randperm(tokens) for _ in range(heads if kind == "heads" else 1)])[None]
    lengths = [tokens // 3, tokens - tokens // 3]
    cut = [min(block, n - i) for n in lengths for i in range(0, n, block)]
    return BlockLayout.from_order(orders, block, lengths=torch.tensor([*cut[:1], 0, *cut[1:]], dtype=torch.int32))


def strided(x: Tensor) -> Tensor:
    """The same numbers as a view of (B, H, L + 5, D + 8) memory that is NaN outside."""
    B, L, H, D = x.shape
    view = torch.full((B, H, L + 5, D + 8), NAN, dtype=x.dtype).transpose(1, 2)[:, :L, :, :D]
    return view.copy_(x)


POOLED = [
    (1, 32, 64, FP32, "raster", False), (63, 32, 128, FP16, "raster", False), (113, 64, 96, FP16, "order", False),
    (113, 32, 64, FP32, "heads", True), (63, 16, 96, FP16, "raster", True), (1023, 128, 128, FP16, "order", True),
    (113, 48, 40, FP32, "order", True), (300, 256, 128, FP32, "heads", False), (5, 1, 8, FP32, "raster", False),
]


@pytest.mark.parametrize("case", POOLED, ids=lambda case: "-".join(map(str, case)))
def test_means_are_those_of_the_twin(case: tuple[Any, ...]) -> None:
    tokens, block, dim, dtype, kind, masked = case
    torch.manual_seed(0)
    layout = make_layout(kind, tokens, block, 2)
    x, mask = torch.randn(2, tokens, 2, dim).to(dtype), None
    if masked:
        mask = torch.rand(2, tokens) < 0.6
        mask[1, : tokens // 2] = False
        x[~mask] = NAN
    want = scoring.pool(x, layout, mask=mask)
    assert want.isfinite().all()
    for one in (x, strided(x)):
        got = routing.pool(one, layout, mask=mask, kernels=True)
        assert got.dtype == FP32
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        mean, squares = routing.pool_moments(one, layout, mask=mask, kernels=True)
        torch.testing.assert_close(mean, want, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(squares, routing.pool_moments(x, layout, mask=mask)[1], rtol=2e-5, atol=2e-6)


def random_rule(kind: str, B: int, H: int, nq: int, nk: int) -> Iterator[Rule]:
    """Rules of a kind: edge amounts, tensors of every broadcast shape, ranges, forced blocks."""

    def amounts(*shape: int) -> Tensor:
        return torch.randint(-1, nk + 3, shape) if kind == "top_k" else torch.rand(shape) * 1.2 - 0.1

    plain = {"top_k": [1, 2, nk, nk + 5, 0], "top_p": [0.0, 0.4, 0.9, 1.0, 1.5], "threshold": [0.0, 0.5, -INF, INF]}
    for amount in plain[kind]:
        yield Rule(kind, amount)
    yield Rule(kind, amounts(H, 1, 1), columns=slice(1, nk - 1), forced_columns=slice(0, 2), least=2)
    yield Rule(kind, amounts(B, 1, nq, 1), rows=slice(1, None), forced_rows=torch.rand(nq) < 0.3,
               forced_columns=torch.rand(B, H, nk) < 0.1, least=3)
    yield Rule(kind, amounts(B, H, nq, 1), forced_rows=torch.rand(1, H, nq) < 0.3, columns=slice(2, 2))
    if nq == nk:
        if kind != "top_p":
            yield Rule(kind, amounts(B, H, nq, 1), near=2, rows=slice(0, nq - 1), columns=slice(0, nk - 1))
            yield Rule(kind, plain[kind][1], near=1)
        yield Rule(kind, amounts(1, H, 1, 1), own=True, forced_columns=torch.rand(nk) < 0.1, columns=slice(0, nk // 2))


def same(got: BlockMask, want: BlockMask) -> bool:
    """Whether two masks are equal in every list and count."""
    return all(torch.equal(getattr(got, name), getattr(want, name))
               for name in ("lists", "whole", "boundary", "pairs"))


def hard_scores(B: int, H: int, nq: int, nk: int) -> Tensor:
    """Many ties, both zeros, infinities, NaN, and a row of nothing but -inf."""
    scores = (torch.randn(B, H, nq, nk) * 2).round() / 2
    scores[torch.rand(scores.shape) < 0.1] = -0.0
    scores[torch.rand(scores.shape) < 0.05] = -INF
    scores[torch.rand(scores.shape) < 0.03] = INF
    scores[:, 0, -1][torch.rand(B, nk) < 0.3] = NAN
    scores[0, -1, 0] = -INF
    return scores


@pytest.mark.parametrize("kind", ["top_k", "top_p", "threshold"])
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (2, 5), (4, 4), (2, 33), (1, 600), (1, 4096)])
def test_lists_are_exactly_those_of_the_twin(kind: str, nq: int, nk: int) -> None:
    torch.manual_seed(nk)
    B, H = 2, 2
    query = BlockLayout.raster(nq * 16 - 3, 16)
    # Short blocks in the middle and, where there is room, an empty one.
    lengths = torch.where(torch.rand(nk) < 0.3, torch.randint(1, 16, (nk,)), 16).to(torch.int32)
    if nk > 4:
        lengths[2] = 0
    key = BlockLayout.from_order(torch.randperm(int(lengths.sum())), 16, lengths=lengths)
    scores = hard_scores(B, H, nq, nk)
    if kind == "top_p":
        scores = scores.clamp(-4, 4).nan_to_num().softmax(-1)
        scores[0, 0, 0] = scores[0, 0, 0].round(decimals=2)
    for rule in random_rule(kind, B, H, nq, nk):
        want = routing.lists_of_scores(scores, query, key, rule)
        got = routing.lists_of_scores(scores, query, key, rule, kernels=True)
        assert same(got, want), rule
    narrow = routing.lists_of_scores(scores, query, key, Rule(kind, 1), max_width=3, kernels=True)
    want = routing.lists_of_scores(scores, query, key, Rule(kind, 1), max_width=3)
    assert all(torch.equal(getattr(narrow, n), getattr(want, n)) for n in ("lists", "whole", "boundary"))


@pytest.mark.parametrize("seed", range(6))
def test_lists_of_random_shapes(seed: int) -> None:
    torch.manual_seed(100 + seed)
    B, H, nq, nk = (int(torch.randint(1, high, ())) for high in (3, 3, 5, 130))
    query, key = BlockLayout.raster(nq * 32 - seed, 32), BlockLayout.raster(nk * 32 - 5, 32)
    scores = torch.randn(B, H, nq, nk)
    for rule in (Rule("top_k", int(torch.randint(1, nk + 2, ()))), Rule("top_p", torch.rand(H, 1, 1), softmax=True),
                 Rule("threshold", 1 / nk, softmax=True, columns=slice(nk // 3, None)),
                 Rule("top_k", torch.randint(1, nk + 2, (nq, 1)), softmax=True)):
        assert same(routing.lists_of_scores(scores, query, key, rule, kernels=True),
                    routing.lists_of_scores(scores, query, key, rule)), rule


@pytest.mark.parametrize("shares", [False, True])
def test_rows_of_every_magnitude_give_exactly_the_same(shares: bool) -> None:
    """From the smallest floats to the largest, of both signs, and rows whose scores nearly all agree."""
    torch.manual_seed(11)
    layout = BlockLayout.raster(9 * 16 - 3, 16)
    scores = torch.randn(1, 4, 9, 9) * 10.0 ** torch.randint(-45, 38, (1, 4, 9, 9))
    scores[:, 1] = 1 + torch.randint(3, (9, 9)) * 2.0**-23
    scores[:, 2, :, ::2], scores[:, 3] = 3e38, scores[:, 3].abs().clamp(max=1e-38)
    scores = scores.clamp(-80, 80).softmax(-1) if shares else scores
    for k in (2, 5):
        for rule in (Rule("top_k", k), Rule("top_p", k / 9, least=k) if shares else Rule("top_k", k, near=3)):
            want = routing.lists_of_scores(scores, layout, layout, rule)
            assert same(routing.lists_of_scores(scores, layout, layout, rule, kernels=True), want), rule


@pytest.mark.parametrize("kind", ["top_k", "top_p", "threshold"])
def test_rows_of_minus_infinity_with_softmax(kind: str) -> None:
    layout = BlockLayout.raster(80, 16)
    scores = torch.full((1, 1, 5, 5), -INF)
    rule = Rule(kind, 2 if kind == "top_k" else 0.3, softmax=True)
    kept = routing.lists_of_scores(scores, layout, layout, rule, kernels=True)
    assert same(kept, routing.lists_of_scores(scores, layout, layout, rule))
    assert (kept.work() == {"top_k": 2, "top_p": 5, "threshold": 1}[kind]).all()


ROUTED = [
    (113, 239, 64, FP32, "raster", False, "top_k"), (63, 113, 128, FP16, "order", True, "top_p"),
    (113, 63, 96, FP16, "heads", False, "threshold"), (1, 1, 64, FP32, "raster", False, "top_k"),
    (1023, 300, 128, FP32, "order", True, "top_k"),
]


@pytest.mark.parametrize("case", ROUTED, ids=lambda case: "-".join(map(str, case)))
def test_masks_of_activations_are_those_of_the_twin(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.kernels import routing as kernels

    query_tokens, key_tokens, dim, dtype, kind, masked, rule_kind = case
    torch.manual_seed(1)
    block = 128 if query_tokens > 1000 else 32
    query_layout, key_layout = (make_layout(kind, n, block, 2) for n in (query_tokens, key_tokens))
    query, key = (torch.randn(2, n, 2, dim).to(dtype) for n in (query_tokens, key_tokens))
    mask = None
    if masked:
        mask = torch.rand(2, key_tokens) < 0.8
        key[~mask] = NAN
    rule = Rule(rule_kind, 2 if rule_kind == "top_k" else 0.2, softmax=rule_kind != "top_k")
    arguments = query, key, query_layout, key_layout, 1.0, rule
    want = routing.route(*arguments, key_mask=mask)
    got = routing.route(*arguments, key_mask=mask, kernels=True)
    assert same(got, want)
    if query_tokens == 113:
        monkeypatch.setattr(kernels, "_NUMBERS_AT_ONCE", 1)
        assert same(routing.route(strided(query), strided(key), *arguments[2:], key_mask=mask, kernels=True), want)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
def test_weights_of_key_blocks_are_added_to_the_scores_exactly_as_in_the_twin(shape: tuple[int, int]) -> None:
    torch.manual_seed(8)
    layout = BlockLayout.raster(19 * 16 - 3, 16)
    block_query, block_key = torch.randn(2, 2, 3, 19, 32).unbind(0)
    weight = torch.randn(*shape, 19, 2)[..., 0] * 4
    weight[..., 5] = -INF
    for rule in (Rule("top_k", 4), Rule("threshold", 0.0, rows=slice(0, 17), columns=slice(0, 17), near=1)):
        arguments = block_query, block_key, layout, layout, 0.3, rule
        want = routing.route_means(*arguments, key_weight=weight)
        assert same(routing.route_means(*arguments, key_weight=weight, kernels=True), want)
        assert not same(routing.route_means(*arguments), want)


@pytest.mark.parametrize("grid", [TokenGrid(3, 6, 10), TokenGrid(2, 9, 11, text=20, text_at="front")], ids=str)
def test_rainfusion2_plans_the_same_mask(grid: TokenGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    query, key, value = torch.randn(3, 1, grid.tokens, 2, 64).unbind(0)
    call = Call(query, key, value, grid, 0.125)
    for count_forced in (True, False):
        method = rainfusion2.RainFusion2(density=0.3, count_forced=count_forced, block_size=32, tile=4)
        want = method.plan(call).mask
        with monkeypatch.context() as patch:
            patch.setattr(rainfusion2, "route_means", functools.partial(routing.route_means, kernels=True))
            got = method.plan(call).mask
        assert got is not None and want is not None and same(got, want)
        assert torch.equal(got.density(), want.density())


@pytest.mark.parametrize("tokens, rows, dim, dtype, masked", [
    (113, 5, 64, FP32, False), (1, 1, 64, FP32, False), (300, 40, 96, FP16, True), (1023, 33, 128, FP16, False),
])
def test_errors_of_sampled_rows_are_those_of_the_twin(
    tokens: int, rows: int, dim: int, dtype: torch.dtype, masked: bool
) -> None:
    torch.manual_seed(3)
    query, key, value = (strided(x) for x in torch.randn(3, 2, tokens, 2, dim).to(dtype).unbind(0))
    place = torch.randint(tokens, (rows,))
    allowed = torch.rand(2, rows, tokens) < torch.tensor([0.6, 0.2])[:, None, None]
    allowed[1, 0] = False
    mask = None
    if masked:
        mask = torch.rand(2, tokens) < 0.7
    want = routing.row_errors(*(x.float() for x in (query, key, value)), place, allowed, 0.11, mask)
    if mask is not None:
        key[~mask], value[~mask] = NAN, NAN
    got = routing.row_errors(query, key, value, place, allowed, 0.11, mask, kernels=True)
    torch.testing.assert_close(got, want, rtol=1e-4 if dtype == FP32 else 5e-3, atol=1e-6)


def test_sampled_rows_in_several_pieces_and_candidates_far_below_the_maximum() -> None:
    from dit_sparse.kernels import sampling

    torch.manual_seed(4)
    query, key, value = torch.randn(3, 1, 1100, 1, 64).unbind(0)
    query, key = query * 6, key * 6
    rows, allowed = torch.tensor([0, 1099]), torch.rand(3, 2, 1100) < 0.01
    allowed[2] = False
    out = sampling.sampled_outputs(query, key, value, rows, allowed, 1.0)
    logits = torch.einsum("rd,ld->rl", query[0, rows, 0].double(), key[0, :, 0].double())
    seen = torch.cat((torch.ones(1, 2, 1100, dtype=torch.bool), allowed))
    want = logits.masked_fill(~seen, -INF).softmax(-1).nan_to_num() @ value[0, :, 0].double()
    torch.testing.assert_close(out[0, 0].double(), want, rtol=1e-3, atol=1e-4)
    assert not out[0, 0, 3].any()


@pytest.mark.parametrize("case", [
    (113, 63, 64, FP32, "raster", False, 32, 16), (63, 113, 96, FP16, "order", True, 16, 64),
    (130, 300, 128, FP16, "heads", False, 128, 128), (300, 130, 64, FP32, "order", True, 128, 128),
    (1, 1, 64, FP32, "raster", False, 16, 16),
], ids=lambda case: "-".join(map(str, case)))
def test_masses_are_those_of_the_twin(case: tuple[Any, ...]) -> None:
    query_tokens, key_tokens, dim, dtype, kind, masked, query_block, key_block = case
    torch.manual_seed(5)
    query_layout = make_layout(kind, query_tokens, query_block, 2)
    key_layout = make_layout(kind, key_tokens, key_block, 2)
    query, key = (strided(torch.randn(2, n, 2, dim).to(dtype)) for n in (query_tokens, key_tokens))
    mask = torch.ones(2, key_tokens, dtype=torch.bool)
    if masked:
        mask = torch.rand(2, key_tokens) < 0.7
        mask[1] = False  # a batch element without a key
    logits = torch.einsum("blhd,bmhd->bhlm", query.float(), key.float()) * 0.2
    lse = logits.masked_fill(~mask[:, None, None], -INF).logsumexp(-1)
    key[~mask] = NAN
    keep = torch.rand(2, 2, query_layout.blocks, key_layout.blocks) < 0.5
    keep[:, 0, 0] = False
    for listed in (BlockMask.from_dense(keep, query_layout, key_layout), BlockMask.full(query_layout, key_layout)):
        for per_row in (False, True):
            arguments = query, key, lse, listed, 0.2
            key_mask = mask if masked else None
            want = routing.listed_mass(*arguments, key_mask=key_mask, per_row=per_row)
            got = routing.listed_mass(*arguments, key_mask=key_mask, per_row=per_row, kernels=True)
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_masses_of_all_blocks_stand_at_their_places(masked: bool) -> None:
    """Short blocks, last in the lists, in the middle too; fewer queries than keys."""
    key_layout = BlockLayout.from_order(torch.randperm(150), 32, lengths=[70, 80])
    query_layout = BlockLayout.from_order(torch.arange(40), 16, lengths=[20, 20])
    query, key = torch.randn(2, 40, 2, 64), torch.randn(2, 150, 2, 64)
    mask = torch.rand(2, 150) < 0.7 if masked else None
    arguments = query, key, query_layout, key_layout, 0.2
    want = routing.block_mass(*arguments, key_mask=mask)
    got = routing.block_mass(*arguments, key_mask=mask, kernels=True)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_no_operator_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel path on tensors without contents, launches left out: what needs a content cannot run."""
    from dit_sparse.kernels import budgets, mass, pooling, sampling
    from dit_sparse.kernels import routing as kernels
    from tests.waits import Waits

    launched = []

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert all(isinstance(n, int) for n in grid)
            return lambda *args, **constants: launched.append(self.name)

    for module, name in ((pooling, "pool_kernel"), (kernels, "score_kernel"), (kernels, "select_kernel"),
                         (sampling, "sampled_kernel"), (sampling, "merge_kernel"), (budgets, "piece_kernel"),
                         (budgets, "combine_kernel"), (mass, "mass_kernel")):
        monkeypatch.setattr(module, name, Launch(name))
    torch.use_deterministic_algorithms(False)
    layout = BlockLayout.from_order(torch.empty(1, 2, 113, dtype=torch.int64, device="meta"), 32)
    query, key, value = torch.empty(3, 1, 113, 2, 64, device="meta").unbind(0)
    mask = torch.empty(1, 113, dtype=torch.bool, device="meta")
    blocks = torch.empty(1, 2, layout.blocks, dtype=torch.bool, device="meta")
    with Waits():
        for kind in ("top_k", "top_p", "threshold"):
            amount = torch.empty(2, 1, 1, device="meta", dtype=torch.int64 if kind == "top_k" else FP32)
            for rule in (Rule(kind, 1), Rule(kind, amount, own=True, forced_rows=blocks, forced_columns=blocks)):
                found = routing.route(query, key, layout, layout, 1.0, rule, key_mask=mask, kernels=True)
                assert found.density().device.type == "meta" and found.lists.shape == (1, 2, 4, 4)
        rows = torch.empty(7, dtype=torch.int64, device="meta")
        allowed = torch.empty(2, 7, 113, dtype=torch.bool, device="meta")
        assert routing.row_errors(query, key, value, rows, allowed, 1.0, mask, kernels=True).shape == (1, 2, 2)
        mean, squares = routing.pool_moments(value, layout, mask=mask, kernels=True)
        assert squares.shape == (1, 2, 4)
        left = torch.empty(1, 2, 7, 4, dtype=torch.int32, device="meta")
        words: dict[str, Any] = dict(entry=left.float(), mean_value=mean, key_mask=mask, kernels=True)
        errors, norms = budget_errors(query, key, value, rows, layout, left, 3, 1.0, **words)
        assert errors.shape == (1, 2, 7, 3) and norms.shape == (1, 2, 7)
        lse = torch.empty(1, 2, 113, device="meta")
        assert routing.listed_mass(query, key, lse, found, 1.0, key_mask=mask, kernels=True).shape == (1, 2, 4, 4)
    assert launched == ["pool_kernel", "pool_kernel", "score_kernel", "select_kernel"] * 6 + [
        "sampled_kernel", "merge_kernel", "pool_kernel", "piece_kernel", "combine_kernel", "mass_kernel"]


@pytest.mark.parametrize(("dtype", "gap"), [(FP32, 20.0), (FP16, 2.0)])
def test_candidates_below_the_peak_and_masked_values_agree(dtype: torch.dtype, gap: float) -> None:
    torch.manual_seed(7)
    query, key, value = torch.zeros(2, 64, 1, 16), torch.zeros(2, 64, 1, 16), torch.randn(2, 64, 1, 16)
    query[..., 0], key[:, :8, :, 0] = 1, gap
    allowed, mask = torch.zeros(2, 4, 64, dtype=torch.bool), torch.rand(2, 64) < 0.7
    allowed[0, :, 32:], allowed[1, :, 16:], mask[1] = True, True, False
    key[~mask], value[~mask] = NAN, INF
    arguments = *(x.to(dtype) for x in (query, key, value)), torch.arange(4), allowed, 1.0, mask
    want = routing.row_errors(*arguments)
    assert want.isfinite().all() and (want[0] > 0).all() and not want[1].any()
    torch.testing.assert_close(routing.row_errors(*arguments, kernels=True), want, rtol=2e-3, atol=1e-6)
    with pytest.raises(ValueError, match="rows must lie in 0 ... 63"):
        routing.row_errors(*arguments[:3], torch.arange(61, 65), *arguments[4:], kernels=True)


def test_what_the_kernels_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout.raster(10, 16)
    x = torch.randn(1, 10, 1, 8).to(torch.bfloat16)
    with pytest.raises(ValueError, match="computes bfloat16 wrongly"):
        routing.route(x, x, layout, layout, 1.0, Rule("top_k", 1), kernels=True)
    monkeypatch.setattr(routing, "_MAX_KEY_BLOCKS", 0)
    with pytest.raises(ValueError, match="1 key blocks are more than 0"):
        routing.route(x.float(), x.float(), layout, layout, 1.0, Rule("top_k", 1), kernels=True)
    assert dataclasses.is_dataclass(Rule)


def test_hard_amounts_and_numbers_that_are_no_shares_give_exactly_the_same() -> None:
    torch.manual_seed(6)
    layout, scores = BlockLayout.raster(48, 16), torch.rand(1, 3, 3, 3)
    shares = scores.softmax(-1)
    shares[0, 0, 0, 2] = NAN
    shares[0, 0, 1, :2], shares[0, 0, 2] = NAN, torch.randn(3)
    shares[0, 1, 0, 1], shares[0, 1, 1, 1], shares[0, 2] = INF, -INF, NAN
    rules = [Rule("top_k", k) for k in (2**31, 2**40, -(2**33))]
    rules += [Rule("top_k", torch.tensor([[k]])) for k in (2**32 + 1, -(2**33))]
    rules += [Rule("top_p", p, least=n) for p in (0.0, 0.4, 1.0) for n in (1,)]
    rules += [Rule("top_p", torch.tensor([[p]], dtype=dtype)) for p in (0.5, INF, NAN)
              for dtype in (FP16, torch.bfloat16, FP32, torch.float64)]
    for rule in rules:
        for one in (scores, shares):
            want = routing.lists_of_scores(one, layout, layout, rule)
            assert same(routing.lists_of_scores(one, layout, layout, rule, kernels=True), want), rule
            assert (want.work() > 0).all()
