"""One tiny Wan for this folder's tests."""

from pathlib import Path

import pytest

from tests.tiny_wan import build_tiny_wan, save_tiny_wan


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline; copy it before changing it."""
    return save_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="session")
def tiny_pipe():
    """A tiny pipeline with random weights."""
    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe
