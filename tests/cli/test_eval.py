"""`dit-sparse eval` on a tiny model: what it writes, prints and refuses."""

import json
import sys
from pathlib import Path

import pytest

CONFIG = """
pipeline: {model}
methods: [svg]
prompts: [a red circle, a blue star]
steps: 2
size: 64x32x5
guidance: 1
measures: [psnr, temporal_flickering]
"""


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Path) -> Path:
    (tmp_path / "small.yaml").write_text(CONFIG.format(model=tiny_folder))
    return tmp_path / "small.yaml"


def test_run_show_and_compare(dit_sparse, config: Path) -> None:
    done = dit_sparse("eval", "run", "small.yaml")
    assert done.code == 0, done.err
    assert done.files == {"small.yaml", "eval-small"} and "psnr" in done.out and "4 of 4" in done.out
    lines = (done.folder / "eval-small" / "results.jsonl").read_text()
    done = dit_sparse("eval", "run", "small.yaml", "--output", "eval-small", "--json")
    assert done.json["finished"] == done.json["planned"] == 4
    assert done.json["methods"][1]["psnr"]["prompts"] == 2
    assert (done.folder / "eval-small" / "results.jsonl").read_text() == lines  # nothing was done again
    (done.folder / "eval-small" / "report.html").unlink()
    assert dit_sparse("eval", "show", "eval-small").code == 0
    page = (done.folder / "eval-small" / "report.html").read_text()
    assert "dit-sparse eval run small.yaml --output eval-small" in page
    done = dit_sparse("eval", "compare", "eval-small:dense", "eval-small:svg", "--json")
    assert done.code == 0 and {d["says"] for d in done.json["differences"]} == {"too few prompts"}
    said = dit_sparse("eval", "compare", "eval-small", "eval-small").out
    assert "beyond noise" in said and "0 of 0" in said and "too few prompts for" in said  # two prompts judge nothing
    wrong = dit_sparse("eval", "compare", "eval-small", "eval-small", "--confidence", "95")
    assert "confidence=95.0 is not allowed" in wrong.refusal()


def test_vbench_goes_out_and_comes_back(dit_sparse, config: Path) -> None:
    assert dit_sparse("eval", "run", "small.yaml", "--output", "run").code == 0
    done = dit_sparse("eval", "export-vbench", "run", "svg", "--output", "out", "--json")
    assert done.code == 0, done.err
    assert {file.name for file in (done.folder / "out").iterdir()} == {"a red circle-0.mp4", "a blue star-0.mp4"}
    # neither prompt is VBench's, which a warning says
    assert done.json["coverage"] == {}
    done = dit_sparse("eval", "export-vbench", "run", "svg", "--output", "out")
    assert done.code == 0 and "none of these prompts is VBench's" in done.err
    (config.parent / "scores.json").write_text(json.dumps({"scene": [0.4111, []], "color": [0.9, []]}))
    done = dit_sparse("eval", "import-vbench", "scores.json", "--folder", "run", "--method", "svg")
    assert done.code == 0 and "50.00" in done.out and "not complete" in done.out, done.err
    assert "VBench's own scores" in (config.parent / "run" / "report.html").read_text()


def test_vbench_prompts_are_written(dit_sparse) -> None:
    done = dit_sparse("eval", "export-vbench", "--output", "prompts", "--dimension", "color", "--dimension", "scene")
    assert done.code == 0 and "171" in done.out, done.err
    folder = done.folder / "prompts"
    assert {file.name for file in folder.rglob("*.txt")} == {"all_dimension.txt", "color.txt", "scene.txt"}
    assert len((folder / "all_dimension.txt").read_text().splitlines()) == 171
    assert len(json.loads((folder / "VBench_full_info.json").read_text())) == 946


def test_measures_are_listed(dit_sparse) -> None:
    done = dit_sparse("eval", "measures", "--json")
    names = {row["name"]: row for row in done.json}
    assert names["psnr"]["missing"] == "" and names["world_scene"]["dimension"] == "scene"
    assert "temporal_flickering" in dit_sparse("eval", "measures").out
    rows = dit_sparse("eval", "measures", "--dimensions", "--json").json
    assert len(rows) == 16 and all(row["any_video"] or row["world"] or row["network"] for row in rows)
    assert "import VBench's score" in dit_sparse("eval", "measures", "--dimensions").out


def test_blind_spots_are_printed(dit_sparse) -> None:
    words = ["eval", "blind-spots", "--size", 48, "--frames", 5]
    words += ["--measure", "temporal_flickering", "--measure", "psnr"]
    done = dit_sparse(*words)
    assert done.code == 0, done.err
    row = next(line for line in done.out.splitlines() if "temporal_flickering" in line)
    assert "BLIND" in row and "falls" in row
    # measures on networks that are in no package stand below the table, with the reason
    assert "nothing promised" in done.out and "clip_score: CLIP's weights are in no package" in done.out
    found = dit_sparse(*words, "--json").json
    assert "freeze" in found["blind"]["temporal_flickering"] and len(found["values"]["psnr"]["blur"]) == 4


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Files of every kind that people have."""
    import av
    import torch

    from dit_sparse.eval.measures.degradations import PROMPTS, draw
    from dit_sparse.pipelines.video_io import write_video

    video = draw(PROMPTS[0], 5, 64).video
    write_video(tmp_path / "a.mp4", video, 8)
    write_video(tmp_path / "b.mp4", (video + 0.1 * torch.randn_like(video)).clamp(0, 1), 8)
    write_video(tmp_path / "slow.mp4", video, 4)
    write_video(tmp_path / "short.mp4", video[:3], 8)
    write_video(tmp_path / "one.mp4", video[:1], 8)
    write_video(tmp_path / "portrait.mp4", video[..., :48], 8)
    frames = (video * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    for name, kind in (("ten.mkv", "yuv444p10le"), ("alpha.mkv", "bgra")):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("ffv1", rate=8)
            stream.height, stream.width, stream.pix_fmt = 64, 64, kind
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=kind)))
            container.mux(stream.encode())
    (tmp_path / "text.mp4").write_text("no video")
    return tmp_path


def test_any_file_is_measured(dit_sparse, videos: Path) -> None:
    words = ["--measure", "psnr", "--measure", "temporal_flickering"]
    done = dit_sparse("eval", "clip", "b.mp4", "a.mp4", *words, "--json")
    assert done.code == 0, done.err
    assert 15 < done.json["values"]["psnr"] < 25 and done.json["fps"] == 8
    # how much it moves stands beside what a frozen clip is best at
    assert {"motion_magnitude_proxy", "dynamic_degree_proxy"} <= {*done.json["values"], *done.json["reasons"]}
    ten = dit_sparse("eval", "clip", "ten.mkv", "a.mp4", "--measure", "psnr", "--json")
    assert ten.json["values"]["psnr"] > 30, ten.err
    portrait = dit_sparse("eval", "clip", "portrait.mp4", "--measure", "colourfulness_proxy", "--json").json
    assert (portrait["height"], portrait["width"]) == (64, 48) and portrait["values"]
    one = dit_sparse("eval", "clip", "one.mp4", "--measure", "temporal_flickering")
    assert one.code == 0 and "1 frame; this measure needs 2" in one.out
    words = ["--prompt", "a cat", "--measure", "world_color", "--json"]
    assert dit_sparse("eval", "clip", "a.mp4", *words).json["reasons"]["world_color"].startswith("does not apply")


BAD_FILES = {
    "missing": (["none.mp4"], "none.mp4 is not a file; give a video"),
    "no video": (["text.mp4"], "text.mp4 cannot be read as a video"),
    "wrong fps": (["a.mp4", "--fps", "30"], "a.mp4 has 8 frames per second; fps=30 was asked for"),
    "other fps": (["a.mp4", "slow.mp4"], "slow.mp4 has 4 frames per second; fps=8 was asked for"),
    "no fps": (["a.mp4", "--fps", "0"], "fps=0.0 is not allowed"),
    "lengths": (["short.mp4", "a.mp4"], "video is 64x64 with 3 frames and reference 64x64 with 5"),
    "sizes": (["portrait.mp4", "a.mp4"], "video is 48x64 with 5 frames and reference 64x64"),
    "alpha": (["alpha.mkv"], "alpha.mkv has an alpha channel"),
    "measure": (["a.mp4", "--measure", "pnsr"], "'pnsr' is unknown"),
    "nothing to compare with": (["a.mp4", "--measure", "psnr"], "--measure psnr needs a second video"),
    "no prompt": (["a.mp4", "--measure", "world_color"], "--measure world_color needs --prompt"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_by_name(dit_sparse, videos: Path, case: str) -> None:
    words, match = BAD_FILES[case]
    assert match in dit_sparse("eval", "clip", *words).refusal()


WRONG = {
    "no file": (["run", "none.yaml"], "none.yaml cannot be read"),
    "foreign folder": (["run", "small.yaml", "--output", "full"], "--output full holds other files"),
    "file": (["run", "small.yaml", "--output", "small.yaml"], "is a file; name a folder"),
    "size": (["run", "odd.yaml"], "width 63 is not a multiple of"),
    "key": (["run", "typo.yaml"], "key 'prompt' is unknown; did you mean 'prompts'"),
    "model": (["run", "model.yaml"], "'nowhere' is unknown"),
    "device": (["run", "device.yaml"], "'warp' cannot be used"),
    "no run": (["compare", "full", "full"], "cannot be read"),
    "nowhere": (["compare", "a", "b"], "a is no folder"),
    "show": (["show", "full"], "cannot be read"),
    "halves": (["import-vbench", "scores.json", "--folder", "full"], "--folder and --method belong together"),
    "scores": (["import-vbench", "scores.json"], "scores.json cannot be read"),
    "export": (["export-vbench", "full", "svg", "--output", "out"], "cannot be read"),
    "export onto a file": (["export-vbench", "--output", "small.yaml"], "--output small.yaml: "),
    "dimension": (["export-vbench", "--output", "out", "--dimension", "beauty"], "'beauty' is unknown; VBench has"),
    "half": (["export-vbench", "full", "--output", "out"], "FOLDER and METHOD belong together"),
    "dino": (["run", "dino.yaml"], "holds pytorch_model.bin; only safetensors are read"),
    "measure": (["blind-spots", "--measure", "pnsr"], "'pnsr' is unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(dit_sparse, config: Path, case: str) -> None:
    text = config.read_text()
    folder = config.parent
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "odd.yaml").write_text(text.replace("64x32x5", "63x32x5"))
    (folder / "typo.yaml").write_text(text.replace("prompts:", "prompt:"))
    (folder / "model.yaml").write_text(text.replace(text.split("pipeline: ")[1].split("\n")[0], "nowhere"))
    (folder / "device.yaml").write_text(text + "device: warp\n")
    (folder / "dino").mkdir()
    (folder / "dino" / "config.json").write_text('{"model_type": "vit"}')
    (folder / "dino" / "pytorch_model.bin").write_bytes(b"")
    (folder / "dino.yaml").write_text(text + "dino: dino\n")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    words, match = WRONG[case]
    assert match in dit_sparse("eval", *words).refusal()
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_core_commands_do_not_import_what_eval_needs() -> None:
    import subprocess

    code = (
        "import sys, json, dit_sparse, dit_sparse.cli, dit_sparse.eval.compare, dit_sparse.commands.compare\n"
        "bad = {'cv2', 'torchmetrics', 'yaml', 'imageio_ffmpeg', 'matplotlib', 'efficientnet_lite_pytorch'}\n"
        "print(json.dumps(sorted(bad & set(sys.modules))))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) <= {"yaml"}  # PyYAML comes with the hub's client
