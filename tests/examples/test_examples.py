"""Every example runs as a program on a tiny pipeline of its class, saved and loaded like a real one."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_hosts import save_tiny_host

FOLDER = Path(__file__).resolve().parents[2] / "examples"
VIDEO, IMAGE = ["--size", "96", "64", "--frames", "17"], ["--size", "192", "128"]
CASES = {
    "wan": ("WanPipeline", "clip.mp4", VIDEO),
    "wan_i2v": ("WanImageToVideoPipeline", "clip.mp4", VIDEO),
    "hunyuan_video": ("HunyuanVideoPipeline", "clip.mp4", VIDEO),
    "cogvideox": ("CogVideoXPipeline", "clip.mp4", VIDEO),
    "ltx": ("LTXPipeline", "clip.mp4", ["--size", "192", "128", "--frames", "33"]),
    "flux": ("FluxPipeline", "picture.png", IMAGE),
    "qwen_image": ("QwenImagePipeline", "picture.png", IMAGE),
}


def program(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CASES)
def test_example_writes_its_file_and_was_sparse(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    host, file, size = CASES[name]
    model, output = save_tiny_host(host, tmp_path / "model"), tmp_path / file
    words = ["a red circle"]
    if name == "wan_i2v":
        Image.new("RGB", (64, 48), "red").save(tmp_path / "circle.png")
        words.insert(0, str(tmp_path / "circle.png"))
    program(name).main([*words, "--model", str(model), "--output", str(output), "--steps", "4", *size])
    told = capsys.readouterr().out
    calls = re.search(r"^calls +\d+: (\d+) sparse, .* (\d+) fallbacks", told, re.MULTILINE)
    assert int(calls[1]) > 0 and int(calls[2]) == 0, told
    assert str(output) in told
    assert sizes(output) == [int(text) for text in size[1:3]]


def sizes(output: Path) -> list[int]:
    """Width and height of the file that was written."""
    from dit_sparse.pipelines.video_io import read_video

    if output.suffix == ".png":
        with Image.open(output) as picture:
            return list(picture.size)
    return list(read_video(output).shape[:1:-1])


def test_every_example_is_tested_and_short() -> None:
    files = {file.stem: file for file in FOLDER.glob("*.py")}
    assert set(files) == set(CASES)
    for file in files.values():
        text = file.read_text()
        assert len(text.splitlines()) < 40, file.name
        assert f"examples/{file.name}" in ast.get_docstring(ast.parse(text))
