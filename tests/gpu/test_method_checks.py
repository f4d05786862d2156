"""The GPU checks of all methods, rehearsed on a CPU at a tiny geometry."""

from __future__ import annotations

import pathlib
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from dit_sparse import SparseFallbackError
from dit_sparse.blockmask import BlockMask
from dit_sparse.eval.method_speed import comparable
from dit_sparse.eval.step_models import GEOMETRIES, Geometry
from dit_sparse.grid import TokenGrid
from dit_sparse.methods import svg
from dit_sparse.methods.base import Call, Plan
from tests.gpu import method_checks, run
from tests.waits import Waits


def tiny() -> Geometry:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"hidden_states": torch.randn(1, 4, 4, 16, 16, dtype=dtype), "timestep": torch.full((1,), 999.0),
                "encoder_hidden_states": torch.randn(1, 8, 16, dtype=dtype)}

    small = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16,
             "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    return Geometry("tiny", "a tiny Wan", "WanTransformer3DModel", {"num_layers": 10}, inputs, 256, small)


@pytest.mark.parametrize("method", comparable())
def test_every_method_runs_through_the_checks(method: str) -> None:
    problem, numbers = method_checks.runs_sparse(method, *method_checks.made(tiny(), "cpu"), "cpu")
    assert problem == "" and 0 < numbers["density"] <= 1 and numbers["backends"]
    assert numbers["sparse_calls"] == method_checks.LAYERS * method_checks.SPARSE

    with ExitStack() as stack:
        def guard(on: bool) -> None:
            if on:
                stack.enter_context(Waits())
            else:
                stack.close()

        assert method_checks.never_waits(method, TokenGrid(3, 7, 9, text=11, text_at="front"), "cpu", guard) == ""


def test_what_the_checks_find(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = svg.SVG.plan
    model = method_checks.made(tiny(), "cpu")

    def waits(self: svg.SVG, call: Call) -> Plan:
        float(call.query.sum())
        return plan(self, call)

    monkeypatch.setattr(svg.SVG, "plan", waits)
    with pytest.raises(AssertionError, match="waits for the device"), ExitStack() as stack:
        method_checks.never_waits("svg", TokenGrid(3, 7, 9), "cpu",
                                  lambda on: (stack.enter_context(Waits()), None)[1] if on else stack.close())
    monkeypatch.setattr(svg.SVG, "plan", lambda self, call: Plan(None))
    problem, _ = method_checks.runs_sparse("svg", *model, "cpu")
    assert problem.startswith("no call ran sparse")

    def broken(self: svg.SVG, call: Call) -> Plan:
        mask = plan(self, call).mask
        assert isinstance(mask, BlockMask)
        call.value.fill_(torch.nan)
        return Plan(mask)

    monkeypatch.setattr(svg.SVG, "plan", broken)
    with pytest.raises(SparseFallbackError, match="non-finite output"):  # which a run of checks counts as failed
        method_checks.runs_sparse("svg", *model, "cpu")


def test_numbers_of_a_check_go_to_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    log = run.Run(tmp_path / "gpu")
    checks = {"a": lambda: ("", {"plan_ms": 2.5}), "b": lambda: ("wrong", {"plan_ms": 3}), "c": lambda: ""}
    run.run_checks(log, checks, 60, lambda: False)
    assert log.passed == ["a", "c"] and log.failed == ["b"]
    assert [each.get("plan_ms") for each in log.result["checks"]] == [2.5, 3, None]
    log.total()
    lines = (tmp_path / "gpu.log").read_text().splitlines()
    assert lines[0].endswith("a  plan_ms 2.5") and "b: wrong  plan_ms 3" in lines[1]


def test_the_models_are_known_and_every_method_is_checked_on_each() -> None:
    checks = method_checks.all_checks()
    assert set(method_checks.MODELS) <= set(GEOMETRIES)
    for method in comparable():
        mine = [function for name, function in checks.items() if name.startswith(f"{method} ")]
        assert len(mine) == len(method_checks.MODELS) + len(method_checks.GRIDS)
        assert all(isinstance(function, partial) for function in mine)
