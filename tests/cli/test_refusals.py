"""Bad input: one line, exit code 2, no traceback, no file."""

import json
import os
from pathlib import Path

import pytest

CASES = {
    "size is no size": (["--size", "big"], "512x512x33"),
    "size of four": (["--size", "1x2x3x4"], "512x512x33"),
    "size zero": (["--size", "0"], "from 32 to 2048"),
    "side too large": (["--size", "100000"], "from 32 to 2048"),
    "width not a multiple": (["--size", "250"], "use 240 or 256"),
    "height not a multiple": (["--size", "256x40"], "use 32 or 48"),
    "frames not allowed": (["--frames", "16"], "use 15 or 17"),
    "no frames": (["--frames", "0"], "from 1 to 257"),
    "too many frames": (["--frames", "100001"], "from 1 to 257"),
    "negative frames": (["--frames", "-1"], "from 1 to 257"),
    "too many tokens": (["--size", "1024x1024x129"], "the limit is 131072"),
    "sizes contradict": (["--size", "64x64x5", "--frames", "9"], "contradict"),
    "no steps": (["--steps", "0"], "from 1 to 200"),
    "steps no number": (["--steps", "many"], "--steps"),
    "guidance": (["--guidance", "-1"], "--guidance"),
    "guidance not finite": (["--guidance", "nan"], "--guidance"),
    "seed": (["--seed", "-1"], "--seed"),
    "seed beyond 64 bits": (["--seed", str(2**64)], "--seed"),
    "method": (["--method", "magic"], "svg"),
    "density zero": (["--density", "0"], "density"),
    "density above one": (["--density", "1.5"], "density"),
    "option unknown": (["--option", "colour=3"], "colour"),
    "option without value": (["-o", "density"], "name=value"),
    "option out of range": (["-o", "dense_steps=-1"], "dense_steps"),
    "option of wrong type": (["-o", "dense_layers=many"], "dense_layers"),
    "unknown flag": (["--fast"], "--fast"),
    "device": (["--device", "cuda:99"], "--device"),
    "device unknown": (["--device", "abacus"], "--device"),
    "model": (["--model", "nowhere"], "'embedded'"),
    "fps": (["--fps", "0"], "--fps"),
    "output without folder": (["--output", "no/such/folder/clip.mp4"], "does not exist"),
    "output below a file": (["--output", "/dev/null/clip.mp4"], "does not exist"),
    "output with wrong suffix": (["--output", "clip.avi"], ".mp4"),
    "image with the suffix of a clip": (["--frames", "1", "--output", "image.mp4"], ".png"),
    "output on a read-only file system": (["--output", "/proc/clip.mp4"], "cannot be written"),
    "prompts file missing": (["--prompts", "none.txt"], "none.txt"),
}


# compare takes one prompt and makes a video
ONLY_GENERATE = {"prompts file missing", "image with the suffix of a clip"}
COMMANDS = [(command, case) for command in ("generate", "compare") for case in CASES
            if command == "generate" or case not in ONLY_GENERATE]


@pytest.mark.parametrize(("command", "case"), COMMANDS)
def test_wrong_arguments(dit_sparse, command: str, case: str) -> None:
    words, expected = CASES[case]
    prompt = [] if "--prompts" in words else ["a red circle"]
    done = dit_sparse(command, *prompt, *words)
    assert expected in done.refusal()
    assert done.files == set()


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt(dit_sparse, prompt: str) -> None:
    assert "PROMPT is empty" in dit_sparse("generate", prompt).refusal()


CONTENTS = {"empty": b"", "remarks": b"\n \n# only remarks\n", "binary": b"\xff\xfe\x00"}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_prompts_file_without_prompts(dit_sparse, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert "prompts.txt" in dit_sparse("generate", "--prompts", "prompts.txt").refusal()


def test_prompt_and_file(dit_sparse, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    assert "not both" in dit_sparse("generate", "a red circle", "--prompts", "prompts.txt").refusal()


def test_several_prompts_need_a_folder(dit_sparse, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    assert "folder" in dit_sparse("generate", "--prompts", "prompts.txt", "--output", "clip.mp4").refusal()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(dit_sparse, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in dit_sparse("generate", "a", "--output", "locked/clip.mp4").refusal()


def test_output_is_checked_before_the_model_is_loaded(dit_sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    import dit_sparse.pipelines.load as module

    monkeypatch.setattr(module, "load", lambda *_a, **_k: pytest.fail("the model was loaded"))
    dit_sparse("generate", "a red circle", "--output", "no/such/folder/clip.mp4").refusal()


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("file", [WEIGHTS, "vae/config.json", "model_index.json", "tokenizer/tokenizer.json"])
def test_missing_files_of_a_model(dit_sparse, tiny_copy: Path, file: str) -> None:
    (tiny_copy / file).unlink()
    done = dit_sparse("generate", "a red circle", "--model", tiny_copy, "--size", 32, "--frames", 3)
    assert done.refusal()
    assert done.files == set()


def test_truncated_weights(dit_sparse, tiny_copy: Path) -> None:
    os.truncate(tiny_copy / WEIGHTS, 1000)
    done = dit_sparse("generate", "a red circle", "--model", tiny_copy, "--size", 32, "--frames", 3)
    assert "damaged" in done.refusal()


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_are_no_numbers(dit_sparse, tiny_copy: Path, steps: int) -> None:
    """The file has its length and its header; a clip of NaN would be black, and look like a result."""
    file = tiny_copy / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-400:] = b"\xff" * 400
    file.write_bytes(data)
    done = dit_sparse("generate", "a red circle", "--model", tiny_copy, "--size", 32, "--frames", 3, "--steps", steps)
    assert "not finite" in done.refusal()
    assert done.files == set()


def test_long_is_for_the_embedded_model(dit_sparse, tiny_folder: Path) -> None:
    assert "--long" in dit_sparse("compare", "a", "--long", "--model", tiny_folder).refusal()


@pytest.mark.parametrize("words", [["paint"], [], ["generate", "--nope"]], ids=["command", "nothing", "flag"])
def test_unknown_words_on_the_command_line(dit_sparse, words: list[str]) -> None:
    dit_sparse(*words).refusal()


LONG = "x" * 300
NAMES = {
    "too long": ["--output", LONG + ".mp4"],
    "sheet too long": ["--output", "x" * 248 + ".mp4"],
    "sheet is a folder": ["--output", "b.mp4"],
    "model too long": ["--model", LONG],
    "meta device": ["--device", "meta"],
    "step_cache": ["-o", "step_cache=foo"],
    "kernel of a GPU": ["--device", "cpu", "-o", "backend=triton"],
}


@pytest.mark.parametrize("command", ["generate", "compare"])
@pytest.mark.parametrize("case", NAMES)
def test_refused_before_the_model_is_loaded(
    dit_sparse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, command: str
) -> None:
    import dit_sparse.pipelines.load as module

    monkeypatch.setattr(module, "load", lambda *_a, **_k: pytest.fail("the model was loaded"))
    (tmp_path / "b-sheet.png").mkdir()
    done = dit_sparse(command, "a red circle", *NAMES[case])
    assert done.refusal() and done.files == {"b-sheet.png"}


@pytest.mark.parametrize("words", [[LONG], ["svg", "--grid", "9" * 300 + "x1x1"], ["svg", "--png", LONG + ".png"]])
def test_inspect_refuses_long_words(dit_sparse, words: list[str]) -> None:
    done = dit_sparse("inspect", *words)
    assert done.refusal() and done.files == set()


@pytest.mark.parametrize("words", [["--method", "magic"], ["--device", "meta"]], ids=["method", "device"])
@pytest.mark.parametrize("folder", ["clips", "deep/clips"])
def test_a_refusal_leaves_no_folder(dit_sparse, tmp_path: Path, words: list[str], folder: str) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    done = dit_sparse("generate", "--prompts", "prompts.txt", "--output", folder, *words)
    assert done.refusal() and done.files == {"prompts.txt"}


@pytest.mark.parametrize("patch", [[1, 0, 0], [0, 2, 2], []])
def test_a_patch_of_nothing(dit_sparse, tiny_copy: Path, patch: list[int]) -> None:
    file = tiny_copy / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": patch}))
    done = dit_sparse("generate", "a red circle", "--model", tiny_copy, "--size", 32, "--frames", 3)
    assert done.refusal() and done.files == set()
