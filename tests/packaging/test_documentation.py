"""What the README and docs/ say is true: code blocks run, commands and options exist, links lead somewhere."""

import importlib.util
import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.documents import FILES, ROOT, Block, blocks, blocks_of, commands, stand_in

README = (ROOT / "README.md").read_text()

# Fragments that a reader puts into code of their own: what they mean there, and blocks that cannot run here, with why.
PIPE = """
from diffusers import WanPipeline
from dit_sparse import SparseProc
pipe, prompt = WanPipeline.from_pretrained("tiny"), "a red circle"
"""
BEFORE = {
    "README.md": PIPE,
    "docs/faq.md": PIPE,
    "docs/methods.md": PIPE,
    "docs/routing.md": """
import torch
from dit_sparse.blockmask import BlockLayout
from dit_sparse.routing import Rule, route
query = key = torch.randn(1, 591 * 32, 1, 8)
layout, scale = BlockLayout.raster(591 * 32, 32), 8 ** -0.5
""",
    "docs/inner-filter.md": """
import torch
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels.skip import skip_attention
from dit_sparse.methods.base import Plan
from dit_sparse.operators import SkipBlocks
query = key = value = torch.randn(1, 128, 2, 16)
layout = BlockLayout.raster(128, 32)
mask = BlockMask.from_dense(torch.ones(1, 1, 4, 4, dtype=torch.bool), layout, layout)
thresholds = torch.tensor([[0.01]])
""",
    "docs/soft-blocks.md": """
import torch
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels.soft import soft_attention
from dit_sparse.methods.base import Plan
from dit_sparse.operators import Soft
from dit_sparse.scoring import pool
query = key = value = torch.randn(1, 128, 2, 16)
layout = BlockLayout.raster(128, 32)
mask = BlockMask.from_dense(torch.eye(4, dtype=torch.bool)[None, None], layout, layout)
mean_key = mean_value = pool(key, layout)
""",
}
NOT_RUN = {
    "gradio_client": "talks to a page that is served: tests/app serves one",
    "enable_parallelism(": "needs several processes: tests/bridge/test_ulysses.py starts two",
}


def run_python(file: Path, told: list[Any]) -> None:
    """The Python blocks of a file one after the other, as a reader would, in one namespace."""
    module = types.ModuleType("documentation")
    sys.modules["documentation"] = module  # dataclasses look their module up
    try:
        exec(BEFORE.get(str(file.relative_to(ROOT)), ""), module.__dict__)
        for block in (block for block in blocks_of(file) if block.language == "python"):
            if not any(text in block.text for text in NOT_RUN):
                # As many lines in front as in the file: a traceback then names the line of the document.
                exec(compile("\n" * block.line + block.text, block.name, "exec", dont_inherit=True), module.__dict__)
    finally:
        del sys.modules["documentation"]
    for summary in told:
        assert not summary.fallbacks, summary


WITH_PYTHON = sorted({block.file for block in blocks("python")})


@pytest.mark.parametrize("file", WITH_PYTHON, ids=lambda file: file.name)
def test_python_blocks_run(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    told = stand_in(monkeypatch, tmp_path)
    run_python(file, told)
    if file.name in ("README.md", "quickstart.md"):
        assert told and any(summary.sparse_calls for summary in told)


def test_what_is_not_run_is_there() -> None:
    text = "".join(block.text for block in blocks("python"))
    assert all(mark in text and why for mark, why in NOT_RUN.items())


# -- commands ------------------------------------------------------------------------------------------------------


def command_of(words: list[str], *, group: bool = False) -> tuple[Any, list[str]]:
    """The command (or, when allowed, the group of them) that these words call, and the words left for it."""
    import typer

    from dit_sparse.cli import app

    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if group and not words:
            return command, words
        assert words and words[0] in command.commands, f"no command {' '.join(words[:1])!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options_exist(words: list[str], source: str, where: str) -> None:
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert f'"{option}"' in source, f"{where} takes no {option}"


def check_command(line: str) -> None:
    """The program exists and takes these options; `dit-sparse` also parses all of them."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "compute-sanitizer":
        words = words[words.index("python"):]
    program, rest = words[0], words[1:]
    if program in ("dit-sparse", "./dit-sparse"):
        command, rest = command_of(rest)
        command.make_context(command.name, list(rest))
    elif program in ("python", "torchrun") and rest[0] == "-m":
        spec = importlib.util.find_spec(rest[1])
        assert spec is not None and spec.origin is not None, rest[1]
        options_exist(rest[2:], Path(spec.origin).read_text(), rest[1])
    elif program in ("python", "torchrun", "bash"):
        script = next(word for word in rest if not word.startswith("-"))
        assert (ROOT / script).is_file(), script
        options_exist(rest[rest.index(script) + 1:], (ROOT / script).read_text(), script)
    elif program == "pip":
        check_pip(rest)
    elif program == "git" or program == "cd":
        pass
    else:
        assert program.startswith("./") and (ROOT / program).stat().st_mode & 0o111, f"{program} is no program"


def check_pip(words: list[str]) -> None:
    """Extras and constraint files that are named exist."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for before, word in zip(words, words[1:], strict=False):
        named = re.fullmatch(r"\.(?:\[(.*)\])?", word)
        if before == "-c":
            assert (ROOT / word).is_file(), word
        elif named is not None:
            assert set(filter(None, (named[1] or "").split(","))) <= set(extras), word


@pytest.mark.parametrize("block", blocks("sh", "bash"), ids=lambda block: block.name)
def test_shell_blocks_name_what_exists(block: Block) -> None:
    for line in commands(block):
        check_command(line)


def test_commands_in_the_text_have_their_options() -> None:
    for file in FILES:
        for text in re.findall(r"`(?:\./)?dit-sparse ([a-z][^`]*)`", file.read_text()):
            command, rest = command_of(text.split(), group=True)
            known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
            for word in rest:
                if word.startswith("--"):
                    assert word.partition("=")[0] in known, f"{file.name}: dit-sparse {text}"


@pytest.mark.parametrize("block", blocks("json", "yaml"), ids=lambda block: block.name)
def test_data_blocks_are_valid(block: Block) -> None:
    if block.language == "json":
        assert json.loads(block.text) is not None
        return
    content = pytest.importorskip("yaml").safe_load(block.text)
    if "methods" in content:
        from dit_sparse.eval.config import parse_config

        assert parse_config(content).methods


# -- tables and links ----------------------------------------------------------------------------------------------


def test_every_command_is_described_and_exists() -> None:
    from dit_sparse.cli import app

    listed = (ROOT / "docs" / "commands.md").read_text()
    groups = {group.name for group in app.registered_groups}
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    described = set(re.findall(r"`dit-sparse ([a-z]+)", listed))
    assert commands <= described <= commands | groups
    assert set(re.findall(r"`dit-sparse ([a-z]+)", README)) <= commands | groups


def test_every_method_is_described_and_exists() -> None:
    from dit_sparse.processor import methods

    names = {method.name for method in methods()}
    section = README.split("## Methods")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z0-9_]+)`", section, re.MULTILINE)) <= names
    table = (ROOT / "docs" / "methods.md").read_text().split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z0-9_]+)`", table, re.MULTILINE)) == names


def test_every_family_is_described() -> None:
    from dit_sparse.families import FAMILIES

    section = README.split("## Hosts")[1].split("\n## ")[0].lower().replace(" ", "").replace("-", "").replace(".", "")
    for family in FAMILIES:
        stem = family.name.rstrip("0123456789")
        assert stem in section, f"the README's table of hosts lacks {family.name}"


@pytest.mark.parametrize("name", ["choosing.md", "quickstart.md", "faq.md"])
def test_quoted_figures_are_in_the_files_that_are_named(name: str) -> None:
    """What these pages say was measured stands in the file of results or benchmarks that the section links."""
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / name).read_text(), flags=re.DOTALL)
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        files = re.findall(r"\]\(((?:results|benchmarks)/[^)#]+)", section)
        source = "\n".join((ROOT / "docs" / file).read_text() for file in set(files))
        said = re.sub(r"`[^`]*`|\]\([^)]*\)", "", section)
        figures = re.findall(r"\d*\.\d+(?=x| dB| s\b| ms| GiB| %| times)", said)
        for figure in figures:
            assert files, f"{name} says {figure} under {section.splitlines()[0]!r} without a file"
            found = re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", source)
            assert found, f"{name}: {figure} is not in {set(files)}"


@pytest.mark.parametrize("file", [*FILES, ROOT / "CHANGELOG.md"], ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", file.read_text()):
        assert (file.parent / target).exists(), f"{file.name} links to {target}"


def test_tests_that_are_named_exist() -> None:
    for file in FILES:
        for name in re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", file.read_text()):
            path = ROOT / name[0]
            assert path.exists(), f"{file.name} names {name[0]}"
            assert not name[1] or f"def {name[1]}(" in path.read_text(), f"{file.name} names {name[0]}::{name[1]}"


def test_quick_commands_are_executable() -> None:
    for name in re.findall(r"^\./([a-z-]+)", README, re.MULTILINE):
        assert (ROOT / name).stat().st_mode & 0o111, name
