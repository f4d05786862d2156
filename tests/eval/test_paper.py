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

LABELS = ["dense", "svg", "rainfusion", "rainfusion2", "gna", "sol", "radial", "noise-ceiling"]
WORDS = ["eval", "paper", "--quick", "--device", "cpu", "--out", "out", "--json"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the clips as they are made."""
    labels: list[str] = []
    make = EvaluationWork._make
    monkeypatch.setattr(
        EvaluationWork, "_make", lambda self, job, label, key: labels.append(label) or make(self, job, label, key)
    )
    return labels


@pytest.mark.slow
def test_quick_tables_and_their_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, made: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(WORDS) == 0
    assert made == 2 * LABELS
    told = json.loads(capsys.readouterr().out)
    assert told["parts"] == dict.fromkeys(("following", "compare", "fidelity", "preview"), "finished")
    assert all(Path(file).is_file() for file in told["files"] + told["reports"])
    text = (tmp_path / "out" / "paper.md").read_text()
    assert "`dit-sparse eval paper --quick --out out --device cpu`" in text and "192 tokens, 3 steps" in text
    assert "CPU" in text and " UTC" in text and "says nothing about methods" in text and "Unfinished" not in text
    for title, first, rows in (
        ("## Prompt following", "clips", ["generated", "the", "drawn", "drawn"]),
        ("## Dense and sparse", "method", ["svg,"]),
        ("### Density near 0.5", "method", None),
        ("### Speed", "method", LABELS),
        ("### Fidelity to dense, same seed", "method", LABELS[1:]),
        ("### Prompt following and quality", "measure", None),
        ("### Attention, call by call", "method", LABELS[1:]),
    ):
        lines = [line for line in text.split(title)[1].split("\n#")[0].splitlines() if line.startswith("|")]
        assert lines[0].startswith(f"| {first} |") and len({line.count("|") for line in lines}) == 1
        assert rows is None or [line.split()[1] for line in lines[2:]] == rows
    lacking = text.split("Not measured:")[1]
    assert "- `ms_ssim`: reference is 128x128; this measure needs" in lacking
    assert "- `clip_score`: needs CLIP" in lacking
    check_numbers(json.loads((tmp_path / "out" / "paper.json").read_text()), text)
    for file in ("following/held-out.jpg", "compare/compare.jpg", "compare/compare.mp4", "preview/report.html"):
        assert (tmp_path / "out" / "runs" / file).stat().st_size > 500
        assert f"runs/{file}" in text

    # A kill after the second caption's third clip: the same command makes what is missing, and the dense clip again.
    results = tmp_path / "out" / "runs" / "preview" / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:14]) + lines[14][:40])
    made.clear()
    before = {file: (tmp_path / "out" / file).stat().st_mtime_ns for file in ("runs/following/following.json",
                                                                            "runs/compare/compare.json")}
    assert main(WORDS) == 0 and made == ["dense", "radial", "noise-ceiling"]
    assert len(results.read_bytes().splitlines()) == 16
    assert before == {file: (tmp_path / "out" / file).stat().st_mtime_ns for file in before}  # not made again


def check_numbers(numbers: dict, text: str) -> None:
    """The JSON file holds what the Markdown file shows, with date and hardware."""
    assert set(numbers["parts"]) == {"following", "compare", "fidelity", "preview"} and numbers["quick"] is True
    for part in numbers["parts"].values():
        assert part["state"] == "finished" and {"date", "device", "torch"} <= set(part["environment"])
        for table in part["tables"].values():
            assert f"| {' | '.join(table['columns'])} |" in text
    rows = numbers["parts"]["preview"]["tables"]["Speed"]["rows"]
    assert [row[0] for row in rows] == LABELS and set(rows[0][2]) == {"mean", "low", "high", "prompts"}


@pytest.mark.slow
def test_seconds_that_do_not_suffice_leave_the_rest_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, made: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "METHODS", paper.METHODS[:1])
    labels = ["dense", "svg", "noise-ceiling"]
    # Whatever this machine's speed: the time is over once a clip was made.
    clock = [0.0]
    for place in ("dit_sparse.commands.paper", "dit_sparse.eval.evaluation"):
        monkeypatch.setattr(f"{place}.time.monotonic", lambda: clock[0])
    make = EvaluationWork._make
    monkeypatch.setattr(EvaluationWork, "_make", lambda *a: clock.__setitem__(0, clock[0] + 50) or make(*a))
    assert main([*WORDS, "--part", "preview", "--seconds", "100"]) == 0
    assert made == labels  # the caption that was begun is finished for every method, the second is not begun
    states = json.loads(capsys.readouterr().out)["parts"]
    assert states["preview"] == "3 of 6 clips are missing, for want of time"
    assert states["following"] == states["compare"] == "not asked for"
    text = (tmp_path / "out" / "paper.md").read_text()
    assert "**Unfinished: 3 of 6 clips are missing" in text and "- compare: not asked for" in text
    assert "1 captions" in text
    made.clear()
    assert main([*WORDS, "--part", "preview"]) == 0 and made == labels
    assert "Unfinished" not in (tmp_path / "out" / "paper.md").read_text()
    # A part made by itself leaves the tables of those made before.
    assert main([*WORDS, "--part", "compare"]) == main([*WORDS, "--part", "fidelity"]) == 0
    capsys.readouterr()
    assert main([*WORDS, "--part", "following"]) == 0
    states = json.loads(capsys.readouterr().out)["parts"]
    assert states == dict.fromkeys(("following", "compare", "fidelity", "preview"), "finished") and made == labels
    text = (tmp_path / "out" / "paper.md").read_text()
    assert text.count("\n## ") == 4 and "not asked for" not in text


def test_what_the_seconds_do_not_allow_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.commands.paper import _Maker

    maker = _Maker(tmp_path, ["dit-sparse"], "cpu", seconds=3.0)
    for name, part in paper.parts(False).items():
        if name != "following":  # the README's first figures are made in any case
            assert "the same command makes it" in str(maker.make(name, part))
    assert list(tmp_path.iterdir()) == []


def test_captions_are_of_the_worlds_grammar_and_nest() -> None:
    some = paper.captions(48)
    assert len(set(some)) == 48 and some[:16] == paper.captions(16)
    assert all(read_caption(text) is not None for text in some)
    pairs = sum(" of a" in text for text in some)
    assert 12 <= pairs <= 36


def test_full_parts_are_valid_and_the_most_wanted_come_first() -> None:
    parts = paper.parts(False)
    assert list(parts)[:3] == ["following", "compare", "fidelity"]  # what the README prints
    for name, part in parts.items():
        if isinstance(part, paper.Size):
            config = paper.config_of(part)
            assert len(config.prompts) == part.prompts and config.methods[-1].label == "noise-ceiling", name
            assert config.attention == part.attention <= part.prompts
    assert {type(part) for part in paper.parts(True).values()} == {type(part) for part in parts.values()}


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
    (tmp_path / "docs" / "paper.md").write_text("# My methods\n")
    (tmp_path / "used" / "runs" / "preview").mkdir(parents=True)
    (tmp_path / "used" / "runs" / "preview" / "notes.txt").write_text("mine")
    before = {path for path in tmp_path.rglob("*")}
    for words, match in (
        (["--out", "file"], "--out file is a file; name a folder"),
        (["--out", "docs"], "paper.md was not made by this command"),
        (["--out", "used"], "holds other files"),
        (["--out", "new", "--device", "warp"], "'warp' cannot be used"),
        (["--out", "new", "--part", "speed"], "'speed' is unknown; use one of following, compare, fidelity, preview"),
    ):
        assert main(["eval", "paper", "--quick", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and match in err and len(err.splitlines()) == 1
    assert {path for path in tmp_path.rglob("*")} == before
