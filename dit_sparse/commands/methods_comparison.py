"""`dit-sparse eval methods`: every method on the included model at the same densities."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import UserError, print_json, print_pairs, print_table, progress, quiet_libraries, refusing
from .request import check_writable
from .run import check_device

if TYPE_CHECKING:
    from ..eval.methods import Comparison, Plan, Work


def compare_methods(
    out: Path,
    *,
    quick: bool = False,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    methods: list[str] | None = None,
    seconds: float | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """Make and measure what is missing in the folder, within the seconds given, and write the tables of what is there.

    Args:
        out: folder, made or continued.
        quick: the size that a CPU makes in seconds.
        steps, guidance, batch, methods: in place of the plan's own; see `eval.methods.Plan`.
        seconds: no batch is begun after so many; 0 makes none and writes the tables of what is there; None: no limit.
        device: None takes the GPU when there is one.
        as_json: print files and state instead of tables.
    """
    plan = _plan(quick, steps, guidance, batch, methods)
    check_device(device)
    from ..eval.methods import MARK, RESULTS, TABLES

    prepare(out, MARK, RESULTS, TABLES)
    words = ["dit-sparse", "eval", "methods", "--out", str(out), *(["--quick"] if quick else [])]
    given = {"steps": steps, "guidance": guidance, "batch": batch, "device": device}
    words += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    words += [word for name in methods or [] for word in ("--method", name)]
    run, work, files = make_comparison(plan, out, shlex.join(words), quick, seconds, device)
    _tell(run, files, as_json)
    refuse_dead(work)


def make_comparison(
    plan: Plan, out: Path, command: str, quick: bool, seconds: float | None, device: str | None
) -> tuple[Comparison, Work | None, list[Path]]:
    """Make what is missing of a plan, and the folder's tables.

    Args:
        plan: what is made.
        out: a folder that `prepare` found right.
        command: that makes it, for the tables.
        quick, seconds, device: as in `compare_methods`.

    Returns:
        What is there, what made it (None where nothing was to be made), and the files.
    """
    from ..eval.attention_time import read_times
    from ..eval.bed import Bed
    from ..eval.evaluation import digest, environment
    from ..eval.methods import Comparison, Work, deadline
    from ..eval.methods_tables import read_environment, write
    from ..pipelines.load import load, locate

    stop = deadline(seconds)
    with refusing():
        times = read_times()
        quiet_libraries()
        run = Comparison(plan, out, digest(locate("embedded")))
        run.load()
        there = read_environment(out)
        pipe = None if seconds == 0 else load("embedded", device=device)
    work = None if pipe is None else Work(Bed(pipe, plan.frames, plan.side, plan.steps, plan.guidance), plan)
    try:
        if work is not None:
            with progress("batches") as update:
                run.make(work, stop=stop, bar=update)
    finally:  # also when it is interrupted: what is there makes tables
        # Where nothing was made, the numbers still belong to the machine that made them.
        where = environment(pipe) if work is not None and (work.made or not there) else there
        with refusing(OSError, prefix=f"--out {out}: "):
            files = write(run, out, times, command=command, environment=where, quick=quick)
    return run, work, files


def _tell(run: Comparison, files: list[Path], as_json: bool) -> None:
    from ..eval.attention_time import read_times
    from ..eval.methods_tables import COLUMNS, console_rows, sections

    done = run.complete()
    made = {"finished": done, "results": len(run.results), "files": [str(file) for file in files]}
    if as_json:
        print_json(made)
    else:
        for each in sections(run, read_times()):
            print_table(COLUMNS, console_rows(each), title=each.title)
        print_pairs({"results": len(run.results), "finished": "yes" if done else "no; the same command goes on",
                     "written": made["files"]})


def refuse_dead(work: Work | None) -> None:
    """Say so where the GPU gave up on the way."""
    if work is not None and work.dead:
        raise UserError("the GPU stopped answering; start the same command again, and it goes on behind that batch")


def _plan(quick: bool, steps: int | None, guidance: float | None, batch: int | None, methods: list[str] | None) -> Plan:
    """What is to be made, checked."""
    with refusing():
        from ..eval.method_speed import comparable
        from ..eval.methods import QUICK, Plan

        for name in methods or []:
            if name not in comparable():
                raise ValueError(f"--method {name!r} cannot be compared; use some of {', '.join(comparable())}")
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "batch": batch,
                             "methods": tuple(dict.fromkeys(methods)) if methods else None}
    changed = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(QUICK if quick else Plan(), **changed)


def prepare(out: Path, mark: str, results: str, tables: str) -> None:
    """The folder exists and takes files; tables that are somebody's own are not touched.

    Args:
        out: of --out.
        mark: first words of tables that the command made.
        results, tables: names of its files.
    """
    from ..eval.run import finished

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    file = out / tables
    if file.exists() and not (file.is_file() and file.read_text(encoding="utf-8", errors="replace").startswith(mark)):
        raise UserError(f"--out {out}: {tables} was not made by this command; name another folder")
    with refusing(OSError, prefix=f"--out {out}: "):
        out.mkdir(parents=True, exist_ok=True)
    with refusing():
        finished(out / results)
    check_writable(out / tables, out / results, argument="--out")
