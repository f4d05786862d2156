"""The table of methods at a model's geometry, at a tiny one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dit_sparse.eval import method_speed
from dit_sparse.eval.attention_time import read_times
from dit_sparse.eval.method_speed import COLUMNS, Bench, bench_methods, comparable, main
from dit_sparse.grid import TokenGrid
from dit_sparse.methods import all_methods
from dit_sparse.methods.base import Call, Plan
from dit_sparse.methods.radial import Radial


def test_every_method_has_a_row_with_its_density_and_the_speedup_counts_the_plan():
    rows = bench_methods(TokenGrid(5, 9, 11, text=7, text_at="back"), 2, 64, dtype="fp32", device="cpu", seconds=0.01)
    assert {row.method for row in rows} == {"dense", *comparable()} <= set(all_methods())
    dense, *sparse = rows
    assert dense.method == "dense" and dense.density == dense.speedup == 1.0
    for row in sparse:
        assert 0 < row.density <= 1 and row.backend and len(row.cells()) == len(COLUMNS)
        expected = dense.attention_ms / (row.plan_ms + row.attention_ms)
        assert abs(row.speedup - expected) < 1e-9


@pytest.mark.parametrize(("words", "expected"), [
    (["--density", "2"], "(0, 1]"), (["--method", "magic"], "radial"), (["--grid", "5by5"], "height"),
    (["--device", "cuda:99"], "is not there"),
])
def test_misuse_is_told_before_anything_is_measured(monkeypatch, capsys, words, expected):
    monkeypatch.setattr("sys.argv", ["method_speed", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert expected in capsys.readouterr().err


@dataclass(frozen=True)
class Keeping(Radial):
    """Looks at dense steps, keeps two tensors, and a static one that all layers share."""

    name: ClassVar[str] = "keeping"
    observes: ClassVar[bool] = True

    def observe(self, call: Call, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        call.state.keep("seen", torch.zeros(100 + call.step, dtype=torch.float32))

    def plan(self, call: Call) -> Plan:
        assert call.state.age("seen") == call.step - 1  # the last dense step of each timed run
        call.cached("shared", lambda: torch.zeros(1000))
        call.state.keep("step", torch.zeros(50 if call.step == 4 else 10, dtype=torch.float32))
        return super().plan(call)


def test_what_a_method_keeps_between_steps_is_counted_without_shared_parts():
    bench = Bench(TokenGrid(3, 5, 7), 2, 16, "fp32", "cpu", 0.01)
    row = bench.time(Keeping())
    assert row.state_bytes == 4 * (101 + 50) and row.block_size == 32 and row.density > 0
    assert bench.time(Radial()).state_bytes == 0
    assert "151" not in method_speed.state_table([row]) and "40 layers x 2" in method_speed.state_table([row])


def test_the_table_of_times_goes_on_where_it_was_and_is_read_back(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(method_speed, "DENSITIES", (0.2, 1.0))
    out = tmp_path / "times.json"
    words = ["--grid", "1x8x8", "--heads", "1", "--head-dim", "16", "--dtype", "fp32", "--device", "cpu"]
    words += ["--density", "0.3", "0.5", "--own", "--kernels", "--seconds", "0.01", "--method", "svg"]
    words += ["--out", str(out)]
    monkeypatch.setattr("sys.argv", ["method_speed", *words, "--budget", "0"])
    main()
    assert json.loads(out.read_text())["rows"] == []
    monkeypatch.setattr("sys.argv", ["method_speed", *words])
    main()
    held = json.loads(out.read_text())
    assert [row["options"] for row in held["rows"]] == ["density=0.3", "density=0.5", "own"]
    found = {(cell["block"], cell["density"]) for cell in held["kernels"]}
    assert found == {(block, density) for block in (64, 128) for density in (0.2, 1.0)}
    monkeypatch.setattr(Bench, "time", None)  # nothing is measured twice
    monkeypatch.setattr(Bench, "kernel", None)
    main()
    times = read_times(out)
    assert times is not None and times.state_bytes() == {"svg": 0} and times.dense_ms > 0
    monkeypatch.setattr("sys.argv", ["method_speed", *words[:-1], str(out), "--heads", "2"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "another geometry" in capsys.readouterr().err


def test_a_method_that_fails_is_named_and_the_others_are_measured(monkeypatch, tmp_path):
    real = Bench.time

    def time(self, method, options=""):
        if method.name == "svg":
            raise RuntimeError("no\nmore")
        return real(self, method, options)

    monkeypatch.setattr(Bench, "time", time)
    content = {"rows": [], "kernels": [], "failed": {}}
    bench = Bench(TokenGrid(1, 8, 8), 1, 16, "fp32", "cpu", 0.01)
    method_speed.measure(bench, content, ["svg", "radial"], [0.3], own=False, kernels=False, keep=lambda: None,
                         log=lambda line: None)
    assert [row["method"] for row in content["rows"]] == ["radial"] and content["failed"] == {"svg density=0.3": "no"}


def test_the_folder_of_the_results_is_made(monkeypatch, tmp_path):
    out = tmp_path / "new" / "methods.json"
    words = ["--grid", "1x8x8", "--heads", "1", "--head-dim", "16", "--dtype", "fp32", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["method_speed", *words, "--method", "radial", "--out", str(out)])
    main()
    assert out.is_file()
