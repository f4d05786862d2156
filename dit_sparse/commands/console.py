"""How commands speak: results on standard output, everything else on standard error, errors in one line."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Something the user can put right: printed in one line, exit code 2."""


@contextmanager
def refusing(*kinds: type[BaseException], prefix: str = "") -> Iterator[None]:
    """Turn errors of these kinds (ValueError when none is named) into a UserError of one line."""
    caught = kinds or (ValueError,)
    try:
        yield
    except caught as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(prefix + lines[0]) from error


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"dit-sparse: warning: {text}", file=sys.stderr)


def quiet_libraries() -> None:
    """No network for models on this disk, and no progress bars or advice from the libraries below us."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def print_json(value: Any) -> None:
    """Print one JSON document; numbers that JSON does not know become null."""
    readable = (sys.stdout.encoding or "").lower().startswith("utf")  # elsewhere JSON's own escapes
    print(json.dumps(_plain(value), indent=2, ensure_ascii=not readable))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print a table with headings; columns of numbers are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        number = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if item is None else str(item)) for item in row))
    _output().print(table)


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """Print names and values, one pair a line; a list takes one line for each item."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        for line, item in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            table.add_row(Text(name if line == 0 else "", style="bold"), Text(str(item)))
    _output().print(table)


def _output() -> Any:
    from rich.console import Console

    # A pipe has no width of its own: lines are then not folded.
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=160)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error when that is a terminal; yields update(done, steps)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, steps: int) -> None:
            bar.update(task, completed=done, total=steps)

        yield update


@contextmanager
def fraction_bar(label: str) -> Iterator[Callable[[float, str, float | None], None]]:
    """A progress bar for work that says itself how far it is; yields update(share done, text, seconds left or None)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[left]}")]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=1.0, left="")

        def update(share: float, text: str, seconds_left: float | None) -> None:
            left = "" if seconds_left is None else f"about {_duration(seconds_left)} left"
            bar.update(task, completed=share, description=text, left=left)

        yield update


def _duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
