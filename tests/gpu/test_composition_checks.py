"""The GPU checks of composition, rehearsed on a CPU; there tests/composition runs far more."""

from __future__ import annotations

import pytest
import torch

from tests.composition.cases import AXES, REFUSED, Case
from tests.gpu import composition_checks


def test_the_cases_are_allowed_and_hold_every_value() -> None:
    cases = [Case(*values) for values in composition_checks.CASES]
    assert not any(refusal.concerns(case.values()) for case in cases for refusal in REFUSED)
    assert {value for case in cases for value in case.values()} == {(axis, x) for axis, xs in AXES.items() for x in xs}
    assert all(function.args in [(values,) for values in composition_checks.CASES]
               for function in composition_checks.all_checks().values())


@pytest.mark.parametrize("values", [v for v in composition_checks.CASES if v[2] == "eager"][:2], ids=", ".join)
def test_a_case_runs_through_the_checks(values: tuple[str, ...]) -> None:
    problem, numbers = composition_checks.composed(values, "cpu", "eager")
    assert problem == "" and numbers["overlap"] >= 0.98 and numbers["error"] <= 2 * numbers["plain_error"]


def test_a_wrong_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.composition import compare, hosts

    values = ("radial", "none", "eager", "no LoRA", "batched", "no offload", "bf16")
    compare.plain(Case(*values))
    run = hosts.run
    monkeypatch.setattr(hosts, "run", lambda pipe, guidance: run(pipe, guidance) * (
        1.5 if pipe.transformer.dtype == torch.bfloat16 else 1))
    problem, _ = composition_checks.composed(values, "cpu", "eager")
    assert problem == "outputs differ by 0.5000"
