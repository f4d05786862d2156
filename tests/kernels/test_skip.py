"""Attention with the inner filter: the operator against its twin, the filter's limits, and what it refuses.

The kernel's tests run in Triton's interpreter, in a process of their own (see test_portable.py).
"""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference, skip_reference
from dit_sparse.kernels.skip import skip_attention
from tests.kernels.cases import Case
from tests.kernels.skip_rule import CASES, check, inputs_of, without
from tests.kernels.toolchain import interprets_numpy_2_4, needs_assembler, needs_triton
from tests.waits import Waits

HERE = pathlib.Path(__file__)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def tiles(maxima: list[float], size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask]:
    """One query tile, and key tiles whose scores are the maxima, in this order."""
    key = torch.tensor(maxima).repeat_interleave(size)[None, :, None, None]
    query = torch.ones(1, size, 1, 1)
    value = torch.randn(key.shape)
    layouts = BlockLayout.raster(size, size), BlockLayout.raster(size * len(maxima), size)
    return query, key, value, BlockMask.full(*layouts)


@pytest.mark.parametrize("maxima, skips", [
    ((0.0, -1, 3, -8), [0, 0, 0, 1]), ((-8.0, 3, -1, 0), [0, 0, 0, 0]), ((3.0, -1, 0, -8), [0, 0, 0, 1])])
def test_order_decides_what_is_left_out(maxima, skips) -> None:
    """Maxima of the tiles in the order of the visit; log threshold -5."""
    arguments = tiles(list(maxima))
    threshold = math.exp(-5)
    for first in ("list", "own"):
        assert skip_reference(*arguments, threshold, 1.0, first=first)[2][0, 0, 0].tolist() == [bool(s) for s in skips]
        levels = skip_attention(*arguments, torch.tensor([[threshold]]), scale=1.0, first=first)[2]
        assert levels[0, 0, 0].tolist() == skips


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_equals_the_twin(case: Case) -> None:
    for first in ("own", "list"):
        assert check(inputs_of(case), False, first) == ""


def test_something_is_left_out() -> None:
    inputs = inputs_of(CASES[2])
    skipped = skip_reference(inputs.query, inputs.key, inputs.value, inputs.mask, 0.3, inputs.scale)[2]
    assert 0.05 < skipped.float().mean() < 0.9


def test_threshold_zero_is_plain_attention() -> None:
    """Nothing is left out: bit for bit what no filter computes, and the LSE is the dense one."""
    inputs = inputs_of(Case(113, 150, query_block=16, key_block=16, lists="all", batch=2))
    full = BlockMask.full(inputs.mask.query, inputs.mask.key)
    arguments = inputs.query, inputs.key, inputs.value, full
    out, lse, levels = skip_attention(*arguments, torch.zeros(1, 1), scale=inputs.scale)
    count = skip_attention(*arguments, torch.ones(1, 1), scale=inputs.scale, apply=False)
    assert not levels.any() and torch.equal(out, count[0]) and torch.equal(lse, count[1])
    for got, want in zip((out, lse), block_sparse_attention(*arguments, scale=inputs.scale), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_row_maxima_survive_and_the_lost_mass_is_bounded() -> None:
    """A row loses less than threshold * keys left out, at random and with planted peaks, and never its maximum."""
    torch.manual_seed(1)
    layouts = BlockLayout.raster(90, 16), BlockLayout.raster(200, 16)
    mask = BlockMask.full(*layouts)
    for planted in (0, 10):
        query, key, value = (torch.randn(1, n, 2, 16) for n in (90, 200, 200))
        query[..., 0] += planted
        key[..., 0] += torch.randn(13).repeat_interleave(16)[:200, None] * bool(planted)
        scores = (query.double().transpose(1, 2) @ key.double().permute(0, 2, 3, 1)) / 4
        for threshold in (0.02, 0.3, 1.0):
            out, lse, levels = skip_attention(query, key, value, mask, torch.tensor([[threshold]]))
            left = without(mask, levels > 0).token_mask().expand_as(scores)
            assert levels.any() or not planted
            assert torch.equal(scores.masked_fill(~left, -torch.inf).amax(-1), scores.amax(-1))
            lost = scores.softmax(-1).masked_fill(left, 0).sum(-1)
            assert (lost <= threshold * (~left).sum(-1)).all()
            want = attention_reference(query, key, value, left, dtype=torch.float64)
            torch.testing.assert_close(lse.double(), want[1], atol=1e-5, rtol=0)


def test_one_pass_counts_what_many_thresholds_leave_out() -> None:
    """20 thresholds counted in one pass that leaves out nothing, against 20 passes with one each; ragged tails."""
    torch.manual_seed(2)
    query, key, value = (torch.randn(1, n, 2, 16) for n in (300, 1000, 1000))
    query[..., 0] = 12
    key[..., 0] += 2 * torch.randn(8).repeat_interleave(128)[:1000, None]
    mask = BlockMask.full(BlockLayout.raster(300, 128), BlockLayout.raster(1000, 128))
    trials = torch.logspace(-6, math.log10(0.99), 20)[None]
    levels = skip_attention(query, key, value, mask, trials, apply=False)[2]
    counts = [int((levels > 19 - j).sum()) for j in range(20)]
    single = [int(skip_attention(query, key, value, mask, t[None, None])[2].sum()) for t in trials[0]]
    assert counts == single and counts[-1] > counts[10] > counts[0]


def test_thresholds_per_head() -> None:
    inputs = inputs_of(Case(150, 300, query_block=32, key_block=16, heads=2))
    arguments = inputs.query, inputs.key, inputs.value, inputs.mask
    levels = skip_attention(*arguments, torch.tensor([[0.0], [0.3]]), scale=inputs.scale)[2]
    both = skip_attention(*arguments, torch.tensor([[0.3]]), scale=inputs.scale)[2]
    assert not levels[:, 0].any() and torch.equal(levels[:, 1], both[:, 1])


def test_query_blocks_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.kernels import skip

    monkeypatch.setattr(skip, "_NUMBERS_AT_ONCE", 2000)
    assert check(inputs_of(CASES[2]), False) == ""
    assert check(inputs_of(CASES[5]), False) == ""


def test_bfloat16() -> None:
    assert check(inputs_of(Case(113, 239, query_block=32, key_block=32, dtype=torch.bfloat16)), False) == ""


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    inputs = inputs_of(Case())
    good = dict(query=inputs.query, key=inputs.key, value=inputs.value, mask=inputs.mask,
                thresholds=torch.ones(1, 1))
    for change, words in (
        (dict(query=inputs.query[:, 1:]), "mask is for 113 queries"),
        (dict(key=inputs.key[:, 1:]), "do not fit"),
        (dict(thresholds=torch.ones(3, 1)), "thresholds is"),
        (dict(thresholds=torch.ones(1, 65)), "thresholds is"),
        (dict(first="best"), "own, list"),
        (dict(scale=-1.0), "positive"),
        (dict(kernels=True), "kernels=True: the kernel with the inner filter cannot run this call: "),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            skip_attention(**(good | change))
        assert "\n" not in str(caught.value)


def test_the_operator_is_one_call_for_compilers() -> None:
    inputs = inputs_of(Case(113, 150, query_block=32, key_block=32))

    def attend(query: torch.Tensor) -> torch.Tensor:
        return skip_attention(query + 1, inputs.key, inputs.value, inputs.mask, torch.full((1, 1), 0.2))[0] * 2

    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs.query), attend(inputs.query))


def test_plain_path_never_waits() -> None:
    inputs = inputs_of(CASES[4])
    thresholds = torch.full((1, 1), 0.2)
    with Waits():
        skip_attention(inputs.query, inputs.key, inputs.value, inputs.mask, thresholds, key_mask=inputs.key_mask)


@pytest.mark.slow
@needs_triton
@interprets_numpy_2_4
def test_kernel_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    suite = HERE.with_name("interpreted_skip.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=suite.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@needs_assembler
def test_kernel_compiles_for_hopper_without_spills() -> None:
    done = subprocess.run([sys.executable, str(HERE.with_name("offline_skip.py"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
