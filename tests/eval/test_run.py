"""The runner survives being killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dit_sparse.eval.run import finished, job_key, run

JOBS = [{"prompt": name, "seed": 0} for name in "abc"]


def test_each_job_is_done_once(tmp_path: Path) -> None:
    calls = []

    def work(job):
        calls.append(job["prompt"])
        return {"upper": job["prompt"].upper()}

    file = tmp_path / "results.jsonl"
    assert [r["upper"] for r in run(JOBS[:2], work, file)] == ["A", "B"]
    assert [r["upper"] for r in run(JOBS, work, file)] == ["A", "B", "C"]
    assert calls == ["a", "b", "c"]
    assert len(file.read_text().splitlines()) == 3


def test_key_does_not_depend_on_the_order_of_settings() -> None:
    assert job_key({"a": 1, "b": 2}) == job_key({"b": 2, "a": 1})


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_off_by_a_kill_is_done_again(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "results.jsonl"
    run(JOBS, lambda job: {"made": 1}, file)
    file.write_bytes(file.read_bytes()[:-cut])
    assert len(finished(file)) == 2
    again = []
    run(JOBS, lambda job: again.append(job["prompt"]) or {"made": 2}, file)
    assert again == ["c"]
    assert [json.loads(line)["result"]["made"] for line in file.read_text().splitlines()] == [1, 1, 2]


def test_a_failing_job_leaves_the_finished_ones(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"

    def work(job):
        if job["prompt"] == "b":
            raise RuntimeError("no")
        return {}

    with pytest.raises(RuntimeError):
        run(JOBS, work, file)
    assert [entry["job"]["prompt"] for entry in finished(file).values()] == ["a"]


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("buy milk\n")
    with pytest.raises(ValueError, match="line 1"):
        run(JOBS, lambda job: {}, file)
    assert file.read_text() == "buy milk\n"


def test_a_killed_process_can_be_continued(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    code = f"""
import os
from dit_sparse.eval.run import run
def work(job):
    if job["prompt"] == "b":
        os.kill(os.getpid(), 9)
    return {{"by": "first"}}
run([{{"prompt": p, "seed": 0}} for p in "abc"], work, {str(file)!r})
"""
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == -9
    made = run(JOBS, lambda job: {"by": "second"}, file)
    assert [result["by"] for result in made] == ["first", "second", "second"]
