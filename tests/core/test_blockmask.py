import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse import blocklayout
from dit_sparse import order as orders
from dit_sparse.blockmask import HIGHEST, LOWEST, BlockLayout, BlockMask, TokenWindow
from dit_sparse.grid import TokenGrid

LENGTHS = [1, 3, 63, 64, 100, 113, 239]


def random_layout(tokens: int, block_size: int, heads: int | None, seed: int) -> BlockLayout:
    """A layout in random order, cut into random segments; `heads` None: one order for all."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator) for _ in range(heads or 1)]
    order = rows[0] if heads is None else torch.stack(rows)[None]
    cut = int(torch.randint(0, tokens + 1, (), generator=generator))
    return BlockLayout.from_order(order, block_size, lengths=[cut, tokens - cut])


def brute_mask(keep: Tensor, query: BlockLayout, key: BlockLayout) -> Tensor:
    """Block map to (B, H, Lq, Lk), walking over every slot of every block."""
    batch, heads = keep.shape[:2]
    mask = torch.zeros(batch, heads, query.tokens, key.tokens, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            tokens = []
            for layout in (query, key):
                index = layout.token_of_slot.expand(batch, heads, -1)[b, h]
                blocks = index.reshape(layout.blocks, layout.block_size)
                tokens.append([block[block >= 0] for block in blocks])
            for i, rows in enumerate(tokens[0]):
                for j, columns in enumerate(tokens[1]):
                    mask[b, h, rows[:, None], columns] = keep[b, h, i, j]
    return mask


def check_lists(mask: BlockMask, keep: Tensor, boundary: Tensor) -> None:
    """Lists hold the kept blocks, whole ones first, each group in rising order, and 0 beyond the counts."""
    assert mask.lists.dtype == mask.whole.dtype == mask.boundary.dtype == torch.int32
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        whole, n = int(mask.whole[b, h, i]), int(mask.work()[b, h, i])
        row = mask.lists[b, h, i].tolist()
        assert row[:whole] == (keep & ~boundary)[b, h, i].nonzero()[:, 0].tolist()
        assert row[whole:n] == (keep & boundary)[b, h, i].nonzero()[:, 0].tolist()
        assert not any(row[n:])


# -- layouts ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.sampled_from([1, 5, 32, 64, 128]), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_layout_and_its_inverse(tokens: int, block_size: int, heads: int | None, seed: int) -> None:
    layout = random_layout(tokens, block_size, heads, seed)
    assert int(layout.lengths.sum()) == tokens == int(layout.real.sum())
    assert layout.lengths.min() > 0 and layout.lengths.max() <= block_size
    token, slot = layout.token_of_slot, layout.slot_of_token
    assert torch.equal(token >= 0, layout.real.expand_as(token))
    assert torch.equal(token.gather(-1, slot), torch.arange(tokens).expand_as(slot))


@pytest.mark.parametrize("tokens", LENGTHS)
def test_raster_layout_equals_its_written_out_form(tokens: int) -> None:
    plain = BlockLayout.raster(tokens, 32)
    written = BlockLayout.from_order(torch.arange(tokens), 32)
    assert plain.index is None and torch.equal(plain.token_of_slot, written.index)
    assert torch.equal(plain.lengths, written.lengths)
    assert torch.equal(plain.slot_of_token, written.slot_of_token)


def test_from_order_with_device_lengths_equals_host_lengths() -> None:
    order = torch.randperm(50)
    host = BlockLayout.from_order(order, 16, lengths=[20, 0, 30])
    device = BlockLayout.from_order(order, 16, lengths=torch.tensor([16, 4, 0, 16, 14]))
    assert host.lengths.tolist() == [16, 4, 16, 14] and device.blocks == 5
    assert torch.equal(device.index.reshape(5, 16)[[0, 1, 3, 4]], host.index.reshape(4, 16))
    assert (device.index.reshape(5, 16)[2] == -1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockLayout.raster(10, 0),
        lambda: BlockLayout.from_order(torch.arange(10), 2.0, lengths=[10]),
        lambda: BlockLayout(4, 10, None, torch.tensor([4, 4])),
        lambda: BlockLayout(4, 8, torch.arange(7), torch.tensor([4, 4])),
        lambda: BlockLayout.from_order(torch.arange(10), 4, lengths=[4, 5]),
    ],
    ids=["block size", "block size kind", "too few blocks", "index length", "lengths"],
)
def test_layout_refuses(make) -> None:
    with pytest.raises(ValueError, match="BlockLayout: "):
        make()


# -- lists ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(LENGTHS), st.sampled_from(LENGTHS), st.sampled_from([(32, 32), (64, 32), (32, 128)]),
       st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]), st.floats(0, 1), st.integers(0, 99))
def test_from_dense_to_dense_round_trip(lq, lk, sizes, shape, share, seed) -> None:
    torch.manual_seed(seed)
    query, key = random_layout(lq, sizes[0], None, seed), BlockLayout.raster(lk, sizes[1])
    keep = torch.rand(*shape, query.blocks, key.blocks) < share
    partial = torch.rand_like(keep, dtype=torch.float32) < 0.3
    mask = BlockMask.from_dense(keep, query, key, partial=partial)
    boundary = partial | (key.lengths < key.block_size)
    assert torch.equal(mask.to_dense(), keep)
    assert torch.equal(mask.boundary_dense(), keep & boundary)
    check_lists(mask, keep, boundary)


def test_short_key_blocks_are_boundary_and_short_query_blocks_need_no_care() -> None:
    short, full = BlockLayout.raster(100, 64), BlockLayout.raster(128, 64)
    assert BlockMask.full(full, short).boundary.tolist() == [[[1, 1]]]
    assert BlockMask.full(short, full).boundary.tolist() == [[[0, 0]]]


def test_empty_blocks_are_never_listed() -> None:
    layout = BlockLayout.from_order(torch.arange(8), 4, lengths=torch.tensor([4, 0, 4]))
    mask = BlockMask.full(layout, layout)
    assert mask.to_dense()[0, 0].tolist() == [[True, False, True], [False] * 3, [True, False, True]]
    assert mask.density() == 1


def test_max_width_narrows_the_lists_only() -> None:
    layout = BlockLayout.raster(239, 16)
    keep = torch.zeros(1, 2, 15, 15, dtype=torch.bool).scatter_(-1, torch.rand(1, 2, 15, 15).topk(4).indices, True)
    narrow, wide = (BlockMask.from_dense(keep, layout, layout, max_width=n) for n in (4, None))
    assert narrow.lists.shape[-1] == 4 and wide.lists.shape[-1] == 15 and narrow.nbytes < wide.nbytes
    assert torch.equal(narrow.to_dense(), wide.to_dense()) and narrow.density() == wide.density()
    lost = BlockMask.from_dense(keep, layout, layout, max_width=3)
    assert lost.work().max() == 3  # never more entries than the list can hold


def test_equal_heads_are_not_copied() -> None:
    layout = BlockLayout.raster(1023, 64)
    keep = (torch.rand(16, 16) < 0.5).expand(2, 40, 16, 16)
    mask = BlockMask.from_dense(keep, layout, layout)
    assert mask.lists.shape == (1, 1, 16, 16)
    assert torch.equal(mask.to_dense(), keep[:1, :1])
    # lists, two counts and the lengths, shared by queries and keys, counted once
    assert mask.nbytes == 4 * (16 * 16 + 16 + 16 + 16)


def test_building_never_reads_a_tensor() -> None:
    """Meta tensors have no contents: any .item(), nonzero or data-dependent shape would raise."""
    grid = TokenGrid(5, 9, 7, text=10, text_at="front")
    layout = orders.layout(grid, orders.hilbert(grid, "meta"), 32)
    window = TokenWindow(*(torch.zeros(2, layout.slots, dtype=torch.int32, device="meta") for _ in range(3)))
    keep = torch.ones(1, 4, layout.blocks, layout.blocks, dtype=torch.bool, device="meta")
    mask = BlockMask.from_dense(keep, layout, layout, window=window).union(BlockMask.from_dense(
        keep, layout, layout, window=window))
    assert mask.density().shape == mask.balance().shape == () and mask.head_density().shape == (1, 4)


def test_wrong_shapes_are_named() -> None:
    layout = BlockLayout.raster(64, 32)
    mask = BlockMask.full(layout, layout)
    with pytest.raises(ValueError, match="keep has shape"):
        BlockMask.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool), layout, layout)
    with pytest.raises(ValueError, match="lists"):
        BlockMask(mask.lists[0], mask.whole, mask.boundary, layout, layout)
    with pytest.raises(ValueError, match="boundary"):
        BlockMask(mask.lists, mask.whole, mask.boundary[..., :1], layout, layout)
    window = TokenWindow(*(torch.zeros(1, 32, dtype=torch.int32) for _ in range(3)))
    with pytest.raises(ValueError, match="window"):
        BlockMask(mask.lists, mask.whole, mask.boundary, layout, layout, window)
    with pytest.raises(ValueError, match="key_coordinates"):
        TokenWindow(*(torch.zeros(4, 64, dtype=torch.int32) for _ in range(3)))


# -- token masks and density --------------------------------------------------------------------------------------


@given(st.sampled_from(LENGTHS), st.sampled_from(LENGTHS), st.sampled_from([(32, 32), (64, 32)]),
       st.sampled_from([None, 3]), st.sampled_from([None, 3]), st.sampled_from([(1, 1), (2, 1), (2, 3)]),
       st.integers(0, 99))
def test_token_mask_and_density_equal_brute_force(lq, lk, sizes, query_heads, key_heads, shape, seed) -> None:
    torch.manual_seed(seed)
    query, key = random_layout(lq, sizes[0], query_heads, seed), random_layout(lk, sizes[1], key_heads, seed + 1)
    keep = torch.rand(*shape, query.blocks, key.blocks) < 0.5
    mask = BlockMask.from_dense(keep, query, key)
    heads = max(shape[1], query_heads or 1, key_heads or 1)
    expected = brute_mask(keep.expand(-1, heads, -1, -1), query, key)
    assert torch.equal(mask.token_mask(), expected)
    assert torch.equal(mask.pairs.expand(shape[0], heads), expected.sum((2, 3)))
    assert mask.density() == pytest.approx(expected.float().mean().item(), abs=1e-6)


def box_window(grid: TokenGrid, reach: tuple[int, int, int], layout: BlockLayout) -> tuple[TokenWindow, Tensor]:
    """Tokens within `reach` along each axis, text seen by and seeing all; and the same by brute force."""
    at = grid.coordinates().T
    whole = torch.zeros(3, grid.tokens, dtype=torch.int32)
    whole[:, grid.video_slice] = at
    low, high = (whole + sign * torch.tensor(reach, dtype=torch.int32)[:, None] for sign in (-1, 1))
    low[:, grid.text_slice], high[:, grid.text_slice] = LOWEST, HIGHEST
    text = torch.zeros(grid.tokens, dtype=torch.bool)
    text[grid.text_slice] = True
    window = TokenWindow.from_tokens(whole, low, high, layout, layout, always=text)
    distance = (whole[:, :, None] - whole[:, None, :]).abs()
    near = (distance <= torch.tensor(reach)[:, None, None]).all(0)
    return window, near | text[:, None] | text


@given(st.sampled_from(["none", "front", "back"]), st.sampled_from(["raster", "tile", "hilbert"]),
       st.sampled_from([32, 64]), st.tuples(*[st.integers(0, 4)] * 3))
def test_window_classification_equals_brute_force(place, name, block_size, reach) -> None:
    grid = TokenGrid(3, 7, 11, text=0 if place == "none" else 13, text_at=place)
    order, lengths = orders.tile(grid, (2, 4, 4)) if name == "tile" else (getattr(orders, name)(grid), None)
    layout = orders.layout(grid, order, block_size, lengths=lengths)
    window, allowed = box_window(grid, reach, layout)
    mask = BlockMask.from_window(window, layout, layout)
    assert torch.equal(mask.token_mask()[0, 0], allowed)
    assert int(mask.pairs) == int(allowed.sum())

    # Block by block: listed when any pair is allowed, whole when the keys fill the block and all pairs are.
    block = torch.nn.functional.one_hot(layout.block_of_token, layout.blocks).double()
    counts = block.T @ allowed.double() @ block
    full = (counts == layout.lengths[:, None] * layout.lengths) & (layout.lengths == block_size)
    assert torch.equal(mask.to_dense()[0, 0], counts > 0)
    assert torch.equal(mask.boundary_dense()[0, 0], (counts > 0) & ~full)
    assert torch.equal(window.pair_counts(layout, layout), counts.int())
    # What a GPU does, testing every pair of blocks, counts the same.
    assert torch.equal(blocklayout._count_pairs(window, layout, layout, only_mixed=False), counts.int())


def test_window_with_different_queries_and_keys() -> None:
    query, key = BlockLayout.raster(113, 32), random_layout(63, 64, None, 0)
    place = torch.arange(113)[None]
    window = TokenWindow.from_tokens(torch.arange(63)[None], place - 50, place - 20, query, key)
    mask = BlockMask.from_window(window, query, key)
    distance = torch.arange(113)[:, None] - torch.arange(63)
    assert torch.equal(mask.token_mask()[0, 0], (distance >= 20) & (distance <= 50))
    assert torch.equal(mask.work()[0, 0] > 0, torch.tensor([True] * 4))
    assert int(mask.pairs) == int(((distance >= 20) & (distance <= 50)).sum())


def test_one_window_in_slot_order_serves_heads_with_their_own_orders() -> None:
    """A band over slots is spatial for a raster head and temporal for a token-major one, as in Sparse VideoGen."""
    grid = TokenGrid(4, 5, 6)
    layouts = [orders.layout(grid, make(grid), 32) for make in (orders.raster, orders.token_major)]
    both = orders.per_head(layouts, torch.tensor([[0, 1]]))
    slot = torch.arange(both.slots, dtype=torch.int32)[None]
    mask = BlockMask.from_window(TokenWindow(slot, slot - 20, slot + 20), both, both)
    assert mask.lists.shape[:2] == (1, 1)
    token = torch.arange(grid.video)
    places = token, token % 30 * 4 + token // 30
    expected = torch.stack([(p[:, None] - p).abs() <= 20 for p in places])[None]
    assert torch.equal(mask.token_mask(), expected)
    assert mask.density() == pytest.approx(expected.float().mean().item(), abs=1e-6)


def test_with_layouts_keeps_the_count_of_pairs() -> None:
    grid = TokenGrid(4, 5, 6)
    plain = orders.layout(grid, orders.raster(grid), 32)
    mask = BlockMask.from_dense(torch.rand(1, 2, 4, 4) < 0.5, plain, plain)
    density = mask.density()
    other = orders.per_head([plain, plain], torch.zeros(1, 2, dtype=torch.int64))
    moved = mask.with_layouts(other, other)
    assert moved.__dict__["pairs"] is mask.pairs and moved.density() == density
    assert torch.equal(moved.token_mask(), mask.token_mask())


def test_window_is_counted_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout.raster(100, 32)
    slot = torch.arange(layout.slots, dtype=torch.int32)[None]
    window = TokenWindow(slot, slot - 5, slot + 5)
    calls = []
    count = blocklayout._count_pairs
    monkeypatch.setattr(blocklayout, "_count_pairs", lambda *args: calls.append(1) or count(*args))
    for _ in range(3):
        mask = BlockMask.from_window(window, layout, layout)
        assert int(mask.pairs) == 100 * 11 - 30
    assert len(calls) == 1


# -- golden densities of 21 x 45 x 80 -------------------------------------------------------------------------------


def band(width: int, *, inclusive: bool, sink: int = 0) -> BlockMask:
    layout = BlockLayout.raster(75_600, 128)
    place = torch.arange(75_600, dtype=torch.int32)[None]
    reach = width if inclusive else width - 1
    always = place[0] < sink
    window = TokenWindow.from_tokens(place, place - reach, place + reach, layout, layout, always=always)
    return BlockMask.from_window(window, layout, layout)


@pytest.mark.parametrize(
    ("width", "inclusive", "sink", "density"),
    [(10112, False, 0, 0.24961), (10240, True, 0, 0.25256), (10240, True, 3600, 0.29260), (12416, True, 3600, 0.34017)],
)
def test_band_densities(width: int, inclusive: bool, sink: int, density: float) -> None:
    mask = band(width, inclusive=inclusive, sink=sink)
    assert mask.density().item() == pytest.approx(density, abs=6e-6)
    # Every pair within the band, counted in closed form.
    reach = width if inclusive else width - 1
    pairs = 75_600 * (2 * reach + 1) - reach * (reach + 1)
    if sink:
        pairs += sink * 75_600 - sum(min(sink, q + reach + 1) - min(sink, max(0, q - reach)) for q in range(75_600))
    assert int(mask.pairs) == pairs


def test_band_in_whole_blocks() -> None:
    mask = band(10240, inclusive=True)
    assert mask.to_dense().sum().item() / 591**2 == pytest.approx(0.25387, abs=5e-6)
    assert band(10240, inclusive=True, sink=3600).to_dense().sum().item() / 591**2 == pytest.approx(0.29505, abs=5e-6)
    assert 1 < mask.balance().item() < 1.1


def test_neighbourhood_window_has_its_exact_density() -> None:
    """Windows that shift inwards at the borders keep exactly their volume of keys (generalised neighbourhoods)."""
    grid, window = TokenGrid(21, 45, 80), torch.tensor([3, 9, 16])[:, None]
    at = grid.coordinates().T
    low = (at - window // 2).clamp(min=0).minimum(torch.tensor(grid.sizes)[:, None] - window)
    order, lengths = orders.tile(grid, (3, 5, 8))
    layout = orders.layout(grid, order, 128, lengths=lengths)
    mask = BlockMask.from_window(
        TokenWindow.from_tokens(at, low, low + window - 1, layout, layout), layout, layout
    )
    assert layout.blocks == 630 and int(mask.pairs) == 75_600 * 3 * 9 * 16


def test_full_mask_has_density_one() -> None:
    grid = TokenGrid(21, 45, 80, text=226, text_at="front")
    order, lengths = orders.tile(grid, (1, 8, 16))
    layout = orders.layout(grid, order, 128, lengths=lengths)
    assert BlockMask.full(layout, layout).density() == 1


# -- algebra ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windowed", [False, True])
def test_union_and_intersection_equal_those_of_tokens(windowed: bool) -> None:
    grid = TokenGrid(3, 7, 11, text=13, text_at="front")
    layout = orders.layout(grid, orders.hilbert(grid), 32)
    window = box_window(grid, (1, 2, 2), layout)[0] if windowed else None
    shapes = (1, 3), (2, 1)
    masks = []
    for shape in shapes:
        keep, partial = (torch.rand(*shape, layout.blocks, layout.blocks) < 0.6 for _ in range(2))
        masks.append(BlockMask.from_dense(keep, layout, layout, partial=partial, window=window))
    one, two = (m.token_mask() for m in masks)
    union, common = masks[0].union(masks[1]), masks[0].intersection(masks[1])
    assert torch.equal(union.token_mask(), one | two)
    assert torch.equal(common.token_mask(), one & two)
    assert union.density() >= max(m.density() for m in masks)


def test_algebra_refuses_masks_that_do_not_fit() -> None:
    layout, other = BlockLayout.raster(100, 32), BlockLayout.raster(100, 64)
    slot = torch.arange(128, dtype=torch.int32)[None]
    mask = BlockMask.full(layout, layout)
    with pytest.raises(ValueError, match="query layouts differ"):
        mask.union(BlockMask.full(other, other))
    with pytest.raises(ValueError, match="windows differ"):
        mask.intersection(BlockMask.from_window(TokenWindow(slot, slot, slot), layout, layout))


def test_balance_is_the_longest_list_over_the_mean() -> None:
    layout = BlockLayout.raster(128, 32)
    assert BlockMask.full(layout, layout).balance() == 1
    keep = torch.eye(4, dtype=torch.bool)
    keep[0] = True
    assert BlockMask.from_dense(keep, layout, layout).balance().item() == pytest.approx(4 / (7 / 4))


def test_to_moves_everything_and_keeps_sharing() -> None:
    grid = TokenGrid(3, 5, 7, text=4, text_at="front")
    layout = orders.layout(grid, None, 32)
    mask = BlockMask.from_window(box_window(grid, (1, 1, 1), layout)[0], layout, layout)
    moved = mask.to("meta")
    assert all(t.device.type == "meta" for t in moved.tensors()) and moved.query is moved.key
    assert len(moved.tensors()) == len(mask.tensors())
    assert torch.equal(mask.to("cpu").token_mask(), mask.token_mask())


def test_repeated_building_gives_equal_bits() -> None:
    layout = BlockLayout.raster(1023, 32)
    keep = torch.rand(2, 3, 32, 32) < 0.4
    first, second = (BlockMask.from_dense(keep, layout, layout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
