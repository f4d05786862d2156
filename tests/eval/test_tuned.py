"""Plans of `tune` beside the methods: the search for a density, order of work, resumption, verdicts, tables."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_sparse.cli import main
from dit_sparse.eval import tuned, tuned_tables
from dit_sparse.eval.attention_time import read_times
from dit_sparse.eval.density_search import Prior, at_psnr, found_at, is_far, next_density, on_line
from dit_sparse.eval.tuned import Evaluation
from dit_sparse.eval.tuned_work import Cost, OutOfTimeError, Plan, earlier, plan_cost
from dit_sparse.grid import TokenGrid
from dit_sparse.tuning.candidates import DENSE, Candidate
from dit_sparse.tuning.cost import CostTable
from dit_sparse.tuning.headplan import HeadPlan
from dit_sparse.tuning.preset import TunedPreset

PLAN = Plan(targets=(26.0, 30.0), methods=("sol", "svg", "draft"), rounds=3)
CANDIDATES = (DENSE, Candidate("soft", "morton", 0.1), Candidate("drop", "tile", 0.3))


def preset(target: float, statistic: str = "mean", grid: tuple[int, int, int] = (17, 32, 32)) -> TunedPreset:
    """One dense bucket of a step, then half of the heads at each of two candidates."""
    choices = np.zeros((2, 8, 4), dtype=np.uint8)
    choices[1, :, :2], choices[1, :, 2:] = 1, 2 if target < 30 else 0
    return TunedPreset(
        {"class": "WanTransformer3DModel", "config_hash": "0" * 12, "layers": 8, "heads": 4}, grid, 0, 10,
        "FlowMatchEulerDiscreteScheduler", 3.0, "fp32", "cpu", "pytorch", f"psnr>={target:g}", statistic, True, None,
        (0, 1, 10), CANDIDATES, choices, ({"prompt_hash": "0" * 8, "psnr": target},), "0.1.0",
        datetime.date(2026, 1, 1).isoformat())


class Fake:
    """Finishes every job at once: PSNR rises by 20 dB for ten times the density, methods differ by a constant."""

    OFFSET = {"sol": 48.0, "svg": 42.0, "draft": 45.0}

    def __init__(self, found: Callable[[Any], Any] = lambda job: None) -> None:
        self.jobs: list[Any] = []
        self.dead, self.found = False, found

    def __call__(self, job: Any) -> dict[str, Any]:
        self.jobs.append(job)
        if (given := self.found(job)) is not None:
            return dict(given)
        if job["kind"] == "tune":
            return {"preset": preset(job["target"], job["statistic"]).to_dict(), "seconds": 5.0}
        first, end, _ = job["batch"]
        if job["kind"] == "tuned":
            base, density = float(job["preset"]["target"].removeprefix("psnr>=")), 0.2
        else:
            density = job["asked"]
            base = self.OFFSET[job["label"]] + 20 * math.log10(density)
        values = [{"psnr": base + 0.1 * (i - first), "ssim": 0.9} for i in range(first, end)]
        return {"values": values, "density": density, "run_density": 0.5, "calls": 80, "sparse_calls": 56,
                "seconds": 1.0}


def evaluation(folder: Path, work: Fake, plan: Plan = PLAN, **options: Any) -> tuple[Evaluation, bool]:
    run = Evaluation(plan, folder, "weights", times=read_times(), costs=CostTable.modelled(), prior=earlier())
    run.load()
    return run, run.make(work, **options)


def test_a_search_needs_few_runs_and_says_how_it_ended() -> None:
    def psnr(density: float) -> float:  # steeper at low densities than the search takes for granted
        return 40 + 15 * math.log10(density) - 1 / (1 + 20 * density)

    for goal in (22.0, 28.0, 36.0):
        points: list[tuple[float, float]] = []
        while (density := next_density(points, goal)) is not None:
            points.append((density, psnr(density)))
        assert len(points) <= 4
        found = found_at(points, goal)
        assert found is not None and found.how == "measured" and abs(psnr(found.density) - goal) <= 0.15
    assert next_density([], 28.0, [(0.1, 26.0), (0.3, 30.0)]) == pytest.approx(0.1 * 3**0.5, rel=1e-3)
    # One run moves the earlier curve.
    assert next_density([(0.1, 28.0)], 30.0, [(0.1, 26.0), (0.3, 30.0)]) == pytest.approx(0.1 * 3**0.5, rel=1e-3)
    assert next_density([(0.02, 30.0)], 20.0) is None and next_density([(1.0, 25.0)], 30.0) is None
    between, beyond = found_at([(0.1, 20.0), (0.2, 30.0)], 25.0), found_at([(0.1, 20.0)], 23.0)
    assert between is not None and between.how == "interpolated" and between.density == pytest.approx(0.02**0.5)
    assert beyond is not None and beyond.how == "extrapolated" and found_at([], 1.0) is None
    for runs, goal in (([(0.1, 20.0)], 26.0), ([(0.1, 20.0), (1.0, 58.0)], 30.0)):
        far = found_at(runs, goal)
        assert far is not None and far.how == "guessed", "the runs lie too far off for a line"
    assert is_far(0.15, [0.02, 0.9]) and not is_far(0.15, [0.1, 0.2]) and not is_far(0.15, [0.1])
    falling = [(0.1, 30.0), (0.2, 29.9)]
    assert 0.05 < at_psnr(falling, 31.0) < 0.3 and math.isfinite(on_line([(0.3, 30.0)], 0.1))


def test_where_a_curve_turns_back_a_line_across_it_is_a_guess() -> None:
    """Densities as they were counted need not rise with what was asked for: runs on both sides are those by PSNR."""
    turning = [(0.09, 28.8), (0.2, 26.3), (0.37, 27.1), (1.0, 58.0)]
    far, near = found_at(turning, 30.0), found_at(turning, 26.7)
    assert far is not None and far.how == "guessed" and near is not None and near.how == "interpolated"
    assert next_density([(0.05, 25.0), (1.0, 58.0)], 30.0) == pytest.approx(0.05**0.5, abs=1e-4), "half-way"


def test_beyond_all_runs_the_earlier_curve_leads_on() -> None:
    prior = [(0.05, 25.0), (0.1, 28.0), (0.2, 31.0)]
    runs = [(0.1, 27.5), (0.12, 27.6)]  # their own line would lead to 1
    assert next_density(runs, 30.6, prior) == pytest.approx(0.12 * 2 ** ((30.6 - 27.6) / 3), rel=0.02)


def test_hardly_beyond_the_runs_their_own_line_leads_on() -> None:
    """The earlier curve's slope is half of theirs: moved, its next step would be too small to be another mask."""
    prior = [(0.05, 26.0), (0.1, 29.5), (0.2, 33.0)]
    runs = [(0.1546, 29.06), (0.1437, 28.12)]
    assert next_density(runs, 27.53, prior) == pytest.approx(0.1372, abs=1e-3)


def test_a_method_that_cannot_be_so_sparse_counts_with_its_fastest_run(tmp_path: Path) -> None:
    run, _ = evaluation(tmp_path, Fake())
    name = (PLAN.methods or ())[0]
    points = [tuned.Point(0.02, 0.27, 33.0, Cost(50.0, 90.0)), tuned.Point(0.1, 0.3, 34.0, Cost(60.0, 99.0))]
    run.points = lambda _: points  # type: ignore[method-assign]
    found, cost = tuned.at_psnr(run, name, 27.0)
    assert found is not None and (found.how, found.density, found.psnr) == ("fewest", 0.27, 33.0)
    assert cost == Cost(50.0, 90.0) and not run._is_rough(name, 27.0)
    found, _ = tuned.at_psnr(run, name, 33.5)
    assert found is not None and found.how == "interpolated"


def test_the_tables_of_an_earlier_run_lead_the_search_where_they_are_no_guess() -> None:
    rows = [dict(method="sol", density=0.05, psnr=26.0, how="interpolated"),
            dict(method="sol", density=0.1, psnr=30.0, how="measured"),
            dict(method="svg", density=0.9, psnr=34.0, how="guessed"),
            dict(method="svg", density=0.2, psnr=30.0, how="measured")]
    curves = {"sol": ((0.1, 20.0), (0.2, 21.0)), "svg": ((0.1, 22.0),)}
    prior = Prior(("sol", "svg"), curves).with_tuned({"sections": [{"rows": rows}]})
    assert prior.curves == {"sol": ((0.05, 26.0), (0.1, 30.0)), "svg": ((0.1, 22.0),)} and prior.names == ("sol", "svg")


def test_methods_come_in_the_order_of_the_earlier_comparison() -> None:
    prior = earlier()
    assert prior.names.index("sol") < prior.names.index("svg") and len(prior.curves["sol"]) >= 2
    names = Plan().names(prior)
    assert names[0] == prior.names[0] and "radial" not in names and {"sol", "svg", "draft"} <= set(names)
    assert Plan(methods=("svg", "sol")).names(prior) == ["sol", "svg"]
    assert Plan(methods=("svg",)).names(Prior()) == ["svg"]


def test_held_out_and_calibration_captions_differ() -> None:
    from dit_sparse.eval.bed import held_out

    plan = Plan()
    assert not set(held_out()[1][: plan.clips]) & set(plan.prompts()) and len(plan.prompts()) == plan.calibration


def test_the_order_of_work_and_its_resumption(tmp_path: Path) -> None:
    work = Fake()
    run, done = evaluation(tmp_path, work)
    assert done and run.next_job() is None and run.missing() == []
    kinds = [(job["kind"], job.get("target") or job.get("label")) for job in work.jobs]
    assert kinds[:4] == [("tune", 26.0), ("tuned", None), ("tune", 30.0), ("tuned", None)]
    assert kinds[8][1] == "sol" and work.jobs[8]["batch"] == [0, 12, 0], "after the tunings of all statistics"
    assert sum(kind == "tune" for kind, _ in kinds) == 4
    for name in PLAN.methods or ():
        for target in PLAN.targets:
            goal = run.goal(target)
            assert goal == pytest.approx(target + 0.55)
            found, cost = tuned.at_psnr(run, name, goal)
            assert found is not None and found.how in ("measured", "interpolated") and cost is not None
            assert Fake.OFFSET[name] + 0.55 + 20 * math.log10(found.density) == pytest.approx(goal, abs=0.2)
    again = Fake()
    assert evaluation(tmp_path, again)[1] and again.jobs == []
    assert evaluation(tmp_path / "..", Fake(), stop=lambda: True)[1] is False


def test_a_tuning_that_runs_out_of_time_is_begun_again(tmp_path: Path) -> None:
    def late(job: Any) -> Any:
        if job["kind"] == "tune" and job["target"] == 30:
            raise OutOfTimeError
        return None

    work = Fake(late)
    run, done = evaluation(tmp_path, work)
    assert not done and run.goal(26.0) is not None and run.goal(30.0) is None
    assert any("psnr>=30 (mean): not run" in line for line in run.missing())
    tuned_tables.write(run, tmp_path, command="x", environment={})
    assert "n/a: not run" in (tmp_path / "tuned.md").read_text()
    assert evaluation(tmp_path, again := Fake())[1] and again.jobs[0]["kind"] == "tune"


def test_a_tuning_that_failed_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    def broken(job: Any) -> Any:
        return {"error": "RuntimeError: no", "lost": False} if job["kind"] == "tune" and job["target"] == 30 else None

    for _ in range(2):  # the second call fails as well, and a third one tries once more
        work = Fake(broken)
        run, _ = evaluation(tmp_path, work)
        assert sum(job["kind"] == "tune" and job["target"] == 30 for job in work.jobs) == 2  # mean and min, once each
        assert run.outcome(30.0, "mean").why == "RuntimeError: no"
    stopped, _ = evaluation(tmp_path, Fake(), stop=lambda: True)
    assert stopped.outcome(30.0, "mean").why == "RuntimeError: no"
    run, done = evaluation(tmp_path, again := Fake())
    assert done and run.outcome(30.0, "mean").mean is not None
    assert [job["target"] for job in again.jobs if job["kind"] == "tune"] == [30.0, 30.0]
    assert evaluation(tmp_path, last := Fake())[1] and last.jobs == []


def test_our_own_methods_do_not_count_for_the_best() -> None:
    from dit_sparse.eval.tuned_work import Cost

    outcome = tuned.Outcome(30.0, "mean", psnr=[30.0], cost=Cost(30.0, 80.0))
    rows = [tuned_tables.Row("auto", 0.1, 30.0, "measured", Cost(10.0, 60.0), 33.0),
            tuned_tables.Row("sol", 0.1, 30.0, "measured", Cost(40.0, 90.0), 27.0)]
    said = tuned_tables.Section(outcome, rows).verdicts()
    assert said["fastest"][0] == "sol" and said["best_at_equal_time"] == ("sol", 27.0) and said["enough"]
    assert [row[0] for row in tuned_tables.Section(outcome, rows).table().rows] == ["tuned", "(auto)", "sol"]
    # A guess at the plan's PSNR says nothing there; at the plan's time the method may be known all the same.
    rows += [tuned_tables.Row("svg", 0.1, 30.0, "guessed", Cost(5.0, 50.0), 29.9)]
    section = tuned_tables.Section(outcome, rows)
    said = section.verdicts()
    assert section.unsettled == ["svg"] and said["fastest"] == ("sol", 90.0)
    assert said["best_at_equal_time"] == ("svg", 29.9) and not said["enough"]


def test_failures_stand_in_the_table(tmp_path: Path) -> None:
    def found(job: Any) -> Any:
        if job["kind"] == "tune" and job["statistic"] == "min":
            return {"error": "ValueError: infeasible", "lost": False}
        return {"error": "RuntimeError: no", "lost": False} if job.get("label") == "svg" else None

    run, done = evaluation(tmp_path, Fake(found))
    assert done
    text = tuned_tables.write(run, tmp_path, command="x", environment={})[0].read_text()
    assert "n/a: RuntimeError: no" in text and "n/a: ValueError: infeasible" in text
    table = [line for line in text.split("## Targets")[1].split("##")[0].splitlines() if "|" in line]
    assert len({line.count("|") for line in table}) == 1


def test_verdicts_and_tables(tmp_path: Path) -> None:
    run, _ = evaluation(tmp_path, Fake())
    files = tuned_tables.write(run, tmp_path, command="dit-sparse x", environment={"device": "here"})
    text, content = files[0].read_text(), json.loads(files[1].read_text())
    assert text.startswith(tuned.MARK) and "`dit-sparse x`" in text and "Nothing." in text
    first, second = content["sections"]
    for section in (first, second):
        said, rows = section["verdicts"], {row["method"]: row for row in section["rows"]}
        fastest = min(rows.values(), key=lambda row: row["cost"]["run"])
        mine = content["targets"][content["sections"].index(section)]["cost"]["run"]
        assert said["fastest"][0] == fastest["method"] == "sol"
        assert said["at_least_as_fast"] == (mine <= fastest["cost"]["run"])
        # At the plan's own time the method has what its line says.
        if rows["sol"]["equal"] is not None:
            density = run.density_at("sol", mine)
            assert rows["sol"]["equal"] == pytest.approx(48.55 + 20 * math.log10(density or 1), abs=0.1)
            assert said["better_by"] == pytest.approx(section["psnr"] - said["best_at_equal_time"][1])
    assert [row["as_asked"] for row in content["targets"]] == [True] * 4
    worst = run.outcome(26.0, "min")
    worst.psnr = [26.0] * 11 + [20.0]
    assert tuned_tables.is_met(worst) and worst.reached == 11
    worst.psnr[0] = 25.9
    assert not tuned_tables.is_met(worst)


def test_cost_of_a_plan_is_its_mixture_on_forty_heads() -> None:
    costs, grid = CostTable.modelled(), TokenGrid(17, 32, 32)
    choices = np.zeros((2, 1, 4), dtype=np.uint8)
    choices[1, 0] = [1, 1, 2, 0]
    cost = plan_cost(HeadPlan(CANDIDATES, (0, 2, 10), choices), grid, costs)
    # 136 blocks (Morton): a budget of .1 is 14 of them; more of the tiles, which are smaller.
    each = [20 * costs.tau(CANDIDATES[1], 14 / 136), 10 * costs.tau(CANDIDATES[2]), 10 * costs.dense]
    assert cost.call == pytest.approx(sum(each), rel=0.02)
    assert cost.run == pytest.approx((2 * 40 * costs.dense + 8 * cost.call) / 10)
    whole = plan_cost(HeadPlan(CANDIDATES, (0, 10), choices[:1]), grid, costs)
    assert whole.run == whole.call == pytest.approx(40 * costs.dense)


@pytest.mark.parametrize(("words", "expected"), [
    (["--out", "file"], "is a file"), (["--out", "docs"], "was not made by this command"),
    (["--device", "warp"], "cannot be used"),
])
def test_wrong_words_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                 words: list[str], expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tuned.md").write_text("mine")
    assert main(["eval", "tune", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and expected in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_quick_on_the_included_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["eval", "tune", "--quick", "--device", "cpu", "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["finished"] and (out / "presets" / "psnr-24-mean.json").is_file()
    content = json.loads((out / "tuned.json").read_text())
    assert content["targets"][0]["mean"] > 15 and content["targets"][0]["cost"]["run"] > 0
    rows = {row["method"]: row for row in content["sections"][0]["rows"]}
    assert rows["sol"]["cost"] is not None and rows["svg"]["psnr"] is not None
    assert main(["eval", "tune", "--quick", "--device", "cpu", "--out", str(out), "--json", "--seconds", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == made["results"]
