"""A tiny model for the commands, and a way to run them as a user does, without a process for each."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_wan import save_tiny_wan


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline; copy it before changing it."""
    return save_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("copy") / "wan"))


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def files(self) -> set[str]:
        return {file.name for file in self.folder.iterdir()}

    def refusal(self) -> str:
        """The one line of a refusal; nothing else happened."""
        assert self.code == 2, (self.out, self.err)
        lines = [line for line in self.err.splitlines() if not line.startswith("dit-sparse: warning:")]
        assert len(lines) == 1 and lines[0].startswith("dit-sparse: error: "), self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def dit_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., Done]:
    """dit_sparse("generate", "a red circle", ...) in an empty folder."""
    from dit_sparse.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words: Any) -> Done:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Done(code, out, err, tmp_path)

    return run
