import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import order as orders
from dit_sparse.grid import TokenGrid

ORDERS = {
    "raster": orders.raster,
    "token_major": orders.token_major,
    "hilbert": orders.hilbert,
    "morton": orders.morton,
    "tile": lambda grid: orders.tile(grid, (2, 3, 4))[0],
    **{axes: (lambda grid, axes=axes: orders.axis_order(grid, axes)) for axes in orders.AXIS_ORDERS},
}
LARGE = [TokenGrid(1, 1, 1), TokenGrid(21, 45, 80), TokenGrid(13, 17, 19), TokenGrid(1, 31, 29)]
GRIDS = st.builds(TokenGrid, st.integers(1, 7), st.integers(1, 9), st.integers(1, 9))


def check_bijection(order: torch.Tensor, tokens: int) -> None:
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(tokens))
    back = orders.inverse(order)
    assert torch.equal(order[back], torch.arange(tokens)) and torch.equal(back[order], torch.arange(tokens))


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("grid", LARGE, ids=str)
def test_every_order_is_a_bijection(name: str, grid: TokenGrid) -> None:
    check_bijection(ORDERS[name](grid), grid.video)


@given(GRIDS, st.sampled_from(sorted(ORDERS)))
def test_every_order_is_a_bijection_on_any_grid(grid: TokenGrid, name: str) -> None:
    check_bijection(ORDERS[name](grid), grid.video)


def test_inverse_of_a_batch_of_orders() -> None:
    order = torch.stack([torch.randperm(113) for _ in range(6)]).reshape(2, 3, 113)
    x = torch.randn(2, 3, 113)
    assert torch.equal(x.gather(-1, order).gather(-1, orders.inverse(order)), x)


def test_token_major_places() -> None:
    to = orders.inverse(orders.token_major(TokenGrid(21, 45, 80)))
    assert to[[0, 1, 3600, 3601, 75599]].tolist() == [0, 21, 1, 22, 75599]


@pytest.mark.parametrize("axes", orders.AXIS_ORDERS)
def test_axis_order_nests_the_axes(axes: str) -> None:
    grid = TokenGrid(3, 4, 5)
    at = grid.coordinates()[orders.axis_order(grid, axes)]
    keys = [tuple(row["tyx".index(a)] for a in axes) for row in at.tolist()]
    assert keys == sorted(keys)


def test_axis_order_refuses() -> None:
    with pytest.raises(ValueError, match="axes='txx'.*tyx"):
        orders.axis_order(TokenGrid(1, 2, 3), "txx")


@pytest.mark.parametrize("grid", [TokenGrid(8, 8, 8), TokenGrid(1, 16, 16), TokenGrid(4, 1, 4), TokenGrid(1, 1, 8)],
                         ids=str)
def test_hilbert_steps_to_neighbours(grid: TokenGrid) -> None:
    at = grid.coordinates()[orders.hilbert(grid)]
    assert ((at[1:] - at[:-1]).abs().sum(1) == 1).all()


def test_hilbert_keeps_blocks_compact_on_a_ragged_grid() -> None:
    grid = TokenGrid(21, 45, 80)

    def spread(order: torch.Tensor) -> torch.Tensor:
        blocks = grid.coordinates()[order][: 590 * 128].reshape(590, 128, 3).float()
        return (blocks - blocks.mean(1, keepdim=True)).norm(dim=-1).mean()

    assert spread(orders.hilbert(grid)) < 0.25 * spread(orders.raster(grid))
    assert spread(orders.morton(grid)) < 0.3 * spread(orders.raster(grid))


def test_morton_on_a_square() -> None:
    assert orders.morton(TokenGrid(1, 2, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_tile_is_raster_over_tiles_and_inside() -> None:
    order, lengths = orders.tile(TokenGrid(1, 3, 5), (1, 2, 2))
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert lengths == (4, 4, 2, 2, 2, 1)


@given(GRIDS, st.tuples(*[st.integers(1, 5)] * 3))
def test_tiles_are_boxes(grid: TokenGrid, shape: tuple[int, int, int]) -> None:
    order, lengths = orders.tile(grid, shape)
    assert sum(lengths) == grid.video
    for tile in grid.coordinates()[order].split(lengths):
        spans = tile.amax(0) - tile.amin(0) + 1
        assert spans.prod() == len(tile) and (spans <= torch.tensor(shape)).all()


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 2)])
def test_tile_refuses(shape: tuple) -> None:
    with pytest.raises(ValueError, match="tile: shape="):
        orders.tile(TokenGrid(2, 2, 2), shape)


def test_choose_tile() -> None:
    grid = TokenGrid(21, 45, 80)
    t, y, x = orders.choose_tile(grid, 128)
    assert t * y * x <= 128 and min(t, y, x) >= 3  # compact
    assert len(orders.tile(grid, (t, y, x))[1]) <= 1.1 * len(orders.tile(grid, orders.choose_tile(grid, 128, 0))[1])
    assert orders.choose_tile(TokenGrid(16, 16, 16), 64) == (4, 4, 4)
    assert orders.choose_tile(TokenGrid(1, 32, 32), 64) == (1, 8, 8)
    assert orders.choose_tile(TokenGrid(1, 1, 1), 128) == (1, 1, 1)


@given(GRIDS, st.integers(0, 9), st.sampled_from(["front", "back"]), st.sampled_from([1, 4, 7, 32]),
       st.sampled_from(["raster", "hilbert", "tile", "identity"]))
def test_layout_holds_every_token_once_and_never_mixes(
    grid: TokenGrid, text: int, place: str, block_size: int, name: str
) -> None:
    grid = TokenGrid(*grid.sizes, text=text, text_at=place)
    order, lengths = None, None
    if name == "tile":
        order, lengths = orders.tile(grid, (2, 3, 4))
    elif name != "identity":
        order = ORDERS[name](grid)
    layout = orders.layout(grid, order, block_size, lengths=lengths)
    n_video = orders.video_blocks(layout, grid)
    token = layout.token_of_slot.reshape(layout.blocks, block_size)
    assert torch.equal((token >= 0).sum(1), layout.lengths.long())
    assert torch.equal(token >= 0, torch.arange(block_size) < layout.lengths[:, None])  # packed at the front
    video, rest = token[:n_video], token[n_video:]
    assert torch.equal(rest[rest >= 0], torch.arange(grid.tokens)[grid.text_slice])
    expected = torch.arange(grid.video) if order is None else order
    assert torch.equal(video[video >= 0], expected + grid.video_start)
    slots = layout.slot_of_token
    assert torch.equal(layout.token_of_slot[slots], torch.arange(grid.tokens))
    assert torch.equal(layout.block_of_token, slots // block_size)


def test_layout_is_the_identity_where_it_can_be() -> None:
    def index(*, text: int, place: str) -> torch.Tensor | None:
        grid = TokenGrid(2, 4, 8, text=text, text_at=place)
        return orders.layout(grid, None, 32).index

    assert index(text=0, place="none") is None and index(text=5, place="back") is None
    assert index(text=5, place="front") is not None
    assert orders.layout(TokenGrid(1, 3, 11, text=5, text_at="back"), None, 32).lengths.tolist() == [32, 1, 5]


def test_layout_cuts_tiles_bigger_than_a_block() -> None:
    grid = TokenGrid(6, 8, 16, text=3, text_at="front")
    order, lengths = orders.tile(grid, (6, 8, 8))
    layout = orders.layout(grid, order, 128, lengths=lengths)
    assert layout.lengths.tolist() == [128] * 6 + [3]
    first = grid.coordinates()[layout.token_of_slot[:128] - 3]
    assert first.amax(0).tolist() == [1, 7, 7]  # two frames of the tile: a (2, 8, 8) box


def test_layout_per_head() -> None:
    grid = TokenGrid(3, 5, 7, text=4, text_at="front")
    order = torch.stack([orders.raster(grid), orders.token_major(grid)])[None]
    both = orders.layout(grid, order, 32)
    single = [orders.layout(grid, order[0, h], 32) for h in range(2)]
    assert torch.equal(both.index, torch.stack([x.index for x in single])[None])
    chosen = orders.per_head(single, torch.tensor([[1, 0, 1]]))
    assert torch.equal(chosen.index, both.index[:, [1, 0, 1]])
    assert torch.equal(chosen.index.gather(-1, chosen.slot_of_token)[0, 2], torch.arange(grid.tokens))
    with pytest.raises(ValueError, match="per_head"):
        orders.per_head([single[0], orders.layout(grid, None, 64)], torch.zeros(1, 1, dtype=torch.int64))


def test_layout_refuses_an_order_of_another_grid() -> None:
    with pytest.raises(ValueError, match="order has 6 tokens"):
        orders.layout(TokenGrid(1, 3, 3), torch.arange(6), 4)
