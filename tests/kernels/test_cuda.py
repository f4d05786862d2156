"""The kernel in CUDA C++: its source on a CPU, its machine code without a GPU, and what it leaves to the other one."""

import pathlib
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

from dit_sparse import order
from dit_sparse.blockmask import BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels import attention, hopper_cuda, nvrtc, starting
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_cuda import cuda_reasons, takes_cuda
from dit_sparse.kernels.hopper_plan import Tuning
from dit_sparse.kernels.soft import soft_attention
from dit_sparse.kernels.starting import Starting
from tests.gpu import random_cases
from tests.kernels import soft_rule
from tests.kernels.cases import Case, Inputs, build, check
from tests.kernels.toolchain import needs_assembler, needs_triton

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SCRIPT = pathlib.Path(__file__).with_name("offline_cuda.py")


def nvrtc_missing() -> bool:
    try:
        nvrtc._nvrtc()
    except OSError:
        return True
    return False


@needs_triton
@needs_compiler
@pytest.mark.parametrize(("kinds", "persistent"), [((1, 3, 9, 15), True), ((0, 10, 11), False)])
def test_the_source_computes_random_calls(kinds: tuple[int, ...], persistent: bool) -> None:
    """Raster, permuted, 64-key blocks, head dims that leave shared memory unused; short blocks, empty lists in all."""
    from tests.kernels.cuda_emulator.emulator import emulated

    lines: list[str] = []
    with emulated() as attention:
        def attend(drawn: random_cases.Drawn) -> tuple[torch.Tensor, torch.Tensor]:
            inputs = drawn.inputs
            return attention(inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask), inputs.scale,
                             Tuning(persistent=persistent))

        seeds = [kind + round * len(random_cases.KINDS) for round in range(2) for kind in kinds]
        totals = random_cases.run(seeds, "cpu", lines.append, most=300, kernels=lambda _: {"cuda": attend})
    assert lines == [] and totals["cuda"]["calls"] == len(seeds)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("case", [
    Case(513, 1023, head_dim=64, dtype=torch.bfloat16, query_block=128, key_block=128),
    Case(130, 2700, heads=1, head_dim=64, dtype=torch.bfloat16, query_block=128, key_block=64, lists="shared"),
], ids=lambda case: case.name)
def test_the_ring_and_the_tiles_go_round(case: Case) -> None:
    """More blocks in a list than the ring holds, or than a warp reads at once; more tiles than programs."""
    from tests.kernels.cuda_emulator.emulator import emulated

    inputs = build(case, "cpu")
    with emulated(processors=1) as attention:
        found = attention(inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask), inputs.scale)
    assert check(inputs, *found) == ""


@needs_triton
@needs_compiler
@pytest.mark.parametrize("case", soft_rule.TOGETHER_CASES, ids=lambda case: case.name)
def test_soft_blocks_come_after_the_listed_ones(case: Case) -> None:
    from tests.kernels.cuda_emulator.emulator import emulated

    with emulated() as attention:
        assert soft_rule.check_together(build(case, "cpu"), attention) == ""


@pytest.mark.slow
@needs_assembler
@pytest.mark.skipif(nvrtc_missing(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
def test_compiles_without_spills_and_with_overlapped_products() -> None:
    cases = ["bf16-128", "bf16-128-permuted", "bf16-128-64-keys", "fp16-64", "bf16-128-permuted-soft"]
    done = subprocess.run([sys.executable, str(SCRIPT), "--cases", *cases], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("spills 0") == len(cases), done.stdout + done.stderr[-2000:]


CUDA = Tuning(cuda=True)
FITS = Case(dtype=torch.bfloat16, head_dim=128, query_block=128, key_block=128)


def call_of(**changes: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Blocks]:
    inputs = build(Case(**{**vars(FITS), **changes}), "cpu")  # type: ignore[arg-type]
    return inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask, inputs.key_mask)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """As if this machine had a Hopper GPU, NVRTC and the driver; what falls back is counted here."""
    found = Counter[str]()
    monkeypatch.setattr(starting, "fallbacks", found)
    monkeypatch.setattr(hopper_cuda, "hopper_reasons", lambda *_: [])
    monkeypatch.setattr(hopper_cuda, "starting", Starting("the Hopper kernel in CUDA C++", "the kernel in Gluon"))
    monkeypatch.setattr(hopper_cuda, "soft_starting", Starting("the same with soft blocks", "a merge"))
    monkeypatch.setattr(nvrtc, "missing", lambda: "")
    return found


def test_says_what_it_leaves_to_the_other_kernel() -> None:
    for changes, words in ((dict(window=1), "a window"), (dict(masked=True), "a key mask"),
                           (dict(key_block=32), "key block size 32")):
        assert any(words in reason for reason in cuda_reasons(*call_of(**changes)))


@pytest.mark.parametrize(("changes", "takes"), [
    ({}, True), (dict(dtype=torch.float16, head_dim=96), True), (dict(head_dim=64), True),
    (dict(order="heads"), True), (dict(window=1), False),
    (dict(masked=True), False), (dict(key_block=64, order="heads"), True),
    (dict(key_block=64, head_dim=64), False), (dict(key_block=64, head_dim=64, value_dim=128), True),
], ids=str)
def test_takes_the_calls_it_is_faster_for_and_others_where_asked(
    counted: Counter[str], changes: dict, takes: bool
) -> None:
    call = call_of(**changes)
    assert takes_cuda(*call, Tuning()) is takes and takes_cuda(*call, Tuning(cuda=False)) is False
    if set(changes) & {"window", "masked"}:
        with pytest.raises(ValueError, match="cuda=True. cannot run this call: .*; use cuda=None or False") as error:
            takes_cuda(*call, CUDA)
        assert "\n" not in str(error.value)
    else:
        assert takes_cuda(*call, CUDA) is True
    assert not counted


def test_takes_soft_blocks_with_the_listed_ones_as_far_as_its_shared_memory_goes(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hopper_cuda.takes_soft(*call_of()) and not hopper_cuda.takes_soft(*call_of(masked=True))
    monkeypatch.setattr(hopper_cuda, "MOST_SOFT_BLOCKS", call_of()[3].key_blocks - 1)
    assert not hopper_cuda.takes_soft(*call_of())
    monkeypatch.undo()
    monkeypatch.setattr(nvrtc, "missing", lambda: "the compiler NVRTC cannot be loaded: no such file")
    assert not hopper_cuda.takes_soft(*call_of()) and not counted, "the listed blocks count it, once"


@needs_triton
@needs_compiler
def test_calls_with_soft_blocks_go_there_by_default(counted: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From `soft_attention` through the operator to the source, computed on the CPU."""
    from tests.kernels.cuda_emulator.emulator import emulated

    inputs, ran = build(soft_rule.TOGETHER_CASES[3], "cpu"), []
    monkeypatch.setattr(attention, "_choose", lambda *_: "hopper")
    with emulated():
        monkeypatch.setattr(hopper_cuda.nvrtc, "missing", lambda: "", raising=False)
        found = soft_attention(inputs.query, inputs.key, inputs.value, *soft_rule.means_of(inputs), inputs.mask,
                               scale=inputs.scale, on_backend=ran.append)
    assert soft_rule.check(inputs, *found) == "" and ran == ["hopper"]
    assert len(hopper_cuda.soft_starting.started) == 1 and not hopper_cuda.starting.started and not counted


def test_soft_blocks_are_merged_where_the_kernel_does_not_start(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call of a kind finds out, the next ones know."""
    inputs = build(FITS, "cpu")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(hopper_cuda, "block_sparse_attention_cuda", fails)
    monkeypatch.setattr(attention, "_run_hopper", attention._run_reference)
    monkeypatch.setattr(attention, "_choose", lambda *_: "hopper")
    with pytest.warns(UserWarning, match="did not start .*no room"):
        assert soft_rule.check(inputs, *soft_rule.run(inputs, None)) == ""
    assert soft_rule.check(inputs, *soft_rule.run(inputs, None)) == ""
    assert sum(counted.values()) == 2


def test_soft_blocks_reach_the_portable_kernel_where_no_hopper_kernel_starts(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, ran = build(FITS, "cpu"), []

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(hopper_cuda, "block_sparse_attention_cuda", fails)
    monkeypatch.setattr(attention, "_run_hopper", fails)
    monkeypatch.setattr(attention, "_run_triton", attention._run_reference)
    monkeypatch.setattr(attention, "triton_reasons", lambda *_: [])
    monkeypatch.setattr(attention, "_hopper", Starting("the Hopper kernel", "the portable kernel"))
    monkeypatch.setattr(attention, "_choose", lambda *_: "hopper")
    with pytest.warns(UserWarning, match="did not start .*no room"):
        found = soft_attention(inputs.query, inputs.key, inputs.value, *soft_rule.means_of(inputs), inputs.mask,
                               scale=inputs.scale, on_backend=ran.append)
    assert soft_rule.check(inputs, *found) == "" and ran == ["triton"]


def test_a_machine_without_the_compiler_is_counted_once_a_call(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "missing", lambda: "no NVRTC")
    assert not hopper_cuda.takes_soft(*call_of()) and not counted
    assert not takes_cuda(*call_of(), Tuning()) and sum(counted.values()) == 1


def test_tiles_that_are_to_be_copied_as_boxes_go_to_gluon(counted: Counter[str]) -> None:
    grid, tile = TokenGrid(5, 11, 13), (4, 4, 8)
    positions, lengths = order.tile(grid, tile)
    layout = order.layout(grid, positions, 128, lengths=lengths, tile_shape=tile)
    x = torch.zeros(1, grid.tokens, 1, 128, dtype=torch.bfloat16)
    blocks = Blocks.from_mask(BlockMask.full(layout, layout))
    assert [takes_cuda(x, x, x, blocks, Tuning(ragged_boxes=boxes)) for boxes in (False, True)] == [True, False]


def test_without_nvrtc_or_driver_such_calls_are_counted_and_named(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "missing", lambda: "the compiler NVRTC cannot be loaded: no such file")
    call = call_of()
    assert takes_cuda(*call, Tuning()) is False and takes_cuda(*call_of(masked=True), Tuning()) is False
    assert counted == {"the Hopper kernel in CUDA C++ cannot run here (the compiler NVRTC cannot be loaded: no such "
                       "file)": 1}
    with pytest.raises(ValueError, match="NVRTC cannot be loaded"):
        takes_cuda(*call, CUDA)
    assert hopper_cuda.note() == "; all calls run on the kernel in Gluon, as the compiler NVRTC cannot be loaded: no " \
                                 "such file"


@needs_triton
def test_a_compile_that_fails_leaves_the_calls_to_gluon(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_sparse.kernels import hopper

    tried: list[Inputs] = []

    def broken(*_: object) -> None:
        tried.append(inputs)
        raise RuntimeError("attention.cu does not compile: line 3\nand more")

    inputs = build(FITS)
    blocks = Blocks.from_mask(inputs.mask)
    monkeypatch.setattr(hopper, "block_sparse_attention_cuda", broken)
    monkeypatch.setattr(hopper, "starting", hopper_cuda.starting)
    monkeypatch.setattr(hopper, "_by_gluon", lambda *call: attention._run_reference(*call[:5]))
    arguments = (inputs.query, inputs.key, inputs.value, blocks, inputs.scale)
    why = "the Hopper kernel in CUDA C++ did not start (RuntimeError: attention.cu does not compile: line 3)"
    with pytest.warns(UserWarning, match="does not compile: line 3.: such calls run on the kernel in Gluon"):
        assert check(inputs, *hopper.block_sparse_attention_hopper(*arguments)) == ""
    assert check(inputs, *hopper.block_sparse_attention_hopper(*arguments)) == ""
    assert len(tried) == 1 and counted == {why: 2}
    assert hopper_cuda.note() == f"; 1 kind(s) of calls run on the kernel in Gluon: {why}"
    assert check(inputs, *hopper.block_sparse_attention_hopper(*arguments, Tuning(cuda=False))) == ""
    with pytest.raises(RuntimeError, match="does not compile"):
        hopper.block_sparse_attention_hopper(*arguments, Tuning(cuda=True))
    assert len(tried) == 2 and counted == {why: 2}
