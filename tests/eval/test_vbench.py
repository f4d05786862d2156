"""VBench's arithmetic and files, on fixtures in its format."""

import json
from pathlib import Path

import pytest

from dit_sparse.eval.vbench import DIMENSIONS, export_videos, keep_scores, kept_scores, read_scores, scores

RAW = {name: 0.2 + 0.04 * i for i, name in enumerate(DIMENSIONS)}


def test_total_is_the_leaderboards() -> None:
    found = scores(RAW)
    norm = {n: (RAW[n] - d.low) / (d.high - d.low) * d.weight for n, d in DIMENSIONS.items()}
    quality = sum(norm[n] for n, d in DIMENSIONS.items() if d.quality) / 6.5
    semantic = sum(norm[n] for n, d in DIMENSIONS.items() if not d.quality) / 9
    assert found.quality == pytest.approx(quality) and found.semantic == pytest.approx(semantic)
    assert found.total == pytest.approx((4 * quality + semantic) / 5) and found.missing == []
    top = scores({name: d.high for name, d in DIMENSIONS.items()})
    assert top.total == pytest.approx(1)


def test_missing_dimensions_leave_the_mean_open() -> None:
    found = scores({n.replace("_", " "): v for n, v in RAW.items() if n != "scene"})
    assert found.semantic is None and found.total is None and found.missing == ["scene"] and found.quality is not None


def test_files(tmp_path: Path) -> None:
    names = list(RAW)
    for file, some in (("a", names[:7]), ("b", names[7:])):
        content = {n: [RAW[n], [{"video_path": "x-0.mp4", "video_results": RAW[n]}]] for n in some}
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    assert read_scores(tmp_path / "a.json", tmp_path / "b.json") == scores(RAW)
    with pytest.raises(ValueError, match="stands in another file"):
        read_scores(tmp_path / "a.json", tmp_path / "a.json")


WRONG = {"list": [], "text": {"scene": "good"}, "empty": {"scene": []}, "unknown": {"beauty": [0.5]},
         "word": {"scene": ["x"]}, "NaN": {"scene": [float("nan")]}, "per cent": {"imaging_quality": [67.2]}}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_one_line(tmp_path: Path, case: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps(WRONG[case]))
    with pytest.raises(ValueError, match="result of VBench|is unknown|finite number|not per cent") as caught:
        read_scores(tmp_path / "r.json")
    assert "\n" not in str(caught.value)
    for name in ("none.json", "bad.json"):
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(ValueError, match="cannot be read|is no JSON"):
            read_scores(tmp_path / name)


def make_run(folder: Path, prompts: list[str], seeds: list[int]) -> Path:
    """A folder as `eval run` leaves it, with empty videos."""
    keys, lines = [], []
    (folder / "videos").mkdir(parents=True)
    for i, prompt in enumerate(prompts):
        for seed in seeds:
            job, video = {"prompt": prompt, "seed": seed, "label": "svg"}, f"videos/{i}-{seed}.mp4"
            (folder / video).write_text(f"{prompt} {seed}")
            result = {"seconds": 1.0, "density": 0.5, "values": {}, "reasons": {}, "video": video}
            keys.append(json.dumps(job))
            lines.append(json.dumps({"key": keys[-1], "job": job, "result": result}))
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.json").write_text(json.dumps({"command": "", "config": {}, "jobs": keys}))
    (folder / "environment.json").write_text("{}")
    return folder


def test_export_has_vbenchs_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a cat", "a dog"], [7, 9])
    export_videos(run, "svg", tmp_path / "out")
    files = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert files == {"a cat-0.mp4": "a cat 7", "a cat-1.mp4": "a cat 9", "a dog-0.mp4": "a dog 7",
                     "a dog-1.mp4": "a dog 9"}
    with pytest.raises(ValueError, match="has no method 'radial'; use one of svg"):
        export_videos(run, "radial", tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be a file's name"):
        export_videos(make_run(tmp_path / "slash", ["a/b"], [0]), "svg", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_scores_are_kept_with_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a cat"], [0])
    assert kept_scores(run) == {}
    keep_scores(run, "svg", scores(RAW))
    assert kept_scores(run)["svg"]["total"] == scores(RAW).total
    with pytest.raises(ValueError, match="has no method"):
        keep_scores(run, "gna", scores(RAW))
