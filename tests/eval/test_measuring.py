"""Clips that are measured in other processes have the same numbers, and nothing is left behind or lost."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from dit_sparse.eval.config import parse_config
from dit_sparse.eval.evaluation import evaluate
from dit_sparse.eval.measures.networks import Networks
from dit_sparse.eval.measuring import PARTS, Measuring, Task, workers_for
from dit_sparse.eval.run import finished, run
from tests.tiny_wan import build_tiny_wan

SHAPE = {"frames": 5, "height": 32, "width": 48, "steps": 2, "guidance_scale": 1.0}


@pytest.mark.slow
def test_other_processes_give_the_same_numbers(tmp_path: Path) -> None:
    config = parse_config({
        "pipeline": "tiny", "prompts": ["a red circle", "a blue star"], "methods": ["svg"],
        "measures": ["psnr", "ssim", "temporal_flickering", "world_color"],
    })  # fmt: skip
    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        (folder / PARTS).mkdir()
        (folder / PARTS / "1.npy").write_bytes(b"of a run that was killed")
        found[workers] = evaluate(config, SHAPE, pipe, folder, command="", workers=workers)
        assert len(list((folder / "videos").rglob("*.mp4"))) == 4
    assert not (tmp_path / "2" / PARTS).exists()
    for here, there in zip(found[0], found[2], strict=True):
        assert there["values"] == pytest.approx(here["values"], abs=1e-5)
        assert there["reasons"] == here["reasons"] and there["video"] == here["video"]
        assert there["measuring_seconds"] > 0 and "measuring_seconds" not in here


def test_a_cpu_is_left_to_the_clips() -> None:
    assert workers_for("cpu") == 0 and 0 <= workers_for("cuda") <= 12


def test_results_that_come_late_are_kept(tmp_path: Path) -> None:
    futures = {name: Future() for name in "abc"}

    def work(job):
        if job["prompt"] == "c":
            futures["a"].set_result({"made": "a"})
            raise RuntimeError("no")
        return futures[job["prompt"]]

    jobs = [{"prompt": name} for name in "abc"]
    with pytest.raises(RuntimeError, match="no"):
        run(jobs, work, tmp_path / "results.jsonl")
    # b was not measured yet when c failed
    assert [entry["result"]["made"] for entry in finished(tmp_path / "results.jsonl").values()] == ["a"]
    again = {name: Future() for name in "bc"}
    for name, future in again.items():
        future.set_result({"made": name})
    results = run(jobs, lambda job: again[job["prompt"]], tmp_path / "results.jsonl")
    assert [result["made"] for result in results] == ["a", "b", "c"]


def test_a_run_ends_where_it_is_told_to(tmp_path: Path) -> None:
    jobs = [{"prompt": name} for name in "abcd"]
    stop = {"enough": lambda job: job["prompt"] == "c"}
    assert run(jobs, lambda job: {"made": 1}, tmp_path / "results.jsonl", **stop) == [{"made": 1}] * 2
    assert len(run(jobs, lambda job: {"made": 2}, tmp_path / "results.jsonl")) == 4


def test_what_cannot_be_measured_there_is_raised_here(tmp_path: Path) -> None:
    task = Task("", 8, tmp_path / "clip.mp4", ("psnr",), Networks())
    with Measuring(tmp_path) as measuring, pytest.raises(ValueError, match="not finite"):
        measuring.submit(torch.full((2, 3, 32, 32), torch.nan), None, task, {})
    assert list(tmp_path.iterdir()) == []
