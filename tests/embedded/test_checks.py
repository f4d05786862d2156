"""The checks pass on drawn clips and fail on other captions."""

import torch

from dit_sparse.pipelines.embedded import checks, drawing, world


def test_drawn_clips_pass_and_shuffled_captions_fail():
    spec = world.sample(20, "held", generator=torch.Generator().manual_seed(5))
    clips = torch.cat([drawing.draw({k: v[i : i + 4] for k, v in spec.items()}, 17, 96) for i in range(0, 20, 4)])
    own = checks.score(clips, spec)
    assert own["colour"] == 1 and min(own["shape"], own["motion"], own["relation"]) >= 0.9
    other = checks.score(clips, {name: values.roll(7, 0) for name, values in spec.items()})
    assert other["colour"] <= 0.3 and other["shape"] <= 0.3 and other["motion"] <= 0.4 and other["all"] <= 0.15


def test_an_empty_clip_fails_every_check_that_applies():
    spec = world.sample(6, "held", generator=torch.Generator().manual_seed(1))
    rows = checks.check_all(torch.zeros(6, 3, 17, 64, 64), spec)
    assert all(value == 0 for row in rows for value in row.values() if value is not None)


def test_motion_and_camera_need_a_clip():
    spec = world.sample(4, "held", two=0.0, generator=torch.Generator().manual_seed(1))
    rows = checks.check_all(drawing.draw(spec, 1, 128), spec)
    assert all(row["motion"] is None and row["camera"] is None and row["colour"] == 1 for row in rows)


def test_summary_leaves_out_what_does_not_apply():
    rows = [dict.fromkeys(checks.NAMES), dict.fromkeys(checks.NAMES)]
    rows[0].update(colour=1.0, shape=0.0)
    rows[1].update(colour=1.0, relation=1.0)
    assert checks.summarise(rows) == {"colour": 1.0, "shape": 0.0, "relation": 1.0, "all": 0.5}
