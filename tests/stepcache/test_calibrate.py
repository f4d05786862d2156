"""Calibrations: what is measured is what the formulas say, and files are checked before they are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from dit_sparse import enable, summary
from dit_sparse.modelid import config_hash
from dit_sparse.stepcache import coefficients
from dit_sparse.stepcache.calibrate import calibrate
from dit_sparse.stepcache.teacache import polynomial
from tests.tiny_wan import build_tiny_wan, save_tiny_wan

STEPS = 10


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    made = build_tiny_wan()
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: WanPipeline, prompt: str = "a red circle", callback: Callable[[int, int], None] | None = None) -> Any:
    def at_end(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if callback is not None:
            callback(step + 1, STEPS)
        return tensors

    return pipe(prompt, height=64, width=64, num_frames=9, num_inference_steps=STEPS, guidance_scale=3.0,
                generator=torch.Generator().manual_seed(0), output_type="latent", max_sequence_length=16,
                callback_on_step_end=at_end).frames


@pytest.fixture(scope="module")
def documents(pipe: WanPipeline) -> dict[str, dict[str, Any]]:
    def make(prompt: str, callback: Callable[[int, int], None]) -> None:
        run(pipe, prompt, callback)

    return {kind: calibrate(kind, pipe, ["a red circle", "a blue square"], make, model="tiny")
            for kind in ("magcache", "teacache")}


def residuals(pipe: WanPipeline) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """(conditioning of the blocks, output - input of the stack), each forward in its turn: cond, uncond."""
    model, found = pipe.transformer, {"e": [], "x": [], "y": []}
    hooks = [model.blocks[0].register_forward_pre_hook(lambda _, args: (found["e"].append(args[2]),
                                                                        found["x"].append(args[0]))[:0] or None),
             model.blocks[-1].register_forward_hook(lambda _m, _a, out: found["y"].append(out) or None)]
    run(pipe)
    for hook in hooks:
        hook.remove()
    return found


def test_the_numbers_are_those_of_the_formulas(pipe: WanPipeline, documents: dict[str, dict[str, Any]]) -> None:
    def make(prompt: str, callback: Callable[[int, int], None]) -> None:
        run(pipe, prompt, callback)

    found = residuals(pipe)
    mag, tea = (calibrate(kind, pipe, ["a red circle"], make) for kind in ("magcache", "teacache"))
    added = [y - x for x, y in zip(found["x"], found["y"], strict=True)]
    for step in range(1, STEPS):
        each = [float((added[2 * step + b].norm(dim=-1) / (added[2 * step - 2 + b].norm(dim=-1) + 1e-8)).mean())
                for b in (0, 1)]
        assert mag["ratios"][step] == pytest.approx(sum(each) / 2, abs=2e-4)
    assert mag["ratios"][0] == 1.0 and mag["steps"] == tea["steps"] == STEPS and tea["signal"] == "modulation"

    def change(series: list[torch.Tensor], i: int) -> float:
        return float((series[i] - series[i - 2]).abs().mean() / series[i - 2].abs().mean())

    points = [(change(found["e"], i), change(found["y"], i)) for i in range(2, 2 * STEPS)]
    fit = coefficients.fitted(points)
    for x, _ in points:
        assert polynomial(tea["coefficients"], x) == pytest.approx(polynomial(fit, x), abs=1e-3)


def test_the_fit_finds_a_polynomial_and_does_not_invent_one() -> None:
    true = [3.0, -2.0, 0.5, 0.25, 0.1]
    points = [(x / 100, polynomial(true, x / 100)) for x in range(1, 20)]
    assert coefficients.fitted(points) == pytest.approx(true, abs=1e-6)
    assert coefficients.fitted([(0.5, 2.0), (1.0, 3.0)] * 3) == pytest.approx([0, 0, 0, 2.0, 1.0])
    with pytest.raises(ValueError, match="at least 2 steps"):
        coefficients.fitted([])


@pytest.mark.parametrize("kind", ["magcache", "teacache"])
def test_a_file_serves_its_model_and_no_other(pipe: WanPipeline, documents: dict, kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"{kind}.json"
    file.write_text(json.dumps({**documents[kind], "threshold": 9.0}))
    enable(pipe, "radial", dense_layers=0, step_cache=str(file))
    run(pipe)
    assert summary(pipe).step_cache == kind and summary(pipe).skipped_calls > 0
    if kind == "magcache":  # stretched to the run
        assert pipe.transformer._cache_config.num_inference_steps == STEPS
    for change, text in (({"config": "0" * 16}, "another model"), ({"format": 2}, "format 1"),
                         ({"cache": "pab"}, "its cache"), ({coefficients.NUMBERS[kind]: ["x"]}, "not finite"),
                         ({coefficients.NUMBERS[kind]: [float("nan")]}, "not finite")):
        file.write_text(json.dumps({**documents[kind], **change}))
        with pytest.raises(ValueError, match=text) as error:
            enable(pipe, "radial", step_cache=str(file))
        assert "\n" not in str(error.value)


def test_what_ships_is_whole_and_the_included_model_has_its_own() -> None:
    from dit_sparse.pipelines.load import load

    model = load(device="cpu").transformer
    for kind in ("magcache", "teacache"):
        for row in coefficients.published(kind):
            assert row["class"] and row["match"] and all(isinstance(x, float) for x in row[coefficients.NUMBERS[kind]])
        own = coefficients.find(kind, model)
        assert own["config"] == config_hash(model) and own["cache"] == kind


def test_models_of_one_configuration_are_told_apart_by_name() -> None:
    from types import SimpleNamespace

    class WanTransformer3DModel(SimpleNamespace):
        pass

    sizes = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128}
    model = WanTransformer3DModel(config={**sizes, "in_channels": 16})
    assert coefficients.find("teacache", model)["name"] == "wan2.1-t2v-14b"
    model.config["in_channels"] = 36
    with pytest.raises(ValueError, match="teacache:wan2.1-i2v-480p"):
        coefficients.find("teacache", model)
    assert coefficients.find("teacache", model, "wan2.1-i2v-720p")["threshold"] == 0.18


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    from dit_sparse.cli import main

    monkeypatch.chdir(tmp_path)
    save_tiny_wan(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    size = ["--model", "wan", "--size", "64x64x9", "--steps", "6"]
    assert main(["calibrate", "magcache", *size, "--prompts", "prompts.txt", "--output", "own.json", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made["steps"] == 6 and json.loads((tmp_path / "own.json").read_text())["ratios"] == made["ratios"]
    assert main(["generate", "a red circle", *size, "--step-cache", "first_block", "-o", "dense_layers=0",
                 "--output", "clip.mp4", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)["summary"]
    assert report["step_cache"] == "first_block" and report["steps"] == 6 and "skipped_per_step" in report
    before = set(tmp_path.iterdir())
    for words, text in ((["generate", "a", *size, "--step-cache", "wrong"], "first_block, taylorseer"),
                        (["generate", "a", *size, "--step-cache", "teacache"], "dit-sparse calibrate teacache --model"),
                        (["compare", "a", *size, "--step-cache", "fastercache"], "in one forward"),
                        (["calibrate", "pab"], "magcache or teacache"),
                        (["calibrate", "magcache", "--output", "own.txt"], ".json"),
                        (["calibrate", "magcache", "--steps", "1"], "at least 2"),
                        (["calibrate", "magcache", "--model", "wan"], "--prompts FILE is needed")):
        assert main(words) == 2
        lines = [x for x in capfd.readouterr().err.splitlines() if "warning" not in x]
        assert len(lines) == 1 and text in lines[0]
    assert set(tmp_path.iterdir()) == before
