"""The tables of `dit-sparse eval tune`, from whatever results its folder has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bootstrap import interval
from .density_search import FEWEST, TOLERANCE
from .method_speed import comparable, takes_density
from .methods import SCHEDULE
from .tables import Table
from .tuned import MARK, ROWS, RUN, TABLES, Evaluation, Outcome, at_psnr, at_time
from .tuned_work import Cost, Plan

BELOW = 0.5  # dB that the mean may lie below the target
SHARE = 11 / 12  # of the clips that are at a target for the worst clip
BETTER = 2.0  # dB at equal time
TUNED = "tuned"
TARGETS = ["target", "statistic", "held-out PSNR dB", "worst clip dB", "clips at the target", "met", "density",
           "run density", "ms, sparse calls", "ms, all calls", "tuning s"]  # fmt: skip
METHODS = ["method", "density", "PSNR dB", "how", "ms, sparse calls", "ms, all calls", "tuned is faster",
           "PSNR dB at the tuned time", "tuned is better by dB"]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method at the PSNR of a plan.

    Args:
        method: its name.
        density, psnr, how: where the search ended, see `density_search.Found`.
        cost: modelled.
        equal: PSNR at the modelled time of the plan; None where there is none, and unequal then says why.
        why: why there is nothing; empty when there is.
    """

    method: str
    density: float | None = None
    psnr: float | None = None
    how: str = ""
    cost: Cost | None = None
    equal: float | None = None
    unequal: str = ""
    why: str = ""


@dataclass
class Section:
    """The methods at the PSNR of one plan.

    Args:
        outcome: the plan's.
        rows: of the methods, by modelled time of all calls.
    """

    outcome: Outcome
    rows: list[Row] = field(default_factory=list)

    @property
    def judged(self) -> list[Row]:
        """Rows of published methods with a modelled time that is no guess."""
        return [row for row in self.rows if row.cost is not None and row.how != "guessed" and is_published(row.method)]

    @property
    def unsettled(self) -> list[str]:
        """Published methods of which nothing can be said at this PSNR."""
        return [row.method for row in self.rows if is_published(row.method) and row not in self.judged]

    def verdicts(self) -> dict[str, Any]:
        """Whether the plan is at least as fast as every method, and by how much better at equal time.

        Returns:
            "fastest", "fastest_of_sparse_calls": (method, milliseconds) or None; "at_least_as_fast",
            "at_least_as_fast_in_sparse_calls": bool or None without times; "best_at_equal_time": (method, PSNR) or
            None; "better_by": dB or None; "enough": whether that is 2 dB, or no method can be so fast; None while it
            is not known.
        """
        cost, mean = self.outcome.cost, self.outcome.mean
        found: dict[str, Any] = {"fastest": None, "at_least_as_fast": None, "fastest_of_sparse_calls": None,
                                 "at_least_as_fast_in_sparse_calls": None, "best_at_equal_time": None,
                                 "better_by": None, "enough": None}
        if cost is None or mean is None or not self.judged:
            return found
        for word, name in (("", "run"), ("_of_sparse_calls", "call")):
            best = min(self.judged, key=lambda row: getattr(row.cost, name))
            found[f"fastest{word}"] = (best.method, getattr(best.cost, name))
            place = "at_least_as_fast" + ("_in_sparse_calls" if word else "")
            found[place] = getattr(cost, name) <= getattr(best.cost, name)
        published = [row for row in self.rows if not row.why and is_published(row.method)]
        equal = [row for row in published if row.equal is not None]
        if equal:
            top = max(equal, key=lambda row: row.equal or 0.0)
            found["best_at_equal_time"] = (top.method, top.equal)
            found["better_by"] = mean - (top.equal or 0.0)
            found["enough"] = found["better_by"] >= BETTER
        elif all(row.unequal == "never so fast" for row in published):
            found["enough"] = True
        return found

    def table(self) -> Table:
        """The plan first, then the methods."""
        cost, mean = self.outcome.cost, self.outcome.mean
        first = [TUNED, self.outcome.density, mean, "measured", *_costs(cost), None, mean, None]
        return Table(METHODS, [first, *(self._cells(row) for row in self.rows)])

    def _cells(self, row: Row) -> list[Any]:
        name = row.method if is_published(row.method) else f"({row.method})"
        if row.why:
            return [name, f"n/a: {row.why}", *[None] * (len(METHODS) - 2)]
        cost, mean = self.outcome.cost, self.outcome.mean
        faster = None if cost is None or row.cost is None else f"{row.cost.run / cost.run:.2f}x"
        better = None if row.equal is None or mean is None else mean - row.equal
        return [name, row.density, row.psnr, row.how, *_costs(row.cost), faster, row.equal or row.unequal, better]


def _costs(cost: Cost | None) -> list[str]:
    return ["n/a", "n/a"] if cost is None else [f"{cost.call:.1f}", f"{cost.run:.1f}"]


def is_published(name: str) -> bool:
    """Whether a method counts for what is best: it has a paper."""
    from dit_sparse.methods import all_methods

    return all_methods()[name].arxiv is not None


def is_met(row: Outcome) -> bool | None:
    """Whether the held-out clips are as the target asks; None while they are not there."""
    if row.mean is None:
        return None
    if row.statistic == "min":
        return row.reached >= int(SHARE * len(row.psnr) + 1e-9)
    return row.mean >= row.target - BELOW


def sections(run: Evaluation) -> list[Section]:
    """The methods at the PSNR of every plan that is there."""
    found = []
    for target in run.plan.targets:
        outcome = run.outcome(target, run.plan.statistics[0])
        if outcome.mean is None:
            continue
        rows = [_row(run, name, outcome) for name in run.names]
        rows.sort(key=lambda row: (row.cost is None, 0.0 if row.cost is None else row.cost.run))
        found.append(Section(outcome, rows))
    return found


def _row(run: Evaluation, name: str, outcome: Outcome) -> Row:
    assert outcome.mean is not None
    if why := run.failure(name):
        return Row(name, why=why)
    at, cost = at_psnr(run, name, outcome.mean)
    if at is None:
        return Row(name, why="not run")
    equal, unequal = (None, "no times") if outcome.cost is None else at_time(run, name, outcome.cost.run)
    return Row(name, at.density, at.psnr, at.how, cost, equal, unequal)


def targets(run: Evaluation) -> Table:
    """What was asked and what the held-out clips have."""
    rows: list[list[Any]] = []
    for statistic in run.plan.statistics:
        for target in run.plan.targets:
            row = run.outcome(target, statistic)
            name = f"psnr>={target:g}"
            if row.mean is None:
                rows.append([name, statistic, f"n/a: {row.why}", *[None] * (len(TARGETS) - 3)])
                continue
            rows.append([name, statistic, interval(row.psnr), min(row.psnr), f"{row.reached} of {len(row.psnr)}",
                         "yes" if is_met(row) else "no", row.density, row.run_density, *_costs(row.cost), row.seconds])
    return Table(TARGETS, rows)


def write(run: Evaluation, folder: Path, *, command: str, environment: dict[str, Any], quick: bool = False
          ) -> list[Path]:
    """Write rows and tables.

    Args:
        run: with what is finished.
        folder: exists.
        command: that makes it.
        environment: versions, device and date of the run.
        quick: it is the tiny size, which says nothing about methods.

    Returns:
        The files.
    """
    from dit_sparse.pipelines.video_io import finished_file

    found, missing = sections(run), run.missing()
    plan = dataclasses.asdict(run.plan)
    outcomes = [run.outcome(target, statistic) for statistic in run.plan.statistics for target in run.plan.targets]
    content = {
        "command": command, "environment": environment, "plan": plan, "schedule": SCHEDULE,
        "targets": [dataclasses.asdict(row) | {"mean": row.mean, "as_asked": is_met(row)} for row in outcomes],
        "sections": [{"target": each.outcome.target, "psnr": each.outcome.mean, "verdicts": each.verdicts(),
                      "rows": [dataclasses.asdict(row) for row in each.rows]} for each in found],
        "missing": missing,
    }  # fmt: skip
    parts = [f"{MARK}\n# Plans of `tune` on the included model\n\n`{command}`\n", _preface(run, environment, quick),
             "## Targets\n", targets(run).markdown()]
    for each in found:
        parts += [f"## At the PSNR of the plan for psnr>={each.outcome.target:g}\n", each.table().markdown(),
                  *(f"{line}\n" for line in _said(each))]
    parts.append("## Missing\n\n" + ("".join(f"- {line}\n" for line in missing) or "Nothing.\n"))
    for name, text in ((ROWS, json.dumps(content, indent=1) + "\n"), (TABLES, "\n".join(parts)),
                       (RUN, json.dumps({"command": command, "plan": plan, "weights": run.weights,
                                         "environment": environment}, indent=1) + "\n")):
        with finished_file(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return [folder / TABLES, folder / ROWS]


def _said(each: Section) -> list[str]:
    """The verdicts in sentences."""
    said, cost, mean = each.verdicts(), each.outcome.cost, each.outcome.mean
    if said["fastest"] is None or cost is None or mean is None:
        return ["No modelled times: nothing is said of speed."]
    lines = [f"Nothing is said of {', '.join(each.unsettled)}."] if each.unsettled else []
    for place, word, ms in (("fastest", "at_least_as_fast", cost.run),
                            ("fastest_of_sparse_calls", "at_least_as_fast_in_sparse_calls", cost.call)):
        over = "all calls" if place == "fastest" else "the sparse calls"
        name, best = said[place]
        lines.append(f"At equal PSNR, over {over}: tuned {ms:.1f} ms, the fastest method ({name}) {best:.1f} ms; "
                     f"at least as fast: {'yes' if said[word] else 'no'}.")
    if said["best_at_equal_time"] is None:
        nobody = "no method is ever so fast" if said["enough"] else "no method was run there"
        lines.append(f"At equal time of all calls: {nobody}.")
    else:
        name, psnr = said["best_at_equal_time"]
        lines.append(f"At equal time of all calls: tuned {mean:.2f} dB, the best method ({name}) {psnr:.2f} dB, "
                     f"{said['better_by']:+.2f} dB; {BETTER:g} dB better: {'yes' if said['enough'] else 'no'}.")
    return lines


def _preface(run: Evaluation, environment: dict[str, Any], quick: bool) -> str:
    plan: Plan = run.plan
    versions = ", ".join(f"{key} {environment[key]}" for key in ("torch", "cuda", "triton", "diffusers")
                         if environment.get(key))
    without = ", ".join(name for name in comparable() if not takes_density(name))
    text = (
        f"{environment.get('date', '')}, {environment.get('device', '')}; {versions}.\n"
        f"{plan.side}x{plan.side}x{plan.frames}, {plan.steps} steps, guidance {plan.guidance:g}. The first "
        f"{plan.clips} captions that were held out of training, seed 0, are measured; `tune` (mode {plan.mode}) sees "
        f"the {plan.calibration} after them and none of these. Clips differ by several dB from caption to caption; the "
        "tuner keeps a reserve for that.\n\n"
        f"Met: a mean at most {BELOW:g} dB below its target; with statistic min 11 of 12 clips at theirs.\n"
        "Plans and methods have the same dense calls, the first fifth of the steps and layer 0; a plan may leave more "
        "dense. Methods run at the density that gives the "
        f"plan's mean PSNR on the same clips: measured within {TOLERANCE:g} dB, interpolated between two runs, or "
        "extrapolated beyond them; where its runs lie too far off for a line, the figure is guessed and does not "
        f"count; {FEWEST}: better than that however few blocks are asked for, its fastest run stands there. "
        f"Without an option `density`, and so not here: {without}.\n"
        "Milliseconds are modelled: one attention call of Wan2.1-14B at 720p (21x45x80 tokens, 40 heads of 128), masks "
        "and corrections included; a plan's mixture of candidates is spread over the 40 heads. `sparse calls` is the "
        "mean over calls that are sparse, as in the comparison of methods; `all calls` that over the run, dense calls "
        "included. Rows in brackets are not published elsewhere, and do not count for the best.\n"
    )
    tiny = "**Quick size: it shows that everything runs, and says nothing about methods.**\n\n"
    return tiny * quick + text


def console_rows(table: Table) -> Sequence[Sequence[Any]]:
    """The rows of a table in short texts."""
    def short(cell: Any) -> str:
        if isinstance(cell, str) or cell is None:
            return cell or ""
        return f"{getattr(cell, 'mean', cell):.3g}" if isinstance(cell, float) or hasattr(cell, "mean") else str(cell)

    return [[short(cell) for cell in row] for row in table.rows]
