"""`dit-sparse tune` writes a preset that `generate` and `compare` take."""

from pathlib import Path
from typing import Any

import pytest

from dit_sparse import Preset
from dit_sparse.tuning.preset import TunedPreset

SIZE = ("--size", "64", "--frames", "9", "--steps", "3", "--guidance", "1")


def test_tune_then_generate_and_compare(dit_sparse: Any, tiny_folder: Path) -> None:
    done = dit_sparse("tune", "--model", tiny_folder, "--target", "psnr>=20", "--mode", "quick", *SIZE, "--output",
                      "mine.json", "--state", "kept", "--json")
    assert done.code == 0, done.err
    assert done.json["kind"] == "tuned" and done.json["grid"] == [5, 4, 4] and done.json["files"] == ["mine.json"]
    made = dit_sparse("generate", "a red circle", "--model", tiny_folder, *SIZE, "--preset", "mine.json", "--json")
    assert made.code == 0 and "tuned" in made.json["method"] and not made.json["fallbacks"], made.err
    both = dit_sparse("compare", "a red circle", "--model", tiny_folder, *SIZE, "--preset", "wan-sol", "--json")
    assert both.code == 0 and "'sol'" in both.json["method"], both.err
    other = dit_sparse("generate", "a red circle", "--model", tiny_folder, "--size", "128", "--frames", "9", "--steps",
                       "3", "--preset", "mine.json")
    assert "run dit-sparse tune at this size" in other.refusal() or done.json["candidates"] == [{"pattern": "dense"}]


def test_dense_calls_and_a_step_cache(dit_sparse: Any, tiny_folder: Path) -> None:
    size = ("--size", "64", "--frames", "9", "--steps", "4", "--guidance", "1")
    done = dit_sparse("tune", "--model", tiny_folder, "--target", "psnr>=5", "--mode", "quick", *size, "--dense-steps",
                      "0.5", "--dense-layers", "1", "--step-cache", "pab", "--output", "dense.json", "--json")
    assert done.code == 0, done.err
    assert done.json["buckets"] == [0, 2, 3, 4] and done.json["step_cache"]["name"] == "pab"
    assert done.json["step_cache"]["clips"][0].keys() >= {"psnr", "answered", "skipped_steps"}
    chosen = Preset.load("dense.json")
    assert isinstance(chosen, TunedPreset) and not chosen.choices[0].any() and not chosen.choices[:, 0].any()


@pytest.mark.parametrize(("words", "said"), [
    (("tune", "--target", "nice"), "target='nice' is not allowed"), (("tune", "--mode", "fast"), "--mode 'fast'"),
    (("tune", "--pattern", "blur"), "patterns='blur'"), (("tune", "--statistic", "max"), "--statistic 'max'"),
    (("tune", "--output", "x.txt"), "needs the suffix .json"), (("tune", "--dense-steps", "2.0"), "dense_steps=2.0"),
    (("tune", "--dense-steps", "some"), "dense_steps='some'"), (("tune", "--dense-layers", "-1"), "dense_layers=-1"),
    (("tune", "--step-cache", "blur"), "step_cache='blur' is unknown"),
    (("tune", "--prompts", "none.txt"), "--prompts none.txt"),
    (("generate", "a", "--preset", "no-such"), "preset='no-such' is unknown"),
    (("generate", "a", "--preset", "wan-sol", "--method", "svg"), "method='svg' is not allowed"),
    (("compare", "a", "--preset", "hunyuan-svg", "--size", "64", "--frames", "1"), "not 'wan'"),
], ids=lambda x: " ".join(x)[:40] if isinstance(x, tuple) else "")
def test_refusals(dit_sparse: Any, words: tuple[str, ...], said: str) -> None:
    assert said in dit_sparse(*words).refusal()
