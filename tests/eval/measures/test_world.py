"""The world's dimensions on drawn clips, right and wrong prompts, and prompts of another world."""

import pytest
import torch

from dit_sparse.eval.measures import world as dimensions
from dit_sparse.eval.measures.degradations import draw
from dit_sparse.eval.measures.table import MEASURES, measure
from dit_sparse.pipelines.embedded import world

NAMES = [name for name, entry in MEASURES.items() if entry.kind == "prompt" and not entry.network]


def test_captions_are_read_back() -> None:
    spec = world.sample(200, generator=torch.Generator().manual_seed(1))
    for row, caption in enumerate(world.captions(spec)):
        read = dimensions.read_caption(caption)
        assert read is not None, caption
        for name in ("colour", "shape", "two", "cam"):
            assert int(read[name]) == int(spec[name][row]), caption
        told = {"size": "say_size", "motion": "say_motion", "back": "say_back"}
        for name, said in told.items():
            if int(spec[said][row]) and (name == "back" or not int(spec["two"][row])):
                assert int(read[name]) == int(spec[name][row]), caption


@pytest.mark.parametrize("prompt", ["", "a cat", "a red star moving", "a red star on a wooden background"])
def test_other_prompts_have_no_dimension(prompt: str) -> None:
    values, reasons = measure(torch.rand(3, 3, 48, 48), prompt=prompt, names=NAMES)
    assert values == reasons == {}


ONE = "a large red star moving right on a speckled background"
TWO = "a red circle on the left of a blue star on a gray background"
PAN = "a large yellow square growing on a striped background, camera panning left"
WRONG = {
    "world_object_class": (ONE, ONE.replace("star", "circle")),
    "world_color": (ONE, ONE.replace("red", "blue")),
    "world_action": (ONE, ONE.replace("moving right", "moving left")),
    "world_scene": (ONE, ONE.replace("speckled", "black")),
    "world_multiple_objects": (TWO, TWO.replace("blue star", "blue ring")),
    "world_spatial_relationship": (TWO, TWO.replace("left", "right")),
    "world_camera": (PAN, PAN.replace("panning left", "panning right")),
    "world_all": (ONE, ONE.replace("speckled", "gray")),
}


@pytest.mark.parametrize("name", NAMES)
def test_right_and_wrong_prompts(name: str) -> None:
    right, wrong = WRONG[name]
    video = draw(right, 13, 96).video
    compute = MEASURES[name].compute
    assert compute(video, right) == 1 and compute(video, wrong) == 0
    assert measure(video, prompt=right, names=["world_all"])[0] == {"world_all": 1}


def test_what_does_not_apply_is_none() -> None:
    one, two = draw(ONE, 5, 64).video, draw(TWO, 5, 64).video
    assert dimensions.world_multiple_objects(one, ONE) is None
    assert dimensions.world_object_class(two, TWO) is None
    assert dimensions.world_spatial_relationship(one, ONE) is None
    assert dimensions.world_camera(one, ONE) is None
    assert dimensions.world_action(one, ONE) is None  # five frames


def test_scenes_of_drawn_clips() -> None:
    spec = world.sample(48, generator=torch.Generator().manual_seed(5))
    told = {name: torch.ones_like(spec["two"]) for name in ("say_size", "say_motion", "say_back")}
    from dit_sparse.pipelines.embedded import drawing

    right = 0.0
    for row, caption in enumerate(world.captions({**spec, **told})):
        one = {name: values[row : row + 1] for name, values in spec.items()}
        video = drawing.draw(one, 5, 64)[0].movedim(1, 0) / 2 + 0.5
        right += dimensions.world_scene(video.clamp(0, 1), caption) or 0
    assert right >= 46  # of 48
