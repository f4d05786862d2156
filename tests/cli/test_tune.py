"""`dit-sparse tune` writes a preset that `generate` and `compare` take."""

from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize(("words", "said"), [
    (("tune", "--target", "nice"), "target='nice' is not allowed"), (("tune", "--mode", "fast"), "--mode 'fast'"),
    (("tune", "--pattern", "blur"), "patterns='blur'"), (("tune", "--statistic", "max"), "--statistic 'max'"),
    (("tune", "--output", "x.txt"), "needs the suffix .json"),
    (("tune", "--prompts", "none.txt"), "--prompts none.txt"),
    (("generate", "a", "--preset", "no-such"), "preset='no-such' is unknown"),
    (("generate", "a", "--preset", "wan-sol", "--method", "svg"), "method='svg' is not allowed"),
    (("compare", "a", "--preset", "hunyuan-svg", "--size", "64", "--frames", "1"), "not 'wan'"),
], ids=lambda x: " ".join(x)[:40] if isinstance(x, tuple) else "")
def test_refusals(dit_sparse: Any, words: tuple[str, ...], said: str) -> None:
    assert said in dit_sparse(*words).refusal()
