"""VBench's prompts are all there, and come out as VBench has them."""

import hashlib
import json
from pathlib import Path

import pytest

from dit_sparse.eval import vbench_prompts
from dit_sparse.eval.config import parse_config
from dit_sparse.eval.vbench import DIMENSIONS, export_videos
from dit_sparse.eval.vbench_prompts import all_prompts, coverage, dimensions, prompts_of, style_of, texts_of
from tests.eval.test_vbench import make_run

# of vbench/VBench_full_info.json in the wheel vbench-0.1.5-py3-none-any.whl
SHA256 = "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd"
COUNTS = {
    "temporal_flickering": 75,
    "subject_consistency": 72,
    "background_consistency": 86,
    "scene": 86,
    "object_class": 79,
    "multiple_objects": 82,
    "color": 85,
    "spatial_relationship": 84,
    "human_action": 100,
    "appearance_style": 90,
    "temporal_style": 100,
    "overall_consistency": 93,
}


def test_the_original_file_comes_back_byte_for_byte(tmp_path: Path) -> None:
    files = vbench_prompts.write_prompts(tmp_path)
    info = next(file for file in files if file.name == "VBench_full_info.json")
    assert hashlib.sha256(info.read_bytes()).hexdigest() == SHA256
    assert len((tmp_path / "all_dimension.txt").read_text().splitlines()) == 946
    assert len(files) == 18 and {file.stem for file in (tmp_path / "prompts_per_dimension").iterdir()} == set(
        DIMENSIONS
    )


def test_prompts_by_dimension() -> None:
    assert len(all_prompts()) == 946 and len(texts_of()) == 944
    assert set(dimensions()) == set(DIMENSIONS)
    assert {name: len(prompts_of([name])) for name in COUNTS} == COUNTS
    both = prompts_of(["color", "scene"])
    assert len(both) == 85 + 86 and {p.dimensions[0] for p in both} == {"color", "scene"}
    assert coverage(["a person", "a red bicycle", "my own"])["color"] == (1, 85)
    with pytest.raises(ValueError, match="'beauty' is unknown; VBench has temporal_flickering"):
        prompts_of(["beauty"])


def test_what_prompts_are_about() -> None:
    assert style_of("The bund Shanghai, oil painting") == "oil painting" and style_of("a person") is None
    place = next(p for p in all_prompts() if p.text == "a bicycle on the left of a car, front view")
    assert place.about == ("bicycle", "car", "on the left of")


def test_every_prompt_can_name_a_file() -> None:
    assert all("/" not in text and len(f"{text}-0.mp4".encode()) <= 255 for text in texts_of())


def test_a_configuration_takes_them() -> None:
    some = parse_config({"methods": ["svg"], "prompts": {"vbench": ["color", "scene"]}})
    assert len(some.prompts) == 85 + 86 and some.prompts[0] == "a red bicycle"
    assert len(parse_config({"methods": ["svg"], "prompts": {"vbench": "all"}}).prompts) == 944
    for wrong, match in (
        ({"vbench": ["beauty"]}, "prompts: dimension 'beauty' is unknown"),
        ({"vbench": "some"}, "prompts, vbench is 'some'; write all, or a list of dimensions"),
        ({"vbench": []}, "prompts, vbench is an empty list"),
        ({"vbnech": "all"}, "did you mean 'vbench'"),
    ):
        with pytest.raises(ValueError, match=match):
            parse_config({"methods": ["svg"], "prompts": wrong})


def test_export_by_dimension(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a red bicycle", "alley", "my own"], [7, 9])
    done = export_videos(run, "svg", tmp_path / "color", dimensions=["color"])
    assert {f.name for f in (tmp_path / "color").iterdir()} == {"a red bicycle-0.mp4", "a red bicycle-1.mp4"}
    assert done.coverage == {"color": (1, 85)}
    everything = export_videos(run, "svg", tmp_path / "all")
    assert len(everything.files) == 6 and everything.coverage["scene"] == everything.coverage[
        "background_consistency"
    ] == (1, 86)
    with pytest.raises(ValueError, match="no video of VBench's prompts for object_class"):
        export_videos(run, "svg", tmp_path / "none", dimensions=["object_class"])
    with pytest.raises(ValueError, match="'colour' is unknown"):
        export_videos(run, "svg", tmp_path / "none", dimensions=["colour"])
    assert not (tmp_path / "none").exists()


def test_the_data_stays_small() -> None:
    file = Path(vbench_prompts.__file__).with_name("vbench_prompts.json")
    assert file.stat().st_size < 60_000 and len(json.loads(file.read_text())) == 11
