"""Every command has an example that parses, `--json` where it prints a table, and the documented exit codes."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dit_sparse.cli import INTERRUPTED, app, main

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text()


def commands(group: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """All commands by their full names, such as "eval run"."""
    for word, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{word} ")
        else:
            yield name + word, command


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_parses(name: str, capsys: pytest.CaptureFixture) -> None:
    example = COMMANDS[name].epilog.removeprefix("Example: ")
    words = shlex.split(example)
    assert words[:1 + len(name.split())] == ["dit-sparse", *name.split()]
    COMMANDS[name].make_context(name, words[1 + len(name.split()):])
    assert main([*name.split(), "--help"]) == 0
    assert f"Example: {words[0]} {name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"app"}))
def test_what_prints_a_table_prints_json_too(name: str) -> None:
    assert "--json" in {option for parameter in COMMANDS[name].params for option in parameter.opts}


def test_all_commands_are_documented_with_their_examples() -> None:
    table = re.findall(r"^\| `dit-sparse ([a-z -]+)` \|.*\| `(.*)` \|$", DOCUMENT, re.MULTILINE)
    assert {name: f"Example: {example}" for name, example in table} == {n: c.epilog for n, c in COMMANDS.items()}


def test_exit_codes_are_documented() -> None:
    section = DOCUMENT.split("## Exit codes")[1]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)] == [0, 1, 2, INTERRUPTED]


def test_done_is_0_wrong_input_is_2_and_interrupted_is_130(dit_sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dit_sparse("methods").code == 0
    assert dit_sparse("no-such-command").refusal()
    assert dit_sparse("methods", "--no-such-option").refusal()

    def interrupted(as_json: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dit_sparse.commands.listing.list_methods", interrupted)
    done = dit_sparse("methods")
    assert done.code == INTERRUPTED and "interrupted" in done.err


def test_doctor_says_1_when_something_does_not_work(dit_sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse import doctor

    broken = doctor.Check("part", "problem", "does not work")
    monkeypatch.setattr(doctor, "examine", lambda: [broken])
    assert dit_sparse("doctor").code == 1 and dit_sparse("doctor", "--json").json["ok"] is False


def test_a_defect_is_not_swallowed(dit_sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(as_json: bool) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("dit_sparse.commands.listing.list_methods", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        dit_sparse("methods")


TABLES = ["methods", "doctor", "doctor --hosts", "inspect radial --grid 5x7x9", "eval measures",
          "eval blind-spots --size 32 --frames 3 --measure psnr"]


@pytest.mark.parametrize("words", TABLES)
def test_json_is_one_document_and_nothing_else(dit_sparse, words: str) -> None:
    assert dit_sparse(*words.split(), "--json").json


def test_json_of_runs_and_scores(dit_sparse, tiny_folder: Path, tmp_path: Path) -> None:
    config = {"pipeline": str(tiny_folder), "methods": ["svg"], "prompts": ["a red circle"], "steps": 2,
              "size": "64x32x5", "guidance": 1, "measures": ["psnr"]}
    (tmp_path / "small.json").write_text(json.dumps(config))
    assert dit_sparse("eval", "run", "small.json", "--output", "run", "--json").json["finished"] == 2
    shown = dit_sparse("eval", "show", "run", "--json").json
    assert shown["planned"] == 2 and [row["label"] for row in shown["methods"]] == ["dense", "svg"]
    (tmp_path / "scores.json").write_text(json.dumps({"scene": [0.4111, []]}))
    assert dit_sparse("eval", "import-vbench", "scores.json", "--json").json


def test_defaults_in_the_help_are_those_of_the_included_model() -> None:
    from dit_sparse import SparseProc
    from dit_sparse.commands.settings import PREVIEW
    from dit_sparse.pipelines.embedded import DEFAULTS

    texts = {parameter.name: parameter.help for parameter in COMMANDS["generate"].params}
    assert texts["steps"].endswith(f"own: {DEFAULTS['steps']}.")
    assert texts["guidance"].endswith(f"own: {DEFAULTS['guidance_scale']:g}.")
    assert texts["size"].endswith(f"own: {DEFAULTS['width']}x{DEFAULTS['height']}x{DEFAULTS['frames']}.")
    assert f"else {SparseProc.default_method};" in texts["method"]
    assert texts["density"].endswith(f"own: {PREVIEW['density']:g}.")
