"""Rules, the choice between kernels and plain PyTorch, and the routing kernels' tests in Triton's interpreter.

TRITON_INTERPRET is read when triton is imported and breaks torch.compile in the same process: hence the processes.
"""

import functools
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from dit_sparse import routing, scoring
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.budgets import budget_errors
from dit_sparse.selection import Rule, force, select_threshold, select_top_k, select_top_p
from tests.kernels.toolchain import interprets_numpy_2_4, needs_assembler, needs_triton
from tests.waits import Waits

HERE = pathlib.Path(__file__)


@pytest.mark.slow
@needs_triton
@interprets_numpy_2_4
@pytest.mark.parametrize("name, part", [("routing", "exactly"), ("routing", "not exactly"), ("budgets", "")])
def test_routing_kernels_in_the_interpreter(name: str, part: str) -> None:
    # Compiled kernels and interpreted ones must not meet in one cache, nor two workers in one report.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    suite = HERE.with_name(f"interpreted_{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part, str(suite)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=suite.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@needs_assembler
def test_routing_kernels_compile_for_hopper_without_spills() -> None:
    done = subprocess.run([sys.executable, str(HERE.with_name("offline_routing.py"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def small_call(heads: int = 3) -> tuple[torch.Tensor, torch.Tensor, BlockLayout]:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 150, heads, 16, generator=generator).unbind(0)
    return query, key, BlockLayout.raster(150, 32)


@pytest.mark.parametrize("kind", ["top_k", "top_p", "threshold"])
def test_a_rule_is_its_selection_and_its_forced_blocks(kind: str) -> None:
    scores = torch.randn(2, 3, 5, 6)
    select = {"top_k": select_top_k, "top_p": select_top_p, "threshold": select_threshold}[kind]
    amount = 2 if kind == "top_k" else 0.4
    assert torch.equal(Rule(kind, amount).keep(scores), select(scores, amount))
    rule = Rule(kind, amount, softmax=True, rows=slice(1, 4), columns=slice(1, None), forced_columns=slice(5, 6))
    want = torch.ones(2, 3, 5, 6, dtype=torch.bool)
    want[:, :, 1:4, 1:] = select(scores[:, :, 1:4, 1:].softmax(-1), amount)
    assert torch.equal(rule.keep(scores), force(want, columns=slice(5, 6)))
    per_row = torch.full((5, 1), amount)
    assert torch.equal(Rule(kind, per_row, rows=slice(1, 4)).keep(scores),
                       Rule(kind, amount, rows=slice(1, 4)).keep(scores))


@pytest.mark.parametrize("limit", [1, 2**26])
def test_routing_is_scores_then_selection_then_lists(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, layout = small_call()
    rule = Rule("top_k", torch.tensor([1, 2, 3])[:, None, None], own=True,
                forced_columns=torch.rand(1, 3, layout.blocks) < 0.2, forced_rows=torch.rand(2, 3, layout.blocks) < 0.1)
    keep = rule.keep(scoring.pooled_scores(query, key, layout, layout, 0.3))
    want = BlockMask.from_dense(keep, layout, layout)
    monkeypatch.setattr(scoring, "_NUMBERS_AT_ONCE", limit)
    got = routing.route(query, key, layout, layout, 0.3, rule)
    assert torch.equal(got.lists, want.lists) and torch.equal(got.work(), want.work())


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 3, 5), (2, 3, 5)], ids=str)
def test_weights_of_key_blocks_are_added_to_the_scores(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, layout = small_call()
    means = scoring.pool(query, layout), scoring.pool(key, layout)
    weight, rule = torch.randn(shape), Rule("top_k", 2)
    want = routing.lists_of_scores(means[0] * 0.3 @ means[1].mT + weight[:, :, None], layout, layout, rule)
    for limit in (1, 2**26):  # one head at a time, all of them
        monkeypatch.setattr(scoring, "_NUMBERS_AT_ONCE", limit)
        got = routing.route_means(*means, layout, layout, 0.3, rule, key_weight=weight)
        assert torch.equal(got.lists, want.lists) and torch.equal(got.work(), want.work())
    for wrong in (weight[..., :4], weight.double(), weight[0]):
        with pytest.raises(ValueError, match="route_means: key_weight is"):
            routing.route_means(*means, layout, layout, 0.3, rule, key_weight=wrong)


def test_plain_routing_never_reads_a_tensor() -> None:
    layout = BlockLayout.from_order(torch.zeros(1, 2, 113, dtype=torch.int64, device="meta"), 32)
    x = torch.rand(1, 113, 2, 8, device="meta")
    mask = torch.ones(1, 113, dtype=torch.bool, device="meta")
    with Waits():
        for rule in (Rule("top_k", 2), Rule("top_p", 0.3, softmax=True, own=True), Rule("threshold", 0.1)):
            found = routing.route(x, x, layout, layout, 1.0, rule, key_mask=mask)
            lse = torch.empty(1, 2, 113, device="meta")
            assert routing.listed_mass(x, x, lse, found, 1.0, key_mask=mask).shape == (1, 2, 4, 4)


def test_kernels_are_used_on_a_gpu_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU:
        device, dtype, shape = torch.device("cuda"), torch.float16, (1, 10, 1, 64)

    x: Any = OnGPU()
    real = routing.triton_reasons
    monkeypatch.setattr(routing, "triton_reasons", lambda *tensors: [] if tensors[0] is x else real(*tensors))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for wanted, used in (("", True), ("1", True), ("TRUE", True), ("0", False), ("Off", False), (" false", False)):
        monkeypatch.setenv("DIT_SPARSE_ROUTING", wanted)
        assert routing._use_kernels(x, 10, None) is used
    assert routing._use_kernels(x, 10, True)
    monkeypatch.delenv("DIT_SPARSE_ROUTING")
    assert not routing._use_kernels(torch.zeros(1, 10, 1, 64), 10, None)
    routing.plain_calls.clear()
    assert not routing._use_kernels(x, 2**20, None)
    assert sum(routing.plain_calls.values()) == 1 and "1048576 key blocks" in next(iter(routing.plain_calls))
    assert not routing._use_kernels(x, 10, False)
    # Query and key decide together: nobody who did not ask for kernels sees their error.
    assert not routing._use_kernels(x, 10, None, torch.zeros(1, 10, 1, 64, dtype=torch.float64))


def test_doctor_says_which_kernels_make_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse import doctor

    def found() -> doctor.Check:
        return next(check for check in doctor.examine() if check.name == "routing kernels")

    monkeypatch.delenv("DIT_SPARSE_ROUTING", raising=False)
    if not torch.cuda.is_available():
        assert found().status == "note" and "plain PyTorch" in found().detail
    monkeypatch.setattr(routing, "triton_reasons", lambda *_: [])
    assert found() == doctor.Check("routing kernels", "ok", "Triton kernels make the masks")
    monkeypatch.setenv("DIT_SPARSE_ROUTING", "off")
    assert found().status == "note" and found().detail.startswith("switched off by DIT_SPARSE_ROUTING=off")


def test_what_is_refused() -> None:
    query, key, layout = small_call()
    with pytest.raises(ValueError, match="kernels=True.*needs a GPU"):
        routing.route(query, key, layout, layout, 1.0, Rule("top_k", 1), kernels=True)
    with pytest.raises(ValueError, match="value head dim 200"):
        routing.row_errors(query, key, torch.zeros(2, 150, 3, 200), torch.zeros(1, dtype=torch.int64),
                           torch.ones(1, 1, 150, dtype=torch.bool), 1.0, kernels=True)
    odd = BlockMask.full(layout, BlockLayout.raster(150, 48))
    with pytest.raises(ValueError, match="block sizes .32, 48."):
        routing.listed_mass(query, key, torch.zeros(2, 3, 150), odd, 1.0, kernels=True)
    with pytest.raises(ValueError, match="own=True"):
        routing.route(query, key, layout, BlockLayout.raster(150, 16), 1.0, Rule("top_k", 1, own=True))
    with pytest.raises(ValueError, match="use .B, H, 5, 5."):
        routing.lists_of_scores(torch.zeros(1, 1, 5, 6), layout, layout, Rule("top_k", 1))
    with pytest.raises(ValueError, match="kind='best'"):
        Rule("best", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole numbers"):
        Rule("top_k", 0.5)
    with pytest.raises(ValueError, match="last dimension must be 1"):
        Rule("top_p", torch.rand(3))


@pytest.mark.parametrize("kernels", [None, False, True])
def test_shapes_are_checked_before_either_path(kernels: bool | None) -> None:
    query, key, layout = small_call()
    scores, ones = torch.zeros(2, 3, 5, 5), functools.partial(torch.ones, dtype=torch.bool)
    k = functools.partial(torch.ones, dtype=torch.int64)
    for options in ({"forced_columns": ones(3)}, {"forced_columns": ones(1)}, {"forced_rows": ones(9)},
                    {"forced_rows": ones(3, 5)}, {"forced_columns": ones(1, 2, 5)}, {"forced_rows": k(5)},
                    {"amount": k(2, 1, 1)}, {"amount": k(3, 1)}, {"amount": k(1, 1, 1, 1, 1)}):
        rule = Rule(**{"kind": "top_k", "amount": 1} | options)
        with pytest.raises(ValueError, match="Rule: (forced|amount).*; "):
            routing.lists_of_scores(scores, layout, layout, rule, kernels=kernels)
        with pytest.raises(ValueError, match="Rule: (forced|amount).*; "):
            routing.route(query, key, layout, layout, 1.0, rule, kernels=kernels)
    for wrong in (key[:1], key[:, :, :1], key[..., :8], key[:, :100]):
        with pytest.raises(ValueError, match="route: "):
            routing.route(query, wrong, layout, layout, 1.0, Rule("top_k", 1), kernels=kernels)
        with pytest.raises(ValueError, match="listed_mass: "):
            routing.listed_mass(query, wrong, torch.zeros(2, 3, 150), BlockMask.full(layout, layout), 1.0,
                                kernels=kernels)
    with pytest.raises(ValueError, match="lse is"):
        routing.listed_mass(query, key, torch.zeros(2, 3, 60), BlockMask.full(layout, layout), 1.0, kernels=kernels)
    two = BlockLayout.from_order(torch.arange(150).expand(1, 2, -1), 32)
    with pytest.raises(ValueError, match="index .1, 2, 160."):
        routing.pool(query, two, kernels=kernels)
    with pytest.raises(ValueError, match="pool: mask"):
        routing.pool(query, layout, mask=ones(2, 200), kernels=kernels)
    rows = torch.tensor([0, 1])
    for place, allowed, value in ((rows, ones(1, 2, 100), key), (rows, ones(1, 1, 150), key), (rows, k(1, 2, 150), key),
                                  (rows, ones(0, 2, 150), key), (rows[None], ones(1, 2, 150), key),
                                  (rows.bool(), ones(1, 2, 150), key), (rows, ones(1, 2, 150), key.half())):
        with pytest.raises(ValueError, match="row_errors: (rows|allowed|value)"):
            routing.row_errors(query, key, value, place, allowed, 1.0, kernels=kernels)


@pytest.mark.parametrize("soft", [True, False])
def test_errors_at_budgets_are_those_of_attention_over_what_is_kept(soft: bool) -> None:
    query, key, layout = small_call()
    value, rows = torch.randn(2, 150, 3, 24), torch.tensor([3, 149, 70])
    left = torch.randint(4, (2, 3, 3, layout.blocks), dtype=torch.int32)
    entry, mean = torch.randn(left.shape), torch.randn(2, 3, layout.blocks, 24)
    words = dict(entry=entry, mean_value=mean) if soft else {}
    error, norm = budget_errors(query, key, value, rows, layout, left, 4, 0.3, **words)
    logits = torch.einsum("brhd,blhd->bhrl", query[:, rows], key) * 0.3
    block, wide, outs = torch.arange(150) // 32, value.transpose(1, 2), []
    for place in range(4):
        kept = left <= place  # [B, H, R, n]
        weight = logits.exp() * kept[..., block]
        rest = entry.exp() * ~kept if soft else torch.zeros_like(entry)
        total = weight.sum(-1) + rest.sum(-1)
        outs.append((weight @ wide + rest @ mean) / total[..., None].clamp(min=1e-30))
    torch.testing.assert_close(error, torch.stack([(out - outs[-1]).square().sum(-1) for out in outs], dim=-1))
    torch.testing.assert_close(norm, outs[-1].square().sum(-1))


def test_what_the_kernel_of_budgets_refuses_is_counted() -> None:
    query, key, layout = small_call()
    odd, rows = BlockLayout.raster(150, 48), torch.zeros(1, dtype=torch.int64)
    left = torch.zeros(2, 3, 1, 5, dtype=torch.int32)

    def run(blocks: BlockLayout, value: torch.Tensor, budgets: int = 3, **words: Any) -> Any:
        return budget_errors(query, key, value, rows, blocks, left[..., : blocks.blocks], budgets, 1.0, **words)

    with pytest.raises(ValueError, match="block size 48 is not a power of two"):
        run(odd, key, kernels=True)
    with pytest.raises(ValueError, match="17 budgets are more than 16"):
        run(layout, key, 17, kernels=True)
    with pytest.raises(ValueError, match="value head dim 200"):
        run(layout, torch.zeros(2, 150, 3, 200), kernels=True)
    for wrong in ({"value": key[:1]}, {"value": key.half()}, {"value": key, "blocks": BlockLayout.raster(96, 32)},
                  {"value": key, "key_mask": torch.ones(2, 9, dtype=torch.bool)},
                  {"value": key, "entry": left.float()[0], "mean_value": torch.zeros(2, 3, 5, 16)}):
        with pytest.raises(ValueError, match="budget_errors: "):
            run(**({"blocks": layout} | wrong))


def test_moments_are_means_of_tokens_and_of_their_squared_norms() -> None:
    query, _, layout = small_call()
    mask = torch.rand(2, 150) < 0.7
    query[~mask] = torch.nan
    mean, squares = routing.pool_moments(query, layout, mask=mask)
    assert torch.equal(mean, scoring.pool(query, layout, mask=mask))
    for block in range(5):
        for b in range(2):
            here = query[b, 32 * block : 32 * (block + 1)][mask[b, 32 * block : 32 * (block + 1)]]
            torch.testing.assert_close(squares[b, :, block], here.square().sum(-1).mean(0))


def test_slices_with_a_step_are_refused() -> None:
    for name in ("rows", "columns", "forced_columns"):
        with pytest.raises(ValueError, match=f"{name}=.* has a step"):
            Rule("top_k", 1, **{name: slice(0, None, 2)})


def test_half_precision_is_widened() -> None:
    _, _, layout = small_call()
    scores = torch.randn(1, 1, 5, 5, dtype=torch.float16)
    for rule in (Rule("top_p", torch.tensor([[0.5]], dtype=torch.float16), softmax=True), Rule("threshold", 0.1)):
        want = routing.lists_of_scores(scores.float(), layout, layout, rule)
        got = routing.lists_of_scores(scores, layout, layout, rule)
        assert torch.equal(got.lists, want.lists) and torch.equal(got.work(), want.work())
    shares = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(select_top_p(shares, torch.tensor([[0.5]], dtype=dtype)), select_top_p(shares, 0.5))
    shares[0, 0] = torch.nan  # first, with a share of 0
    assert select_top_p(shares, 0.5).tolist() == [[True, True, False, True]]


def test_listed_mass_of_all_blocks_is_the_block_mass() -> None:
    query, key, layout = small_call()
    mask = torch.rand(2, 150) < 0.8
    logits = torch.einsum("blhd,bmhd->bhlm", query, key) * 0.3
    lse = logits.masked_fill(~mask[:, None, None], -torch.inf).logsumexp(-1)
    key[~mask] = torch.nan
    full = BlockMask.full(layout, layout)
    want = scoring.block_mass(query, key, layout, layout, 0.3, key_mask=mask)
    # The list has whole blocks first and the short one last: here the blocks' own order.
    torch.testing.assert_close(routing.listed_mass(query, key, lse, full, 0.3, key_mask=mask), want)
    rows = routing.listed_mass(query, key, lse, full, 0.3, key_mask=mask, per_row=True)
    torch.testing.assert_close(rows, torch.ones_like(lse))


def test_lists_of_maps_by_chunks_of_heads_are_those_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout.raster(7 * 16 - 3, 16)
    keep = (torch.rand(2, 5, 5, 5) < 0.4) | torch.eye(5, dtype=torch.bool)
    want = torch.ones(2, 5, 7, 7, dtype=torch.bool)
    want[..., :5, :5] = keep
    for most in (2**26, 2 * 4 * 2 * 49):
        monkeypatch.setattr(scoring, "_NUMBERS_AT_ONCE", most)
        got = routing.lists_of_maps(lambda heads: keep[:, heads], 2, 5, layout, 5)
        assert torch.equal(got.to_dense(), want)
        assert torch.equal(got.pairs, BlockMask.from_dense(want, layout, layout).pairs)
