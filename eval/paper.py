"""The repository's own tables: what the README and docs/results say of the included model, made again by one command.

The parts, the most wanted first: whether the model follows its prompts, the README's comparison of dense and sparse,
its table of fidelity, every method of a list at the preview size and at the long one. Each lies in a folder of its own
and goes on where it was stopped; `write_tables` puts their numbers into one Markdown file and one of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import following, tables
from .bootstrap import Interval
from .config import EvalConfig, parse_config
from .following import Following, read_kept
from .methods import QUICK, Comparison, Plan
from .methods_tables import sections
from .results import Evaluation
from .tables import Table

TABLES, NUMBERS, RUNS, COMPARED = "paper.md", "paper.json", "runs", "compare.json"
MARK = "<!-- made by dit-sparse eval paper -->"
DENSITY = 0.25
# One line for each method that is compared; radial has no density of its own to ask for.
METHODS = (
    {"name": "svg", "options": {"density": DENSITY}},
    {"name": "rainfusion", "options": {"density": DENSITY}},
    {"name": "rainfusion2", "options": {"density": DENSITY}},
    {"name": "gna", "options": {"density": DENSITY}},
    {"name": "sol", "options": {"density": DENSITY}},
    {"name": "radial", "options": {"decay": 0.2}},
)
PROMPT = "a large red heart growing on a drifting background"  # of the README's comparison


@dataclass(frozen=True)
class Size:
    """Every method at one size.

    Attributes:
        title: its heading.
        size: width x height x frames.
        steps, guidance: of every clip.
        prompts: how many held-out captions.
        attention: of how many the attention is looked into.
        share: of the seconds that are left when it begins.
        shown: captions whose clips its page holds.
    """

    title: str
    size: str
    steps: int
    guidance: float
    prompts: int
    attention: int
    share: float = 1.0
    shown: int = 4


@dataclass(frozen=True)
class Pair:
    """One prompt dense and sparse, as `dit-sparse compare` makes it.

    Attributes:
        title: its heading.
        prompt, seed: of both clips.
        method, options: of the sparse one.
        shape: frames, height, width, steps, guidance_scale.
        seconds: about what it takes on an H200.
    """

    title: str
    prompt: str
    method: str
    options: dict[str, Any]
    shape: dict[str, Any]
    seed: int = 0
    seconds: int = 30


@dataclass(frozen=True)
class Fidelity:
    """Some methods and random blocks at equal densities, as `dit-sparse eval methods` makes them.

    Attributes:
        title: its heading.
        plan: what is made.
        seconds: about what it takes on an H200.
    """

    title: str
    plan: Plan
    seconds: int = 120


Part = Following | Pair | Fidelity | Size
# Of the README's table. Without the second table of `eval methods`, of more captions and seeds.
FAITHFUL = Plan(methods=("auto", "psa", "sol", "svg"), best=0, more_captions=0)


@dataclass(frozen=True)
class Done:
    """What a part came to.

    Attributes:
        part: as it was asked for.
        where: device, date and versions.
        tables: by title.
        state: "finished", or what is missing and why.
        files: beside the tables, below the folder of the command.
    """

    part: Part
    where: Mapping[str, Any]
    tables: Mapping[str, Table]
    state: str = "finished"
    files: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def parts(quick: bool) -> dict[str, Part]:
    """The parts by name, in the order in which they are made."""
    from dit_sparse.commands.settings import COMPARE

    known = COMPARE["long"]
    shape = {name: known[name] for name in ("frames", "height", "width", "steps", "guidance_scale")}
    pair = Pair("Dense and sparse, the README's comparison", PROMPT, known["method"], known["options"], shape)
    follow = Following("Prompt following, preview size", 256, 17, 20, 3.0, 200, 32, 40)
    if quick:
        small = {"frames": 5, "height": 64, "width": 64, "steps": 3, "guidance_scale": 1.0}
        return {
            "following": Following(follow.title, 64, 5, 2, 1.0, 4, 4, 5),
            "compare": Pair(pair.title, PROMPT, pair.method, pair.options, small, seconds=5),
            "fidelity": Fidelity("Fidelity at equal densities", replace(QUICK, best=0, more_captions=0), 10),
            "preview": Size("Methods, quick size", "128x128x5", 3, 1.0, 2, 1),
        }
    return {
        "following": follow,
        "compare": pair,
        "fidelity": Fidelity("Fidelity at equal densities", FAITHFUL),
        "preview": Size("Methods, preview size", "256x256x17", 20, 3.0, 8, 2, share=0.5),
        "long": Size("Methods, long size", "512x512x33", 20, 3.0, 4, 1, shown=2),
        "following-long": Following("Prompt following, long size", 512, 33, 20, 3.0, 32, 8, 30),
    }


def captions(count: int) -> list[str]:
    """Different captions whose combination of colour, shape and third word was never drawn in training.

    Args:
        count: how many; the first ones of a longer list are those of a shorter one.
    """
    from .bed import held_out

    return held_out()[1][:count]


def config_of(size: Size, device: str | None = None) -> EvalConfig:
    """What one size makes: dense, every method, and the noise ceiling.

    Args:
        size: of `parts`.
        device: None takes the GPU when there is one.
    """
    return parse_config({
        "pipeline": "embedded", "methods": [dict(entry) for entry in METHODS], "prompts": captions(size.prompts),
        "steps": size.steps, "size": size.size, "guidance": size.guidance, "noise_ceiling": True, "clips": size.shown,
        "attention": size.attention, "device": device,
    })  # fmt: skip


def compare_clips(pair: Pair, pipe: Any, folder: Path, weights: str) -> dict[str, Any]:
    """Make both clips of a pair, or read what an earlier call found.

    Args:
        pair: of `parts`.
        pipe: the included pipeline, without sparse attention.
        folder: of the result, made when it is missing; compare.json, compare.mp4 and compare.jpg lie there.
        weights: digest of the model's files.

    Returns:
        The numbers as `compare.Comparison` has them, with "environment" and "key".
    """
    from dit_sparse import SparseProc
    from dit_sparse.pipelines.video_io import CELL, contact_sheet, finished_file, side_by_side, write_image, write_video

    from .compare import compare
    from .evaluation import environment

    key = {**asdict(pair), "device": str(pipe.device), "weights": weights}
    kept = read_kept(folder / COMPARED, key)
    if kept:
        return kept
    numbers, dense, sparse = compare(
        pipe, pair.prompt, SparseProc(pair.method, **pair.options), seed=pair.seed, shape=pair.shape
    )
    folder.mkdir(parents=True, exist_ok=True)
    both = side_by_side([dense, sparse], ["dense", f"{pair.method}  {numbers.psnr:.1f} dB"])
    write_video(folder / "compare.mp4", both)
    write_image(folder / "compare.jpg", contact_sheet(both, most=6, columns=2, cell=2 * CELL))
    found = {"key": key, "environment": environment(pipe), **numbers.to_dict()}
    with finished_file(folder / COMPARED) as part:
        part.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    return found


def pair_done(pair: Pair, found: Mapping[str, Any], files: Sequence[str]) -> Done:
    """The table of a pair."""
    columns = ["method", "run density", "dense seconds", "sparse seconds", "speed-up", "PSNR dB", "PSNR of frames",
               "SSIM"]  # fmt: skip
    names = ("density", "dense_seconds", "sparse_seconds", "speedup", "psnr", "psnr_frames", "ssim")
    method = ", ".join([pair.method, *(f"{name} {value}" for name, value in pair.options.items())])
    table = Table(columns, [[method, *(found[name] for name in names)]])
    return Done(pair, found["environment"], {"": table}, files=files, extra={"tokens": found["tokens"]})


def following_done(plan: Following, found: Mapping[str, Any], files: Sequence[str]) -> Done:
    """The tables of prompt following."""
    return Done(plan, found["environment"], {"": following.table(found)}, files=files,
                extra={"by_kind": found["by_kind"]})  # fmt: skip


def fidelity_done(part: Fidelity, run: Comparison, where: Mapping[str, Any], files: Sequence[str]) -> Done:
    """The tables of methods at equal densities, finished or not."""
    from .attention_time import read_times

    found = {each.title: each.table() for each in sections(run, read_times())}
    state = "finished" if run.complete() else "batches are missing, for want of time"
    return Done(part, where, found, state, files)


def size_done(size: Size, run: Evaluation, files: Sequence[str]) -> Done:
    """The tables of every method at one size, finished or not."""
    found = {
        "Speed": tables.speed(run),
        "Fidelity to dense, same seed": tables.fidelity(run),
        "Prompt following and quality": tables.quality(run),
        f"Attention, call by call, on a dense run ({len(_looked(run))} captions)": tables.calls(run),
    }
    missing = run.planned - len(run.entries)
    tokens = next((e["result"]["tokens"] for e in run.entries if e["result"].get("tokens")), None)
    made = len({e["job"]["prompt"] for e in run.entries})
    state = f"{missing} of {run.planned} clips are missing, for want of time" if missing else "finished"
    return Done(size, run.environment, {name: table for name, table in found.items() if table is not None}, state,
                files, {"tokens": tokens, "captions": made, "not_measured": _unmeasured(run)})  # fmt: skip


def _unmeasured(run: Evaluation) -> dict[str, str]:
    """Measures that no clip has, and why."""
    have = {name for entry in run.entries for name in entry["result"]["values"]}
    reasons = {name: why for entry in run.entries for name, why in entry["result"].get("reasons", {}).items()}
    return {name: why for name, why in reasons.items() if name not in have}


def _looked(run: Evaluation) -> set[int]:
    """One entry for each caption whose attention was looked into by every method that has been."""
    labels = len(run.attention)
    return set(range(run.looked // labels if labels else 0))


def check_folder(out: Path) -> None:
    """Refuse a place where the tables cannot lie.

    Raises:
        ValueError: a file in place of the folder, or a paper.md that is somebody's own.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    file = out / TABLES
    if file.exists() and not (file.is_file() and file.read_text(encoding="utf-8", errors="replace").startswith(MARK)):
        raise ValueError(f"--out {out}: {TABLES} was not made by this command; name another folder")


def write_tables(out: Path, done: Mapping[str, Done | str], command: str, quick: bool) -> list[Path]:
    """Write the Markdown file and the numbers of all parts.

    Args:
        out: exists.
        done: by name, what each part came to, or why it was not begun.
        command: that makes them again.
        quick: whether they are of the quick size.

    Returns:
        Both files.
    """
    from dit_sparse.pipelines.video_io import finished_file

    text = [f"{MARK}\n# The included model: measured\n\n`{command}`\n", _preface(quick)]
    text += [_section(entry) for entry in done.values() if isinstance(entry, Done)]
    left_out = [f"- {name}: {why}\n" for name, why in done.items() if isinstance(why, str)]
    text += ["## Not made\n\n" + "".join(left_out)] if left_out else []
    numbers = {"command": command, "quick": quick, "parts": {name: _plain(entry) for name, entry in done.items()}}
    for name, content in ((TABLES, "\n".join(text)), (NUMBERS, json.dumps(numbers, indent=1, default=str) + "\n")):
        with finished_file(out / name) as part:
            part.write_text(content, encoding="utf-8")
    return [out / TABLES, out / NUMBERS]


def _plain(entry: Done | str) -> Any:
    """A part as plain data: cells that are intervals become mean, low, high, prompts."""
    if isinstance(entry, str):
        return {"state": entry}
    cells = {
        title: {"columns": table.columns,
                "rows": [[asdict(c) if isinstance(c, Interval) else c for c in row] for row in table.rows]}
        for title, table in entry.tables.items()
    }  # fmt: skip
    return {"part": asdict(entry.part), "state": entry.state, "environment": dict(entry.where), **entry.extra,
            "tables": cells, "files": list(entry.files)}  # fmt: skip


def _preface(quick: bool) -> str:
    text = (
        f"Methods are asked for density {DENSITY} (radial: decay 0.2, whose density follows from the grid); the first "
        "fifth of the steps and the\nfirst layer are dense and counted. Captions are held out of training, one seed. "
        "Brackets are 95 % bootstrap intervals over the\ncaptions. `noise-ceiling` is dense attention by another "
        "kernel. Definitions: `dit-sparse eval measures` and each report. On a GPU the\nclips are measured in other "
        "processes while the next is made.\n"
    )
    return (
        "**Quick size: it shows that everything runs, and says nothing about methods.**\n\n" if quick else ""
    ) + text


def _section(entry: Done) -> str:
    where, part = entry.where, entry.part
    versions = ", ".join(f"{key} {where[key]}" for key in ("torch", "cuda", "triton", "diffusers") if where.get(key))
    parts_of = [text for text in (where.get("date", ""), where.get("device", "")) if text]
    state = "" if entry.state == "finished" else f"\n**Unfinished: {entry.state}.**\n"
    body = "".join(f"\n### {title}\n\n{table.markdown()}" if title else f"\n{table.markdown()}"
                   for title, table in entry.tables.items())  # fmt: skip
    files = f" Beside this file: {', '.join(entry.files)}." if entry.files else ""
    lacking = "".join(f"- `{name}`: {why}\n" for name, why in entry.extra.get("not_measured", {}).items())
    rest = f"\nNot measured:\n\n{lacking}" if lacking else ""
    return f"## {part.title}\n\n{', '.join(parts_of)}; {versions}.\n{_shape(entry)}{files}\n{state}{body}{rest}"


def _shape(entry: Done) -> str:
    """What the clips of a part are, in a line."""
    part, tokens = entry.part, entry.extra.get("tokens")
    counted = f", {tokens:,} tokens" if tokens else ""
    if isinstance(part, Following):
        return (f"{part.size}x{part.size}x{part.frames} (width x height x frames), {part.steps} steps, guidance "
                f"{part.guidance:g}, dense, {part.captions} captions; share of clips that pass each check.")
    if isinstance(part, Pair):
        shape = part.shape
        return (f'"{part.prompt}", seed {part.seed}; {shape["width"]}x{shape["height"]}x{shape["frames"]} (width x '
                f"height x frames){counted}, {shape['steps']} steps, guidance {shape['guidance_scale']:g}.")
    if isinstance(part, Fidelity):
        plan = part.plan
        return (f"{plan.side}x{plan.side}x{plan.frames} (width x height x frames), {plan.steps} steps, guidance "
                f"{plan.guidance:g}, {plan.captions} captions; docs/evaluation.md says what the columns mean.")
    return (f"{part.size} (width x height x frames){counted}, {part.steps} steps, guidance {part.guidance:g}, "
            f"{entry.extra['captions']} captions.")
