"""report.html: one page with all numbers, charts and clips of a run inside, that loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import attention, charts, tables
from .bootstrap import Interval
from .config import CEILING, DENSE
from .evaluation import REPORT
from .measures.table import MEASURES, coverage
from .results import Evaluation, interval_of, load_evaluation, number
from .stylesheet import CSS
from .tables import ARROWS, names_of

# Nothing may be fetched, and no script may run: the page is data.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
_LEAST_WIDTH = 192


def write_report(folder: str | Path) -> Path:
    """Write the page of a run, finished or not, into its folder.

    Returns:
        The file.

    Raises:
        ValueError: the folder holds no run.
    """
    from dit_sparse.pipelines.video_io import finished_file

    path = Path(folder) / REPORT
    text = page(load_evaluation(folder))
    with finished_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def page(run: Evaluation) -> str:
    """The whole page as text."""
    parts = [
        ("Speed", _speed(run)),
        ("Fidelity to dense", _fidelity(run)),
        ("Speed against fidelity", _pareto(run)),
        ("Latent error by step", _latents(run)),
        ("Quality by dimension", _dimensions(run)),
        ("VBench's own scores", _vbench(run)),
        ("Density by layer", _layers(run)),
        ("Density by layer and step", _density_maps(run)),
        ("Attention against dense attention", _attention(run)),
        ("Clips", _clips(run)),
        ("What was not measured", _unmeasured(run)),
        ("The measures", _glossary(run)),
        ("Environment and command", _environment(run)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in parts if text)
    some = run.entries[0]["result"]
    config = run.config
    size = f"{some['width']}x{some['height']}, {some['frames']} frames"
    missing = run.planned - len(run.entries)
    state = f"<p class='warn'>Unfinished: {missing} of {run.planned} clips are missing.</p>" if missing else ""
    if run.planned_looks > run.looked:
        state += f"<p class='warn'>The attention of {run.planned_looks - run.looked} clips is not looked into yet.</p>"
    head = (
        f"<h1>Sparse attention on {escape(str(config['pipeline']))}</h1>"
        f"<p>{_count(config['prompts'], 'prompt')}, {_count(config['seeds'], 'seed')}, {escape(size)}, "
        f"{escape(str(run.environment.get('device', '')))}, {escape(str(run.environment.get('date', '')))}. "
        "Brackets and whiskers are 95 % bootstrap intervals over the prompts.</p>" + state
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>dit-sparse evaluation</title><style>{CSS}</style></head>'
        f"<body><main>{head}{body}</main></body></html>\n"
    )


def _count(items: Sequence[Any], name: str) -> str:
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = "".join(
        "<tr>" + "".join(f"<td>{'–' if cell is None else _cell(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def _shown(table: tables.Table) -> str:
    return _table(table.columns, table.rows)


def _cell(cell: Any) -> str:
    if isinstance(cell, Interval):
        width = f"<span class='faint'>[{cell.low:.3g}, {cell.high:.3g}]</span>" if cell.prompts > 1 else ""
        return f"{cell.mean:.4g} {width}"
    return escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell))


def _speed(run: Evaluation) -> str:
    return _shown(tables.speed(run)) + (
        "<p class='faint'>Seconds are of the whole call, text and decoding included; a clip's steps include its "
        "share. Density is the kept fraction over all attention calls, dense ones as 1. The untouched model's share of "
        "attention is that of two steps of it, timed as sparse attention is.</p>"
    )


def _fidelity(run: Evaluation) -> str:
    table = tables.fidelity(run)
    note = (f"<p class='faint'>{CEILING.label} is dense attention by another kernel: rounding alone moves a clip that "
            "far.</p>" if CEILING.label in run.labels else "")
    return _shown(table) + note if table else ""


def _pareto(run: Evaluation) -> str:
    name = next((n for n in ("psnr", *names_of(run, "pair")) if n in names_of(run, "pair")), None)
    points = []
    for label in run.labels:
        x, y = (interval_of(run.of(label), wanted) for wanted in ("speedup", name or ""))
        # The noise ceiling is no choice, and its 100 dB would flatten the others.
        if label not in (DENSE, CEILING.label) and name and x is not None and y is not None:
            points.append(charts.Point(label, x, y))
    return charts.scatter(points, "speed-up", f"{name} to dense") if points and name else ""


def _latents(run: Evaluation) -> str:
    series: dict[str, list[float]] = {}
    for label in run.labels:
        runs = [e["result"]["latent_errors"] for e in run.of(label) if e["result"].get("latent_errors")]
        if runs and len({len(errors) for errors in runs}) == 1:
            series[label] = [sum(step) / len(step) for step in zip(*runs, strict=True)]
    return charts.lines(series, run.labels, "step", "relative error") if series else ""


def _dimensions(run: Evaluation) -> str:
    groups: dict[str, dict[str, Interval]] = {}
    for name in names_of(run, "clip", "prompt"):
        row = {label: interval_of(run.of(label), name) for label in run.labels}
        groups[name] = {label: value for label, value in row.items() if value is not None}
    if not groups:
        return ""
    notes = {name: ARROWS[MEASURES[name].direction] for name in groups}
    text = (
        "<p>VBench's formulas. Names ending in _proxy stand on other networks than VBench's (those without it are "
        "VBench's own on the folders that the configuration names), names beginning with "
        "world_ on the pixels of the embedded model's world: compare methods by them, not with published scores. "
        "Flickering, smoothness and consistency are best for a frozen clip: read dynamic degree beside them.</p>"
    )
    columns = ["VBench's dimension", "VBench takes", "any video", "included model's world", "network given",
               "in this run"]  # fmt: skip
    rows = [[*row.cells(), ", ".join(n for n in (*row.any_video, *row.world, *row.network) if n in groups) or "no"]
            for row in coverage()]
    return (
        text + charts.bars(groups, run.labels, notes)
        + f"<details><summary>all 16 dimensions</summary>{_table(columns, rows)}</details>"
    )


def _vbench(run: Evaluation) -> str:
    """Scores that VBench itself made of exported clips, when they were brought back."""
    from .vbench import DIMENSIONS, kept_scores

    kept = kept_scores(run.folder)
    labels = [label for label in run.labels if label in kept]
    if not labels:
        return ""
    rows = [[name, *(kept[label]["raw"].get(name) for label in labels)] for name in DIMENSIONS]
    rows += [[f"{name} score, normalised", *(kept[label][name] for label in labels)]
             for name in ("quality", "semantic", "total")]
    return _table(["dimension", *labels], rows)


def _layers(run: Evaluation) -> str:
    rows: dict[str, dict[int, float]] = {}
    for label in run.labels:
        found: dict[int, list[float]] = {}
        for entry in run.of(label):
            for layer, value in (entry["result"].get("per_layer") or {}).items():
                found.setdefault(int(layer), []).append(value)
        if found:
            rows[label] = {layer: sum(values) / len(values) for layer, values in found.items()}
    return f"<div class='scroll'>{charts.heat_map(rows)}</div>" if rows else ""


def _density_maps(run: Evaluation) -> str:
    """One map for each method: layers as rows, steps as columns, mean over its clips."""
    maps = []
    for label in run.labels:
        found: dict[int, dict[int, list[float]]] = {}
        for entry in run.of(label):
            for layer, row in (entry["result"].get("density_map") or {}).items():
                for step, value in row.items():
                    found.setdefault(int(layer), {}).setdefault(int(step), []).append(value)
        if found:
            maps.append(_map(label, "density", "step", {
                layer: {step: sum(values) / len(values) for step, values in row.items()}
                for layer, row in sorted(found.items())
            }))
    return "".join(maps)


def _map(label: str, value: str, columns: str, rows: Mapping[int, Mapping[int, float]]) -> str:
    """A heat map of shares by layer, under its method's name."""
    named = {f"layer {layer}": row for layer, row in rows.items()}
    title = f"{label}: {value} by layer and {columns}"
    picture = charts.heat_map(named, columns=columns, value=value, title=title, compact=True)
    return f"<figure class='map'><figcaption>{escape(title)}</figcaption><div class='scroll'>{picture}</div></figure>"


def _attention(run: Evaluation) -> str:
    """Recall, error and cosine of single calls, over all, by layer and step, and by layer and head."""
    table = tables.calls(run)
    if table is None:
        return ""
    maps = []
    for label in run.labels:
        by_step, by_head = attention.grids(run.attention.get(label, []), "recall")
        maps += [_map(label, "recall", "step", by_step)] if by_step else []
        maps += [_map(label, "recall", "head", by_head)] if by_head else []
    return (
        "<p>On the queries, keys and values of a dense run, one call at a time: errors do not add up here. Recall is "
        "the share of the dense attention's mass on the pairs that a method keeps, error and cosine compare the "
        "outputs. The table is the mean over the heads of all sparse calls; dense calls count 1 in the maps by step."
        "</p>" + _shown(table) + "".join(maps)
    )


def _clips(run: Evaluation) -> str:
    prompts = list(dict.fromkeys(entry["job"]["prompt"] for entry in run.entries))
    shown = prompts[: int(run.config.get("clips", 6))]
    figures = []
    for prompt in shown:
        entries = [e for e in run.entries if e["job"]["prompt"] == prompt]
        first = [e for e in entries if e["job"]["seed"] == entries[0]["job"]["seed"]]
        figures.append(_figure(run, first))
    more = f"<p class='faint'>{len(prompts) - len(shown)} more prompts lie in videos/.</p>" if prompts != shown else ""
    return "".join(figures) + more if any(figures) else ""


def _figure(run: Evaluation, entries: Sequence[Mapping[str, Any]]) -> str:
    """The clips of one prompt and seed side by side: a video, and its frames for those who print the page."""
    from dit_sparse.pipelines.video_io import contact_sheet, read_video, side_by_side

    clips, labels = [], []
    for entry in entries:
        file = run.folder / entry["result"]["video"]
        if file.is_file():
            clip = read_video(file)
            # Small clips grow by a whole factor, so that their labels can be read.
            grow = max(1, -(-_LEAST_WIDTH // clip.shape[3]))
            clips.append(clip.repeat_interleave(grow, 2).repeat_interleave(grow, 3))
            away = number(entry["result"], "psnr")
            labels.append(entry["job"]["label"] + ("" if away is None else f"  {away:.1f} dB"))
    if not clips:
        return ""
    both = side_by_side(clips, labels)
    sheet = contact_sheet(both, most=4, columns=1, cell=min(960, both.shape[3]))
    caption = escape(f"{entries[0]['job']['prompt']} (seed {entries[0]['job']['seed']})")
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<video controls loop muted playsinline preload="auto" src="{_mp4(both, int(run.config["fps"]))}"></video>'
        f"<details open><summary>frames</summary><img alt='frames of {caption}' src='{_jpeg(sheet)}'></details>"
        "</figure>"
    )


def _mp4(video: Any, fps: int) -> str:
    from dit_sparse.pipelines.video_io import write_video

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clips.mp4"
        write_video(file, video, fps, crf=20)
        return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()


def _jpeg(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _unmeasured(run: Evaluation) -> str:
    reasons: dict[tuple[str, str], int] = {}
    for entry in run.entries:
        for name, reason in entry["result"].get("reasons", {}).items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    return _table(["measure", "why", "clips"], [[*key, count] for key, count in reasons.items()]) if reasons else ""


def _glossary(run: Evaluation) -> str:
    rows = []
    for name in names_of(run, "pair", "clip", "prompt"):
        entry = MEASURES[name]
        text = " ".join((entry.compute.__doc__ or "").split("Raises:")[0].split())
        rows.append([name, text, entry.range, ARROWS[entry.direction], entry.needs or "nothing"])
    table = _table(["measure", "what it computes", "range", "direction", "needs"], rows)
    return f"<details><summary>formulas and sources</summary>{table}</details>"


def _environment(run: Evaluation) -> str:
    rows = [[name, value] for name, value in run.environment.items()]
    return (
        f"<pre>{escape(run.command)}</pre>" + _table(["what", "value"], rows)
        + f"<details><summary>configuration</summary>{_table(['key', 'value'], list(run.config.items()))}</details>"
    )
