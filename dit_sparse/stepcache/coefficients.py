"""Numbers that MagCache and TeaCache need: published ones, those of the included model, and files of a calibration."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from ..choicefile import reason_of
from ..modelid import config_hash
from .names import CALIBRATED, MAGCACHE

FORMAT = 1
NUMBERS = {"magcache": "ratios", "teacache": "coefficients"}


@cache
def _shipped() -> tuple[dict[str, Any], ...]:
    """Everything in data/: files of published numbers ("models") and of calibrations ("config")."""
    found = []
    for file in sorted((files(__package__) / "data").iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".json"):
            found.append(json.loads(file.read_text(encoding="utf-8")))
    return tuple(found)


def published(kind: str) -> Iterator[dict[str, Any]]:
    """The published sets of a cache, one row for each model.

    Args:
        kind: "magcache" or "teacache".
    """
    for document in _shipped():
        if document["cache"] == kind:
            yield from document.get("models", ())


def command(kind: str, model: Any) -> str:
    """The command that makes a model's own numbers."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "").rstrip("/")
    name = path.removesuffix("/transformer") or "MODEL"
    return f"dit-sparse calibrate {kind} --model {name} --prompts FILE --output {kind}.json"


def find(kind: str, model: Any, named: str | None = None) -> Mapping[str, Any]:
    """The numbers of a model.

    Args:
        kind: "magcache" or "teacache".
        model: the transformer.
        named: the name of a published set, or the path of a file that `dit-sparse calibrate` wrote; None: the set that
            was made for this very configuration, or published for it.

    Returns:
        "ratios" or "coefficients", and what else belongs to them ("threshold", "signal", ...).

    Raises:
        ValueError: there are none, or several; one line with the command that makes them.
    """
    if named is not None:
        return _file(kind, Path(named), model) if named.endswith(".json") else _named(kind, named)
    own = config_hash(model)
    for document in _shipped():
        if document["cache"] == kind and document.get("config") == own:
            return document
    rows = [row for row in published(kind) if row.get("chosen", True) and _fits(row, model)]
    if len(rows) == 1:
        return rows[0]
    if rows:
        names = " or ".join(repr(row["name"]) for row in rows)
        raise ValueError(f"step_cache={kind!r}: several models share this configuration; name yours, {names}, in "
                         f"enable(..., step_cache='{kind}:{rows[0]['name']}')")
    raise ValueError(f"step_cache={kind!r} needs numbers measured on this {type(model).__name__} (configuration "
                     f"{own}), and there are none; make them: {command(kind, model)}; then step_cache='{kind}.json'")


def _fits(row: Mapping[str, Any], model: Any) -> bool:
    config = model.config
    return row["class"] == type(model).__name__ and all(
        config.get(name, _MISSING) == value for name, value in row["match"].items())


_MISSING = object()


def _named(kind: str, name: str) -> Mapping[str, Any]:
    rows = {row["name"]: row for row in published(kind)}
    if name not in rows:
        raise ValueError(f"step_cache: {kind} has no set {name[:60]!r}; use one of {', '.join(rows)}, or a .json file")
    return rows[name]


def kind_of_file(path: str | PathLike[str]) -> str:
    """Which cache a file of a calibration is for.

    Raises:
        ValueError: the file cannot be read; one line.
    """
    return str(_read(Path(path))["cache"])


def _read(path: Path) -> dict[str, Any]:
    """A file of a calibration, checked."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"not written by `dit-sparse calibrate` (format {FORMAT})")
        kind = document.get("cache")
        if kind not in CALIBRATED:
            raise ValueError(f"its cache is {kind!r}, not one of {', '.join(CALIBRATED)}")
        if not isinstance(document.get("config"), str):
            raise ValueError("it does not say which model it was made for")
        _check_numbers(document.get(NUMBERS[kind]), positive=kind == MAGCACHE)
    except (OSError, ValueError) as error:
        raise ValueError(f"step_cache={str(path)!r}: {reason_of(error)}") from error
    return document


def is_number(x: Any) -> bool:
    """Whether x is a finite number."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


def are_numbers(values: Any) -> bool:
    """Whether values is a list or tuple of finite numbers, at least one."""
    return isinstance(values, (list, tuple)) and bool(values) and all(map(is_number, values))


def _check_numbers(values: Any, positive: bool) -> None:
    if not are_numbers(values) or (positive and min(values) <= 0):
        raise ValueError("its numbers are not finite" + (" and positive" if positive else ""))


def _file(kind: str, path: Path, model: Any) -> Mapping[str, Any]:
    document = _read(path)
    if document["cache"] != kind:
        raise ValueError(f"step_cache={str(path)!r} is a calibration of {document['cache']}, not of {kind}")
    if document["config"] != config_hash(model):
        raise ValueError(f"step_cache={str(path)!r} was made for another model (configuration {document['config']}, "
                         f"not {config_hash(model)}); make this one's: {command(kind, model)}")
    return document


def fitted(points: Sequence[tuple[float, float]], degree: int = 4) -> list[float]:
    """Least-squares polynomial through (change of the signal, change of the output), the highest power first.

    Where there are fewer different signals than coefficients, the degree is lowered to what they decide.

    Args:
        points: of all steps, branches and prompts.
        degree: 4 as in TeaCache (arXiv 2411.19108).

    Raises:
        ValueError: there are no points.
    """
    import numpy as np

    if not points:
        raise ValueError("no step followed another: a calibration needs at least 2 steps")
    x, y = np.asarray(points, dtype=np.float64).T
    different = len(np.unique(x.round(12)))
    # In the unit interval: the powers of small changes are otherwise too far apart for the solver.
    scale = float(np.abs(x).max()) or 1.0
    found = np.polynomial.polynomial.polyfit(x / scale, y, min(degree, different - 1))
    powers = [float(c) / scale**i for i, c in enumerate(found)]
    return [0.0] * (degree + 1 - len(powers)) + powers[::-1]
