"""inspect --layer: a call of the included model, drawn; what cannot be looked at is refused."""

import pytest
import torch
from PIL import Image

from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import NOTHING, PANEL, WHOLE, planted_call
from dit_sparse.layermap import GAP, HEAD, LEFT, TOP, dense_mass, draw_layer, frame_density
from dit_sparse.methods import build


@pytest.mark.slow
def test_numbers_and_picture(dit_sparse) -> None:
    done = dit_sparse("inspect", "svg", "--layer", 4, "--head", 1, "--step", 2, "--density", 0.25, "--device", "cpu",
                      "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["picture"] == "layer-svg-4-1-2.png" and found["grid"] == "9x16x16"
    assert abs(found["density"] - 0.25) < 0.03 and found["density"] < found["recall"] < 1
    assert 0 < found["relative_error"] < 1
    with Image.open(done.folder / found["picture"]) as picture:
        assert min(picture.size) > 2 * PANEL


REFUSALS = {
    "method": (["magic", "--layer", 1], "svg"),
    "option": (["svg", "--layer", 1, "-o", "colour=red"], "colour"),
    "layer": (["svg", "--layer", 8], "--layer 8 is not allowed; the included model has 0 to 7"),
    "head": (["svg", "--layer", 1, "--head", 4], "0 to 3"),
    "step": (["svg", "--layer", 1, "--step", 1], "use 2 to 9"),
    "grid": (["svg", "--layer", 1, "--grid", "5x8x12"], "leave --grid"),
    "prompt": (["svg", "--prompt", "a red circle"], "--prompt belongs to --layer"),
    "device": (["svg", "--layer", 1, "--device", "warp"], "cannot be used"),
    "suffix": (["svg", "--layer", 1, "--png", "mask.jpg"], ".png"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments(dit_sparse, case: str) -> None:
    words, expected = REFUSALS[case]
    done = dit_sparse("inspect", *words)
    assert expected in done.refusal() and done.files == set()


def test_density_by_frames_and_mass_are_what_they_say() -> None:
    grid = TokenGrid(3, 4, 5, text=7, text_at="front")
    call = planted_call(grid, 3)
    mask = build("svg", density=0.4, block_size=16).plan(call).mask
    tokens = mask.token_mask()[0].expand(3, -1, -1)
    for head in range(3):
        kept = frame_density(mask, grid, head)
        for i in range(3):
            for k in range(3):
                rows, columns = (slice(7 + 20 * x, 27 + 20 * x) for x in (i, k))
                assert kept[i, k] == pytest.approx(float(tokens[head, rows, columns].float().mean()))
    query, key = call.query[0, :, 0], call.key[0, :, 0]
    whole = (query @ key.T * call.scale).softmax(-1) * grid.tokens
    assert torch.allclose(dense_mass(query, key, call.scale, grid.tokens), whole, atol=1e-4)
    coarse = dense_mass(query, key, call.scale, 1)
    assert coarse.shape == (1, 1) and float(coarse) == pytest.approx(1, abs=1e-4)


def test_panels_lie_where_they_should(tmp_path) -> None:
    grid = TokenGrid(2, 8, 8)
    call = planted_call(grid, 1)
    mask = build("gna", window=(1, 8, 8), block_size=16).plan(call).mask
    draw_layer(mask, call, 0, tmp_path / "layer.png", "title", "numbers")
    with Image.open(tmp_path / "layer.png") as picture:
        # Each frame sees itself and not the other, on the token map and on the map of frames.
        for column, row in ((1, 0), (1, 1)):
            left, top = LEFT + column * (LEFT + PANEL + GAP), HEAD + TOP + row * (TOP + PANEL + GAP)
            at = [[picture.getpixel((left + 40 + x * PANEL // 2, top + 40 + y * PANEL // 2)) for x in (0, 1)]
                  for y in (0, 1)]
            assert at == [[WHOLE, NOTHING], [NOTHING, WHOLE]]
