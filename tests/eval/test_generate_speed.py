"""A generation added up from its steps: the sums, the warm-up that a target allows, the published skip rates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dit_sparse.eval import generate_speed as speed
from dit_sparse.eval.generate_speed import Warmup, published_rate, rungs, sparse_step, warmups
from tests.eval.steps import kinds, row, small


def test_every_rung_is_the_sum_of_its_steps() -> None:
    times = kinds()
    dense, sparse, eight, cached = rungs(times, Warmup("asked for", 5, 0))
    assert dense.seconds == pytest.approx(100 * times.dense.step_seconds) and dense.speedup == 1
    assert sparse.seconds == pytest.approx(2 * (5 * 11.346 + 45 * 4.21))
    assert eight.seconds == pytest.approx(2 * (5 * 10.33 + 45 * 3.01))
    assert (cached.dense_steps, cached.sparse_steps, cached.skipped_steps) == (5, 13, 32)
    assert cached.seconds == pytest.approx(2 * (5 * 10.33 + 13 * 3.01 + 32 * 0.02))
    for found in (sparse, eight, cached):
        assert found.speedup == pytest.approx(dense.seconds / found.seconds)
        assert found.dense_steps + found.sparse_steps + found.skipped_steps == speed.STEPS
        assert len(found.cells()) == len(speed.COLUMNS)
    assert "MagCache skips 32 of 50 steps, as reported (arXiv 2506.09045)" in cached.rung


def test_the_warm_up_that_a_target_allows_is_the_largest_that_reaches_it() -> None:
    times = kinds()
    for name, found in zip(("sparse", "fp8", "cache"), rungs(times, Warmup("asked for", 5, 0))[1:], strict=True):
        assert found.target == speed.TARGETS[name] and found.most_dense is not None
        whole = 100 * times.dense.step_seconds
        most, _ = speed._seconds(times, name, found.most_dense, 0)
        beyond, _ = speed._seconds(times, name, found.most_dense + 1, 0)
        assert whole / most >= found.target > whole / beyond
    # The formula of the module's text, in shares of a dense step.
    s, w = 3.01 / 11.346, 10.33 / 11.346
    assert rungs(times, Warmup("", 5, 0))[2].most_dense == int(50 * (1 / 3 - s) / (w - s))
    slow = dataclasses.replace(times, sparse=row(200.0, "svg", 0.7))
    assert rungs(slow, Warmup("", 0, 0))[1].most_dense is None
    assert rungs(slow, Warmup("", 0, 0))[1].cells()[-1] == "none"


def test_dense_layers_are_put_into_sparse_steps() -> None:
    times = kinds()
    assert sparse_step(times.sparse, times.dense, 3, times.geometry) == pytest.approx(0.01 + 37 * 0.105 + 3 * 0.2834)
    assert sparse_step(times.sparse, times.dense, 99, times.geometry) == pytest.approx(times.dense.step_seconds)


def test_skip_rates_are_those_reported() -> None:
    # 60:04 min to 21:40 and to 30:01.
    assert published_rate("wan-14b-720p", "magcache").share == pytest.approx(1 - 1300 / 3604)
    assert published_rate("wan-14b-720p", "teacache").skipped(50, 0) == 25
    rate = published_rate("tiny", "magcache")
    assert rate.model == "wan-14b-720p" and "60:04 to 21:40" in str(rate) and "2506.09045" in str(rate)
    # Neither warm-up nor the steps that the cache always computes are skipped.
    assert [rate.skipped(50, n) for n in (0, 10, 18, 19, 50)] == [32, 32, 32, 31, 0]
    assert rate.skipped(10, 0) == 6 and rate.skipped(1, 0) == 0
    for model in speed.models():
        for cache in speed.CACHES:
            assert 0.4 < published_rate(model, cache).share < 0.7


def test_the_authors_warm_up_stands_beside_the_one_asked_for() -> None:
    assert warmups("svg") == [Warmup("asked for", 5, 0), Warmup("svg's authors", 10, 1)]
    assert warmups("svg", 0.2, 1) == [Warmup("asked for", 10, 1)]
    assert warmups("rectified", 5, 0)[1] == Warmup("rectified's authors", 5, 2)
    assert [w.whose for w in warmups("twilight")] == ["asked for"]  # no setting for Wan
    for wrong in (-1, 1.5, "many"):
        with pytest.raises(ValueError, match="dense_steps"):
            warmups("svg", wrong)  # type: ignore[arg-type]


def test_notes_say_what_was_reached_and_what_not() -> None:
    times = kinds()
    ladder = rungs(times, Warmup("asked for", 20, 0))
    text = "\n".join(speed.notes(times, [ladder]))
    assert "text encoder, VAE and scheduler not counted" in text and text.count("missed") == 3
    assert "reached" in "\n".join(speed.notes(times, [rungs(times, Warmup("", 2, 0))]))
    rehearsed = dataclasses.replace(kinds("tiny", eight=False), parts="no 8-bit units")
    ladder = rungs(rehearsed, Warmup("", 5, 0))
    assert [found.target for found in ladder] == [None] * 3
    text = "\n".join(speed.notes(rehearsed, [ladder]))
    assert "a rehearsal" in text and "Not measured: no 8-bit units" in text


def test_the_files_hold_every_ladder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    times, asked = kinds(), warmups("svg")
    written = speed.write(times, asked, [rungs(times, warmup) for warmup in asked], tmp_path / "new", "cpu")
    assert {path.name for path in written} == {f"generate.{kind}" for kind in ("csv", "json", "md", "png")}
    found = json.loads((tmp_path / "new" / "generate.json").read_text())
    assert [len(found["rows"]), len(found["others"][0]), len(found["steps"])] == [4, 4, 4]
    assert found["warmups"][1] == {"whose": "svg's authors", "steps": 10, "layers": 1}
    table = (tmp_path / "new" / "generate.md").read_text()
    assert table.count("| svg's authors |") == 4 and "5 + 13 + 32 skipped" in table
    assert (tmp_path / "new" / "generate.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_skipped_step_runs_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speed.skipped_ms(small(), "cpu", torch.float32, 0.01) > 0
    monkeypatch.setattr(speed, "LONG_RUN", 0)  # a cache that may skip nothing
    with pytest.raises(RuntimeError, match="computed"):
        speed.skipped_ms(small(), "cpu", torch.float32, 0.01)


def test_every_kind_of_step_is_timed() -> None:
    seen: list[str] = []
    found = speed.measure(small(), "radial", device="cpu", dtype="bf16", compiled=False, seconds=0.01,
                          on_row=seen.append)
    assert seen == ["dense", "radial", "dense, fp8 linear", "radial, fp8 linear", "skipped"]
    assert found.parts == "linear layers" and found.sparse.density < 1 and not found.sparse.fallbacks
    assert [r.rung.split(":")[0] for r in rungs(found, Warmup("", 5, 0))] == ["dense", "+ sparse", "+ fp8",
                                                                            "+ step cache"]
