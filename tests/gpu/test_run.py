"""The GPU programs as far as a machine without a GPU shows: parts, logs, totals, and the random calls themselves."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from dit_sparse.kernels.attention import _run_reference
from dit_sparse.kernels.blocks import Blocks
from tests.gpu import random_cases, run

ROOT = pathlib.Path(__file__).parents[2]


def by_the_formula(drawn: random_cases.Drawn) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = drawn.inputs
    blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
    return _run_reference(inputs.query, inputs.key, inputs.value, blocks, inputs.scale)


def test_random_calls_are_right_by_the_formula_and_come_again() -> None:
    lines: list[str] = []
    totals = random_cases.run(range(64), "cpu", lines.append, most=150, kernels=lambda _: {"formula": by_the_formula})
    assert lines == [] and totals["formula"]["calls"] == 64 and totals["formula"]["failed"] == []
    kinds = len(random_cases.KINDS)
    assert kinds % 8 == 0 and kinds == len(set(random_cases.KINDS))
    first, again, other = (random_cases.draw(seed, "cpu").inputs for seed in (5, 5, 5 + kinds))
    assert torch.equal(first.query, again.query) and torch.equal(first.mask.lists, again.mask.lists)
    assert first.query.shape != other.query.shape or not torch.equal(first.query, other.query)


def test_the_hopper_kernels_source_computes_random_calls() -> None:
    pytest.importorskip("triton")
    from tests.kernels.gluon_emulator import emulate

    def attend(drawn: random_cases.Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, kind = drawn.inputs, drawn.kind
        blocks = Blocks.from_mask(inputs.mask, inputs.key_mask)
        return emulate(inputs.query, inputs.key, inputs.value, blocks, inputs.scale,
                       programs=2 if kind.persistent else None, ragged_boxes=kind.order == "ragged boxes")

    lines: list[str] = []
    totals = random_cases.run(range(48), "cpu", lines.append, most=140, kernels=lambda _: {"hopper": attend})
    assert lines == [] and totals["hopper"]["calls"] == 48


def test_random_calls_vary() -> None:
    drawn = [random_cases.draw(seed, "cpu") for seed in range(320)]
    inputs = [x.inputs for x in drawn]
    assert {1, 2} == {x.query.shape[0] for x in inputs} and {1, 2, 3} == {x.query.shape[2] for x in inputs}
    assert sum(x.key.shape[1] % 2 for x in inputs) > 150 and min(x.query.shape[1] for x in inputs) == 1
    assert {x.query.is_contiguous() for x in inputs} == {True, False}
    assert any((x.mask.work() == 0).any() for x in inputs) and any((x.mask.work() == 0).all() for x in inputs)
    assert {x.mask.lists.shape[:2] == (1, 1) for x in inputs} == {True, False}
    text = {x.inputs.mask.query.box[7] == 0 for x in drawn if x.kind.text and x.inputs.mask.query.box}
    assert text == {True, False}  # in front and at the back
    for x in drawn:
        assert all(step % 16 == 0 for y in (x.inputs.query, x.inputs.key) for step in y.stride()[:3])
        box = x.inputs.mask.query.box
        assert (box is not None) == (x.kind.order in ("boxes", "ragged boxes"))


def test_wrong_results_are_named_by_seed() -> None:
    def wrong(drawn: random_cases.Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = by_the_formula(drawn)
        return (out + 0.05 if drawn.seed == 3 else out), (lse * torch.nan if drawn.seed == 5 else lse)

    lines: list[str] = []
    totals = random_cases.run(range(8), "cpu", lines.append, most=150, kernels=lambda _: {"one": wrong})
    assert totals["one"]["failed"] == [3, 5]
    assert lines[0].startswith("FAILED one seed 3 (order=permuted): ") and "seed 5" in lines[1]


def test_a_call_moved_elsewhere_keeps_numbers_and_steps() -> None:
    drawn = random_cases.draw(5, "cpu")
    there = random_cases.moved(drawn.inputs, "cpu")
    for x, y in zip((drawn.inputs.query, drawn.inputs.key), (there.query, there.key), strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()


@pytest.mark.parametrize("parts", [1, 3, 4, 8])
def test_parts_hold_every_random_call_once(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, parts: int) -> None:
    seen: list[int] = []

    def take(seeds: list[int], *_: object) -> dict[str, dict[str, Any]]:
        seen.extend(seeds)
        return {"hopper": {"calls": len(seeds), "failed": seeds[:1], "out": 0.5, "lse": 0.1}}

    monkeypatch.setattr(random_cases, "run", take)
    for part in range(1, parts + 1):
        log = run.Run(tmp_path / f"{parts}-{part}")
        run.run_random(log, 100, 7, (part, parts), lambda: False)
        log.total()
        assert not log.left and len(log.failed) == 1
    assert sorted(seen) == list(range(7, 107))
    assert "random calls passed, 1 failed\n" in (tmp_path / f"{parts}-1.log").read_text()


def test_logs_are_never_overwritten_and_end_with_the_total(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    asked = iter([False, False, True])

    def broken() -> str:
        raise RuntimeError("first line\nsecond")

    for stop, last in ((lambda: next(asked), "1 checks passed, 1 failed, 1 not run: cut, why"),
                       (lambda: False, "2 checks passed, 1 failed")):
        log = run.Run(tmp_path / "gpu")
        run.run_checks(log, {"a": lambda: "", "b": broken, "c": lambda: ""}, 60, stop)
        log.total("why" if log.left else "")
        log.total("once")
        text = log.path.with_name(log.path.name + ".log").read_text()
        assert text.splitlines()[-1] == last and "b: RuntimeError: first line\n" in text
        result = json.loads(log.path.with_name(log.path.name + ".json").read_text())
        assert result["failed"] == ["b"] and len(result["checks"]) == 3 - log.left
    assert {x.name for x in tmp_path.iterdir()} == {"gpu.log", "gpu.json", "gpu-2.log", "gpu-2.json"}


@pytest.mark.parametrize("limit, ending", [("60", "SIGTERM"), ("0.5", "hangs took longer than 0.5 s")])
def test_what_cuts_a_run_still_writes_the_total(tmp_path: pathlib.Path, limit: str, ending: str) -> None:
    program = f"""
import pathlib, time, torch
from tests.gpu import run
torch.cuda.synchronize = lambda: None
log = run.Run(pathlib.Path({str(tmp_path / "gpu")!r}))
log.listen()
run.run_checks(log, {{"first": lambda: "", "hangs": lambda: time.sleep(60)}}, {limit}, lambda: False)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and "first" in process.stdout.readline()
    if ending == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == run.CUT
    assert rest.splitlines()[-1] == f"1 checks passed, 0 failed, 1 not run: cut, {ending}"
    assert json.loads((tmp_path / "gpu.json").read_text())["not_run"] == 1


def test_every_kernel_has_checks_and_speeds() -> None:
    import importlib

    for module, speeds in run.KERNELS.values():
        assert not module or callable(importlib.import_module(module).all_checks)
        if speeds:
            name, function = speeds.split(":")
            assert callable(getattr(importlib.import_module(name), function))
    every = run.checks_of(None)
    assert len(every) == len({*every}) and any(name.startswith("portable accuracy") for name in every)


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "1", "1/x"])
def test_parts_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--out", "x", "--part", text])
    assert "--part" in capsys.readouterr().err


def test_a_text_chooses_checks_by_their_names(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    checks = {f"soft {name}": lambda: "" for name in ("one a", "two a", "one b")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(run.Run, "listen", lambda self: None)
    monkeypatch.setattr(run.speed, "environment", lambda device: {"device": device})
    monkeypatch.setattr(run, "checks_of", lambda kernel: checks)
    words = ["--out", str(tmp_path), "--only", "checks", "--kernel", "soft", "--match"]
    assert run.main([*words, "one"]) == 0
    log = (tmp_path / "gpu-soft-checks.log").read_text()
    assert "soft one a" in log and "soft one b" in log and "2 checks passed" in log
    with pytest.raises(SystemExit):
        run.main([*words, "three"])
