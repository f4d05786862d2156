"""inspect: numbers, picture, simulator, refusals."""

import pytest
from PIL import Image


@pytest.mark.parametrize("method", ["svg", "gna", "radial"])
def test_numbers_and_picture(dit_sparse, method: str) -> None:
    done = dit_sparse("inspect", method, "--grid", "5x8x12", "--text", "10", "--json")
    assert done.code == 0, done.err
    result = done.json
    assert result["tokens"] == 5 * 8 * 12 + 10
    assert 0 < result["density"] <= 1
    assert result["picture"] == f"mask-{method}-5x8x12.png"
    with Image.open(done.folder / result["picture"]) as picture:
        assert min(picture.size) > 100
    text = dit_sparse("inspect", method, "--grid", "5x8x12", "--png", "mask.png").out
    for word in ("density", "blocks", "memory", "speed-up", "mask.png"):
        assert word in text


def test_dense_has_no_picture(dit_sparse) -> None:
    done = dit_sparse("inspect", "dense", "--grid", "5x8x12")
    assert done.code == 0 and done.files == set()
    assert "mask" in dit_sparse("inspect", "dense", "--grid", "5x8x12", "--png", "mask.png").refusal()


def test_simulator_gives_the_paper_s_number(dit_sparse) -> None:
    rule = ["-o", "window=18x24x24", "-o", "stride=16x8x8", "--query-tile", "4x8x8", "--key-tile", "2x8x8"]
    done = dit_sparse("inspect", "gna", "--grid", "30x48x80", *rule, "--json")
    simulation = done.json["simulation"]
    assert simulation["fixed_speedup"] == pytest.approx(11.11, abs=0.01) and simulation["perfect"]


REFUSALS = {
    "method": (["magic"], "svg"),
    "grid": (["svg", "--grid", "big"], "21x45x80"),
    "grid too large": (["svg", "--grid", "999x999x999"], "limit"),
    "grid of zero": (["svg", "--grid", "0x4x4"], "frames"),
    "text place": (["svg", "--text", "5", "--text-at", "middle"], "text_at"),
    "text negative": (["svg", "--text", "-5"], "--text"),
    "option": (["svg", "-o", "colour=red"], "colour"),
    "density": (["svg", "--density", "2"], "density"),
    "window too large": (["gna", "--grid", "4x4x4", "-o", "window=8x8x8"], "does not fit"),
    "tile of another method": (["svg", "--query-tile", "4x8x8"], "gna"),
    "tile without window": (["gna", "--query-tile", "4x8x8"], "window"),
    "tile is no tile": (["gna", "--query-tile", "4x8"], "4x8x8"),
    "picture's suffix": (["svg", "--png", "mask.jpg"], ".png"),
    "picture's folder": (["svg", "--png", "none/mask.png"], "does not exist"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments(dit_sparse, case: str) -> None:
    words, expected = REFUSALS[case]
    done = dit_sparse("inspect", *words, *([] if "--grid" in words else ["--grid", "5x8x12"]))
    assert expected in done.refusal()
    assert done.files == set()
