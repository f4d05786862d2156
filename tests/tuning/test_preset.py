"""Presets: what is saved is what is loaded, what does not fit is refused in one line, and families are data."""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse import Preset, SparseFallbackError, SparseProc, disable, enable, presets, summary
from dit_sparse.pipelines.hosts import call_host
from dit_sparse.tuning.candidates import DENSE, Candidate
from dit_sparse.tuning.family import FamilyPreset, family_presets
from dit_sparse.tuning.preset import TunedPreset, model_identity
from tests.tuning.tiny import SMALL, build

KINDS = (DENSE, Candidate("soft", "tile", 0.15), Candidate("drop", "morton", 0.3))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build(layers=2, heads=2)


def preset_for(pipe: Any, **changes: Any) -> TunedPreset:
    choices = np.array([[[0, 0], [0, 0]], [[1, 2], [0, 1]], [[2, 2], [1, 1]]], dtype=np.uint8)
    made = TunedPreset(
        model=model_identity(pipe.transformer), grid=(5, 8, 8), text=0, steps=4, scheduler="X", cfg=3.0, dtype="fp32",
        gpu="cpu", dense_kernel="pytorch", target="psnr>=30", statistic="mean", met=True, ceiling_db=None,
        buckets=(0, 1, 2, 4), candidates=KINDS, choices=choices,
        evidence=({"prompt_hash": "ab", "psnr": 31.5, "density": [1.0, 0.2, 0.2]},), version="0", date="2026-11-23")
    return dataclasses.replace(made, **changes)


def clip(pipe: Any, **changes: Any) -> torch.Tensor:
    return call_host(pipe, {"prompt": "a red circle", **SMALL, **changes}, seed=0)


def test_save_load_apply_is_bit_equal(pipe: Any, tmp_path: Path) -> None:
    preset, file = preset_for(pipe), tmp_path / "mine.json"
    preset.save(file)
    loaded = Preset.load(file)
    assert loaded.to_dict() == preset.to_dict()
    enable(pipe, preset=preset)
    first = clip(pipe)
    told = summary(pipe)
    assert told.sparse_calls and not told.fallbacks and not told.notes
    enable(pipe, preset=str(file))
    assert torch.equal(first, clip(pipe))
    pipe.set_attn_processor(SparseProc(preset=loaded))
    assert torch.equal(first, clip(pipe))
    disable(pipe)
    assert not torch.equal(first, clip(pipe))


def test_first_step_is_dense_as_the_plan_says(pipe: Any) -> None:
    enable(pipe, preset=preset_for(pipe))
    clip(pipe)
    told = summary(pipe)
    assert told.per_step[0] == 1.0 and max(told.per_step[s] for s in (2, 3)) < 1
    assert "tuned" in told.method and len(told.method) < 400
    disable(pipe)


def test_a_wrong_grid_is_refused_and_a_near_one_carried_over(pipe: Any) -> None:
    enable(pipe, preset=preset_for(pipe))
    with pytest.raises(SparseFallbackError, match="not 9x8x8 .* dit-sparse tune"):
        clip(pipe, num_frames=17)
    enable(pipe, preset=preset_for(pipe, grid=(5, 8, 9)))
    clip(pipe)
    assert any("transferred" in note for note in summary(pipe).notes)
    enable(pipe, preset=preset_for(pipe))
    clip(pipe, num_inference_steps=6)
    assert any("mapped to 6" in note for note in summary(pipe).notes)
    disable(pipe)


def test_another_model_is_refused(pipe: Any) -> None:
    before = dict(pipe.transformer.attn_processors)
    for name, value, said in (("class", "Other", "made for Other"), ("layers", 3, "3 layers, not 2"),
                              ("heads", 8, "8 heads, not 2")):
        wrong = preset_for(pipe)
        with pytest.raises(ValueError, match=said):
            enable(pipe, preset=dataclasses.replace(wrong, model={**wrong.model, name: value}))
    assert {n: id(p) for n, p in before.items()} == {n: id(p) for n, p in pipe.transformer.attn_processors.items()}
    other = preset_for(pipe)
    enable(pipe, preset=dataclasses.replace(other, model={**other.model, "config_hash": "0" * 16}))
    clip(pipe)
    assert any("transferred" in note for note in summary(pipe).notes)
    disable(pipe)


def test_options_beside_a_preset(pipe: Any) -> None:
    assert SparseProc(preset=preset_for(pipe), refresh=2, dense_layers=1).settings.dense_layers == 1
    with pytest.raises(ValueError, match="option 'density' is not allowed with a tuned preset"):
        SparseProc(preset=preset_for(pipe), density=0.5)
    with pytest.raises(ValueError, match="method='svg' is not allowed"):
        SparseProc("svg", preset=preset_for(pipe))


LOOP = {"clips": 3, "measure": "psnr", "mean": 31.25, "standard_error": 0.5, "worst": 30.0}

CACHE = {"name": "teacache", "met": True, "clips": [{"prompt_hash": "ab", "psnr": 30.5, "answered": 0.4}]}
CHECK = {"patterns": "soft", "milliseconds": 12.5, "buckets": [1, 2], "predicted": [0.1, 0.002],
         "measured": [0.2, 0.001]}

WRONG = [
    ("format", 2, "format=2"), ("kind", "other", "kind='other'"), ("speed", 1, "'speed' is unknown"),
    ("grid", [3, 4], "grid="), ("text", -1, "text="), ("steps", 5, "buckets="), ("buckets", [0, 2, 1, 4], "buckets="),
    ("met", "yes", "met="), ("cfg", "3", "cfg="), ("statistic", "max", "statistic="), ("evidence", [1], "evidence="),
    ("candidates", [{"pattern": "dense"}, {"pattern": "blur", "order": "tile", "density": 0.2}, {"pattern": "dense"}],
     "pattern='blur'"),
    ("candidates", [{"pattern": "dense"}], "plan holds 2"),
    ("candidates", [{"pattern": "soft", "order": "tile", "density": 7}] * 3, "density=7"),
    ("plan", "!!", "plan is no base64"), ("plan", base64.b64encode(b"12").decode(), "plan has 2 bytes"),
    ("model", {"class": "X"}, "model="), ("format", True, "format=True"), ("kind", ["tuned"], "kind=['tuned']"),
    ("cfg", float("nan"), "cfg='nan'"), ("ceiling_db", float("inf"), "ceiling_db='inf'"),
    ("grid", [10**300, 1, 1], "grid="), ("target", "pretty", "target='pretty'"), ("dtype", "a\nb\x1b[31m", "dtype="),
    ("evidence", [{"psnr": float("nan")}], "evidence="), ("evidence", [{"note": "a\nb"}], "evidence="),
    ("evidence", [{"density": [{}]}], "evidence="), ("loop", {"clips": 3}, "loop="), ("loop", 3, "loop="),
    ("loop", {**LOOP, "mean": float("nan")}, "loop="), ("loop", {**LOOP, "measure": "beauty"}, "loop="),
    ("step_cache", "teacache", "step_cache="), ("step_cache", {"name": "teacache"}, "step_cache="),
    ("step_cache", {**CACHE, "met": 1}, "step_cache="), ("step_cache", {**CACHE, "clips": 3}, "step_cache="),
    ("step_cache", {"name": "x", "refused": "a\nb"}, "step_cache="), ("checks", CHECK, "checks="),
    ("checks", [{**CHECK, "measured": [0.1]}], "checks="), ("checks", [{"patterns": "all"}], "checks="),
    ("checks", [{**CHECK, "taken": True}], "checks="), ("checks", [{**CHECK, "predicted": None}], "checks="),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=lambda x: str(x)[:20])
def test_what_is_wrong_is_named_in_one_line(pipe: Any, tmp_path: Path, name: str, value: Any, said: str) -> None:
    held = preset_for(pipe).to_dict()
    held[name] = value
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(held))
    with pytest.raises(ValueError) as error:
        Preset.load(file)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_the_loop_found_is_kept_and_told(pipe: Any, tmp_path: Path) -> None:
    assert "loop" not in preset_for(pipe).to_dict(), "older files have none"
    preset = preset_for(pipe, loop=LOOP)
    preset.save(tmp_path / "a.json")
    assert Preset.load(tmp_path / "a.json").to_dict() == preset.to_dict()
    told = preset.describe()
    assert "met on 1 held-out clip and the loop's 3, taken together" in told
    assert "3 clips: mean psnr 31.25 with a standard error of 0.50, worst 30.00" in told


def test_what_forwards_and_a_step_cache_showed_is_kept_and_told(pipe: Any, tmp_path: Path) -> None:
    held = preset_for(pipe).to_dict()
    assert "step_cache" not in held and "checks" not in held, "older files have none"
    told = []
    for number, cache in enumerate((CACHE, {**CACHE, "met": False}, {"name": "teacache", "refused": "out of memory"})):
        preset = preset_for(pipe, step_cache=cache, checks=(CHECK, {**CHECK, "patterns": "all"}))
        preset.save(tmp_path / f"{number}.json")
        loaded = Preset.load(tmp_path / f"{number}.json")
        assert loaded.to_dict() == preset.to_dict() and loaded.to_dict()["step_cache"] == cache
        told.append(loaded.describe())
    assert "teacache: met on 1 held-out clip" in told[0] and "40% of the attention calls answered" in told[0]
    assert "teacache: NOT met" in told[1] and "teacache: not run, out of memory" in told[2]
    assert "soft alone: velocity error by bucket predicted 0.1 0.002, measured 0.2 0.001" in told[0]
    assert "all patterns: velocity error" in told[0]


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"format": ' + "1" * 5000 + "}", "\x00"])
def test_a_file_that_is_no_preset_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="cannot be read") as error:
        Preset.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", [5, b"wan-svg", {}, "a" * 5000, "presets/../wan-svg"], ids=lambda x: str(x)[:20])
def test_what_names_no_preset_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="preset="):
        SparseProc(preset=source)


@pytest.mark.parametrize(("name", "value"), [
    ("options", {"method": "sol"}), ("options", {"self": 1}), ("options", {"preset": "wan-sol"}), ("source", "a\nb"),
    ("family", ""), ("method", ["svg"]), ("speed", 1)])
def test_a_wrong_family_preset_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Preset.from_dict({**Preset.load("wan-svg").to_dict(), name: value})


def test_missing_fields_and_files(pipe: Any, tmp_path: Path) -> None:
    held = preset_for(pipe).to_dict()
    del held["plan"]
    with pytest.raises(ValueError, match="plan is missing"):
        Preset.from_dict(held)
    (tmp_path / "broken.json").write_text("{")
    for source, said in ((tmp_path / "broken.json", "cannot be read"), (tmp_path / "none.json", "cannot be read"),
                         ("no such", "use a JSON file or one of"), ("../x", "use a JSON file or one of")):
        with pytest.raises(ValueError, match=said):
            Preset.load(source)


def test_description_says_whether_it_was_met(pipe: Any) -> None:
    assert "NOT met" in preset_for(pipe, met=False).describe() and "psnr 31.50" in preset_for(pipe).describe()


def test_shipped_presets_are_whole(pipe: Any) -> None:
    names = presets()
    assert {"wan-svg", "hunyuan-svg", "cogvideox-svg", "ltx-sparge", "flux-gna"} <= set(names)
    for name in names:
        assert Preset.load(name).describe()


def test_family_presets_are_the_methods_own_settings() -> None:
    shipped = {name: one for name in presets() if isinstance(one := Preset.load(name), FamilyPreset)}
    made = family_presets()
    assert shipped == made, "write them anew: python -m dit_sparse.tuning.family"
    assert all(one.evidence == "untested on weights" for one in shipped.values())


def test_a_family_preset_is_for_its_family(pipe: Any) -> None:
    enable(pipe, preset="wan-sol", tau=0.5)
    clip(pipe)
    assert "'sol'" in summary(pipe).method and "tau=0.5" in summary(pipe).method
    with pytest.raises(ValueError, match="preset is for the family 'hunyuan', not 'wan'"):
        enable(pipe, preset="hunyuan-svg")
    assert "'sol'" in summary(pipe).method
    disable(pipe)
    with pytest.raises(ValueError, match="the preset is for 'svg'"):
        SparseProc("sol", preset="wan-svg")
