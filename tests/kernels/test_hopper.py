"""The Hopper kernel on the CPU: what it refuses, its plan, who chooses it, its fall-back, and its source emulated.

Triton's interpreter does not run Gluon. gluon_emulator.py runs the kernel's source as threads instead, which shows
neither layouts nor speed: tests/gpu does, and test_offline.py compiles the kernel for sm_90.
"""

import dataclasses
from collections import Counter

import pytest
import torch

from dit_sparse import order
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels import attention, hopper_plan, nvrtc, starting
from dit_sparse.kernels.attention import block_sparse_attention, can_run, choose_backend, device_backends
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import (
    bulk_readable,
    bulk_strides,
    common_box,
    half_of,
    make_plan,
    prefers_persistent,
    tile_tokens,
)
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.kernels.starting import Starting
from tests.kernels.cases import Case, build, check

GRID = TokenGrid(5, 11, 13, text=77, text_at="front")
TILE = (4, 4, 8)


def on_hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """As if this machine had such a GPU and triton."""
    monkeypatch.setattr(hopper_plan, "missing", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def tiled(grid: TokenGrid, shape: tuple[int, int, int] = TILE, block: int = 128) -> BlockLayout:
    positions, lengths = order.tile(grid, shape)
    return order.layout(grid, positions, block, lengths=lengths, tile_shape=shape)


def reasons_on_gpu(case: Case) -> list[str]:
    """The reasons for tensors of this case, less that they lie on the CPU."""
    inputs = build(case)
    found = can_run("hopper", inputs.query, inputs.key, inputs.value, inputs.mask, inputs.key_mask)
    assert "the tensors are on cpu, it needs a Hopper GPU" in found
    return [reason for reason in found if "are on cpu" not in reason]


FITS = Case(dtype=torch.bfloat16, query_block=128, key_block=128)


@pytest.mark.parametrize("changes", [
    {}, {"dtype": torch.float16}, {"key_block": 64}, {"head_dim": 128}, {"head_dim": 96}, {"head_dim": 8},
    {"value_dim": 128}, {"window": 3, "always": True}, {"masked": True}, {"order": "heads"}, {"strided": True},
], ids=str)
def test_what_it_can_run(monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    on_hopper(monkeypatch)
    assert reasons_on_gpu(dataclasses.replace(FITS, **changes)) == []


@pytest.mark.parametrize("changes, reason", [
    ({"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
    ({"head_dim": 160, "value_dim": 64}, "head dim 160 is not a multiple of 8 up to 128"),
    ({"head_dim": 36, "value_dim": 64}, "head dim 36 is not a multiple of 8 up to 128"),
    ({"value_dim": 256}, "head dim of the values 256 is not a multiple of 8 up to 128"),
    ({"query_block": 64}, "query block size 64 is not 128"),
    ({"key_block": 32}, "key block size 32 is not one of 64, 128"),
], ids=str)
def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch, changes: dict, reason: str) -> None:
    on_hopper(monkeypatch)
    assert reasons_on_gpu(dataclasses.replace(FITS, **changes)) == [reason]


def test_refused_by_name_in_one_line() -> None:
    inputs = build(Case())
    with pytest.raises(ValueError, match="backend='hopper' cannot run this call: .*float32 is not float16") as error:
        block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, backend="hopper")
    assert "\n" not in str(error.value)


def able(monkeypatch: pytest.MonkeyPatch, run: object = None) -> None:
    """As if the Hopper kernel, and the portable one as its fall-back, could run here."""
    hopper, triton, *others = attention._BACKENDS
    hopper = dataclasses.replace(hopper, reasons=lambda *_: [], missing=lambda: "")
    monkeypatch.setattr(attention, "_BACKENDS", (hopper, triton, *others))
    counted = Counter[str]()
    monkeypatch.setattr(attention, "fallbacks", counted)
    monkeypatch.setattr(starting, "fallbacks", counted)
    monkeypatch.setattr(attention, "_hopper", Starting("the Hopper kernel", "the portable kernel"))
    monkeypatch.setattr(nvrtc, "missing", lambda: "")
    monkeypatch.setattr(attention, "triton_reasons", lambda *_: [])
    monkeypatch.setattr(attention, "_run_triton", attention._run_reference)
    if run is not None:
        monkeypatch.setattr(attention, "_run_hopper", run)


@pytest.mark.parametrize("variable, chosen", [
    (None, "hopper"), ("1", "hopper"), ("", "hopper"), ("0", "cpu"), ("Off", "cpu"), (" false", "cpu"),
])
def test_chosen_first_unless_the_environment_switches_it_off(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, chosen: str
) -> None:
    monkeypatch.delenv("DIT_SPARSE_HOPPER", raising=False)
    if variable is not None:
        monkeypatch.setenv("DIT_SPARSE_HOPPER", variable)
    able(monkeypatch)
    inputs = build(Case())
    assert choose_backend(inputs.query, inputs.key, inputs.value, inputs.mask) == chosen
    name, available, words = device_backends()[0]
    assert (name, available) == ("hopper", True)
    assert words == "Hopper kernel (Gluon, CUDA C++)" + (
        f"; switched off by DIT_SPARSE_HOPPER={variable}, used only with backend='hopper'" if chosen == "cpu" else "")


def test_a_kernel_that_does_not_start_is_replaced_counted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIT_SPARSE_HOPPER", raising=False)
    tries: list[object] = []

    def broken(query, key, value, blocks, scale):  # type: ignore[no-untyped-def]
        tries.append(blocks)
        raise NameError("name 'warpgroup_mma' is not defined\nin the kernel")

    able(monkeypatch, broken)
    inputs = build(Case())
    arguments, ran = (inputs.query, inputs.key, inputs.value, inputs.mask), []
    with pytest.warns(UserWarning, match="did not start .NameError: name 'warpgroup_mma' is not defined.: such"):
        out, lse = block_sparse_attention(*arguments, scale=inputs.scale, on_backend=ran.append)
    assert check(inputs, out, lse) == ""
    block_sparse_attention(*arguments, on_backend=ran.append, backend="reference")
    block_sparse_attention(*arguments, on_backend=ran.append)
    assert ran == ["triton", "reference", "cpu"] and len(tries) == 1
    assert list(attention.fallbacks.values()) == [2]
    assert "1 kind(s) of calls run on triton instead: the Hopper kernel did not start" in device_backends()[0][2]
    # Asked for by name it raises, and so does every other kind's own error.
    monkeypatch.setattr(attention, "_named", lambda name: dataclasses.replace(attention._BACKENDS[0], run=broken))
    with pytest.raises(NameError):
        block_sparse_attention(*arguments, backend="hopper")


def test_the_summary_says_that_slower_kernels_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse import SparseProc, routing
    from dit_sparse.session import RunSession

    monkeypatch.setattr(attention, "fallbacks", Counter({"an earlier run": 3}))
    monkeypatch.setattr(routing, "plain_calls", Counter())
    session = RunSession(SparseProc())
    assert session.notes() == []
    attention.fallbacks["the Hopper kernel did not start (NameError: x)"] += 2
    routing.plain_calls["head dim 160 is above 128"] += 1
    assert session.notes() == ["2 x the Hopper kernel did not start (NameError: x)",
                               "1 x masks in plain PyTorch: head dim 160 is above 128"]
    session.forget()
    assert session.notes() == []


def test_errors_of_a_kernel_that_ran_before_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIT_SPARSE_HOPPER", raising=False)
    answers: list[object] = [torch.OutOfMemoryError("no memory"), None, RuntimeError("CUDA error")]

    def once(*arguments):  # type: ignore[no-untyped-def]
        if (error := answers.pop(0)) is not None:
            raise error
        return attention._run_reference(*arguments)

    able(monkeypatch, once)
    inputs = build(Case())
    arguments = (inputs.query, inputs.key, inputs.value, inputs.mask)
    with pytest.raises(torch.OutOfMemoryError):
        block_sparse_attention(*arguments)
    block_sparse_attention(*arguments)
    with pytest.raises(RuntimeError, match="CUDA error"):
        block_sparse_attention(*arguments)
    assert not attention.fallbacks and not attention._hopper.failed


@pytest.mark.parametrize("setting, words", [
    ({"find_spec": None}, "triton is not installed"),
    ({"capability": (8, 0)}, r"compute capability 9.0\); this machine has 8.0"),
    ({"interpret": "1"}, "interpreter .* does not run Gluon"),
    ({"cuda": False}, "no NVIDIA GPU"),
], ids=str)
def test_missing_says_why(monkeypatch: pytest.MonkeyPatch, setting: dict, words: str) -> None:
    monkeypatch.setattr(hopper_plan.importlib.util, "find_spec", lambda _: setting.get("find_spec", "found"))
    monkeypatch.setenv("TRITON_INTERPRET", setting.get("interpret", "0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: setting.get("cuda", True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: setting.get("capability", (9, 0)))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(hopper_plan._missing.__wrapped__())


def test_plan_without_masks_takes_the_lists_as_they_are() -> None:
    blocks = Blocks.from_mask(build(FITS).mask)
    plan = make_plan(blocks, 239, 64, 64)
    assert plan.lists is blocks.lists and plan.flags is plan.exempt is plan.key_ok is plan.box is None
    assert [make_plan(dataclasses.replace(blocks, key_block=block), 239, dim, dim).stages
            for dim in (64, 96) for block in (64, 128)] == [4, 4, 4, 2]
    assert make_plan(blocks, 239, 64, 72).width == 128


def test_persistent_programs_are_chosen_where_they_were_measured_to_be_faster() -> None:
    blocks = Blocks.from_mask(build(FITS).mask)
    for dim, key_block, wanted in ((128, 128, True), (96, 128, True), (64, 128, True), (128, 64, False)):
        chosen = dataclasses.replace(blocks, key_block=key_block)
        assert prefers_persistent(chosen, make_plan(chosen, 239, dim, dim)) is wanted


def test_plan_with_a_key_mask_demotes_blocks_and_flags_keys() -> None:
    pytest.importorskip("triton")
    inputs = build(dataclasses.replace(FITS, query_tokens=300, key_tokens=1000, window=2, always=True, masked=True,
                                       batch=2, lists="all"))
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    plan = make_plan(blocks, 1000, 64, 64)
    real = blocks.real_keys(1000)
    assert plan.flags is not None and plan.exempt is not None
    assert torch.equal(plan.flags & 1 != 0, real) and torch.equal(plan.flags[0, 0] & 2 != 0, blocks.always)
    clean = real.unflatten(-1, (-1, 128)).all(-1)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, plan.whole.shape)).tolist():
        before, after = blocks.lists[b, h, i].tolist(), plan.lists[b, h, i].tolist()
        n, whole, exempt = (int(x[b, h, i]) for x in (blocks.whole, plan.whole, plan.exempt))
        assert all(clean[b, 0, block] for block in after[:whole])
        assert sorted(after[: whole + exempt]) == sorted(before[:n]) and plan.boundary[b, h, i] == (
            blocks.boundary[b, h, i] + exempt)
    one = plan.element(1)
    assert torch.equal(one.lists, plan.lists[1:]) and one.flags is not None and len(one.flags) == 1


@pytest.mark.parametrize("grid, shape, wanted", [
    (GRID, TILE, True),
    (TokenGrid(8, 8, 8), (2, 8, 8), True),
    (TokenGrid(21, 8, 16), (1, 8, 16), True),
    (TokenGrid(5, 5, 5), (5, 5, 5), False),  # not powers of two
    (GRID, (4, 4, 4), False),  # does not fill a block
    (GRID, (8, 8, 8), False),  # cut into several blocks
])
def test_which_tiles_are_copied_as_boxes(grid: TokenGrid, shape: tuple[int, int, int], wanted: bool) -> None:
    layout = tiled(grid, shape)
    keep = torch.ones(layout.blocks, layout.blocks, dtype=torch.bool)
    blocks = Blocks.from_mask(BlockMask.from_dense(keep, layout, layout))
    ragged = any(n % t for n, t in zip(grid.sizes, shape, strict=True))
    assert (common_box(blocks, ragged=True) is not None) == wanted
    assert (common_box(blocks) is not None) == (wanted and not ragged)
    assert common_box(dataclasses.replace(blocks, key_box=None), ragged=True) is None
    for allowed in (False, True):
        plan = make_plan(blocks, grid.tokens, 128, 128, ragged_boxes=allowed)
        assert plan.video_blocks == (order.video_blocks(layout, grid) if wanted and (allowed or not ragged) else 0)
    windowed = dataclasses.replace(blocks, key_coordinates=torch.zeros(1, layout.slots))
    assert common_box(windowed, ragged=True) is None or not ragged


@pytest.mark.parametrize("text_at", ["front", "back", "none"])
@pytest.mark.parametrize("sizes, shape", [((5, 11, 13), TILE), ((8, 8, 16), TILE), ((3, 9, 17), (1, 8, 16))])
def test_tiles_hold_the_tokens_of_their_blocks(
    sizes: tuple[int, int, int], shape: tuple[int, int, int], text_at: str
) -> None:
    grid = TokenGrid(*sizes, text=0 if text_at == "none" else 150, text_at=text_at)  # type: ignore[arg-type]
    layout = tiled(grid, shape)
    assert layout.box is not None and layout.to("cpu").box == layout.box
    token = tile_tokens(layout.box, torch.device("cpu")).unflatten(0, (-1, 128))
    assert token.shape[0] == layout.blocks
    # The same tokens in each block, and the padding of cut tiles is where the copy leaves zeros.
    same = layout.token_of_slot.unflatten(0, (-1, 128))
    assert torch.equal(token.sort(-1).values, same.sort(-1).values)
    whole = layout.lengths == 128
    assert torch.equal(token[whole], same[whole])
    half = half_of(shape)
    assert half[0] * half[1] * half[2] == 64


def test_cut_tiles_are_flagged_with_and_without_a_key_mask() -> None:
    pytest.importorskip("triton")
    layout = tiled(GRID)
    keep = torch.ones(layout.blocks, layout.blocks, dtype=torch.bool)
    mask = BlockMask.from_dense(keep, layout, layout)
    key_mask = torch.rand(2, GRID.tokens, generator=torch.Generator().manual_seed(0)) < 0.9
    token = tile_tokens(layout.box or (), torch.device("cpu"))
    plain, masked = (make_plan(Blocks.from_mask(mask, m), GRID.tokens, 128, 128, ragged_boxes=True)
                     for m in (None, key_mask))
    assert plain.flags is not None and torch.equal(plain.flags[0, 0] == 1, token >= 0)
    assert plain.whole is mask.whole
    assert masked.flags is not None
    for b in range(2):
        seen = token[masked.flags[b, 0] == 1]
        assert torch.equal(seen.sort().values, key_mask[b].nonzero()[:, 0])


def test_other_layouts_have_no_box() -> None:
    layout = tiled(GRID)
    assert BlockLayout.raster(GRID.tokens, 128).box is None
    assert order.per_head([layout, layout], torch.tensor([[0, 1]])).box is None
    positions, lengths = order.tile(GRID, TILE)
    assert order.layout(GRID, positions, 128, lengths=lengths).box is None


def test_the_operator_carries_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = tiled(GRID)
    mask = BlockMask.full(layout, layout)
    seen: list[Blocks] = []
    plain = attention._named("reference")

    def run(query, key, value, blocks, scale):  # type: ignore[no-untyped-def]
        seen.append(blocks)
        return plain.run(query, key, value, blocks, scale)

    monkeypatch.setattr(attention, "_BACKENDS", (dataclasses.replace(plain, run=run),))
    query = torch.randn(1, GRID.tokens, 1, 8)
    block_sparse_attention(query, query, query, mask, backend="reference")
    assert seen[0].query_box == seen[0].key_box == layout.box


def test_what_bulk_copies_cannot_read_is_copied() -> None:
    x = torch.randn(2, 10, 3, 64).to(torch.bfloat16)
    assert bulk_readable(x) is x and bulk_strides(x) == [1920, 64, 192, 1]
    assert bulk_readable(x[:, :, :1]).data_ptr() == x.data_ptr()
    assert bulk_strides(x[:1, :1, :1]) == [16, 16, 16, 1]
    odd = torch.randn(2, 10, 3, 68).to(torch.bfloat16)
    for view in (odd[..., :64], odd[..., 4:], x[:, :, :1].expand(-1, -1, 3, -1), x.transpose(2, 3),
                 torch.randn(2 * 10 * 3 * 64 + 1).to(torch.bfloat16)[1:].reshape(2, 10, 3, 64)):
        made = bulk_readable(view)
        assert made.data_ptr() != view.data_ptr() and made.is_contiguous() and torch.equal(made, view)
        assert made.data_ptr() % 16 == 0


def emulated(query_tokens: int, key_tokens: int, **changes: object) -> Case:
    return dataclasses.replace(FITS, query_tokens=query_tokens, key_tokens=key_tokens,
                               **{"dtype": torch.float16, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("case, programs", [
    (emulated(1, 1, lists="shared", heads=1), None),
    (emulated(63, 300, dtype=torch.bfloat16), None),
    (emulated(300, 900, head_dim=128), None),
    (emulated(300, 900, head_dim=128, masked=True), 2),
    (emulated(300, 500, head_dim=96, key_block=64, strided=True), 3),
    (emulated(300, 300, value_dim=128, lists="all", batch=2), 1),
    (emulated(300, 500, order="permuted", head_dim=96), None),
    (emulated(300, 500, order="heads", masked=True, batch=2), None),
    (emulated(300, 500, masked=True, batch=2, lists="all"), None),
    (emulated(300, 500, window=2, key_block=64), None),
    (emulated(300, 300, window=3, always=True, masked=True, batch=2, lists="all"), None),
    (emulated(300, 300, window=1, masked=True, order="heads", strided=True), None),
], ids=lambda x: x.name if isinstance(x, Case) else str(x))
def test_the_kernels_source_computes_attention(case: Case, programs: int | None) -> None:
    """With NaN in all fresh memory, and with that many persistent programs."""
    pytest.importorskip("triton")
    from tests.kernels.gluon_emulator import emulate

    inputs = build(case)
    out, lse = emulate(inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask, inputs.key_mask),
                       inputs.scale, programs=programs)
    assert check(inputs, out, lse) == ""


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid, shape", [
    (TokenGrid(5, 6, 13, text=77, text_at="front"), TILE),
    (TokenGrid(5, 6, 13, text=140, text_at="back"), TILE),
    (TokenGrid(3, 9, 17), (1, 8, 16)),
    (TokenGrid(4, 8, 8, text=5, text_at="back"), TILE),
], ids=str)
def test_the_kernels_source_copies_tiles(grid: TokenGrid, shape: tuple[int, int, int], masked: bool) -> None:
    pytest.importorskip("triton")
    from tests.kernels.gluon_emulator import emulate

    generator = torch.Generator().manual_seed(0)
    layout = tiled(grid, shape)
    keep = torch.rand(2, 2, layout.blocks, layout.blocks, generator=generator) < 0.6
    keep[:, :, 0] = False
    mask = BlockMask.from_dense(keep, layout, layout)
    query, key, value = (torch.randn(2, grid.tokens, 2, 64, generator=generator).half() for _ in range(3))
    key_mask = torch.rand(2, grid.tokens, generator=generator) < 0.9 if masked else None
    blocks = Blocks.from_mask(mask, key_mask)
    assert common_box(blocks, ragged=True) is not None
    out, lse = emulate(query, key, value, blocks, 0.125, ragged_boxes=True)
    want, want_lse = attention_reference(query, key, value, mask.token_mask(), 0.125, key_mask)
    torch.testing.assert_close(out, want, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)
