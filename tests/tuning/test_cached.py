"""A step cache is off while a plan is made, and on for the held-out clips once: what the preset then says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import MagCacheConfig

from dit_sparse import Preset, disable, enable, summary, tune
from dit_sparse.pipelines.hosts import call_host
from dit_sparse.stepcache import ActiveCache, TeaCacheConfig
from dit_sparse.tuning.cached import cache_title
from dit_sparse.tuning.candidates import DENSE, Candidate
from dit_sparse.tuning.cost import CostTable
from dit_sparse.tuning.preset import TunedPreset
from dit_sparse.tuning.run import Runner
from dit_sparse.tuning.targets import measure
from tests.tuning.test_tune import looks, small
from tests.tuning.tiny import PROMPTS, SMALL

STEPS = 12
CALL = {**SMALL, "num_inference_steps": STEPS, "guidance_scale": 1.0}
# Two steps are answered after each computed one, from step 3 on.
EVERY_THIRD = MagCacheConfig(threshold=9.0, max_skip_steps=2, retention_ratio=0.25, num_inference_steps=STEPS,
                             mag_ratios=[1.0] * STEPS)
SKIPPED = (3, 4, 6, 7, 9, 10)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small()


def tuned(pipe: Any, target: str = "psnr>=22", **options: Any) -> TunedPreset:
    found = tune(pipe, target, PROMPTS, "quick", call=CALL, **{"costs": CostTable.modelled(), **options})
    assert isinstance(found, TunedPreset)
    return found


def test_it_is_tuned_without_and_verified_with_the_cache(pipe: Any, tmp_path: Path) -> None:
    before = looks(pipe)
    plain, found = tuned(pipe, state=tmp_path), tuned(pipe, state=tmp_path, step_cache=EVERY_THIRD)
    assert looks(pipe) == before and not plain.table.all_dense
    held = found.step_cache
    assert held is not None and held["name"] == "magcache" and len(held["clips"]) == 1
    rest = found.to_dict()
    assert rest.pop("step_cache") == held and rest == plain.to_dict(), "the plan and its evidence know no cache"
    # The clip that was verified is the clip that preset and cache make.
    enable(pipe, preset=found, step_cache=EVERY_THIRD)
    made = call_host(pipe, {"prompt": PROMPTS[1], **CALL}, seed=1)
    told = summary(pipe)
    disable(pipe)
    dense = call_host(pipe, {"prompt": PROMPTS[1], **CALL}, seed=1)
    clip = held["clips"][0]
    assert clip["psnr"] == pytest.approx(measure("psnr", dense, made), abs=1e-3)
    assert clip["psnr"] != found.evidence[0]["psnr"] and clip["prompt_hash"] == found.evidence[0]["prompt_hash"]
    assert clip["skipped_steps"] == told.skipped_steps == len(SKIPPED) and clip["answered"] == 0.5
    assert held["met"] == (clip["psnr"] >= 22) and "speedup" not in clip
    found.save(tmp_path / "a.json")
    assert Preset.load(tmp_path / "a.json").to_dict() == found.to_dict()
    assert f"magcache: {'met' if held['met'] else 'NOT met'} on 1 held-out clip" in found.describe()
    assert "50% of the attention calls answered by the cache" in found.describe()


def test_skipped_steps_do_not_shift_the_buckets(pipe: Any) -> None:
    made = tuned(pipe)
    kinds = (DENSE, *(Candidate("drop", "tile", density) for density in (0.9, 0.6, 0.4, 0.1)))
    choices = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None], made.choices.shape).copy()
    preset = dataclasses.replace(made, candidates=kinds, choices=choices)  # another density in every bucket
    density = []
    for cache in (None, EVERY_THIRD):
        enable(pipe, preset=preset, step_cache=cache)
        call_host(pipe, {"prompt": PROMPTS[0], **CALL}, seed=0)
        density.append(summary(pipe).per_step)
        disable(pipe)
    without, beside = density
    assert set(without) - set(beside) == set(SKIPPED) and len(set(without.values())) == 5
    assert beside == {step: value for step, value in without.items() if step in beside}


def test_a_cache_is_judged_by_the_target_itself(pipe: Any, tmp_path: Path) -> None:
    for target in ("psnr>=1", "psnr>=60", "speedup>=0.9"):
        held = tuned(pipe, target, state=tmp_path, step_cache=EVERY_THIRD).step_cache
        assert held is not None and held["met"] == (target != "psnr>=60")
    timed = tuned(pipe, "psnr>=1", step_cache=EVERY_THIRD, costs=None).step_cache
    assert timed is not None and timed["clips"][0]["speedup"] > 0


def test_a_resumed_run_does_not_make_these_clips_again(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tuned(pipe, state=tmp_path, step_cache=EVERY_THIRD)
    monkeypatch.setattr(Runner, "clips", lambda *words: pytest.fail("made again"))
    assert tuned(pipe, state=tmp_path, step_cache=EVERY_THIRD).to_dict() == found.to_dict()


@pytest.mark.parametrize(("cache", "said"), [
    ("blur", "step_cache='blur' is unknown"), ("magcache", "step_cache='magcache' needs numbers"),
    ("teacache:no-such", "no-such"), (1.5, "step_cache=float"), ("none.json", "none.json")], ids=str)
def test_what_cannot_run_is_refused_before_any_clip(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, cache: Any, said: str
) -> None:
    before = looks(pipe)
    monkeypatch.setattr(Runner, "clips", lambda *words: pytest.fail("a clip was made"))
    with pytest.raises(ValueError) as error:
        tuned(pipe, step_cache=cache)
    assert said in str(error.value) and "\n" not in str(error.value) and looks(pipe) == before


def test_a_cache_that_stops_the_run_costs_no_preset(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*words: Any) -> None:
        raise RuntimeError("out of\tmemory\nsecond line")

    before = looks(pipe)
    monkeypatch.setattr(ActiveCache, "begin", stop)
    found = tuned(pipe, step_cache=EVERY_THIRD)
    assert found.step_cache == {"name": "magcache", "refused": "out of memory"} and found.evidence
    assert "magcache: not run, out of memory" in found.describe() and looks(pipe) == before
    assert Preset.from_dict(found.to_dict()).to_dict() == found.to_dict()


def test_how_a_cache_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"format": 1, "cache": "teacache", "config": "x", "coefficients": [0.0, 1.0]}')
    for given, name in (("pab", "pab"), ("teacache:wan2.1-t2v-14b", "teacache:wan2.1-t2v-14b"),
                        (TeaCacheConfig(threshold=0.1), "teacache"), (EVERY_THIRD, "magcache"),
                        (f"magcache:{file}", "magcache"), (file, "teacache")):
        assert cache_title(given) == name
