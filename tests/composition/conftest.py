"""The options of this folder: `pytest tests/composition --full-matrix`, `pytest tests/composition --write-docs`."""

import pytest

from tests.composition.cases import Case, cover, product


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two flags; both need the folder's name on the command line."""
    group = parser.getgroup("composition")
    group.addoption("--full-matrix", action="store_true", help="run the full product, not only a cover of all pairs")
    group.addoption("--write-docs", action="store_true", help="write the generated part of docs/compatibility.md")


def cases(config: pytest.Config) -> list[Case]:
    """What this run composes."""
    every = product()
    return every if config.getoption("full_matrix", default=False) else cover(every)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `case` runs once for each."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(metafunc.config), ids=str)
