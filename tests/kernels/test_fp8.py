"""fp8 attention on the CPU: what it refuses, how far rounding moves numbers, and the kernels' source run as it stands.

The quantising kernels run in Triton's interpreter (interpreted_fp8.py), the attention kernel, which that does not run,
as threads (fp8_emulator.py); both are compiled for sm_90 (offline_fp8.py). tests/gpu shows speed.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dit_sparse import order
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels import fp8, hopper_plan
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.fp8 import block_sparse_attention_fp8, block_sparse_fp8_reference, fp8_plan, fp8_reasons
from dit_sparse.kernels.quantise import BLOCK, SCORES, dequantise, quantise_reference, rounding_bound, value_order
from dit_sparse.kernels.reference import attention_reference
from tests.kernels.cases import Case, Inputs, build
from tests.kernels.fp8_rule import formula_problem, kernel_problem, noise_bound, noise_figures, rounding_noise
from tests.kernels.toolchain import needs_assembler, needs_triton

HERE = pathlib.Path(__file__).parent
FITS = Case(dtype=torch.float16, query_block=128, key_block=128)


def case(query_tokens: int, key_tokens: int, **changes: object) -> Case:
    return dataclasses.replace(FITS, query_tokens=query_tokens, key_tokens=key_tokens, **changes)  # type: ignore[arg-type]


def noise(kind: str, tokens: int = 700, dim: int = 128) -> Inputs:
    """White noise, the same with a mean of the keys ten times as large, or with outlier channels; every pair seen."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, tokens, 2, dim, generator=generator).unbind(0)
    if kind == "large mean":
        key = key + 10 * torch.randn(dim, generator=generator)
    elif kind == "outliers":
        key[..., 5], value[..., 7] = 10 * key[..., 5], 100 * value[..., 7]
    layout = BlockLayout.raster(tokens, 128)
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    return Inputs(query, key, value, BlockMask.full(layout, layout), None, dim**-0.5)


def emulated(inputs: Inputs, scores: str = "e4m3", **options: object) -> tuple[Tensor, Tensor, object]:
    """Output and LSE of the kernel's source, and what it was given."""
    from tests.kernels.fp8_emulator import emulate

    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    quantised = quantise_reference(inputs.query, inputs.key, inputs.value, blocks, inputs.scale, scores=scores)
    out, lse = emulate(quantised, blocks, inputs.scale, inputs.query.shape[1], inputs.query.shape[3],
                       inputs.query.dtype, **options)  # type: ignore[arg-type]
    return out, lse, quantised


@pytest.mark.parametrize("changes, reason", [
    ({}, ""), ({"dtype": torch.bfloat16}, ""), ({"head_dim": 96}, ""), ({"window": 3, "masked": True}, ""),
    ({"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
    ({"head_dim": 160, "value_dim": 64}, "head dim 160 is not a multiple of 8 up to 128"),
    ({"value_dim": 36}, "head dim of the values 36 is not a multiple of 8 up to 128"),
    ({"query_block": 64}, "query block size 64 is not 128"),
    ({"key_block": 64}, "key block size 64 is not 128"),
], ids=str)
def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch, changes: dict, reason: str) -> None:
    monkeypatch.setattr(hopper_plan, "missing", lambda: "")
    inputs = build(dataclasses.replace(FITS, **changes))
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    found = fp8_reasons(inputs.query, inputs.key, inputs.value, blocks)
    assert found == ["the tensors are on cpu, it needs a Hopper GPU", *([reason] if reason else [])]
    with pytest.raises(ValueError, match="fp8 attention cannot run this call: .* on cpu") as error:
        block_sparse_attention_fp8(inputs.query, inputs.key, inputs.value, blocks, inputs.scale)
    assert "\n" not in str(error.value)


def test_scores_that_are_not_there() -> None:
    inputs = build(FITS)
    blocks = Blocks.from_mask(inputs.mask)
    arguments = inputs.query, inputs.key, inputs.value, blocks, inputs.scale
    for call in (block_sparse_attention_fp8, block_sparse_fp8_reference, quantise_reference):
        with pytest.raises(ValueError, match="^scores='int4' is not allowed; use one of e4m3, int8$"):
            call(*arguments, scores="int4")


def test_imports_and_twin_need_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from dit_sparse.kernels import fp8, quantise
from dit_sparse.kernels.blocks import Blocks
x = torch.randn(1, 130, 2, 64)
blocks = Blocks.dense(130, 130, 128, None, x.device)
assert fp8.block_sparse_fp8_reference(x, x, x, blocks, 0.1)[0].shape == x.shape
assert fp8.fp8_reasons(x, x, x, blocks)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr[-2000:]


def test_order_of_the_values() -> None:
    slot = value_order(32)
    for j, t, e in ((0, 0, 1), (1, 0, 0), (0, 3, 1), (1, 2, 1)):
        assert slot[4 * t + 2 * j + e] == 8 * j + 2 * t + e and slot[16 + 4 * t + 2 * j + e] == 16 + 8 * j + 2 * t + e
    assert torch.equal(slot.sort().values, torch.arange(32))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("kind", ["white", "large mean", "outliers"])
def test_rounding_stays_within_its_bound(kind: str, scores: str) -> None:
    inputs = noise(kind, 300)
    blocks = Blocks.from_mask(inputs.mask)
    quantised = quantise_reference(inputs.query, inputs.key, inputs.value, blocks, inputs.scale, scores=scores)
    # Every scale uses the whole range.
    for made in (quantised.query, quantised.key):
        largest = made.float().unflatten(2, (-1, BLOCK)).abs().amax((3, 4))
        assert (largest == {"e4m3": 448, "int8": 127}[scores]).all()
    assert (quantised.value.float().abs().amax(3) == 448).all()
    query, key, value, _ = dequantise(quantised, blocks, 128)
    centred = inputs.key.float() - inputs.key.float().mean(1, keepdim=True)
    worst = []
    for got, want in ((query, inputs.query.float()), (key, centred)):
        for start in range(0, 300, BLOCK):
            rows = want[:, start : start + BLOCK]
            bound = rounding_bound(rows, rows.abs().amax((1, 3), keepdim=True), scores)
            worst.append(((got[:, start : start + BLOCK] - rows).abs() / bound).max())
    values = inputs.value.float()
    worst.append(((value - values).abs() / rounding_bound(values, values.abs().amax(1, keepdim=True))).max())
    # The bound is met, and nearly reached: a format with another bit would stay below half of it.
    assert max(worst) <= 1 and min(worst) > 0.9


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("kind", ["white", "large mean", "outliers"])
def test_error_on_noise(kind: str, scores: str) -> None:
    """The error expected of four roundings, whatever the mean of the keys; the LSE is that of the keys as given."""
    pytest.importorskip("triton")
    inputs = noise(kind)
    out, lse, quantised = emulated(inputs, scores)
    want, _ = attention_reference(inputs.query, inputs.key, inputs.value, dtype=torch.float64)
    q, k = inputs.query.float(), inputs.key.float() - inputs.key.float().mean(1, keepdim=True)
    spread = (torch.einsum("bqhd,bkhd->bhqk", q, k) * inputs.scale).std(-1).square().mean().sqrt()
    expected = rounding_noise(inputs.query, inputs.key, inputs.value, inputs.scale, scores)
    # Channel by channel, or the largest would hide all others.
    for channels in (slice(0, 7), slice(7, 8), slice(8, None)):
        error, cosine = noise_figures(out[..., channels], want[..., channels])
        bound = float(expected[..., channels].sum().sqrt() / want[..., channels].norm())
        if scores == "e4m3":
            bound = min(bound, noise_bound(float(spread)))
        assert error <= bound and cosine >= 1 - bound**2 / 2, (error, bound, cosine)
    assert formula_problem(inputs, lse, quantised) == ""  # type: ignore[arg-type]


def test_centring_is_what_bears_a_large_mean() -> None:
    inputs = noise("large mean")
    blocks = Blocks.from_mask(inputs.mask)
    arguments = inputs.query, inputs.key, inputs.value, blocks, inputs.scale
    want, want_lse = attention_reference(inputs.query, inputs.key, inputs.value, dtype=torch.float64)
    errors = []
    for mean in (None, torch.zeros(1, 2, 128)):
        out, lse = block_sparse_fp8_reference(*arguments, quantise_reference(*arguments, mean))
        errors.append((noise_figures(out, want)[0], (lse - want_lse).abs().max().item()))
    assert errors[0][0] < 0.06 and errors[0][1] < 0.1
    assert errors[1][0] > 5 * errors[0][0] and errors[1][1] > 5 * errors[0][1]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("made, options", [
    (case(1, 1, lists="shared", heads=1), {}),
    (case(63, 113, head_dim=128, dtype=torch.bfloat16), {}),
    (case(113, 1023, head_dim=128, lists="all", batch=2), {}),
    (case(1023, 300, head_dim=64, lists="shared", batch=2), {}),
    (case(300, 900, head_dim=128), {"stages": 2}),
    (case(300, 900, head_dim=128), {"fresh": False}),
    (case(300, 900, head_dim=128, masked=True, batch=2), {}),
    (case(300, 500, head_dim=96, strided=True), {}),
    (case(300, 300, head_dim=40, value_dim=128, lists="all", batch=2), {}),
    (case(300, 500, order="permuted", head_dim=96, value_dim=8), {}),
    (case(300, 500, order="heads", masked=True, batch=2), {}),
    (case(300, 500, window=2), {}),
    (case(300, 300, window=3, always=True, masked=True, batch=2, lists="all"), {}),
    (case(300, 300, window=1, masked=True, order="heads", strided=True), {}),
], ids=lambda x: x.name if isinstance(x, Case) else str(x))
def test_the_kernels_source_computes_attention(made: Case, options: dict, scores: str) -> None:
    """With NaN in all fresh memory and in what is masked or lies around the activations."""
    pytest.importorskip("triton")
    inputs = build(made)
    out, lse, quantised = emulated(inputs, scores, **options)
    assert kernel_problem(inputs, out, lse, quantised) == ""  # type: ignore[arg-type]
    assert formula_problem(inputs, lse, quantised) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
def test_tiles_of_a_grid(masked: bool) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(5, 6, 13, text=77, text_at="front")
    positions, lengths = order.tile(grid, (4, 4, 8))
    layout = order.layout(grid, positions, 128, lengths=lengths, tile_shape=(4, 4, 8))
    keep = torch.rand(2, 2, layout.blocks, layout.blocks, generator=generator) < 0.6
    keep[:, :, 0] = False
    query, key, value = (torch.randn(2, grid.tokens, 2, 64, generator=generator).half() for _ in range(3))
    key_mask = torch.rand(2, grid.tokens, generator=generator) < 0.9 if masked else None
    inputs = Inputs(query, key, value, BlockMask.from_dense(keep, layout, layout), key_mask, 0.125)
    out, lse, quantised = emulated(inputs)
    assert Blocks.from_mask(inputs.mask).query_box is not None
    assert kernel_problem(inputs, out, lse, quantised) == ""  # type: ignore[arg-type]


def test_the_entry_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tests.kernels.fp8_emulator import emulate

    inputs = build(case(200, 300, order="heads", masked=True, batch=2, head_dim=96))
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    monkeypatch.setattr(fp8, "fp8_reasons", lambda *_: [])
    monkeypatch.setattr(fp8, "quantise", lambda *a: quantise_reference(*a[:5], scores=a[6]))
    monkeypatch.setattr(fp8, "attend", lambda made, blocks, plan, scale, tokens, dtype, cuda: emulate(
        made, blocks, scale, tokens, 96, dtype))
    arguments = inputs.query, inputs.key, inputs.value, blocks, inputs.scale
    for scores in SCORES:
        out, lse = block_sparse_attention_fp8(*arguments, scores=scores)
        assert kernel_problem(inputs, out, lse, quantise_reference(*arguments, scores=scores)) == ""
    assert torch.equal(block_sparse_attention_fp8(*arguments)[0],
                       block_sparse_attention_fp8(*arguments, scores=fp8.SCORES)[0])
    for tokens in ((0, 300), (200, 0)):
        q, k = (torch.randn(1, n, 2, 64).half() for n in tokens)
        out, lse = block_sparse_attention_fp8(q, k, k, Blocks.dense(*tokens, 128, None, q.device), 0.1)
        assert out.shape == q.shape and not out.any() and lse.shape == (1, 2, tokens[0]) and (lse == -torch.inf).all()


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_not_hidden(name: str, number: float, scores: str) -> None:
    """8-bit conversions saturate: what a model did wrong must still be seen in the output."""
    pytest.importorskip("triton")
    inputs = noise("white", 130)
    getattr(inputs, name)[0, 60, 1, 5] = number
    out, lse, _ = emulated(inputs, scores)
    assert torch.isfinite(out[:, :, 0]).all() and torch.isfinite(lse[:, 0]).all()
    rows = slice(60, 61) if name == "query" else slice(None)
    channels = slice(5, 6) if name == "value" else slice(None)
    assert not torch.isfinite(out[:, rows, 1, channels]).any()


def test_what_is_not_seen_is_no_reason_for_nan() -> None:
    """int8 marks numbers that are not finite in the scale of their block: who sees nothing of it stays finite."""
    pytest.importorskip("triton")
    inputs = build(case(300, 300, window=1, lists="shared"))
    broken = dataclasses.replace(inputs, query=inputs.query.clone())
    broken.query[0, 10, 1, 5] = torch.nan
    out, lse, _ = emulated(broken, "int8")
    good, good_lse, _ = emulated(inputs, "int8")
    seen = (good_lse > -torch.inf).transpose(1, 2)  # (B, Lq, H)
    assert out[:, :BLOCK, 1][seen[:, :BLOCK, 1]].isnan().all()
    spoilt = torch.zeros_like(seen)
    spoilt[:, :BLOCK, 1] = seen[:, :BLOCK, 1]
    assert (~seen).any() and torch.equal(out[~spoilt], good[~spoilt])
    assert torch.equal(lse.transpose(1, 2)[~spoilt], good_lse.transpose(1, 2)[~spoilt])


def test_the_plan_never_copies_tiles() -> None:
    grid = TokenGrid(8, 8, 16)
    positions, lengths = order.tile(grid, (4, 4, 8))
    layout = order.layout(grid, positions, 128, lengths=lengths, tile_shape=(4, 4, 8))
    blocks = Blocks.from_mask(BlockMask.full(layout, layout))
    plan = fp8_plan(blocks, grid.tokens, 96, 64)
    assert plan.box is None and plan.flags is None and plan.width == 128 and plan.lists is blocks.lists


@pytest.mark.slow
@needs_triton
def test_quantising_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_fp8.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@needs_assembler
def test_compiles_without_spills_and_with_overlapped_products() -> None:
    """One variant of each kind; `python tests/kernels/offline_fp8.py` compiles all of them."""
    cases = ["fp8-128", "fp8-64", "fp8-128-everything", "int8-128", "int8-128-everything", "quantise-128-int8"]
    done = subprocess.run([sys.executable, str(HERE / "offline_fp8.py"), "--cases", *cases], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count("waits 12") == 5, done.stdout + done.stderr[-2000:]
