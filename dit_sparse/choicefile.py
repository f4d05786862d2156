"""Files of choices that a method made before a run: held against grid and model, and refused in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def version_of(option: str, path: str | PathLike[str], made_by: str) -> tuple[str, int, int]:
    """A file's path, time of change and size: the key under which what was read of it is kept.

    Args:
        option: the name of the option, for the message.
        path: the file.
        made_by: what writes such files, for the message.

    Raises:
        ValueError: there is no such file; one line.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{option}={str(file)!r} is not a file; use one that {made_by} wrote")
    state = file.stat()
    return str(file), state.st_mtime_ns, state.st_size


def check_grid_and_block(about: Mapping[str, Any]) -> None:
    """Raise ValueError unless "grid" holds three whole numbers and "block_size" one, all at least 1."""
    sizes = [about["block_size"], *about["grid"]]
    if len(sizes) != 4 or any(type(n) is not int or n < 1 for n in sizes):
        raise ValueError("its grid and block_size are not whole numbers >= 1")


def check_made_for(what: str, advice: str, sizes: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise ValueError, in one line, unless what was made before fits what is asked for now.

    Args:
        what: "calibration", "the search".
        advice: what to do instead.
        sizes: (name, what it was made for, what is asked for or None when unknown); tuples are printed as 21x45x80.
    """
    for name, mine, theirs in sizes:
        if theirs is not None and mine != theirs:
            said, asked = ("x".join(map(str, x)) if isinstance(x, tuple) else x for x in (mine, theirs))
            raise ValueError(f"{what} was made for {name} {said}, not {asked}; {advice}")
