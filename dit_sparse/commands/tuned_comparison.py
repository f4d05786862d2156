"""`dit-sparse eval tune`: plans of `tune` on held-out clips, beside every method at the same PSNR."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from .console import UserError, print_json, print_pairs, print_table, progress, quiet_libraries, refusing
from .methods_comparison import prepare
from .run import check_device

if TYPE_CHECKING:
    from ..eval.tuned_work import Plan


def compare_tuned(
    out: Path,
    *,
    quick: bool = False,
    seconds: float | None = None,
    state: Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """Make what is missing in the folder, within the seconds given, and write the tables of what is there.

    Args:
        out: folder, made or continued.
        quick: the size that a CPU makes in seconds.
        seconds: nothing is begun after so many, and a tuning is left to go on later; 0 makes nothing; None: no limit.
        state: where tunings keep what they found; None: in the folder.
        device: None takes the GPU when there is one.
        as_json: print files and state instead of tables.
    """
    from ..eval.tuned_work import QUICK, Plan

    check_device(device)
    from ..eval.tuned import MARK, RESULTS, TABLES

    prepare(out, MARK, RESULTS, TABLES)
    words = ["dit-sparse", "eval", "tune", "--out", str(out), *(["--quick"] if quick else [])]
    words += ["--device", device] if device else []
    _make(QUICK if quick else Plan(), out, shlex.join(words), quick, seconds, state, device, as_json)


def _make(
    plan: Plan, out: Path, command: str, quick: bool, seconds: float | None, state: Path | None, device: str | None,
    as_json: bool,
) -> None:
    from ..eval.attention_time import read_times
    from ..eval.bed import Bed
    from ..eval.evaluation import digest, environment
    from ..eval.methods import deadline
    from ..eval.methods_tables import read_environment
    from ..eval.tuned import Evaluation
    from ..eval.tuned_tables import console_rows, sections, targets, write
    from ..eval.tuned_work import Work, earlier
    from ..pipelines.load import load, locate
    from ..tuning.cost import CostTable

    stop = deadline(seconds)
    with refusing():
        times = read_times()
        quiet_libraries()
        run = Evaluation(plan, out, digest(locate("embedded")), times=times,
                         costs=None if times is None else CostTable.modelled(), prior=earlier())
        run.load()
        there = read_environment(out)
        pipe = None if seconds == 0 else load("embedded", device=device)
    work = None
    if pipe is not None:
        bed = Bed(pipe, plan.frames, plan.side, plan.steps, plan.guidance)
        work = Work(bed, plan, pipe, out, state=state, stop=stop)
    where = environment(pipe) if pipe is not None else there

    def tables() -> list[Path]:
        # Where nothing was made, the numbers still belong to the machine that made them.
        noted = where if work is not None and (work.made or not there) else there
        with refusing(OSError, prefix=f"--out {out}: "):
            return write(run, out, command=command, environment=noted, quick=quick)

    done = False
    try:
        if work is not None:
            with progress("tunings and batches") as update:
                done = run.make(work, stop=stop, bar=update, kept=tables)
        done = done or run.next_job() is None
    finally:  # also when it is interrupted
        files = tables()
    if as_json:
        print_json({"finished": done, "results": run.count, "missing": run.missing(), "files": [str(f) for f in files]})
    else:
        for title, table in (("Targets", targets(run)), *((f"psnr>={each.outcome.target:g}", each.table())
                                                          for each in sections(run))):
            print_table(table.columns, console_rows(table), title=title)
        print_pairs({"results": run.count, "finished": "yes" if done else "no; the same command goes on",
                     "missing": run.missing() or "nothing", "written": [str(file) for file in files]})
    if work is not None and work.dead:
        raise UserError("the GPU stopped answering; start the same command again, and it goes on behind that batch")
