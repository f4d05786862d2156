"""AdaSpa: block mass, budgets of heads by the paper's numbers, selection, the LSE of an earlier step, its cadence."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from dit_sparse import routing
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import planted_call
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.adaspa import BASE, FEWER, MORE, AdaSpa, budget_classes, head_levels
from dit_sparse.methods.base import Call
from dit_sparse.order import video_blocks
from dit_sparse.processor import SparseProc
from dit_sparse.session import RunSession

GRIDS = [
    TokenGrid(5, 7, 9),
    TokenGrid(3, 9, 11, text=40, text_at="front"),
    TokenGrid(1, 20, 23, text=5, text_at="back"),
    TokenGrid(1, 1, 1),
]


def _mass(call: Call, blocks: BlockLayout) -> torch.Tensor:
    """(B, H, nq, nk): block sums of the dense softmax, over tokens in slot order."""
    real = blocks.real
    token = blocks.token_of_slot[real]
    block = torch.arange(blocks.slots)[real] // blocks.block_size
    logits = torch.einsum("bqhd,bkhd->bhqk", call.query, call.key)[..., token, :][..., token] * call.scale
    if call.key_mask is not None:
        logits = logits.masked_fill(~call.key_mask[:, None, None, token], -torch.inf)
    member = torch.nn.functional.one_hot(block, blocks.blocks).float()
    return member.T @ logits.softmax(-1) @ member


def _peak(call: Call, heads: int, part: int) -> None:
    """The first heads look at the first tokens of the sequence, one in so many."""
    call.query[:, :, :heads, 0] = call.key[:, : call.grid.tokens // part, :heads, 0] = 8


# -- scores --------------------------------------------------------------------------------------------------------


def test_block_mass_is_that_of_the_softmax(make_call) -> None:
    """544 tokens in blocks of 64: rows add up to the number of queries, 64 or 32."""
    call = make_call(TokenGrid(1, 16, 34), heads=3, head_dim=16)
    blocks = BlockLayout.raster(544, 64)
    full = BlockMask.full(blocks, blocks)
    _, lse = block_sparse_attention(call.query, call.key, call.value, full, scale=call.scale)
    mass = routing.listed_mass(call.query, call.key, lse, full, call.scale) * blocks.lengths[:, None]
    torch.testing.assert_close(mass, _mass(call, blocks), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass.sum(-1), blocks.lengths.float().expand(1, 3, -1), rtol=1e-5, atol=1e-4)


# -- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high, few, base, more", [(0, 0, 24, 0), (5, 5, 14, 5), (12, 12, 0, 12), (14, 12, 0, 12),
                                                   (20, 12, 0, 12)])
def test_budgets_of_heads(high: int, few: int, base: int, more: int) -> None:
    """24 heads, so many with a recall above .8: the mean sparsity stays .8."""
    recall = torch.linspace(0.1, 0.79, 24)
    recall[:high] = torch.linspace(0.99, 0.81, high)
    recall = recall[torch.randperm(24)]
    level = head_levels(recall[None], 0.8)[0]
    assert [int((level == x).sum()) for x in (FEWER, BASE, MORE)] == [few, base, more]
    sparsity = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)[level]
    assert float(sparsity.mean()) == pytest.approx(0.8, abs=1e-12)
    if few and more:
        assert recall[level == FEWER].min() > recall[level == MORE].max()


def test_counts_of_the_paper() -> None:
    """1857 video blocks at sparsity .8 keep 372, .9 keep 186, .7 keep 558; above 2/3 the mean stays too."""
    assert AdaSpa(count_forced=False).counts(1857, 4) == (186, 372, 558)
    assert AdaSpa(count_forced=False).counts(1857, 0) == AdaSpa(count_forced=False).counts(1857, 99)
    for density in (0.1, 0.5, 0.8, 1.0):
        fewer, base, more = AdaSpa(density=density).counts(200, 3)
        assert fewer + more == 2 * base and 1 <= fewer and more <= 200
    assert AdaSpa(density=1.0).counts(7, 2) == (7, 7, 7) and AdaSpa().counts(1, 0) == (1, 1, 1)


def test_classes_are_nested_budgets() -> None:
    mass = torch.rand(2, 2, 5, 13)
    classes, kept = budget_classes(mass, (2, 4, 6))
    for least, count in ((3, 2), (2, 4), (1, 6)):
        want = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.topk(count).indices, True)
        assert torch.equal(classes >= least, want)
    torch.testing.assert_close(kept, mass.topk(4).values.sum(-1))


# -- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "masked keys"])
def test_mask_is_the_algorithm(grid: TokenGrid, masked: bool, make_call) -> None:
    """Head by head and row by row: base budget, recall, budgets again, the best blocks; text on top."""
    call = make_call(grid, batch=2, heads=5, head_dim=16)
    _peak(call, 2, 4)
    if masked:
        key_mask = torch.rand(2, grid.tokens) < 0.8
        call.key[~key_mask] = torch.nan
        call = dataclasses.replace(call, key_mask=key_mask)
    method = AdaSpa(density=0.4, count_forced=False, recall=0.7, block_size=32)
    mask = method.plan(call).mask
    blocks = mask.query
    video = video_blocks(blocks, grid)
    if masked:
        call.key[~key_mask] = 0
    mass, got, levels = _mass(call, blocks)[..., :video, :video], mask.to_dense(), Counter()
    assert got[..., video:, :].all() and got[..., video:].all()
    counts = method.counts(video, blocks.blocks - video)
    for b in range(2):
        recall = mass[b].topk(counts[BASE]).values.sum((-2, -1)) / mass[b].sum((-2, -1))
        ranked = recall.argsort(descending=True).tolist()
        giving = min(int((recall > 0.7).sum()), 2)
        for h in range(5):
            level = FEWER if h in ranked[:giving] else MORE if h in ranked[5 - giving :] else BASE
            levels[level] += 1
            want = torch.zeros(video, video, dtype=torch.bool)
            want.scatter_(-1, mass[b, h].topk(counts[level]).indices, True)
            assert torch.equal(got[b, h, :video, :video], want)
    assert grid.video == 1 or levels[FEWER] == levels[MORE] > 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_sparsity_is_dense(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, head_dim=16)
    mask = AdaSpa(density=1.0, block_size=32).plan(call).mask
    out, _ = block_sparse_attention(call.query, call.key, call.value, mask, scale=call.scale)
    want, _ = attention_reference(call.query, call.key, call.value, scale=call.scale)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_no_other_mask_of_equal_rows_holds_more(make_call) -> None:
    call = make_call(TokenGrid(4, 8, 16), heads=3)
    mask = AdaSpa(density=0.3, head_adaptive=False, block_size=32).plan(call).mask
    mass = _mass(call, mask.query)
    best = (mass * mask.to_dense()).sum((-2, -1))
    count = int(mask.work()[0, 0, 0])
    assert (mask.work() == count).all()
    for _ in range(1000):
        other = torch.zeros_like(mass, dtype=torch.bool)
        other.scatter_(-1, torch.rand_like(mass).topk(count).indices, True)
        assert ((mass * other).sum((-2, -1)) <= best + 1e-4).all()


def test_budgets_of_heads_raise_the_recall(make_call) -> None:
    """Heads that look at one place beside heads that look everywhere, at the same density."""
    call = make_call(TokenGrid(6, 8, 16), heads=6)
    _peak(call, 3, 8)
    recalls, densities = [], []
    for adaptive in (False, True):
        method = AdaSpa(density=0.3, head_adaptive=adaptive, block_size=32)
        mask = method.plan(dataclasses.replace(call, state=State())).mask
        recalls.append(float((_mass(call, mask.query) * mask.to_dense()).sum() / (6 * 768)))
        densities.append(float(mask.density()))
    assert recalls[1] > recalls[0] + 0.05 and densities[0] == pytest.approx(densities[1], abs=1e-6)


@pytest.mark.parametrize(
    "grid", [TokenGrid(9, 16, 16), TokenGrid(1, 64, 64), TokenGrid(5, 20, 30, text=226, text_at="front")], ids=str
)
def test_density_is_near_the_asked_one(grid: TokenGrid) -> None:
    text = 1 - (grid.video / grid.tokens) ** 2
    for density in (0.15, 0.5):
        got = float(AdaSpa().at_density(density).plan(planted_call(grid, heads=3, head_dim=8)).mask.density())
        assert abs(got - max(density, text + (1 - text) * density / 2)) <= 0.03


# -- over the steps ------------------------------------------------------------------------------------------------


def _at(call: Call, memory: Memory, step: int) -> Call:
    return dataclasses.replace(call, step=step, num_steps=50, state=State(memory, (0, "cond"), step=step))


def test_lse_of_an_earlier_step(make_call) -> None:
    """The same activations at steps 10 and 30 give the same bits; so does an LSE with a constant added."""
    call, memory, method = make_call(TokenGrid(4, 8, 16), heads=3), Memory(), AdaSpa(block_size=32)
    first = method.plan(_at(call, memory, 10)).mask
    kept = State(memory, (0, "cond"), step=10).recall("kept")
    assert method.due(_at(call, memory, 30)) and not method.due(_at(call, memory, 29))
    lse = State(memory, (0, "cond"), step=11).recall("lse")
    memory.put(("state", "lse", (0, "cond")), lse + 1.0, step=10)
    second = method.plan(_at(call, memory, 30)).mask
    assert torch.equal(State(memory, (0, "cond"), step=30).recall("kept"), kept)
    assert torch.equal(first.to_dense(), second.to_dense())
    assert State(memory, (0, "cond"), step=31).recall("lse") is None, "no search is left that needs it"
    assert not any(method.due(_at(call, memory, step)) for step in range(31, 50))


def test_masks_stay_between_searches(make_call) -> None:
    grid, memory = TokenGrid(4, 8, 16), Memory()
    method = AdaSpa(searches=(12, 0.6), block_size=32)
    masks = {step: method.plan(_at(make_call(grid, seed=step), memory, step)).mask.to_dense()
             for step in (10, 11, 13, 20, 29, 31, 40)}
    same = {step: torch.equal(masks[step], masks[10 if step < 12 else 13 if step < 30 else 31]) for step in masks}
    assert all(same.values()), same
    assert not torch.equal(masks[10], masks[13]) and not torch.equal(masks[13], masks[31])


def _run(proc: SparseProc, calls: dict[int, Call], steps: int) -> RunSession:
    """A run of one layer, with the activations of a step."""
    session = RunSession(proc)
    session.layers = 1
    for step in range(steps):
        call = calls[step % len(calls)]
        session.begin_forward(ForwardInfo(grid=dataclasses.replace(call.grid, text=0), reason="", step=step,
                                          num_steps=steps, branch="cond", new_run=step == 0, family="hunyuan"))
        session.attention(0, call.query, call.key, call.value, None, call.scale)
    return session


def test_schedule_of_the_paper(make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 steps: 11 dense ones (0 ... 10), one search from the LSE of step 10, 39 sparse ones."""
    searched: list[int] = []
    search = AdaSpa.search

    def counting(self: AdaSpa, call: Call, lse: torch.Tensor) -> Any:
        searched.append(call.step)
        return search(self, call, lse)

    monkeypatch.setattr(AdaSpa, "search", counting)
    call = make_call(TokenGrid(4, 8, 16), heads=2)
    options = {"dense_search": True, "dense_steps": 0.2, "dense_layers": 0, "strict": True}
    session = _run(SparseProc("adaspa", block_size=32, **options), {0: call}, 50)
    densities = [float(record.density) for record in session.report.records]
    assert searched == [10, 30]
    assert densities[:11] == [1.0] * 11 and all(d < 0.3 for d in densities[11:]) and len(densities) == 50
    assert not any(record.kind == "fallback" for record in session.report.records)
    # Without a dense search the first one takes the LSE of the last dense step: nothing more than that is dense.
    searched.clear()
    session = _run(SparseProc("adaspa", block_size=32, **{**options, "dense_search": False}), {0: call}, 50)
    assert searched == [10, 30] and sum(float(record.density) == 1 for record in session.report.records) == 10


def test_a_search_waits_for_nothing(make_call, no_waiting) -> None:
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    call = make_call(grid, batch=2, heads=3, key_mask=torch.rand(2, grid.tokens) < 0.8)
    method = AdaSpa(block_size=32)
    method.plan(call)
    lse = torch.zeros(2, 3, grid.tokens)
    with no_waiting():
        method.mask(call, method.search(call, lse)).density()


def test_few_heads_at_a_time_give_the_same(make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(TokenGrid(4, 8, 8, text=20, text_at="back"), batch=2, heads=3)
    masks = []
    for numbers in (2**26, 500):
        monkeypatch.setattr("dit_sparse.scoring._NUMBERS_AT_ONCE", numbers)
        masks.append(AdaSpa(block_size=32).plan(dataclasses.replace(call, state=State())).mask)
    assert torch.equal(masks[0].to_dense(), masks[1].to_dense())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"density": 0}, "density=0"),
        ({"recall": 2}, "recall=2"),
        ({"dense_search": 1}, "True or False"),
        ({"searches": 0.5}, "searches=0.5"),
        ({"searches": (1.5,)}, "fractions"),
        ({"searches": (-1,)}, "whole numbers"),
        ({"block_size": 48}, "block_size=48"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("adaspa", **options)
    assert "\n" not in str(caught.value)
    assert build("adaspa", searches=[10, 0.6]).searches == (10, 0.6)
