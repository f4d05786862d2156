"""The commands on a tiny model: files, numbers, interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_sparse.pipelines.video_io import read_video

SMALL = ["--size", "48x32", "--frames", "5", "--steps", "3", "--guidance", "1"]
ROOT = Path(__file__).resolve().parents[2]


def test_generate_writes_clip_and_sheet_and_tells(dit_sparse, tiny_folder: Path) -> None:
    done = dit_sparse("generate", "a red circle", "--model", tiny_folder, "--output", "clip.mp4", *SMALL)
    assert done.code == 0, done.err
    assert done.files == {"clip.mp4", "clip-sheet.png"}
    assert read_video(done.folder / "clip.mp4").shape == (5, 3, 32, 48)
    for word in ("device", "backend", "tokens", "density", "in attention", "elsewhere", "fallbacks", "clip.mp4"):
        assert word in done.out


def test_generate_json_adds_up(dit_sparse, tiny_folder: Path) -> None:
    words = ["--model", tiny_folder, "--json", "--method", "svg", "--density", "0.5", "-o", "dense_layers=0"]
    done = dit_sparse("generate", "a red circle", *words, *SMALL)
    assert done.code == 0, done.err
    result = done.json
    assert result["tokens"] == 3 * 2 * 3
    assert result["width"] == 48 and result["height"] == 32 and result["frames"] == 5
    seconds = result["seconds"]
    assert seconds["all"] == pytest.approx(seconds["attention"] + seconds["elsewhere"], abs=0.01)
    assert 0 < result["density"] <= 1
    assert result["summary"]["calls"] == 3 * 2  # steps, layers
    assert done.files == {"a-red-circle-0.mp4", "a-red-circle-0-sheet.png"}


def test_one_frame_is_an_image(dit_sparse, tiny_folder: Path) -> None:
    words = ["--model", tiny_folder, "--size", "32", "--frames", "1", "--steps", "2", "--output", "image"]
    done = dit_sparse("generate", "a red circle", *words)
    assert done.code == 0, done.err
    assert done.files == {"image.png", "image-sheet.png"}


def test_many_prompts_make_many_clips(dit_sparse, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\n# remark\na blue star!\n")
    words = ["--prompts", "prompts.txt", "--output", "clips", "--model", tiny_folder, "--json", *SMALL]
    done = dit_sparse("generate", *words)
    assert done.code == 0, done.err
    assert [result["prompt"] for result in done.json] == ["a red circle", "a blue star!"]
    names = sorted(file.name for file in (tmp_path / "clips").iterdir())
    assert names == ["001-a-red-circle-0-sheet.png", "001-a-red-circle-0.mp4", "002-a-blue-star-0-sheet.png",
                     "002-a-blue-star-0.mp4"]


def test_seed_decides_about_the_clip(dit_sparse, tiny_folder: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ["--seed", seed, "--output", f"{name}.mp4", "--model", tiny_folder, *SMALL]
        assert dit_sparse("generate", "a red circle", *words).code == 0
    clips = [Path(f"{name}.mp4").read_bytes() for name in "abc"]
    assert clips[0] == clips[1] != clips[2]


def test_compare_reports_both_runs(dit_sparse, tiny_folder: Path) -> None:
    words = ["--model", tiny_folder, "--output", "both.mp4", "--json", *SMALL]
    done = dit_sparse("compare", "a red circle", *words)
    assert done.code == 0, done.err
    result = done.json
    assert result["speedup"] == pytest.approx(result["dense_seconds"] / result["sparse_seconds"])
    assert 0 < result["psnr"] <= 100 and 0 < result["ssim"] <= 1
    assert 0 < result["density"] <= 1
    assert done.files == {"both.mp4", "both-sheet.png"}
    assert read_video(done.folder / "both.mp4").shape[-1] == 2 * 48


def test_compare_with_dense_changes_nothing(dit_sparse, tiny_folder: Path) -> None:
    done = dit_sparse("compare", "a red circle", "--model", tiny_folder, "--method", "dense", "--json", *SMALL)
    assert done.json["psnr"] > 60
    assert done.json["density"] == 1


def test_compare_prints_a_table(dit_sparse, tiny_folder: Path) -> None:
    done = dit_sparse("compare", "a red circle", "--model", tiny_folder, *SMALL)
    assert done.code == 0, done.err
    for word in ("PSNR", "SSIM", "speed-up", "density", "dense", "sparse"):
        assert word in done.out


def test_strict_is_one_line(dit_sparse, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse import SparseFallbackError
    from dit_sparse.pipelines import text_to_video as module

    def refuse(*_args, **_kwargs):
        raise SparseFallbackError("layer 0 cannot run sparse")

    monkeypatch.setattr(module, "text_to_video", refuse)
    done = dit_sparse("generate", "a red circle", "--model", tiny_folder, "-o", "strict=true", *SMALL)
    assert "layer 0" in done.refusal()


def test_unknown_words_are_named(dit_sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.pipelines import load as module

    def stop(*_args, **_kwargs):
        raise ValueError("far enough")

    monkeypatch.setattr(module, "load", stop)
    done = dit_sparse("generate", "a red hippopotamus moving right")
    assert "far enough" in done.refusal()
    assert "'hippopotamus'" in done.err and "'red'" not in done.err and "256x256" not in done.err
    assert "256x256" in dit_sparse("generate", "a red circle", "--size", "512x128").err


def test_interruption_leaves_no_file(dit_sparse, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", interrupt)
    done = dit_sparse("generate", "a red circle", "--model", tiny_folder, *SMALL)
    assert done.code == 130
    assert "interrupted" in done.err
    assert done.files == set()


def test_a_full_disk_is_one_line(dit_sparse, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    done = dit_sparse("generate", "a red circle", "--model", tiny_folder, *SMALL)
    assert done.code == 2 and "No space left" in done.err
    assert done.files == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_signals_end_a_run_cleanly(tiny_folder: Path, tmp_path: Path, number: int) -> None:
    words = ["generate", "a red circle", "--model", str(tiny_folder), "--size", "64x64x33", "--steps", "200"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from dit_sparse.cli import main; sys.exit(main())", *words],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        # A suite that a shell runs in the background was told to ignore Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(6)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_methods(dit_sparse) -> None:
    done = dit_sparse("methods", "--json")
    assert {"dense", "svg"} <= {method["name"] for method in done.json}
    for method in done.json:
        assert {"title", "arxiv", "options", "needs"} <= set(method) and len(method["parts"]) == 5
    text = dit_sparse("methods").out
    assert "svg" in text and "2502.01776" in text
    for word in ("order:", "score:", "select:", "operate:", "remember:", "needs: nothing"):
        assert word in text


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = """
import sys
from dit_sparse.cli import main
main(["--help"])
print("torch" in sys.modules, file=sys.stderr)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert time.monotonic() - start < 3  # 0.3 s on an idle core; the suite runs two processes on two cores
    assert done.stderr.strip() == "False"
    assert "generate" in done.stdout


NAMES = {
    "colon": ("a:b.mp4", ["a:b-sheet.png", "a:b.mp4"]),
    "long": ("x" * 245 + ".mp4", ["x" * 245 + "-sheet.png", "x" * 245 + ".mp4"]),
}


@pytest.mark.parametrize("command", ["generate", "compare"])
@pytest.mark.parametrize("case", NAMES)
def test_unusual_names_of_clips(dit_sparse, tiny_folder: Path, command: str, case: str) -> None:
    name, files = NAMES[case]
    done = dit_sparse(command, "a red circle", "--output", name, "--model", tiny_folder, *SMALL)
    assert done.code == 0, done.err
    assert sorted(done.files) == files
    assert len(read_video(name)) == 5


def test_an_image_with_a_capital_suffix_is_an_image(dit_sparse, tiny_folder: Path) -> None:
    from PIL import Image

    words = ["--model", tiny_folder, "--size", "32", "--frames", "1", "--steps", "2", "--output", "a.PNG"]
    assert dit_sparse("generate", "a red circle", *words).code == 0
    with Image.open("a.PNG") as picture:
        assert (picture.format, picture.size) == ("PNG", (32, 32))


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["table", "json"])
def test_prompts_that_the_terminal_cannot_show(tiny_folder: Path, tmp_path: Path, words: list[str]) -> None:
    words = ["generate", "a é circle", "--model", str(tiny_folder), *SMALL, *words]
    done = subprocess.run(
        [sys.executable, "-m", "dit_sparse.cli", *words], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    if "--json" in words:
        assert json.loads(done.stdout)["prompt"] == "a é circle"
    else:
        assert "a \\xe9 circle" in done.stdout


@pytest.mark.parametrize("prompts", ["a red circle\n", "\ufeffa red circle\na blue star\n"], ids=["one", "two, marked"])
def test_a_file_of_prompts_fills_a_folder(dit_sparse, tiny_folder: Path, tmp_path: Path, prompts: str) -> None:
    (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
    words = ["--prompts", "prompts.txt", "--output", "clips", "--model", tiny_folder, "--json", *SMALL]
    done = dit_sparse("generate", *words)
    assert done.code == 0, done.err
    assert done.files == {"clips", "prompts.txt"}
    assert done.json[0]["prompt"] == "a red circle"
    assert len(list((tmp_path / "clips").iterdir())) == 2 * len(done.json)


def test_different_prompts_have_different_names() -> None:
    from dit_sparse.commands.request import plan_outputs

    prompts = ["红色圆圈", "蓝色星星", "красный circle", "синий circle", "a " * 40 + "b", "a " * 40 + "c", "\udce9"]
    names = {plan_outputs(None, [prompt], ".mp4")[0].name for prompt in prompts}
    assert len(names) == len(prompts) and all(name.isascii() and len(name) < 80 for name in names)


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_the_host_s_own_size_is_reported(
    dit_sparse, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from dit_sparse.pipelines import text_to_video as module

    host = {"height": 32, "width": 48, "frames": 5, "steps": 2}
    real = module.text_to_video
    monkeypatch.setattr(module, "text_to_video", lambda *a, **k: real(*a, **{**k, **host}))
    words = ["a red circle", "--model", tiny_folder]
    text = dit_sparse(command, *words)
    assert text.code == 0, text.err
    assert "None" not in text.out and "48x32, 5 frames, 2 steps" in text.out
    result = dit_sparse(command, *words, "--json").json
    assert {name: result[name] for name in host} == host


def test_methods_names_all_shared_options(dit_sparse) -> None:
    from dit_sparse.processor import SETTINGS

    last = dit_sparse("methods").out.splitlines()[-1]
    assert all(name in last for name in SETTINGS)
