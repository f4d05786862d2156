"""`dit-sparse methods` and `dit-sparse doctor`."""

from __future__ import annotations

import dataclasses
from typing import Any

from .console import print_json, print_table


def list_methods(as_json: bool) -> None:
    """Print every method: its paper, its five parts, its options, and what it needs."""
    from ..processor import SETTINGS, methods

    found = methods()
    if as_json:
        print_json([dataclasses.asdict(method) for method in found])
        return
    rows = []
    for method in found:
        parts = {**method.parts, "needs": method.needs or "nothing"}
        paper = f"{method.title}, arXiv {method.arxiv}" if method.arxiv else method.title
        options = ", ".join(f"{name}={value}" for name, value in method.options.items())
        rows.append([method.name, paper, "\n".join(f"{name}: {text}" for name, text in parts.items()), options or "-"])
    print_table(["method", "paper", "parts", "options and defaults"], rows)
    print(f"Every method also takes {', '.join(SETTINGS)}.")


def show_hosts(as_json: bool) -> int:
    """Print every transformer class of the installed Diffusers: supported, or why not."""
    from ..walk import table, walk
    from .console import quiet_libraries

    quiet_libraries()
    rows = walk()
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print(table(rows))
    return 0


def show_doctor(as_json: bool) -> int:
    """Print the findings of `doctor`; returns 1 when something does not work, else 0."""
    from ..doctor import examine

    checks = examine()
    good = all(check.status != "problem" for check in checks)
    if as_json:
        print_json({"ok": good, "checks": [check.to_dict() for check in checks]})
        return 0 if good else 1
    marks = {"ok": "ok", "note": "-", "problem": "PROBLEM"}
    rows: list[list[Any]] = [[check.name, marks[check.status], check.detail] for check in checks]
    print_table(["part", "", "detail"], rows)
    for check in checks:
        if check.advice:
            print(f"{check.name}: {check.advice}")
    print("Everything that dit-sparse needs works." if good else "Something does not work: see above.")
    return 0 if good else 1
