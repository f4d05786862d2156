"""Every table of the README names the command that makes it, and the command makes those very figures."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from dit_sparse.eval import paper
from dit_sparse.eval.following import Following

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"`((?:dit-sparse|python|bash) [^`]+)`")


def tables() -> dict[str, tuple[str, list[list[str]]]]:
    """By the heading above and the first column's name: the text of the section, and the rows of cells."""
    found: dict[str, tuple[str, list[list[str]]]] = {}
    for section in re.split(r"^## ", README, flags=re.MULTILINE)[1:]:
        name, _, text = section.partition("\n")
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
            found[f"{name}: {rows[0][0]}"] = text, rows
    return found


def test_there_are_tables() -> None:
    assert {name.split(":")[0] for name in tables()} >= {"Commands", "Methods", "Hosts", "Results"}


@pytest.mark.parametrize("name", tables())
def test_every_table_names_a_command(name: str) -> None:
    text, _ = tables()[name]
    assert COMMAND.search(text), f"the README's table {name} says no command"


def test_every_figure_of_the_results_stands_beside_its_command() -> None:
    _, rows = tables()["Results: measured on"]
    assert rows[0] == ["measured on", "what", "figure", "command"]
    for row in rows[2:]:
        assert len(row) == 4 and re.search(r"\d", row[2]) and COMMAND.fullmatch(row[3]), row


@pytest.mark.parametrize("command", [text for text in COMMAND.findall(README) if not text.startswith("dit-sparse")])
def test_programs_exist(command: str) -> None:
    """Those beside `dit-sparse`, whose commands and options tests/packaging checks."""
    words = shlex.split(command)
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None
    else:
        assert (ROOT / words[1]).is_file()


def test_the_papers_parts_are_what_the_readme_says() -> None:
    parts = paper.parts(False)
    follow, pair = parts["following"], parts["compare"]
    assert isinstance(follow, Following) and isinstance(pair, paper.Pair)
    flat = " ".join(README.split())
    assert f"Of {follow.captions} held-out captions" in flat and f"dense attention, {follow.steps} steps" in flat
    assert f'`dit-sparse compare --long "{pair.prompt}"` on two cores, {pair.shape["steps"]} steps' in flat
    assert f"{pair.method} at density {pair.options['density']:.2f}".replace("0.", ".") in flat
    frames, height, width = (pair.shape[name] for name in ("frames", "height", "width"))
    fidelity = parts["fidelity"]
    assert isinstance(fidelity, paper.Fidelity)
    table = next(text for text in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE) if "density .30" in text)
    assert set(re.findall(r"`(\w+)`", table)) == set(fidelity.plan.methods or ())
    assert re.findall(r"density (\.\d+)", table) == [f"{density:.2f}"[1:] for density in fidelity.plan.densities]
    assert f"{fidelity.plan.captions} held-out captions, first fifth" in flat
    assert f"{(frames // 2 + 1) * (height // 16) * (width // 16):,} tokens" in flat


def test_figures_about_the_included_model_are_in_the_results() -> None:
    """What the README prints was measured: docs/results holds the same numbers."""
    results = (ROOT / "docs" / "results" / "foundation.md").read_text()
    said = re.search(r"held-out captions ([\d.]+) have the colours.*?([\d.]+) the shapes, ([\d.]+) the motion and "
                     r"([\d.]+) the relation", " ".join(README.split()))  # fmt: skip
    assert said is not None
    row = re.search(r"generated\*{0,2} \|(.*)", results)
    assert row is not None and [cell.strip(" *") for cell in row[1].split("|")][:4] == list(said.groups())
    speed, decibel = re.search(r"\| ([\d.]+)x at ([\d.]+) dB", README).groups()  # type: ignore[union-attr]
    assert f"{speed}x" in results and f"| {decibel} |" in results
