"""Reuse between steps: what the mask dropped, whole heads, and the part of fixed keys; exactness, ages, bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.blockmask import BlockLayout, BlockMask, TokenWindow
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.operators import Drop, Operator, merge_parts
from dit_sparse.operators_reuse import LEAST_REST, ReuseComplement, ReuseHeads, rest_of
from dit_sparse.reuse import FlashBlock
from tests.waits import Waits

BLOCK = 16
TEXT = TokenGrid(3, 5, 7, text=9, text_at="front")


def tensors(lengths: tuple[int, int] = (113, 77), *, batch: int = 2, heads: int = 3, dim: int = 16, seed: int = 0,
            dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, n, heads, dim, generator=generator).to(dtype) for n in lengths)
    return query, key, torch.randn(batch, lengths[1], heads, dim, generator=generator).to(dtype)


def over(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all of the keys by the block-sparse operator, also over none."""
    return FlashBlock()._all_keys(query, key, value, None, None)


def masked(density: float, layout: BlockLayout, window: TokenWindow | None = None, seed: int = 0) -> BlockMask:
    keep = torch.rand(2, 3, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(seed)) < density
    return BlockMask.from_dense(keep, layout, layout, window=window)


def worst(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


# -- parts of keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("cuts", [(0,), (1,), (77,), (40,), (13, 63), (0, 30)])
def test_merged_parts_are_one_softmax(cuts: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    query, key, value = tensors(dtype=dtype)
    ends = [0, *cuts, 77]
    parts = [over(query, key[:, a:b], value[:, a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    out, lse = merge_parts(parts)
    want, want_lse = attention_reference(*(x.to(torch.float32) for x in (query, key, value)))
    assert out.dtype == dtype and worst(out.to(torch.float32), want) <= bound
    assert float(((lse - want_lse) / want_lse).abs().max()) <= (1e-5 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_rest_by_the_closed_form_is_attention_over_the_rest(density: float, windowed: bool) -> None:
    layout = BlockLayout.raster(113, BLOCK)
    query, key, value = tensors((113, 113))
    window = None
    if windowed:
        place = torch.arange(layout.slots, dtype=torch.int32)[None]
        window = TokenWindow(place, place - 20, place + 20)
    mask = masked(density, layout, window)
    seen = mask.token_mask()
    whole, part = attention_reference(query, key, value), attention_reference(query, key, value, seen)
    want, want_lse = attention_reference(query, key, value, ~seen)
    kept = tuple(x.clone() for x in part)
    out, lse = rest_of(whole, (kept[0], kept[1]))
    weight = (part[1] - whole[1]).exp()
    told = weight <= 0.99
    assert told.any() and worst(out.transpose(1, 2)[told], want.transpose(1, 2)[told]) <= 1e-4
    assert worst(lse[told], want_lse[told]) <= 1e-4
    nothing = weight > 1 - LEAST_REST / 2
    assert (out.transpose(1, 2)[nothing] == 0).all() and (lse[nothing] == -torch.inf).all()
    merged, merged_lse = merge_parts([(out, lse), part])
    assert worst(merged, whole[0]) <= 5 * LEAST_REST and worst(merged_lse, whole[1]) <= 2 * LEAST_REST
    if not windowed:
        direct, direct_lse = block_sparse_attention(query, key, value, mask.complement())
        assert worst(direct, want) <= 1e-5 and torch.allclose(direct_lse, want_lse, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="window"):
            mask.complement()


def test_rows_that_see_no_key_have_no_rest() -> None:
    query, key, value = tensors((20, 20))
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    whole = attention_reference(query, key, value, key_mask=nothing)
    out, lse = rest_of(whole, (whole[0].clone(), whole[1]))
    assert (out == 0).all() and (lse == -torch.inf).all()


# -- fixed keys ----------------------------------------------------------------------------------------------------


def test_with_frozen_queries_a_kept_context_is_exact() -> None:
    """Fresh keys may change; with other queries it is exact where the context's part is computed anew."""
    query, context, context_value = tensors((63, 113))
    block, anew = FlashBlock(), FlashBlock(refresh_every=1)
    for step in range(4):
        key, value = tensors((63, 50), seed=step + 1)[1:]
        want, want_lse = attention_reference(query, torch.cat((context, key), 1), torch.cat((context_value, value), 1))
        out, lse = block(query, key, value, context, context_value, step=step, num_steps=4)
        assert worst(out, want) <= 1e-5 and worst(lse, want_lse) <= 1e-5
    other = tensors((63, 1), seed=9)[0]
    want = attention_reference(other, torch.cat((context, key), 1), torch.cat((context_value, value), 1))[0]
    assert worst(block(other, key, value, context, context_value, step=3, num_steps=4)[0], want) > 1e-3
    assert worst(anew(other, key, value, context, context_value, step=3)[0], want) <= 1e-5
    assert anew.nbytes == 0, "nothing is kept that would not be used"


def test_context_is_computed_once_a_block_layer_and_branch_and_its_bytes_are_the_formulas() -> None:
    query, context, context_value = tensors((63, 113), dtype=torch.bfloat16)
    key, value = tensors((63, 50), dtype=torch.bfloat16)[1:]
    flash = FlashBlock()

    def denoise(number: int) -> None:
        for step in range(4):
            for layer, branch in ((0, "cond"), (0, "uncond"), (1, "cond")):
                flash(query, key, value, context, context_value, step=step, num_steps=4, layer=layer, branch=branch,
                      block=number)

    denoise(0)
    assert (flash.external, flash.internal) == (3, 12)
    B, Lq, H, D = query.shape
    assert flash.nbytes == 3 * B * H * Lq * (2 * D + 4)
    denoise(1)
    assert (flash.external, flash.internal) == (6, 24), "another block"
    flash(query, key, value, context, context_value, step=3, num_steps=4, block=1)
    assert flash.external == 7, "another branch"
    flash(query, key, value, context, context_value, step=3, num_steps=4, block=1)
    assert flash.external == 7
    flash.reset()
    assert flash.nbytes == 0
    flash(query, key, value, context, context_value, step=3, num_steps=4, block=1)
    assert flash.external == 8
    flash(query[:, :20], key, value, context, context_value, step=3, num_steps=4, block=1)
    assert flash.external == 9, "another shape"


@pytest.mark.parametrize(("flash", "num_steps", "computed"), [
    (FlashBlock(), 4, [0]), (FlashBlock(), 8, [0, 2, 4, 6]), (FlashBlock(), None, [0, 2, 4, 6]),
    (FlashBlock(3), 4, [0, 3, 6]), (FlashBlock(4, start=2), 8, [0, 1, 2, 6]),
])
def test_when_the_context_is_computed(flash: FlashBlock, num_steps: int | None, computed: list[int]) -> None:
    query, key, value = tensors((7, 5))
    found = []
    for step in range(8):
        before = flash.external
        flash(query, key, value, key, value, step=step, num_steps=num_steps)
        found += [step] if flash.external > before else []
    assert found == computed


def test_a_context_may_be_empty_or_padded_and_wrong_arguments_are_named() -> None:
    query, key, value = tensors((30, 50))
    real = torch.arange(50) < torch.tensor([[20], [0]])
    out, lse = FlashBlock()(query, key, value, key[:, :0], value[:, :0], step=0)
    want, want_lse = attention_reference(query, key, value)
    assert worst(out, want) <= 1e-5 and worst(lse, want_lse) <= 1e-5
    out, _ = FlashBlock()(query, key, value, key, value, step=0, context_mask=real)
    want, _ = attention_reference(query, *(torch.cat((x, x), 1) for x in (key, value)),
                                  key_mask=torch.cat((torch.ones(2, 50, dtype=torch.bool), real), 1))
    assert worst(out, want) <= 1e-5
    for wrong in ({"refresh_every": 0}, {"start": -1}, {"refresh_every": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlashBlock(**wrong)


# -- operators -----------------------------------------------------------------------------------------------------


def call_of(grid: TokenGrid, *, step: int = 0, state: State | None = None, seed: int = 0, batch: int = 1) -> Call:
    query, key, value = tensors((grid.tokens, grid.tokens), batch=batch, seed=seed)
    return Call(query, key, value, grid, 0.25, step=step, state=state or State())


def states() -> Callable[[int], State]:
    """The state of one layer, by step."""
    memory = Memory()
    return lambda step: State(memory, (0, "cond"), step=step)


def attending(call: Call) -> Any:
    return functools.partial(block_sparse_attention, scale=call.scale, key_mask=call.key_mask)


def test_complement_is_dense_where_it_is_computed_and_uses_its_own_mask_after() -> None:
    at, operator = states(), ReuseComplement(Drop(), 3)
    layout = BlockLayout.raster(TEXT.tokens, BLOCK)
    masks = [masked(0.3, layout, seed=step) for step in range(4)]
    calls = [call_of(TEXT, step=step, state=at(step), seed=step, batch=2) for step in range(4)]
    seen = masks[0].token_mask()
    for step, (call, mask) in enumerate(zip(calls, masks, strict=True)):
        out, lse = operator.run(call, mask, attending(call))
        inputs = call.query, call.key, call.value
        want = attention_reference(*inputs, scale=0.25)
        if step % 3:
            first = calls[0]
            want = merge_parts([attention_reference(first.query, first.key, first.value, ~seen, 0.25),
                                attention_reference(*inputs, seen, 0.25)])
        assert worst(out, want[0]) <= 1e-5 and worst(lse, want[1]) <= 1e-5
        density = float(operator.computed(call, mask))
        assert density == (1.0 if step % 3 == 0 else pytest.approx(float(masks[0].density())))


@pytest.mark.parametrize("name", ["svg", "radial", "gna", "adaspa", "svg2", "rainfusion", "jenga"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complement_is_exact_at_refresh_for_masks_of_methods(name: str, dtype: torch.dtype) -> None:
    call = call_of(TokenGrid(5, 7, 9, text=20, text_at="back"))
    call = dataclasses.replace(call, **{x: getattr(call, x).to(dtype) for x in ("query", "key", "value")})
    exact = attention_reference(*(x.to(torch.float32) for x in (call.query, call.key, call.value)), scale=0.25)[0]
    plan = build(name, block_size=32).plan(call)
    out, _ = ReuseComplement(plan.operator).run(call, plan.mask, attending(call))
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (call.query, call.key, call.value)), scale=0.25).transpose(1, 2)
    assert worst(out.to(torch.float32), exact) <= 2 * worst(plain.to(torch.float32), exact) + 1e-6


def test_steady_heads_are_left_out_of_the_lists_and_text_never_is() -> None:
    """Of three heads only the middle one stays as it is: it is computed at steps 0, 1, 4, 7; the others always."""
    at, operator, work = states(), ReuseHeads(Drop(), every=3, drift=0.05), []
    layout = BlockLayout.raster(TEXT.tokens, BLOCK)
    mask = masked(0.6, layout)
    mask = dataclasses.replace(mask, lists=mask.lists[:1], whole=mask.whole[:1], boundary=mask.boundary[:1])
    steady, outputs = call_of(TEXT), []
    for step in range(8):
        call = call_of(TEXT, step=step, state=at(step), seed=step)
        for name in ("query", "key", "value"):
            getattr(call, name)[:, :, 1] = getattr(steady, name)[:, :, 1]
        call.query[:, :, 1] *= 1 + 0.01 * step  # it changes, though little

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
            work.append(mask.work()[0])
            return block_sparse_attention(query, key, value, mask, scale=0.25)

        out, lse = operator.run(call, mask, attend)
        want, want_lse = attention_reference(call.query, call.key, call.value, mask.token_mask(), 0.25)
        outputs.append(want)
        last = {2: 1, 3: 1, 5: 4, 6: 4}.get(step, step)
        want = want.clone()
        want[:, TEXT.video_slice, 1] = outputs[last][:, TEXT.video_slice, 1]
        assert worst(out, want) <= 1e-5, step
        if last != step:
            assert (lse[:, 1, TEXT.video_slice] == -torch.inf).all()
        computed = mask.token_mask().clone()
        if last != step:
            computed[:, 1, BLOCK:] = False  # the text sits in the first block
        assert float(operator.computed(call, mask)) == pytest.approx(float(computed.to(torch.float32).mean()), rel=1e-5)
    text_block = torch.arange(layout.blocks) * BLOCK < TEXT.text
    empty = torch.stack([x == 0 for x in work])  # (steps, heads, blocks)
    listed = mask.work()[0] > 0
    assert (empty[[2, 3, 5, 6], 1] == (~text_block | ~listed[1])).all()
    assert (empty[[0, 1, 4, 7]] == ~listed).all() and (empty[:, [0, 2]] == ~listed[[0, 2]]).all()


def test_batch_elements_decide_for_themselves() -> None:
    """The two halves of a batch may be the two branches of guidance."""
    at, operator, found = states(), ReuseHeads(Drop(), drift=0.01), []
    layout = BlockLayout.raster(TEXT.tokens, BLOCK)
    mask = BlockMask.full(layout, layout)
    for step in range(3):
        call, other = (call_of(TEXT, step=step, state=at(step), seed=seed, batch=2) for seed in (0, step))
        for name in ("query", "key", "value"):
            getattr(call, name)[1] = getattr(other, name)[1]

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
            found.append(mask.work().expand(2, 3, -1)[..., -1])
            return block_sparse_attention(query, key, value, mask, scale=0.25)

        operator.run(call, mask, attend)
    assert (found[2][0] == 0).all() and (found[2][1] > 0).all()


@pytest.mark.parametrize("operator", [ReuseComplement(), ReuseHeads(drift=2.0)], ids=lambda x: x.name)
def test_nothing_waits_for_the_device(operator: Operator) -> None:
    layout = BlockLayout.raster(TEXT.tokens, BLOCK)
    mask, at = masked(0.4, layout), states()
    for step in range(4):
        call = call_of(TEXT, step=step, state=at(step), batch=2)

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
            return query.clone(), torch.zeros(2, 3, TEXT.tokens)

        with Waits():
            operator.run(call, mask, attend)
            operator.computed(call, mask)
