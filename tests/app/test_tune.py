"""The Tune tab: checks, a real tune of a small clip in a real browser, a stop, and the preset in Generate."""

import base64
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dit_sparse
from dit_sparse import Preset
from dit_sparse.app import tune_work
from dit_sparse.app.sessions import MOST_PRESETS, Sessions
from dit_sparse.bridge import binding_of
from dit_sparse.commands.console import UserError
from dit_sparse.tuning.cost import CostTable

from .conftest import fill, jobs, until

SMALL = {"width": 128, "height": 128, "frames": 5, "steps": 4, "guidance": 1}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tune` with a table of times that is given: nothing is timed."""
    real = dit_sparse.tune

    def tune(*words: Any, **options: Any) -> Any:
        return real(*words, costs=CostTable.modelled(), **options)

    monkeypatch.setattr(dit_sparse, "tune", tune)


def open_tab(visit: Callable[..., Any], **context: Any) -> Any:
    page = visit(**context)
    page.get_by_role("tab", name="Tune").click()
    page.wait_for_selector("#tune-run")
    return page


def test_a_preset_is_tuned_shown_saved_and_used(visit: Any, quick: None, shelf: Any, tmp_path: Path) -> None:
    page = open_tab(visit, viewport={"width": 1280, "height": 1000})
    fill(page, "tune", **SMALL, seed=3)
    page.fill("#tune-value input", "22")
    page.click("#tune-more button")
    page.fill("#tune-dense-steps input", "1")
    page.fill("#tune-dense-layers input", "1")
    page.click("#tune-cache input")
    page.get_by_role("option", name="pab").click()
    page.click("#tune-run")
    page.wait_for_selector("#tune-state [role=progressbar]")
    page.wait_for_selector("#tune-result [data-state=done]", timeout=60_000)
    text = page.inner_text("#tune-result")
    for words in ("psnr>=22 (mean): ", "met on 1 held-out clip", "density by layer and head", "Evidence", "psnr",
                  "prompt_hash", "WanTransformer3DModel", "With the step cache pab: ", "answered"):
        assert words in text, words
    link = page.locator("#tune-result a[download]")
    assert link.get_attribute("download") == "dit-sparse-preset.json"
    file = tmp_path / "preset.json"
    file.write_bytes(base64.b64decode(link.get_attribute("href").partition(",")[2]))
    preset = Preset.load(file)
    table = preset.table
    assert not table.choices[0].any() and not table.choices[:, 0].any() and preset.step_cache["name"] == "pab"
    assert preset.grid == (3, 8, 8) and preset.steps == 4 and binding_of(shelf.open("embedded").transformer) is None
    # A cell for every stretch, layer and head, and a row of the table for every stretch and layer.
    assert page.locator("#tune-result svg rect.heat").count() == table.choices.size
    page.click("#tune-result summary")
    assert page.locator("#tune-result details tbody tr").count() == table.buckets * table.layers
    page.click("#tune-use")
    page.wait_for_selector("#generate-preset input:checked")
    assert page.input_value("#generate-width input") == "128" and page.input_value("#generate-steps input") == "4"
    page.click("#generate-run")
    page.wait_for_selector("#generate-result [data-state=done]")
    made = page.inner_text("#generate-result")
    assert "PSNR" in made and "tuned" in made and "fallback" not in made.replace("No call fell back", "")
    settings = page.locator("#generate-result a[download$='.json']").get_attribute("href").partition(",")[2]
    assert json.loads(base64.b64decode(settings))["preset"] == json.loads(file.read_text())
    assert not page.said


def test_a_stop_and_a_refusal_of_the_tuner(visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def slow(*_words: Any, progress: Any, **_options: Any) -> Any:
        for done in range(1000):
            progress(done / 1000, "looking at <heads>", 90.0)
            begun.set()
            time.sleep(0.02)

    monkeypatch.setattr(dit_sparse, "tune", slow)
    page = open_tab(visit)
    fill(page, "tune", **SMALL)
    page.click("#tune-run")
    page.wait_for_selector("#tune-state :text('looking at <heads>')")
    assert "about 1 min 30 s to go" in page.inner_text("#tune-state") and begun.is_set() and len(jobs()) == 1
    page.click("#tune-stop")
    page.wait_for_selector("#tune-state :text('Cancelled')")
    until(lambda: not jobs(), 5)

    def refuse(*_words: Any, **_options: Any) -> Any:
        raise ValueError("target='psnr>=90' is infeasible: rounding alone gives 71.2 dB")

    monkeypatch.setattr(dit_sparse, "tune", refuse)
    page.wait_for_selector("#tune-run:enabled")
    page.click("#tune-run")
    page.wait_for_selector("#tune-state [role=alert]:has-text('rounding alone gives 71.2 dB')")
    assert page.locator("#tune-use").count() == 0
    # Wrong sizes start no job.
    fill(page, "tune", width=100_000)
    page.click("#tune-run")
    page.wait_for_selector("#tune-state [role=alert]:has-text('use a number from 32 to 2048')")
    assert not jobs()


WRONG = {
    "metric": ({"metric": "beauty"}, "psnr, ssim, lpips, speedup"),
    "mode": ({"mode": "forever"}, "quick, standard, thorough"),
    "statistic": ({"statistic": "median"}, "mean, min"),
    "no number": ({"value": None}, "use a number"),
    "range": ({"metric": "ssim", "value": 30}, "from 0 to 1"),
    "prompts": ({"prompt": "\n".join("abcdefghi")}, "use up to 8, one a line"),
    "long prompt": ({"prompt": "x" * 1001}, "the limit is 1000"),
    "size": ({"width": 250}, "use 240 or 256"),
    "model": ({"model": "/etc"}, "not offered"),
    "dense steps": ({"dense_steps": "many"}, "dense_steps='many'"),
    "dense layers": ({"dense_layers": 1.5}, "dense_layers=1.5"),
    "step cache": ({"step_cache": "/etc/x.json"}, "is unknown; use none or one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused_in_one_line(shelf: Any, case: str) -> None:
    given, expected = WRONG[case]
    asked = {"metric": "psnr", "value": 30, "mode": "quick", "statistic": "mean", **given}
    with pytest.raises(UserError) as error:
        tune_work.check(shelf, **asked)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_request_becomes_the_call_of_the_tuner(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(dit_sparse, "tune", lambda *words, **options: seen.append((words, options)))
    asked = tune_work.check(shelf, metric="speedup", value=1.5, mode="standard", statistic="min",
                            prompt="a red heart\n\n a blue star \n", **SMALL, seed=7, dense_steps=" 0.25 ",
                            dense_layers=2.0, step_cache="teacache")
    sessions = Sessions(shelf.lock)
    list(sessions.follow("me", lambda job: tune_work.run(shelf, asked, job)))
    (pipe, *words), options = seen[0]
    assert pipe is shelf.open("embedded") and words == ["speedup>=1.5", ["a red heart", "a blue star"], "standard"]
    assert options["call"] == {"height": 128, "width": 128, "num_frames": 5, "num_inference_steps": 4,
                               "guidance_scale": 1}
    assert (options["statistic"], options["seed"]) == ("min", 7)
    assert [options[name] for name in ("dense_steps", "dense_layers", "step_cache")] == [0.25, 2, "teacache"]
    usual = tune_work.check(shelf, metric="psnr", value=30, mode="quick", statistic="mean", **SMALL)
    assert usual.more == {}, "what is left alone is left to `tune`"


def test_presets_of_visitors_are_kept_apart_and_few(shelf: Any) -> None:
    sessions, one, other = Sessions(shelf.lock), object(), object()
    sessions.keep_preset("a", one)  # type: ignore[arg-type]
    sessions.keep_preset("b", other)  # type: ignore[arg-type]
    assert sessions.preset("a") is one and sessions.preset("c") is None
    sessions.forget("a")
    assert sessions.preset("a") is None and sessions.preset("b") is other
    for number in range(MOST_PRESETS):
        sessions.keep_preset(str(number), one)  # type: ignore[arg-type]
    assert sessions.preset("b") is None and sessions.preset("0") is one
