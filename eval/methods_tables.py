"""The tables and the picture of `dit-sparse eval methods`, from whatever results its folder has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .attention_time import Times
from .bootstrap import Interval
from .config import CEILING, DENSE
from .method_speed import OWN, WAN_14B
from .methods import FLOOR, MARK, MEASURES, PICTURE, ROWS, RUN, SCHEDULE, TABLES, WAN_STEPS, Comparison, Row
from .tables import Table

MODELLED = "attention ms (modelled)"
DRAWN = 0.98  # densities below it are in the picture
COLUMNS = ["method", "density", "run density", "PSNR dB", "SSIM", "latent error", "prompt accuracy", "recall of mass",
           "relative error of a call", MODELLED, "s a batch"]  # fmt: skip
NAMES = {DENSE: "dense", FLOOR: "random blocks (floor)", CEILING.label: "dense, another kernel (ceiling)"}


@dataclasses.dataclass
class Section:
    """One table of the report."""

    title: str
    rows: list[Row]

    def table(self) -> Table:
        """Rows that can be compared first, by PSNR; then those that cannot, with the reason."""
        good = [row for row in self.rows if not row.why]
        good.sort(key=lambda row: -row.values["psnr"].mean if "psnr" in row.values else -1000.0)
        return Table(COLUMNS, [_cells(row) for row in [*good, *(row for row in self.rows if row.why)]])

    def markdown(self) -> str:
        """Heading, table, and why single calls of a row were not looked into."""
        unseen = [f"`{row.label}`: single calls not looked into: {row.unseen}\n" for row in self.rows if row.unseen]
        return "\n".join([f"## {self.title}\n", self.table().markdown(), *unseen])


def _cells(row: Row) -> list[Any]:
    name = NAMES.get(row.label, row.label)
    if row.why:
        return [name, row.density, row.run_density, f"n/a: {row.why}", *[None] * (len(COLUMNS) - 4)]
    values: list[Any] = [row.values.get(measure) for measure in MEASURES]
    modelled = "n/a" if row.modelled_ms is None else f"{row.modelled_ms:.1f}"
    name += f" ({row.missing} batches missing)" * bool(row.missing)
    return [name, row.density, row.run_density, *values, row.recall, row.relative_error, modelled, row.seconds]


def sections(run: Comparison, times: Times | None) -> list[Section]:
    """The tables that the results allow."""
    plan, names = run.plan, run.plan.names()
    found = []
    fixed = [run.row(DENSE, ""), run.row(CEILING.label, "")]
    for density in plan.densities:
        rows = [*fixed, run.row(FLOOR, density), *(run.row(name, density) for name in names)]
        found.append(Section(f"Density near {density:g}", rows))
    found.append(Section("The authors' own settings", [*fixed, *(run.row(name, OWN) for name in names)]))
    best = run.ranked()[: plan.best]
    for density in sorted(plan.more, reverse=True) if best else ():
        rows = [run.row(name, density, plan.more_captions, plan.seeds) for name in best]
        if any(row.values for row in rows):
            title = f"The best {len(best)} near {density:g}, {plan.more_captions} captions, seeds 0 to {plan.seeds - 1}"
            found.append(Section(title, rows))
    return [Section(each.title, [row.with_time(times) for row in each.rows]) for each in found]


def write(run: Comparison, folder: Path, times: Times | None, *, command: str, environment: dict[str, Any],
          quick: bool = False) -> list[Path]:
    """Write rows, tables and picture.

    Args:
        run: with what is finished.
        folder: exists.
        times: the table of measured times, None where there is none.
        command: that makes it.
        environment: versions, device and date of the run.
        quick: it is the tiny size, which says nothing about methods.

    Returns:
        The files; without matplotlib there is no picture.
    """
    from dit_sparse.pipelines.video_io import finished_file

    found = sections(run, times)
    plain = [{"title": each.title, "rows": [dataclasses.asdict(row) for row in each.rows]} for each in found]
    state = times.state_bytes() if times is not None else None
    content = {"command": command, "environment": environment, "plan": dataclasses.asdict(run.plan),
               "schedule": SCHEDULE, "sections": plain, "state_bytes": state}  # fmt: skip
    parts = [f"{MARK}\n# Methods on the included model\n\n`{command}`\n", _preface(run, environment, times, quick)]
    parts += [each.markdown() for each in found]
    parts.append(_state(run, times))
    for name, text in ((ROWS, json.dumps(content, indent=1) + "\n"), (TABLES, "\n".join(parts)),
                       (RUN, json.dumps({"command": command, "plan": content["plan"], "weights": run.weights,
                                         "environment": environment}, indent=1) + "\n")):
        with finished_file(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    files = [folder / name for name in (TABLES, ROWS)]
    try:
        draw(found, folder / PICTURE)
    except ImportError:
        return files
    return [*files, folder / PICTURE]


def read_environment(folder: Path) -> dict[str, Any]:
    """Versions, device and date that a folder's tables were written with; empty without.

    Raises:
        ValueError: the folder's `RUN` is somebody else's.
    """
    file = folder / RUN
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["environment"])
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{file} was not made by this command; name another folder") from error


def _preface(run: Comparison, environment: dict[str, Any], times: Times | None, quick: bool) -> str:
    plan = run.plan
    versions = ", ".join(f"{key} {environment[key]}" for key in ("torch", "cuda", "triton", "diffusers")
                         if environment.get(key))
    guided = f"guidance {plan.guidance:g} in the same forward" if plan.guidance > 1 else "no guidance"
    spent = ("`attention ms (modelled)` is the time of one attention call of Wan2.1-14B at 720p (21x45x80 tokens, "
             "40 heads of 128), masks and corrections included, ")
    if times is None:
        spent += "from a table of measured times; it was not measured yet, so the column says n/a."
    else:
        spent += (f"from times measured on {times.where.get('device')}; dense takes {times.dense_ms:.1f} ms there.")
    text = (
        f"{environment.get('date', '')}, {environment.get('device', '')}; {versions}.\n"
        f"{plan.side}x{plan.side}x{plan.frames}, {plan.steps} steps, {guided}, batches of {plan.batch}; captions that "
        f"were held out of training, {plan.captions} with seed 0 where nothing else is said.\n\n"
        "One schedule for all: the first fifth of the steps and layer 0 dense (the authors' own settings bring theirs "
        f"where they say one, whole numbers of dense steps as shares of {WAN_STEPS}). `density` is that of "
        "the sparse calls, `run density` that of all.\n"
        "A method counts as near a density within .03 or 15 % of it; else, and where it has no option `density`, the "
        "row says n/a. PSNR, SSIM and the relative error of the last latents are against the dense clip of the same "
        "noise; prompt accuracy is the share of clips that pass every check of what the caption asks for. Brackets "
        "are 95 % bootstrap intervals over the captions.\n"
        f"Recall and relative error of a call: {plan.looked} captions, the same queries, keys and values for every "
        f"method, mean over sparse calls and heads. {spent} `s a batch` is the included model's wall time of the "
        "denoising, launches and first-time compilation included: it says nothing about speed elsewhere.\n"
    )
    tiny = "**Quick size: it shows that everything runs, and says nothing about methods.**\n\n"
    return tiny * quick + text


def _state(run: Comparison, times: Times | None) -> str:
    layers, branches = WAN_14B
    head = f"## Kept between steps at Wan2.1-14B, 720p ({layers} layers, {branches} guidance branches)\n\n"
    if times is None:
        return head + "Not measured yet.\n"
    found = times.state_bytes()
    rows = [[name, "n/a" if name not in found else f"{found[name] / 2**20:.3g}",
             "n/a" if name not in found else f"{found[name] * layers * branches / 2**30:.3g}"]
            for name in run.plan.names()]
    return head + Table(["method", "MiB a layer and branch", "GiB in all"], rows).markdown()


def draw(found: Sequence[Section], path: Path) -> None:
    """PSNR against density as a PNG, and against the modelled time where there is one.

    Args:
        found: the tables.
        path: file to write.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for each in found for row in each.rows if not row.why and "psnr" in row.values]
    # A method that kept everything is dense, and would press the rest together.
    rows = [row for row in rows if row.label == CEILING.label or (row.density or 0) < DRAWN]
    timed = any(row.modelled_ms is not None for row in rows)
    figure, axes = pyplot.subplots(1, 1 + timed, figsize=(8.6 + 6.4 * timed, 6.2), squeeze=False)
    _panel(axes[0][0], rows, "density", "density of the sparse calls")
    if timed:
        _panel(axes[0][1], rows, "modelled_ms", "attention of a call of Wan2.1-14B at 720p, ms (modelled)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", format="png")
    pyplot.close(figure)


def _panel(axes: Any, rows: Sequence[Row], name: str, title: str) -> None:
    """One plot: a line for each method over its densities, its own settings as a star."""
    markers, colours = "osD^vP<>", [f"C{i}" for i in range(10)]
    methods = [label for label in dict.fromkeys(row.label for row in rows) if label not in NAMES]
    for place, label in enumerate(methods):
        style = {"color": colours[place % 10], "marker": markers[place // 10 % len(markers)]}
        points = _points([row for row in rows if row.label == label and isinstance(row.asked, float)], name)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, markersize=5, linewidth=1, **style)
        own = _points([row for row in rows if row.label == label and row.asked == OWN], name)
        if own:
            axes.plot(*zip(*own, strict=True), label=None if points else label, marker="*", markersize=10,
                      linestyle="", color=style["color"], alpha=0.7)
            axes.annotate(label, own[0], xytext=(5, 4), textcoords="offset points", fontsize=7, color=style["color"])
    floor = _points([row for row in rows if row.label == FLOOR], name)
    if floor:
        axes.plot(*zip(*floor, strict=True), label=NAMES[FLOOR], color="0.4", linestyle="--", marker="x",
                  linewidth=1.2)
    top = [row.values["psnr"].mean for row in rows if row.label == CEILING.label]
    if top:
        # Far above everything it would only press the rest together.
        line = {"color": "0.4", "linestyle": ":", "linewidth": 1.2, "label": f"{NAMES[CEILING.label]}: {top[0]:.1f} dB"}
        others = [row.values["psnr"].mean for row in rows if row.label != CEILING.label]
        if others and top[0] < max(others) + 10:
            axes.axhline(top[0], **line)
        else:
            axes.plot([], [], **line)
    front: list[tuple[float, float]] = []
    for x, y in sorted(point for label in methods for point in _points([r for r in rows if r.label == label], name)):
        if not front or y > front[-1][1]:
            front.append((x, y))
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color="0.85", linewidth=5, zorder=0, label="Pareto front")
    axes.set(xlabel=title, ylabel="PSNR to dense, dB")
    axes.set_title("lines: asked densities; stars: the authors' own settings", fontsize=9, color="0.35")
    axes.grid(True, alpha=0.25)


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """(x, PSNR) of rows by rising x; of two with nearly the same, the one of more captions."""
    best: dict[float | str, Row] = {}
    for row in rows:
        known = best.get(row.asked)
        if getattr(row, name) is not None and (known is None or _captions(row) > _captions(known)):
            best[row.asked] = row
    return sorted((float(getattr(row, name)), row.values["psnr"].mean) for row in best.values())


def _captions(row: Row) -> int:
    found: Interval = row.values["psnr"]
    return found.prompts


def console_rows(each: Section) -> list[list[Any]]:
    """The rows of a table in short texts."""
    return [[cell if isinstance(cell, str) else "" if cell is None else f"{cell.mean:.3g}"
             if isinstance(cell, Interval) else f"{cell:.3g}" for cell in row] for row in each.table().rows]
