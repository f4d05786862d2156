"""The evaluation of step caches: order, resumption, refusals, the numbers of a row, the command and its tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.cli import main
from dit_sparse.eval import caches
from dit_sparse.eval.caches import NO_CACHE, SPARSE, Caches, Row, plan_of, table, watching
from dit_sparse.eval.config import DENSE
from dit_sparse.stepcache import NAMES

PLAN = plan_of("preview", captions=3)


class Fake:
    """Finishes every job at once, and refuses FasterCache."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def __call__(self, job: Any) -> dict[str, Any]:
        self.jobs.append(job)
        cost = {"transformer_seconds": 4.0 + job["caption"], "seconds": 9.0}
        if job["cache"] == "fastercache":
            return {"refused": "one forward"}
        if (job["cache"], job["attention"]) == (NO_CACHE, DENSE):
            return cost
        cost["transformer_seconds"] /= 2
        return {"psnr": 30.0 + job["caption"], "ssim": 0.9, "calls": 240, "skipped_calls": 80, "skipped_steps": 5,
                "steps": 20, "density": 0.5, "step_cache_bytes": 2_000_000, **cost}


def test_every_cache_stands_alone_and_beside_sparse_attention_caption_by_caption(tmp_path: Path) -> None:
    work = Fake()
    run = Caches(PLAN, tmp_path, "weights")
    assert run.make(work) and run.complete
    rows = [(job["cache"], job["attention"]) for job in work.jobs if job["caption"] == 0]
    assert rows == [(cache, attention) for attention in (DENSE, SPARSE) for cache in (NO_CACHE, *NAMES)]
    # What is refused for one caption is not tried for the others.
    assert [job["caption"] for job in work.jobs] == [0] * 14 + [1] * 12 + [2] * 12
    assert len({job["prompt"] for job in work.jobs}) == 3 and "step_cache='pab'" in repr(PLAN.proc("pab", SPARSE))

    found = {(row.cache, row.attention): row for row in run.rows()}
    assert found["fastercache", SPARSE].why == "one forward"
    one = found["pab", DENSE]
    assert one.psnr is not None and (one.psnr.mean, one.psnr.prompts) == (31.0, 3)
    assert (one.answered, one.steps, one.density, one.speedup, one.held) == (0.25, 0.25, 0.5, 2.0, 2_000_000)
    reference = found[NO_CACHE, DENSE]
    assert reference.psnr is None and reference.speedup == 1 and reference.answered == 0
    assert "refused" in table(run.rows()).markdown()


def test_a_cut_run_goes_on_and_shares_nothing_with_other_settings(tmp_path: Path) -> None:
    turns = iter([False, True])
    first = Caches(PLAN, tmp_path, "weights")
    assert not first.make(Fake(), stop=lambda: next(turns)) and not first.complete
    # A caption that was begun is finished for every row.
    assert first.captions() == [0] and len(first.rows()) == 14

    class Killed(Fake):
        def __call__(self, job: Any) -> dict[str, Any]:
            if len(self.jobs) == 5:
                raise KeyboardInterrupt
            return super().__call__(job)

    run = Caches(PLAN, tmp_path, "weights")
    with pytest.raises(KeyboardInterrupt):
        run.make(Killed())
    # A kill may leave a caption that some rows lack: no row counts it.
    run = Caches(PLAN, tmp_path, "weights")
    assert run.captions() == [0] and {row.captions for row in run.rows() if not row.why} == {1}
    again, told = Fake(), []
    assert run.make(again, bar=lambda *x: told.append(x)) and len(again.jobs) == 38 - 14 - 5
    assert told[-1] == (38, 38)
    for other in (Caches(dataclasses.replace(PLAN, steps=21), tmp_path, "weights"),
                  Caches(PLAN, tmp_path, "others"), Caches(PLAN, tmp_path, "weights", "cuda")):
        assert other.rows() == []


def test_the_seconds_are_those_of_the_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("dit_sparse.report.time.perf_counter", lambda: next(clock))
    model = torch.nn.Linear(2, 2)
    with watching(model) as seconds:
        model(torch.zeros(1, 2))
        next(clock)  # between forwards, not counted
        model(torch.zeros(1, 2))
        assert seconds() == 2
    model(torch.zeros(1, 2))
    assert seconds() == 2


def test_the_command_makes_real_clips_and_says_why_a_cache_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "caches", "--quick", "--out", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"]
    content = json.loads((tmp_path / caches.ROWS).read_text())["sizes"]["quick"]
    rows = {(row["cache"], row["attention"]): row for row in content["rows"]}
    assert rows["magcache", DENSE]["answered"] == 0.5 and rows["magcache", DENSE]["psnr"]["mean"] > 20
    assert rows[NO_CACHE, SPARSE]["answered"] == 0 and rows[NO_CACHE, SPARSE]["density"] < 1
    text = (tmp_path / caches.TABLES).read_text()
    assert text.startswith(caches.MARK) and "`fastercache` was refused: " in text
    # The tables alone are the same, and a folder of somebody else's is left alone.
    assert main([*words, "--seconds", "0"]) == 0
    again = json.loads((tmp_path / caches.ROWS).read_text())["sizes"]["quick"]
    assert again == content
    (tmp_path / caches.TABLES).write_text("mine")
    assert main(words) == 2 and "was not made by this command" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [(["--size", "huge"], "use one of preview, long"),
                                             (["--device", "nowhere"], "nowhere")])
def test_wrong_words_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["eval", "caches", "--out", str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not (tmp_path / "x").exists()


def test_rows_of_few_numbers() -> None:
    assert Row("pab", DENSE, why="refused here").cells()[:3] == ["pab", DENSE, "refused"]
    with pytest.raises(ValueError, match="use one of preview, long, quick"):
        plan_of("other")
