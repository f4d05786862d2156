"""The comparison of methods: what is made and in which order, resumption, rows that cannot be compared, the tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse import SparseProc
from dit_sparse.cli import main
from dit_sparse.eval import methods, methods_tables
from dit_sparse.eval.attention_time import Times, read_times
from dit_sparse.eval.config import CEILING, DENSE
from dit_sparse.eval.methods import FLOOR, QUICK, Comparison, Plan, Row, near
from dit_sparse.eval.random_blocks import RandomBlocks
from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import planted_call

PLAN = Plan(densities=(0.3, 0.15), captions=8, best=2, more=(0.2, 0.3), more_captions=12, seeds=2, batch=8,
            methods=("gna", "radial", "sol", "svg"))


class Fake:
    """Finishes every job at once; `found` may say otherwise for some."""

    def __init__(self, found: Any = lambda job: None) -> None:
        self.jobs: list[Any] = []
        self.dead, self.found = False, found

    def __call__(self, job: Any) -> dict[str, Any]:
        self.jobs.append(job)
        asked = job["asked"] if isinstance(job["asked"], float) else 0.4
        first, end, _ = job["batch"]
        value = {"psnr": 20 + 10 * asked + len(job["label"]), "ssim": 0.9, "latent_error": 0.1, "accuracy": 1.0}
        if job["label"] == DENSE:
            value = {"accuracy": 1.0}
        cost = {"density": asked, "run_density": asked, "seconds": 2.0}
        made = {"means": {"recall": 0.8, "relative_error": 0.1}} if job["kind"] == "look" else {
            "values": [value] * (end - first), **cost}
        return self.found(job) or made


def made(tmp_path: Path, work: Fake, plan: Plan = PLAN, **options: Any) -> tuple[Comparison, bool]:
    run = Comparison(plan, tmp_path, "weights")
    run.load()
    return run, run.make(work, **options)


def test_the_order_of_work_and_its_resumption(tmp_path: Path) -> None:
    work = Fake()
    run, done = made(tmp_path, work)
    assert done and run.complete()
    first = [(job["label"], job["asked"]) for job in work.jobs if job["kind"] == "clips"]
    start = [(DENSE, ""), (CEILING.label, ""), (FLOOR, 0.3), ("gna", 0.3), ("sol", 0.3), ("svg", 0.3)]
    assert first[:6] == start and first[6] == (FLOOR, 0.15)
    assert first[10:14] == [(name, "own") for name in PLAN.methods or ()]
    # Two methods more often: their batches of captions and seeds, what is there already left out.
    best = run.ranked()[:2]
    assert len(best) == 2 and "radial" not in best
    second = [job for job in work.jobs[-20:] if job["kind"] == "clips" and job["label"] != DENSE]
    assert {job["label"] for job in second} <= {*best, *(PLAN.methods or ())}
    assert {tuple(job["batch"]) for job in work.jobs} >= {(0, 8, 0), (8, 12, 0), (0, 8, 1), (8, 12, 1)}
    for name in best:
        for density in PLAN.more:
            assert run.row(name, density, 12, 2).missing == 0 and run.row(name, density, 12, 2).recall == 0.8

    again = Fake()
    assert made(tmp_path, again)[1] and again.jobs == []
    # A line cut off by a kill is made again, and other settings share nothing.
    lines = (tmp_path / methods.RESULTS).read_bytes()
    (tmp_path / methods.RESULTS).write_bytes(lines[:-30])
    assert made(tmp_path, again)[1] and len(again.jobs) == 1
    assert made(tmp_path, other := Fake(), dataclasses.replace(PLAN, steps=11))[1]
    assert len(other.jobs) == len(work.jobs)


def test_a_budget_and_a_lost_gpu_end_the_work_and_leave_tables(tmp_path: Path) -> None:
    work = Fake()
    run, done = made(tmp_path, work, stop=lambda: len(work.jobs) >= 7)
    assert not done and len(work.jobs) == 7 and not run.complete()
    assert run.row("gna", 0.3).why == "" and run.row("svg", 0.3).why == "not run"
    files = methods_tables.write(run, tmp_path, None, command="x", environment={})
    assert "n/a: not run" in files[0].read_text()

    def lost(job: Any) -> Any:
        if job["label"] == "sol" and job["asked"] == 0.3:
            dying.dead = True
            return {"error": "AcceleratorError: gone", "lost": True}
        return None

    dying = Fake(lost)
    run, done = made(tmp_path, dying)
    assert not done and run.row("sol", 0.3).why == "AcceleratorError: gone"
    assert made(tmp_path, Fake())[1]  # goes on behind the batch that killed it


def test_rows_that_cannot_be_compared_say_why(tmp_path: Path) -> None:
    def found(job: Any) -> Any:
        if job["label"] == "svg" and job["kind"] == "clips":
            return {"error": "ValueError: no", "lost": False}
        if job["label"] == "sol" and job["asked"] == 0.15:
            return {"values": [{"psnr": 99.0, "ssim": 1.0, "latent_error": 0.0, "accuracy": 1.0}] * 8, "density": 0.4,
                    "run_density": 0.5, "seconds": 1.0}
        return None

    run, _ = made(tmp_path, Fake(found))
    assert run.row("radial", 0.3).why == "has no option density"
    assert run.row("svg", 0.3).why == "ValueError: no"
    assert run.row("sol", 0.15).why == "its density is 0.400"
    assert run.row("radial", "own").why == ""
    assert run.ranked() == ["gna", "sol"]  # all densities before some, and radial and svg have none
    assert near(0.15, 0.18) and not near(0.15, 0.185) and near(0.5, 0.57) and not near(0.5, 0.58)


def test_values_are_averaged_over_seeds_before_captions(tmp_path: Path) -> None:
    def found(job: Any) -> Any:
        value = {"psnr": 30.0 + 10 * job["batch"][2], "ssim": 1.0, "latent_error": 0.0, "accuracy": 1.0}
        count = job["batch"][1] - job["batch"][0]
        return {"values": [value] * count, "density": job["asked"], "run_density": 0.5, "seconds": 1.0} if (
            job["kind"] == "clips" and job["label"] == "gna" and job["asked"] != "own") else None

    run, _ = made(tmp_path, Fake(found), dataclasses.replace(PLAN, methods=("gna",)))
    row = run.row("gna", 0.2, 12, 2)
    assert row.values["psnr"].prompts == 12 and row.values["psnr"].mean == pytest.approx(35)


def test_tables_and_picture(tmp_path: Path) -> None:
    run, _ = made(tmp_path, Fake())
    kernels = {128: [(0.05, 10.0), (0.1, 20.0), (0.5, 100.0)]}
    row = {"method": "svg", "options": "density=0.3", "density": 0.3, "plan_ms": 2.0, "attention_ms": 70.0,
           "block_size": 128, "state_bytes": 2**20}
    times = Times({"device": "a GPU"}, "21x45x80", 300.0, kernels, [row])
    files = methods_tables.write(run, tmp_path, times, command="dit-sparse x", environment={"device": "here"})
    text = files[0].read_text()
    assert text.startswith(methods.MARK) and "a GPU" in text and "random blocks (floor)" in text
    assert "| svg | 1 | 0.0781 |" in text and "| gna | n/a | n/a |" in text
    near_table = text.split("## Density near 0.3")[1].split("##")[0]
    assert "| 72.0 |" in near_table and "n/a: has no option density" in near_table
    assert len({line.count("|") for line in near_table.splitlines() if line.startswith("|")}) == 1
    content = json.loads(files[1].read_text())
    assert content["plan"]["steps"] == 10 and content["sections"][0]["rows"]
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_modelled_time_moves_along_the_kernels_curve(tmp_path: Path) -> None:
    kernels = {64: [(0.1, 20.0), (0.3, 60.0)], 128: [(0.1, 10.0), (0.3, 30.0), (0.5, 50.0)]}
    rows = [{"method": "a", "options": options, "density": density, "plan_ms": plan, "attention_ms": ms,
             "block_size": 64, "state_bytes": 0}
            for options, density, plan, ms in (("density=0.3", 0.3, 1.0, 65.0), ("own", 0.2, 5.0, 40.0))]
    times = Times({}, "", 100.0, kernels, rows)
    assert times.milliseconds("a", 0.3, 0.2) == pytest.approx(1 + 65 - 20)  # the operator's 5 ms stay
    assert times.milliseconds("a", "own", 0.2) == pytest.approx(45)
    assert times.milliseconds("random", 0.3, 0.2) == pytest.approx(20)
    assert times.milliseconds("b", 0.3, 0.2) is None and times.kernel(32, 0.2) is None
    assert times.kernel(128, 0.6) == pytest.approx(60)
    assert read_times(tmp_path / "none.json") is None
    (tmp_path / "foreign.json").write_text("[]")
    with pytest.raises(ValueError, match="foreign.json is no table of times"):
        read_times(tmp_path / "foreign.json")


@pytest.mark.parametrize("sizes", [(5, 7, 9), (1, 8, 8), (3, 16, 16)])
def test_random_blocks_keep_the_own_one_and_the_density(sizes: tuple[int, int, int]) -> None:
    grid = TokenGrid(*sizes, text=5, text_at="back")
    call = planted_call(grid, 2)
    mask = RandomBlocks(0.4, 16).plan(call).mask
    assert mask is not None
    kept = mask.to_dense()
    assert kept.diagonal(dim1=-2, dim2=-1).all() and kept[..., -1, :].all() and kept[..., -1].all()
    video = kept[..., :-1, :-1]
    assert (video.sum(-1) == video.sum(-1)[0, 0, 0]).all()
    other = RandomBlocks(0.4, 16).plan(call).mask
    assert other is not None and not torch.equal(other.to_dense(), kept)
    with pytest.raises(ValueError, match="density=0"):
        RandomBlocks(0.0)


def test_whole_numbers_of_dense_steps_are_shares_of_the_authors_runs() -> None:
    own = methods.entry_of("rainfusion2", "own").options
    assert own["dense_steps"] == 0.3 and own["dense_layers"] == 0  # 15 of 50
    assert methods.entry_of("svg", "own").options["dense_steps"] == 0.2


def test_every_entry_is_a_valid_configuration() -> None:
    plan = Plan()
    for _, entry, _ in Comparison(plan, Path()).first():
        proc = entry.proc(plan.steps)
        assert proc is None or isinstance(proc, SparseProc) and proc.settings.strict
        if isinstance(entry.asked, float):
            assert proc.settings.schedule().is_dense(1, 10, 3) and not proc.settings.schedule().is_dense(2, 10, 1)


@pytest.mark.slow
def test_quick_on_the_included_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    words = ["eval", "methods", "--quick", "--device", "cpu", "--out", str(out), "--method", "svg", "--json"]
    assert main([*words, "--seconds", "1"]) == 0  # nothing is begun after the model is loaded, or a little
    begun = json.loads(capsys.readouterr().out)
    assert not begun["finished"] and (out / "methods.md").is_file()
    assert main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["finished"] and made["results"] == 11
    # Tables alone: made again from what is there, with the machine that the numbers belong to.
    noted = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(noted | {"environment": {"device": "another machine"}}))
    assert main([*words, "--seconds", "0"]) == 0 and "another machine" in (out / "methods.md").read_text()
    capsys.readouterr()
    rows = {row["label"]: row for row in json.loads((out / "methods.json").read_text())["sections"][0]["rows"]}
    ceiling, floor, svg = (rows[name] for name in (CEILING.label, FLOOR, "svg"))
    assert ceiling["values"]["psnr"]["mean"] > 60 and ceiling["recall"] == pytest.approx(1)
    assert floor["values"]["psnr"]["mean"] < svg["values"]["psnr"]["mean"] < 60
    assert floor["recall"] < svg["recall"] < 1 and 0 < svg["relative_error"] < floor["relative_error"]
    assert rows[DENSE]["density"] == 1 and "psnr" not in rows[DENSE]["values"]
    assert svg["run_density"] > svg["density"] and QUICK.steps == 3


@pytest.mark.parametrize(("words", "expected"), [
    (["--method", "magic"], "'magic' cannot be compared"), (["--method", "dense"], "cannot be compared"),
    (["--out", "file"], "is a file"), (["--out", "docs"], "was not made by this command"),
    (["--device", "warp"], "cannot be used"), (["--steps", "1"], "--steps"),
    (["--out", "runs"], "was not made by this command"),
])
def test_wrong_words_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "methods.md").write_text("mine")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.json").write_text("{}")
    assert main(["eval", "methods", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and expected in err and len(err.splitlines()) == 1


def test_rows_without_a_table_of_times_say_na() -> None:
    row = Row("svg", 0.3, density=0.3).with_time(None)
    assert row.modelled_ms is None and "n/a" in methods_tables._cells(row)
