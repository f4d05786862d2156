"""Soft blocks: the operator against its twin, and what it refuses; numbers by hand are in tests/methods/test_sol.py.

The kernel's tests run in Triton's interpreter, in a process of their own (see test_portable.py).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.kernels.reference import merge_by_lse, soft_reference
from dit_sparse.kernels.soft import merge_soft_blocks, soft_attention, soft_means
from tests.kernels.cases import Case
from tests.kernels.soft_rule import BF16, CASES, FP32, check, inputs_of, masked_out, means_of, merge, run
from tests.kernels.toolchain import interprets_numpy_2_4, needs_assembler, needs_triton
from tests.waits import Waits

HERE = pathlib.Path(__file__)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_twin_is_a_merge_of_two_attentions() -> None:
    """One softmax over keys and entries equals attention over the keys, merged with attention over the means."""
    inputs = inputs_of(Case(70, 96, key_block=16, query_block=32))
    mean_key, mean_value = means_of(inputs)
    q = inputs.query.transpose(1, 2)
    score = q @ mean_key.mT * inputs.scale + inputs.mask.key.lengths.log()
    row = inputs.mask.query.block_of_token
    score = score.masked_fill(inputs.mask.to_dense()[:, :, row], -torch.inf)
    soft = (score.softmax(-1).nan_to_num(0) @ mean_value).transpose(1, 2), score.logsumexp(-1)
    hard = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, scale=inputs.scale)
    want = merge_by_lse([hard, soft])
    arguments = inputs.query, inputs.key, inputs.value, inputs.mask, inputs.scale
    for got, expected in zip(soft_reference(*arguments), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", CASES + [Case(113, 239, dtype=BF16), Case(113, 150, order="heads", dtype=BF16)],
                         ids=lambda case: case.name)
def test_operator_equals_the_twin(case: Case) -> None:
    inputs = inputs_of(case)
    assert check(inputs, *run(inputs, None)) == ""
    assert check(inputs, *merge(inputs, False)) == ""


def test_blocks_without_keys_are_no_entries() -> None:
    inputs = masked_out()
    out, lse = run(inputs, None)
    assert check(inputs, out, lse) == ""
    assert not out[1].any() and (lse[1] == -torch.inf).all()


def test_rows_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.kernels import soft

    monkeypatch.setattr(soft, "_NUMBERS_AT_ONCE", 200)
    inputs = inputs_of(Case(113, 150, order="heads", batch=2, lists="all"))
    assert check(inputs, *run(inputs, False)) == ""


def test_everything_listed_is_dense_attention() -> None:
    query, key, value = (torch.randn(2, n, 3, 16) for n in (50, 70, 70))
    layouts = BlockLayout.raster(50, 16), BlockLayout.raster(70, 16)
    means = torch.randn(2, 2, 3, layouts[1].blocks, 16)
    got = soft_attention(query, key, value, *means, BlockMask.full(*layouts))
    for a, b in zip(got, dense_attention(query, key, value), strict=True):
        torch.testing.assert_close(a, b)


def test_large_values_and_scores_far_apart() -> None:
    """Sums of values far from 0, and rows whose listed keys score far above or below the means."""
    for dtype, shift in ((FP32, 40.0), (FP32, -40.0), (BF16, 10.0)):
        inputs = inputs_of(Case(113, 239, dtype=dtype))
        inputs.value.add_(10)
        inputs.key[:, :64] += shift * inputs.query[:, :1]
        assert check(inputs, *run(inputs, None)) == "", (dtype, shift)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    inputs = inputs_of(Case())
    mean_key, mean_value = means_of(inputs)
    hard = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask)
    for change, words in (
        (dict(mean_key=mean_key[:, :, 1:]), "mean_key is"),
        (dict(mean_value=mean_value[:, :1]), "mean_value is"),
        (dict(lse=hard[1][..., 1:]), "lse is"),
        (dict(out=hard[0].double()), "out is torch.float64"),
        (dict(query=inputs.query[:, 1:]), "query is"),
        (dict(kernels=True), "kernels=True: the kernel of soft blocks cannot run this call: "),
    ):
        arguments = dict(query=inputs.query, mean_key=mean_key, mean_value=mean_value, mask=inputs.mask,
                         out=hard[0], lse=hard[1]) | change
        with pytest.raises(ValueError, match=words) as caught:
            merge_soft_blocks(**arguments)
        assert "\n" not in str(caught.value)


def test_means_that_do_not_fit_are_refused_before_a_kernel_reads_them() -> None:
    inputs = inputs_of(Case(batch=2))
    mean_key, mean_value = means_of(inputs)
    fit = soft_means(mean_key, mean_value, inputs.mask)
    call = (inputs.query, inputs.key, inputs.value, inputs.mask)
    for change, words in (
        (dict(value=mean_value[..., :1]), "mean_value is"),
        (dict(value=torch.cat([mean_value, mean_value], -1)), "mean_value is"),
        (dict(counts=fit.counts[..., 1:]), "counts of the means are"),
        (dict(counts=fit.counts.expand(3, 1, -1)), "counts of the means are"),
        (dict(heads=torch.tensor([0], dtype=torch.int32)), "heads is torch.int32"),
        (dict(heads=torch.tensor([True, False])), "heads is torch.bool"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            block_sparse_attention(*call, soft=dataclasses.replace(fit, **change))
        assert "\n" not in str(caught.value)
    for key_mask in (torch.ones(2, 238, dtype=torch.bool), torch.ones(2, 239)):
        with pytest.raises(ValueError, match="key_mask is"):
            soft_attention(*call[:3], mean_key, mean_value, inputs.mask, key_mask=key_mask)


def test_no_head_with_soft_blocks_is_attention_over_the_listed_ones() -> None:
    inputs = inputs_of(Case(batch=2, order="heads", lists="all"))
    call, none = (inputs.query, inputs.key, inputs.value), torch.zeros(0, dtype=torch.int64)
    found = soft_attention(*call, *means_of(inputs), inputs.mask, heads=none)
    for a, b in zip(found, block_sparse_attention(*call, inputs.mask), strict=True):
        assert torch.equal(a, b)


def test_the_operator_is_a_proper_operator() -> None:
    from dit_sparse.kernels.blocks import Blocks

    inputs = inputs_of(Case(65, 70, batch=2, order="heads"))
    blocks = Blocks.from_mask(inputs.mask)
    hard = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask)
    arguments = (inputs.query, *means_of(inputs), blocks.key_lengths[None, None], blocks.lists, blocks.whole,
                 blocks.boundary, blocks.query_lengths, blocks.key_lengths, blocks.query_index, *hard,
                 blocks.query_block, blocks.key_block, 0.125, False)
    torch.library.opcheck(torch.ops.dit_sparse.soft_blocks.default, arguments)


def test_compilers_see_one_call() -> None:
    inputs = inputs_of(Case())
    means = means_of(inputs)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return soft_attention(query + 1, inputs.key, inputs.value, *means, inputs.mask)[0] * 2

    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs.query), attend(inputs.query))


def test_plain_path_never_waits() -> None:
    inputs = inputs_of(Case(113, 150, order="heads", masked=True))
    means = means_of(inputs)
    hard = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, key_mask=inputs.key_mask)
    with Waits():
        merge_soft_blocks(inputs.query, *means, inputs.mask, *hard, key_mask=inputs.key_mask)


@pytest.mark.slow
@needs_triton
@interprets_numpy_2_4
def test_kernel_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    suite = HERE.with_name("interpreted_soft.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=suite.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@needs_assembler
def test_kernel_compiles_for_hopper_without_spills() -> None:
    done = subprocess.run([sys.executable, str(HERE.with_name("offline_soft.py"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
