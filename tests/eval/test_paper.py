"""The project's own tables: complete at the quick size, resumed after a kill, and never over somebody's file."""

import json
from pathlib import Path

import pytest

from dit_sparse.cli import main
from dit_sparse.eval import paper
from dit_sparse.eval.bootstrap import Interval
from dit_sparse.eval.evaluation import EvaluationWork
from dit_sparse.eval.measures.world import read_caption
from dit_sparse.eval.tables import Table


@pytest.mark.slow
def test_quick_tables_and_their_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[str] = []
    make = EvaluationWork._make
    monkeypatch.setattr(
        EvaluationWork, "_make", lambda self, job, label, key: made.append(label) or make(self, job, label, key)
    )
    words = ["eval", "paper", "--quick", "--device", "cpu", "--out", "out", "--json"]
    assert main(words) == 0
    labels = ["dense", "svg", "rainfusion", "rainfusion2", "gna", "radial", "noise-ceiling"]
    assert made == 2 * labels
    assert json.loads(capsys.readouterr().out)["clips"] == {"quick": 14}
    text = (tmp_path / "out" / "methods.md").read_text()
    assert "`dit-sparse eval paper --quick --out out --device cpu`" in text and "192 tokens, 3 steps" in text
    assert "CPU" in text and " UTC" in text and "says nothing about methods" in text and "Unfinished" not in text
    for title, first in (
        ("Speed", "method"),
        ("Fidelity to dense, same seed", "method"),
        ("Prompt following and quality", "measure"),
        ("Attention, call by call", "method"),
    ):
        lines = text.split(f"### {title}")[1].split("\n###")[0].strip().splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert rows[0].startswith(f"| {first} |") and len({row.count("|") for row in rows}) == 1
        if first == "method":
            assert [row.split()[1] for row in rows[2:]] == [n for n in labels if title == "Speed" or n != "dense"]
    assert (tmp_path / "out" / "runs" / "quick" / "report.html").is_file()

    # A kill after the second caption's third clip: the same command makes what is missing, and the dense clip again.
    results = tmp_path / "out" / "runs" / "quick" / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:12]) + lines[12][:40])
    made.clear()
    assert main(words) == 0 and made == ["dense", "radial", "noise-ceiling"]
    assert len(results.read_bytes().splitlines()) == 14


def test_captions_are_of_the_worlds_grammar_and_nest() -> None:
    some = paper.captions(48)
    assert len(set(some)) == 48 and some[:16] == paper.captions(16)
    assert all(read_caption(text) is not None for text in some)
    pairs = sum(" of a" in text for text in some)
    assert 12 <= pairs <= 36


def test_full_sizes_are_valid_and_larger() -> None:
    for name, size in paper.sizes(False).items():
        config = paper.config_of(size)
        assert len(config.prompts) == size.prompts and config.methods[-1].label == "noise-ceiling", name
        assert config.attention == size.attention <= size.prompts


def test_markdown() -> None:
    table = Table(["a", "b"], [[None, 0.123456], ["x|y", Interval(2.0, 1.0, 3.0, 4)], [3, Interval(2.0, 2.0, 2.0, 1)]])
    assert table.markdown().splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| - | 0.1235 |",
        "| x\\|y | 2 [1, 3] |",
        "| 3 | 2 |",
    ]


def test_wrong_places_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "methods.md").write_text("# My methods\n")
    (tmp_path / "used" / "runs" / "quick").mkdir(parents=True)
    (tmp_path / "used" / "runs" / "quick" / "notes.txt").write_text("mine")
    before = {path for path in tmp_path.rglob("*")}
    for words, match in (
        (["--out", "file"], "--out file is a file; name a folder"),
        (["--out", "docs"], "methods.md was not made by this command"),
        (["--out", "used"], "holds other files"),
        (["--out", "new", "--device", "warp"], "'warp' cannot be used"),
    ):
        assert main(["eval", "paper", "--quick", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and match in err and len(err.splitlines()) == 1
    assert {path for path in tmp_path.rglob("*")} == before
