import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.grid import TokenGrid

SIZES = st.integers(1, 9)


@given(SIZES, SIZES, SIZES)
def test_coordinates_are_the_raster(frames: int, height: int, width: int) -> None:
    grid = TokenGrid(frames, height, width)
    at = grid.coordinates()
    assert at.dtype == torch.int32 and at.shape == (grid.video, 3)
    t, y, x = at.unbind(1)
    assert torch.equal((t * height + y) * width + x, torch.arange(grid.video, dtype=torch.int32))
    assert (at >= 0).all() and (at < torch.tensor(grid.sizes)).all()


@pytest.mark.parametrize(
    ("place", "video", "text"),
    [("front", slice(5, 65), slice(0, 5)), ("back", slice(0, 60), slice(60, 65))],
)
def test_slices_tile_the_sequence(place: str, video: slice, text: slice) -> None:
    grid = TokenGrid(3, 4, 5, text=5, text_at=place)
    assert (grid.video, grid.tokens, grid.frame_tokens) == (60, 65, 20)
    assert grid.video_slice == video and grid.text_slice == text


def test_a_place_without_text_changes_nothing() -> None:
    grid = TokenGrid(2, 2, 2, text_at="front")
    assert grid.tokens == grid.video == 8 and grid.video_slice == slice(0, 8) and grid.text_slice == slice(0, 0)


def test_parse() -> None:
    assert TokenGrid.parse("21x45x80") == TokenGrid(21, 45, 80)
    assert TokenGrid.parse("45X80") == TokenGrid(1, 45, 80)
    assert TokenGrid.parse("1x1x1", text=226, text_at="back").tokens == 227
    assert TokenGrid.parse(str(TokenGrid(7, 11, 13))) == TokenGrid(7, 11, 13)
    assert str(TokenGrid(7, 11, 13, text=4, text_at="front")) == "7x11x13+4 (front)"


@pytest.mark.parametrize("form", ["", "21", "21x45x", "1x2x3x4", "axbxc", "-1x2x3", "0x2x3"])
def test_parse_refuses(form: str) -> None:
    with pytest.raises(ValueError, match="TokenGrid") as error:
        TokenGrid.parse(form)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dict(frames=0), "frames=0"),
        (dict(height=2.0), "height=2.0"),
        (dict(width=True), "width=True"),
        (dict(text=-1), "text=-1"),
        (dict(text=3), "text_at"),
        (dict(text_at="left"), "text_at='left'"),
    ],
)
def test_the_constructor_names_the_wrong_argument(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TokenGrid(**{"frames": 1, "height": 2, "width": 3, **wrong})
