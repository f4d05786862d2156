"""The quantising kernels in Triton's interpreter. Run by test_fp8.py in a process that has TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from dit_sparse import order
from dit_sparse.blockmask import BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels import fp8, quantise
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.quantise import SCORES, Quantised, key_mean, quantise_reference
from tests.kernels.cases import Case, build

FP16 = Case(dtype=torch.float16, query_block=128, key_block=128)
CASES = [
    dataclasses.replace(FP16, **changes) for changes in (  # type: ignore[arg-type]
        dict(query_tokens=1, key_tokens=1, heads=1, lists="shared"),
        dict(query_tokens=63, key_tokens=113, head_dim=128),
        dict(query_tokens=1023, key_tokens=1023, head_dim=128, heads=3),
        dict(query_tokens=128, key_tokens=256, batch=2),
        dict(query_tokens=113, key_tokens=1023, head_dim=96, strided=True),
        dict(query_tokens=63, key_tokens=300, head_dim=40, value_dim=8),
        dict(query_tokens=300, key_tokens=300, head_dim=64, value_dim=128, dtype=torch.float32),
        dict(query_tokens=300, key_tokens=500, order="permuted", head_dim=128, strided=True),
        dict(query_tokens=300, key_tokens=500, order="heads", masked=True, batch=2, head_dim=96),
        dict(query_tokens=113, key_tokens=300, masked=True, batch=2, strided=True, lists="all"),
    )
]


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7.1's interpreter cuts small 8-bit numbers off instead of rounding them: round as GPUs and torch do."""
    convert = interpreter._convert_float

    def rounded(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.name != "fp8e4nv":
            return convert(x, source, target, mode)
        assert source.name == "fp32"
        plain = torch.from_numpy(numpy.ascontiguousarray(x).view(numpy.float32))
        return plain.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def differences(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, scores: str = "e4m3") -> str:
    """What the kernels compute otherwise than the twin: bits, but for the order in which means are added up."""
    dim = query.shape[3]
    plan = fp8.fp8_plan(blocks, key.shape[1], dim, value.shape[3])
    got, again = (quantise.quantise(query, key, value, blocks, scale, plan.key_ok, scores) for _ in range(2))
    unused = torch.empty(key.shape[0], key.shape[2], value.shape[3])
    mean = quantise._statistics(key, value, blocks.key_mask, unused)
    want = quantise_reference(query, key, value, blocks, scale, mean, scores)
    found = []
    if not torch.allclose(mean, key_mean(key, blocks.key_mask), rtol=1e-5, atol=1e-6):
        found.append("the mean")
    for field in dataclasses.fields(Quantised):
        x, y, z = (getattr(made, field.name) for made in (got, want, again))
        bits = [t.contiguous().view(torch.uint8) for t in (x, y, z)]
        if x.shape != y.shape or x.dtype != y.dtype or not torch.equal(bits[0], bits[2]):
            found.append(f"shape, dtype or repetition of {field.name}")
        elif field.name == "shift":
            # Queries times mean: cancels, so that the error is one of the sum's magnitude.
            if not torch.allclose(x, y, rtol=1e-5, atol=1e-5):
                found.append(f"shift by {(x - y).abs().max():.2e}")
        elif not torch.equal(bits[0], bits[1]):
            found.append(f"{field.name} in {int((bits[0] != bits[1]).sum())} bytes")
    return "; ".join(found)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_twin(case: Case, scores: str) -> None:
    inputs = build(case)
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    assert differences(inputs.query, inputs.key, inputs.value, blocks, inputs.scale, scores) == ""


@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_int8_scales_of_numbers_that_are_not_finite_are_nan(name: str, number: float) -> None:
    inputs = build(dataclasses.replace(FP16, query_tokens=300, key_tokens=300))
    getattr(inputs, name)[0, 140, 1, 5] = number
    blocks = Blocks.from_mask(inputs.mask)
    got = quantise.quantise(inputs.query, inputs.key, inputs.value, blocks, inputs.scale, scores="int8")
    assert torch.isfinite(got.query_scale[:, 0]).all() and torch.isfinite(got.key_scale[:, 0]).all()
    # One key spoils the mean that all keys of a head are centred by, a query only its block.
    spoilt = got.key_scale[0, 1] if name == "key" else got.query_scale[0, 1, 1:2]
    assert spoilt.isnan().all()
    if name == "query":
        assert torch.isfinite(got.query_scale[0, 1, [0, 2]]).all() and torch.isfinite(got.key_scale).all()


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("kind", ["large mean", "outliers", "zeros", "tiny"])
def test_uneven_numbers(kind: str, scores: str) -> None:
    inputs = build(dataclasses.replace(FP16, query_tokens=200, key_tokens=300, dtype=torch.float32))
    query, key, value = inputs.query, inputs.key, inputs.value
    if kind == "large mean":
        key = key + 50 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    elif kind == "outliers":
        query[..., 3], key[..., 5], value[..., 7] = 1000 * query[..., 3], 1000 * key[..., 5], 1000 * value[..., 7]
    elif kind == "zeros":
        query, key, value = query * 0, key * 0, value * 0
    else:
        query, key, value = query * 1e-20, key * 1e-20, value * 1e-20
    assert differences(query, key, value, Blocks.from_mask(inputs.mask), inputs.scale, scores) == ""


def test_tiles_of_a_grid_are_written_one_after_the_other() -> None:
    grid = TokenGrid(5, 6, 13, text=77, text_at="front")
    positions, lengths = order.tile(grid, (4, 4, 8))
    layout = order.layout(grid, positions, 128, lengths=lengths, tile_shape=(4, 4, 8))
    blocks = Blocks.from_mask(BlockMask.full(layout, layout))
    x = torch.randn(1, grid.tokens, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    assert blocks.query_box is not None and differences(x, x, x, blocks, 0.125) == ""


def test_many_parts_of_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(dataclasses.replace(FP16, query_tokens=100, key_tokens=1500, masked=True, batch=2))
    for programs in (1, 7, 100_000):
        monkeypatch.setattr(quantise, "_STATISTICS_PROGRAMS", programs)
        assert differences(inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask, inputs.key_mask),
                           inputs.scale) == ""
