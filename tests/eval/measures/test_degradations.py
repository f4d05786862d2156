"""Measures fall with what spoils a clip, and nothing that spoils it goes unseen."""

import pytest
import torch

from dit_sparse.eval.measures import degradations
from dit_sparse.eval.measures.degradations import (
    ANSWERS,
    DEGRADATIONS,
    NOT_PROMISED,
    PROMPTS,
    Drawn,
    answers,
    degrade,
    draw,
    reencode,
    sensitivities,
)
from dit_sparse.eval.measures.table import MEASURES, measure

# Sizes and prompts: what a measure needs, and no more.
NEEDS = {
    "ms_ssim": (PROMPTS[0], 7, 176),
    "imaging_quality_proxy": (PROMPTS[0], 3, 192),
    "vmaf": (PROMPTS[0], 9, 128),
    "xpsnr": (PROMPTS[0], 9, 128),
    "world_multiple_objects": (PROMPTS[2], 5, 96),
    "world_spatial_relationship": (PROMPTS[2], 5, 96),
    "world_camera": (PROMPTS[1], 13, 96),
    "world_scene": (PROMPTS[0], 13, 128),
}
USUAL = (PROMPTS[0], 9, 96)
MOVING = (PROMPTS[0], 13, 96)


def test_every_measure_has_its_line() -> None:
    # The others need weights that are in no package: nothing is promised, and the printed table says so.
    assert set(ANSWERS) == set(MEASURES) - set(NOT_PROMISED)
    assert set(NOT_PROMISED) == {name for name, m in MEASURES.items() if m.network} | {"lpips", "dists"}
    assert {name for row in ANSWERS.values() for name in row} == set(DEGRADATIONS)


@pytest.mark.parametrize("name", ANSWERS)
def test_it_falls_with_every_strength(name: str) -> None:
    if MEASURES[name].missing():
        pytest.skip(f"{name} {MEASURES[name].missing()}")
    prompt, frames, size = NEEDS.get(name, MOVING if name in ("world_action", "world_all") else USUAL)
    found = sensitivities([draw(prompt, frames, size)], [name], ANSWERS[name])[name]
    for spoiled in ANSWERS[name]:
        assert answers(name, found[spoiled]), (spoiled, found[spoiled])


def test_every_degradation_is_seen_without_extra_packages() -> None:
    plain = [name for name, entry in MEASURES.items() if not entry.needs]
    for spoiled in DEGRADATIONS:
        assert any(spoiled in ANSWERS[name] for name in plain)
        # and by one that needs no reference, except what a prompt cannot tell
        alone = [name for name in ANSWERS if MEASURES[name].kind != "pair" and spoiled in ANSWERS[name]]
        assert alone or spoiled in ("blur",), spoiled


def test_high_quality_encoding_moves_nothing_beyond_its_bound() -> None:
    drawn = draw(PROMPTS[0], 13, 192)
    grain = Drawn(degrade(drawn, "noise", 0.1), drawn.where, drawn.prompt)
    spoiled = degrade(grain, "colour_shift", 0.25)
    before, after = (
        measure(video, reference=grain.video, prompt=grain.prompt)[0] for video in (spoiled, reencode(spoiled))
    )
    assert set(before) == set(after) and len(before) >= 10
    moved = {name: abs(after[name] - before[name]) for name in before}
    assert not {n: (m, MEASURES[n].reencode_bound) for n, m in moved.items() if m > MEASURES[n].reencode_bound}


def test_a_frozen_clip_wins_nothing_unseen() -> None:
    for name in ("dynamic_degree_proxy", "motion_magnitude_proxy"):
        if MEASURES[name].missing():
            pytest.skip(MEASURES[name].missing())
    clip = draw(PROMPTS[0], 9, 96)
    frozen = degrade(clip, "freeze", 1.0)
    moving, still = (measure(video)[0] for video in (clip.video, frozen))
    assert still["temporal_flickering"] == 1 > moving["temporal_flickering"]  # it does win this
    assert moving["dynamic_degree_proxy"] == 1 and still["dynamic_degree_proxy"] == 0
    assert still["motion_magnitude_proxy"] == 0 < moving["motion_magnitude_proxy"]


def test_blind_spots_are_told() -> None:
    found = sensitivities([draw(PROMPTS[0], 5, 64)], ["psnr", "temporal_flickering"])
    blind = degradations.blind_spots(found)
    assert "freeze" in blind["temporal_flickering"] and "noise" not in blind["temporal_flickering"]
    assert "psnr" not in blind


def test_degradations_are_clips_of_the_same_size_and_repeat() -> None:
    clip = draw(PROMPTS[1], 5, 64)
    for name in DEGRADATIONS:
        a, b = degrade(clip, name, 0.7), degrade(clip, name, 0.7)
        assert a.shape == clip.video.shape and torch.equal(a, b)
        assert 0 <= float(a.min()) and float(a.max()) <= 1 and not torch.equal(a, clip.video)
        assert torch.equal(degrade(clip, name, 0), clip.video)


@pytest.mark.parametrize("arguments", [("blurr", 0.5), ("blur", 1.5), ("blur", -1)])
def test_wrong_degradations(arguments) -> None:
    with pytest.raises(ValueError, match="use "):
        degrade(draw(PROMPTS[0], 3, 64), *arguments)
    with pytest.raises(ValueError, match="grammar"):
        draw("a cat")
