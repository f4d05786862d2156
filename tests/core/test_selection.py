import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import order as orders
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.selection import (
    blocks_holding,
    count_of_density,
    force,
    map_kept,
    select_global,
    select_random,
    select_threshold,
    select_top_k,
    select_top_p,
    text_forced,
)


def brute_top(row: list[float]) -> list[int]:
    """Places from the highest score to the lowest, equal ones by index."""
    return sorted(range(len(row)), key=lambda j: (-row[j], j))


SCORES = st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), min_size=7, max_size=7), min_size=1,
                  max_size=4)


@given(SCORES, st.integers(-1, 9))
def test_top_k_takes_the_best_and_of_ties_the_first(scores: list[list[float]], k: int) -> None:
    keep = select_top_k(torch.tensor(scores), k)
    for row, kept in zip(scores, keep, strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == set(brute_top(row)[: max(1, k)])


def test_top_k_with_a_budget_per_head() -> None:
    scores = torch.rand(2, 3, 5, 8)
    k = torch.tensor([0, 3, 20])[:, None, None]
    keep = select_top_k(scores, k)
    assert torch.equal(keep.sum(-1), torch.tensor([1, 3, 8])[:, None].expand(2, 3, 5))
    assert torch.equal(keep[:, 1], select_top_k(scores[:, 1], 3))


@given(SCORES, st.floats(0, 1.2), st.integers(1, 9))
def test_top_p_is_the_shifted_test(scores: list[list[float]], p: float, least: int) -> None:
    shares = torch.tensor(scores, dtype=torch.float64).softmax(-1)
    keep = select_top_p(shares, p, least=least)
    for row, kept in zip(shares.tolist(), keep, strict=True):
        expected, before = set(), 0.0
        for rank, j in enumerate(brute_top(row)):
            if rank < least or before <= p + 1e-12 or p >= 1:
                expected.add(j)
            before += row[j]
        assert set(kept.nonzero()[:, 0].tolist()) == expected


def test_top_p_golden() -> None:
    size, logit = torch.tensor([10.0, 20, 30, 40]), torch.tensor([2.0, 1, 0, -1])
    shares = (size * logit.exp() / (size * logit.exp()).sum())[None]
    assert shares[0].tolist() == pytest.approx([0.4272, 0.3143, 0.1734, 0.0851], abs=1e-4)
    assert [int(select_top_p(shares, p).sum()) for p in (0.9, 0.7, 0.4)] == [3, 2, 1]
    assert int(select_top_p(shares, 0.4, least=int(0.5 * 4)).sum()) == 2


def test_top_p_of_one_keeps_everything() -> None:
    # The cumulative sum of these shares passes 1 in float32.
    shares = torch.rand(200, 2000).softmax(-1) * (1 + 1e-5)
    assert select_top_p(shares, 1.0).all() and select_top_p(shares, 1.5).all()
    keep = select_top_p(shares[None, :2].expand(3, -1, -1), torch.tensor([0.0, 0.5, 1.0])[:, None, None])
    assert (keep[0].sum(-1) == 1).all() and keep[2].all()
    assert (keep[1].sum(-1) > 1).all() and not keep[1].any(0).all()


def test_top_p_zero_keeps_the_best() -> None:
    keep = select_top_p(torch.tensor([[0.2, 0.4, 0.4]]), 0.0)
    assert keep.tolist() == [[False, True, False]]


@given(SCORES, st.floats(-2, 3, width=32))
def test_threshold_and_never_an_empty_row(scores: list[list[float]], threshold: float) -> None:
    keep = select_threshold(torch.tensor(scores), threshold)
    for row, kept in zip(scores, keep.tolist(), strict=True):
        expected = {j for j, score in enumerate(row) if score >= threshold} | {brute_top(row)[0]}
        assert {j for j, one in enumerate(kept) if one} == expected


def test_random_keeps_k_everywhere_with_equal_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    keep = select_random((1, 4, 500, 20), 5, generator=generator)
    assert (keep.sum(-1) == 5).all()
    assert (keep.float().mean((0, 1, 2)) - 0.25).abs().max() < 0.04
    again = select_random((1, 4, 500, 20), 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep, again)


@pytest.mark.parametrize(("blocks", "density", "kept"), [
    (591, 0.2, 119), (591, 0.1, 60), (256, 0.2, 52), (929, 0.2, 186), (100, 0.07, 7), (10, 0.001, 1), (10, 1.0, 10),
])
def test_count_of_density(blocks: int, density: float, kept: int) -> None:
    assert count_of_density(blocks, density) == kept


def test_constant_scores_keep_exactly_the_count() -> None:
    keep = select_top_k(torch.zeros(1, 2, 591, 591), count_of_density(591, 0.2))
    assert keep[..., :119].all() and not keep[..., 119:].any()


@pytest.mark.parametrize("k", [1, 2, 7, 12, 13, 24, 99])
def test_global_choice_is_the_best_of_the_whole_map_and_of_ties_the_first(k: int) -> None:
    for scores in (torch.randn(2, 3, 4, 6), torch.randint(0, 3, (2, 3, 4, 6)).float(), torch.zeros(2, 3, 4, 6)):
        keep = select_global(scores, k)
        place = scores.flatten(-2).argsort(dim=-1, descending=True, stable=True)[..., :k]
        want = torch.zeros(2, 3, 24, dtype=torch.bool).scatter_(-1, place, True)
        assert torch.equal(keep.flatten(-2), want)


@pytest.mark.parametrize(("density", "video", "text", "counted", "kept"), [
    (0.5, 10, 0, True, 50), (0.5, 10, 2, True, 28), (0.1, 10, 2, True, 10), (0.3, 10, 2, True, 15),
    (0.5, 10, 2, False, 50), (1.0, 10, 2, True, 100), (1.0, 1, 0, True, 1),
])
def test_pairs_kept_of_a_map(density: float, video: int, text: int, counted: bool, kept: int) -> None:
    assert map_kept(density, video, text, count_forced=counted) == kept


def test_force() -> None:
    keep = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
    kept = force(keep, rows=slice(0, 1), columns=slice(4, None), own=True)
    expected = torch.eye(5, dtype=torch.bool)
    expected[0], expected[:, 4] = True, True
    assert torch.equal(kept, expected.expand_as(kept)) and not keep.any()

    columns = torch.zeros(3, 5, dtype=torch.bool)
    columns[1, 2] = True
    kept = force(keep, columns=columns)
    assert kept[:, 1, :, 2].all() and int(kept.sum()) == 2 * 5
    rows = torch.tensor([False, True, False, False, False])
    assert torch.equal(force(keep, rows=rows).any(-1), rows.expand(2, 3, 5))
    with pytest.raises(ValueError, match="square"):
        force(torch.zeros(2, 3, dtype=torch.bool), own=True)


@pytest.mark.parametrize("place", ["front", "back"])
@pytest.mark.parametrize("text", [0, 1, 32, 33])
def test_text_forced_keeps_every_pair_with_text(place: str, text: int) -> None:
    grid = TokenGrid(3, 5, 7, text=text, text_at=place)
    layout = orders.layout(grid, orders.morton(grid), 32)
    keep = torch.zeros(1, 1, layout.blocks, layout.blocks, dtype=torch.bool)
    mask = BlockMask.from_dense(text_forced(keep, layout, grid), layout, layout).token_mask()[0, 0]
    is_text = torch.zeros(grid.tokens, dtype=torch.bool)
    is_text[grid.text_slice] = True
    assert torch.equal(mask, is_text[:, None] | is_text)


def test_text_forced_with_other_key_blocks() -> None:
    grid = TokenGrid(3, 5, 7, text=40, text_at="back")
    query, key = orders.layout(grid, None, 64), orders.layout(grid, None, 32)
    keep = text_forced(torch.zeros(query.blocks, key.blocks, dtype=torch.bool), query, grid, key)
    assert keep.sum(1).tolist() == [2, 2, key.blocks]


@pytest.mark.parametrize("place", ["front", "back"])
def test_blocks_holding_finds_the_first_frame(place: str) -> None:
    grid = TokenGrid(21, 45, 80, text=300, text_at=place)
    start = grid.video_start
    plain = orders.layout(grid, None, 128)
    found = blocks_holding(plain, start, start + grid.frame_tokens)
    assert found[:29].all() and int(found.sum()) == 29  # ceil(3600 / 128)
    order, lengths = orders.tile(grid, (2, 8, 8))
    tiles = orders.layout(grid, order, 128, lengths=lengths)
    assert int(blocks_holding(tiles, start, start + grid.frame_tokens).sum()) == 6 * 10
    small = TokenGrid(2, 2, 4)
    both = orders.per_head([orders.layout(small, make(small), 4) for make in (orders.raster, orders.token_major)],
                           torch.tensor([[0, 1]]))
    assert blocks_holding(both, 0, 8).tolist() == [[[True, True, False, False], [True] * 4]]


def test_top_k_with_sink_has_the_published_density() -> None:
    """RainFusion2.0 at 21x45x80, sparsity 0.8: 119 of 591 blocks and the first frame's rows and columns."""
    layout = BlockLayout.raster(75_600, 128)
    keep = select_top_k(torch.rand(1, 2, 591, 591), count_of_density(591, 0.2))
    sink = blocks_holding(layout, 0, 3600)
    keep = force(keep, rows=sink, columns=sink)
    assert keep[..., 29:, :].sum(-1).min() >= 119 and keep[..., 29:, :].sum(-1).max() <= 119 + 29
    assert 0.24054 <= BlockMask.from_dense(keep, layout, layout).density().item() <= 0.28720


def test_selection_never_reads_a_tensor() -> None:
    scores = torch.rand(1, 2, 8, 8, device="meta")
    k = torch.ones(2, 1, 1, dtype=torch.int64, device="meta")
    for keep in (select_top_k(scores, 3), select_top_k(scores, k), select_top_p(scores, 0.5),
                 select_top_p(scores, k / 2), select_threshold(scores, 0.1)):
        assert force(keep, rows=keep[..., 0], columns=slice(1), own=True).shape == scores.shape
