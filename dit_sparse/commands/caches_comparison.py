"""`dit-sparse eval caches`: every step cache on the included model, alone and beside the default sparse method."""

from __future__ import annotations

import shlex
from pathlib import Path

from .console import print_json, print_pairs, print_table, progress, quiet_libraries, refusing
from .methods_comparison import prepare
from .run import check_device

SIZES = ("preview", "long")  # that share a folder


def compare_caches(
    out: Path,
    *,
    size: str = "preview",
    quick: bool = False,
    captions: int | None = None,
    seconds: float | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """Make and measure what is missing in the folder, within the seconds given, and write the tables of what is there.

    Args:
        out: folder, made or continued; both sizes may lie in one.
        size: "preview" or "long".
        quick: two caches at a size that a CPU makes in seconds, in place of `size`.
        captions: of this size, in place of the plan's own.
        seconds: no caption is begun after so many; 0 makes none and writes the tables of what is there; None: no limit.
        device: None takes the GPU when there is one.
        as_json: print files and state instead of tables.
    """
    with refusing():
        if size not in SIZES:
            raise ValueError(f"--size {size!r} is unknown; use one of {', '.join(SIZES)}")
    check_device(device)
    from ..eval.caches import COLUMNS, MARK, RESULTS, TABLES, Caches, Work, plan_of, table, write

    prepare(out, MARK, RESULTS, TABLES)
    from ..eval.evaluation import digest, environment
    from ..eval.methods import deadline
    from ..eval.methods_tables import read_environment
    from ..eval.tuned_tables import console_rows
    from ..pipelines.load import load, locate

    stop = deadline(seconds)
    with refusing():
        quiet_libraries()
        there = read_environment(out)
        pipe = None if seconds == 0 else load("embedded", device=device)
        kind = there.get("kind", "cpu") if pipe is None else pipe.device.type
        weights = digest(locate("embedded"))
        asked = "quick" if quick else size
        every = {name: Caches(plan_of(name, captions if name == asked else None), out, weights, kind)
                 for name in (("quick",) if quick else SIZES)}
        chosen = every[asked]
    words = ["dit-sparse", "eval", "caches", "--out", str(out), *(["--quick"] if quick else ["--size", size])]
    given = {"captions": captions, "device": device}
    words += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    work = None
    try:
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)
            work = Work(pipe, chosen.plan)
            with progress("clips") as update:
                chosen.make(work, stop=stop, bar=update)
    finally:  # also when it is interrupted: what is there makes tables
        # Where nothing was made, the numbers still belong to the machine that made them.
        new = work is not None and (work.made or not there)
        where = {**environment(pipe), "kind": kind} if new else there
        with refusing(OSError, prefix=f"--out {out}: "):
            files = write(list(every.values()), out, command=shlex.join(words), environment=where)
    done = chosen.complete
    if as_json:
        print_json({"finished": done, "files": [str(file) for file in files]})
        return
    for name, one in every.items():
        if rows := one.rows():
            print_table(COLUMNS, console_rows(table(rows)), title=name)
    print_pairs({"finished": "yes" if done else "no; the same command goes on", "written": [str(f) for f in files]})
