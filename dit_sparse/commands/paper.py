"""`dit-sparse eval paper`: make the repository's own tables."""

from __future__ import annotations

import shlex
from pathlib import Path

from .console import print_json, print_pairs, refusing
from .evaluation import run_config
from .request import check_writable
from .run import check_device


def paper(out: Path, *, quick: bool = False, device: str | None = None, as_json: bool = False) -> None:
    """Make what is missing of every size, then write all tables into one file.

    Args:
        out: folder, made or continued.
        quick: the size that a CPU makes in under a minute.
        device: None takes the GPU when there is one.
        as_json: print files instead of a table.
    """
    with refusing(ValueError, OSError):
        from ..eval.paper import RUNS, TABLES, check_folder, config_of, sizes, write_tables
        from ..eval.results import load_evaluation

        check_folder(out)
    check_device(device)
    with refusing(OSError, prefix=f"--out {out}: "):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out / TABLES, argument="--out")
    words = ["dit-sparse", "eval", "paper", *(["--quick"] if quick else []), "--out", str(out)]
    words += ["--device", device] if device else []
    done = {}
    for name, size in sizes(quick).items():
        folder = out / RUNS / name
        run_config(config_of(size, device), folder, words)
        done[name] = load_evaluation(folder)
    with refusing(OSError, prefix=f"--out {out}: "):
        file = write_tables(out, done, shlex.join(words), quick)
    pages = [str(out / RUNS / name / "report.html") for name in done]
    counts = {name: len(run.entries) for name, run in done.items()}
    if as_json:
        print_json({"tables": str(file), "reports": pages, "clips": counts})
    else:
        print_pairs({"clips": sum(counts.values()), "written": [str(file), *pages]})
