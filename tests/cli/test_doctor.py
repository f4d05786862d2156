"""doctor: every failure is a finding with a next step, never a traceback."""

import sys
import types
from pathlib import Path

import pytest

from dit_sparse import doctor


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_a_working_machine(dit_sparse) -> None:
    done = dit_sparse("doctor", "--json")
    problems = [check for check in done.json["checks"] if check["status"] == "problem"]
    assert done.code == 0 and not problems
    names = {check["name"] for check in done.json["checks"]}
    assert {"Python", "torch", "diffusers", "CPU", "GPU", "H.264", "embedded model", "backend cpu"} <= names | {"GPU"}
    assert "Everything that dit-sparse needs works." in dit_sparse("doctor").out


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision that raises when it is imported."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)


def test_broken_torchvision_says_what_to_do(broken: None) -> None:
    text = doctor.broken_torchvision()
    assert "present but broken" in text and "nms" in text and "pip uninstall torchvision" in text
    check = by_name(doctor.examine())["torchvision"]
    assert check.status == "problem" and check.advice == "pip uninstall torchvision"


def test_broken_torchvision_stops_generate_in_one_line(broken: None, dit_sparse, tiny_folder: Path) -> None:
    done = dit_sparse("generate", "a red circle", "--model", tiny_folder, "--size", 32, "--frames", 3)
    assert "pip uninstall torchvision" in done.refusal()


def test_unsupported_diffusers(monkeypatch: pytest.MonkeyPatch, dit_sparse) -> None:
    import diffusers

    monkeypatch.setattr(diffusers, "__version__", "0.99.0")
    check = by_name(doctor.examine())["Diffusers support"]
    assert check.status == "problem" and "0.99.0" in check.detail and "diffusers>=0.42" in check.advice
    assert dit_sparse("doctor").code == 1


def test_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dit_sparse.pipelines import embedded

    monkeypatch.setattr(embedded, "folder", lambda: tmp_path)
    check = by_name(doctor.examine())["embedded model"]
    assert check.status == "problem" and "missing" in check.detail


def test_a_crash_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("dit_sparse.kernels.attention")
    monkeypatch.setitem(sys.modules, "dit_sparse.kernels.attention", module)
    check = by_name(doctor.examine())["backends"]
    assert check.status == "problem" and "ImportError" in check.detail


def test_hosts(dit_sparse) -> None:
    table = dit_sparse("doctor", "--hosts")
    assert table.code == 0 and "| WanTransformer3DModel | yes (wan)" in table.out
    rows = {row["cls"]: row["supported"] for row in dit_sparse("doctor", "--hosts", "--json").json}
    assert rows["WanTransformer3DModel"] and not all(rows.values())
