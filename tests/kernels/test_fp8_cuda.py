"""The 8-bit kernel in CUDA C++: its source on a CPU, its machine code without a GPU, and what it leaves to Gluon."""

import dataclasses
import pathlib
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import fp8, fp8_cuda, hopper_plan, nvrtc, starting
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.fp8_cuda import fp8_cuda_reasons, takes_cuda
from dit_sparse.kernels.quantise import SCORES, quantise_reference
from tests.gpu.checks import poisoned
from tests.kernels.cases import Case, Inputs, build
from tests.kernels.fp8_rule import formula_problem, kernel_problem
from tests.kernels.test_cuda import needs_compiler, nvrtc_missing
from tests.kernels.toolchain import needs_assembler, needs_triton

SCRIPT = pathlib.Path(__file__).with_name("offline_cuda.py")
FITS = Case(dtype=torch.bfloat16, head_dim=128, query_block=128, key_block=128)


def emulated(inputs: Inputs, scores: str = "e4m3", processors: int = 2) -> tuple[Tensor, Tensor, object]:
    """Output and LSE of the kernel's source, and what it was given. NaN in all fresh memory."""
    from tests.kernels.cuda_emulator.emulator import emulated as running

    blocks = Blocks.from_mask(inputs.mask)
    arguments = inputs.query, inputs.key, inputs.value, blocks, inputs.scale
    quantised = quantise_reference(*arguments, scores=scores)
    plan = fp8.fp8_plan(blocks, inputs.key.shape[1], inputs.query.shape[3], inputs.value.shape[3])
    with running(processors), poisoned():
        out, lse = fp8_cuda.attend_cuda(quantised, blocks, plan, inputs.scale, inputs.query.shape[1],
                                        inputs.query.dtype)
    return out, lse, quantised


@needs_triton
@needs_compiler
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("changes", [
    dict(query_tokens=1, key_tokens=1, heads=1, lists="shared"), dict(dtype=torch.float16, batch=2, lists="all"),
    dict(head_dim=96, value_dim=72, order="heads", query_tokens=300), dict(order="permuted", strided=True),
], ids=str)
def test_the_source_computes_attention(changes: dict, scores: str) -> None:
    inputs = build(dataclasses.replace(FITS, **changes))
    out, lse, quantised = emulated(inputs, scores)
    assert kernel_problem(inputs, out, lse, quantised) == ""  # type: ignore[arg-type]
    assert formula_problem(inputs, lse, quantised) == ""  # type: ignore[arg-type]


@needs_triton
@needs_compiler
@pytest.mark.parametrize("scores", SCORES)
def test_the_ring_and_the_tiles_go_round(scores: str) -> None:
    """More blocks in a list than the ring holds, more than a warp has lanes, more tiles than programs."""
    inputs = build(dataclasses.replace(FITS, query_tokens=257, key_tokens=35 * 128 + 5, heads=1))
    out, lse, quantised = emulated(inputs, scores, processors=1)
    assert kernel_problem(inputs, out, lse, quantised) == ""  # type: ignore[arg-type]


@needs_triton
@needs_compiler
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_numbers_that_are_not_finite_are_not_hidden(name: str, scores: str) -> None:
    inputs = build(dataclasses.replace(FITS, query_tokens=300, key_tokens=300))
    getattr(inputs, name)[0, 60, 1, 5] = torch.inf
    out, lse, _ = emulated(inputs, scores)
    assert torch.isfinite(out[:, :, 0]).all()
    rows = slice(60, 61) if name == "query" else slice(0, 128)  # the first block of queries sees all keys
    channels = slice(5, 6) if name == "value" else slice(None)
    assert not torch.isfinite(out[:, rows, 1, channels]).any()
    # The second block of queries sees none.
    assert not out[:, 128:256, 1].any() and (lse[:, 1, 128:256] == -torch.inf).all()


@pytest.mark.slow
@needs_assembler
@pytest.mark.skipif(nvrtc_missing(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
def test_compiles_without_spills_and_with_overlapped_products() -> None:
    cases = ["fp8-bf16", "int8-bf16", "fp8-fp16"]
    done = subprocess.run([sys.executable, str(SCRIPT), "--cases", *cases], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("spills 0") == len(cases), done.stdout + done.stderr[-2000:]


def call_of(**changes: object) -> tuple[Blocks, hopper_plan.Plan]:
    inputs = build(dataclasses.replace(FITS, **changes))  # type: ignore[arg-type]
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    return blocks, fp8.fp8_plan(blocks, inputs.key.shape[1], inputs.query.shape[3], inputs.value.shape[3])


@pytest.mark.parametrize(("changes", "words"), [
    ({}, ""), (dict(order="heads"), ""), (dict(head_dim=64, value_dim=72), ""), (dict(window=1), "a window"),
    (dict(masked=True), "a key mask"), (dict(head_dim=64), "head dims up to 64 only"),
], ids=str)
def test_what_it_leaves_to_gluon(monkeypatch: pytest.MonkeyPatch, changes: dict, words: str) -> None:
    monkeypatch.setattr(nvrtc, "missing", lambda: "")
    call = call_of(**changes)
    assert takes_cuda(*call, None) is (not words) and takes_cuda(*call, False) is False
    if not words:
        assert takes_cuda(*call, True) is True
        return
    with pytest.raises(ValueError, match=f"cuda=True cannot run this call: .* with {words}; use cuda=None or") as error:
        takes_cuda(*call, True)
    assert "\n" not in str(error.value)


def test_without_nvrtc_such_calls_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counter[str]()
    monkeypatch.setattr(starting, "fallbacks", counted)
    monkeypatch.setattr(nvrtc, "missing", lambda: "no compiler")
    assert takes_cuda(*call_of(), None) is False and takes_cuda(*call_of(window=1), None) is False
    assert counted == {"the 8-bit kernel in CUDA C++ cannot run here (no compiler)": 1}
    assert any("no compiler" in why for why in fp8_cuda_reasons(*call_of()))


def test_a_compile_that_fails_leaves_the_calls_to_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(*_: object) -> None:
        tried.append(1)
        raise RuntimeError("attention_fp8.cu does not compile: line 3\nand more")

    counted, answer = Counter[str](), (torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr(starting, "fallbacks", counted)
    monkeypatch.setattr(fp8, "starting", starting.Starting("the kernel", "the other one"))
    monkeypatch.setattr(fp8, "takes_cuda", lambda _blocks, _plan, cuda: cuda is not False)
    monkeypatch.setattr(fp8, "attend_cuda", broken)
    monkeypatch.setattr(fp8, "attend_gluon", lambda *_: answer)
    inputs = build(FITS)
    blocks, plan = call_of()
    quantised = quantise_reference(inputs.query, inputs.key, inputs.value, blocks, inputs.scale)
    call = quantised, blocks, plan, inputs.scale, inputs.query.shape[1], inputs.query.dtype
    with pytest.warns(UserWarning, match="does not compile: line 3.: such calls run on the other one"):
        assert fp8.attend(*call) is answer
    assert fp8.attend(*call) is answer and fp8.attend(*call, cuda=False) is answer
    assert len(tried) == 1 and list(counted.values()) == [2]
    with pytest.raises(RuntimeError, match="does not compile"):
        fp8.attend(*call, cuda=True)
