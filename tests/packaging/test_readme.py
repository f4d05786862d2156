"""The README says what is true of the command line and of the package."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_every_command_is_described_and_exists() -> None:
    from dit_sparse.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    described = set(re.findall(r"`dit-sparse ([a-z]+)", README))
    groups = {group.name for group in app.registered_groups}
    assert commands <= described <= commands | groups


def test_every_method_is_described_and_exists() -> None:
    from dit_sparse.processor import methods

    section = README.split("## Methods")[1].split("\n## ")[0]
    described = set(re.findall(r"^\| `([a-z0-9]+)`", section, re.MULTILINE))
    assert described == {method.name for method in methods()}


def test_every_family_is_described() -> None:
    from dit_sparse.families import FAMILIES

    section = README.split("## Hosts")[1].split("\n## ")[0].lower().replace(" ", "").replace("-", "").replace(".", "")
    for family in FAMILIES:
        stem = family.name.rstrip("0123456789")
        assert stem in section, f"the README's table of hosts lacks {family.name}"


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(file: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / file).read_text()):
        assert (ROOT / target).exists(), f"{file} links to {target}"


def test_quick_commands_are_executable() -> None:
    for name in re.findall(r"^\./([a-z-]+)", README, re.MULTILINE):
        assert (ROOT / name).stat().st_mode & 0o111, name
