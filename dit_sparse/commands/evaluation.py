"""`dit-sparse eval ...`: run an evaluation, compare two, list the measures and what they do not see."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import UserError, print_json, print_pairs, print_table, progress, refusing, warn
from .request import check_writable, shape_of, warn_of_unknown_words

if TYPE_CHECKING:
    from ..eval.config import EvalConfig


def evaluate(config_file: Path, *, output: Path | None = None, as_json: bool = False) -> None:
    """Check the configuration, make and measure what is missing in the folder, write the report, print a table."""
    with refusing():
        from ..eval.config import read_config

        config = read_config(config_file)
    folder = output or Path(f"eval-{config_file.stem}")
    run_config(config, folder, ["dit-sparse", "eval", "run", str(config_file), "--output", str(folder)])
    show(folder, as_json=as_json)


def run_config(config: EvalConfig, folder: Path, words: list[str], *, seconds: float | None = None) -> None:
    """Make and measure what is missing in a folder, and write its report.

    Args:
        config: what to make.
        folder: made or continued.
        words: the command that makes it, for the report.
        seconds: after about which no further prompt is begun; None makes all.
    """
    from .run import open_pipeline, stay_offline

    stay_offline(config.pipeline)
    from .. import SparseFallbackError, SparseProc
    from ..pipelines.embedded import DEFAULTS

    base = DEFAULTS if config.pipeline == "embedded" else {}
    shape = shape_of(
        config.pipeline, size=config.size, steps=config.steps, guidance_scale=config.guidance, base=base
    )
    prepare_folder(folder)
    warn_of_unknown_words(config.pipeline, list(config.prompts))
    # The kernel of any method may be one that this device lacks.
    for entry in config.methods[1:]:
        _check_kernel(SparseProc(entry.name, **entry.options), config.device)
    first = config.methods[0]
    pipe = open_pipeline(config.pipeline, config.device, SparseProc(first.name, **first.options))
    import torch

    from ..eval.evaluation import digest
    from ..eval.evaluation import evaluate as run_evaluation
    from ..pipelines.load import locate

    with refusing(ValueError, SparseFallbackError, MemoryError, torch.OutOfMemoryError):
        run_evaluation(
            config, shape.arguments(), pipe, folder, command=shlex.join(words), bar=progress,
            weights=digest(locate(config.pipeline)), seconds=seconds,
        )


def prepare_folder(folder: Path, *, make: bool = True) -> None:
    """The folder exists and takes files; one that holds something else is refused. Not `make`: only look."""
    from ..eval.attention import ATTENTION
    from ..eval.evaluation import REPORT, RESULTS, RUN
    from ..eval.run import finished

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN).is_file():
        raise UserError(f"--output {folder} holds other files; name a new folder, or one of an evaluation")
    if make:
        with refusing(OSError, prefix=f"--output {folder}: "):
            folder.mkdir(parents=True, exist_ok=True)
    with refusing():
        for name in (RESULTS, ATTENTION):
            finished(folder / name)
    if make:
        check_writable(folder / RESULTS, folder / REPORT)


def _check_kernel(proc: Any, device: str | None) -> None:
    from .run import check_backend, check_device

    check_device(device)
    check_backend(proc.settings.backend, device)


def show(folder: Path, *, as_json: bool = False, write: bool = False) -> None:
    """Print the tables of a run; `write` also makes its report anew, as after a kill."""
    with refusing(ValueError, OSError):
        if write:
            from ..eval.report import write_report

            write_report(folder)
        from ..eval.bootstrap import Interval
        from ..eval.measures.table import MEASURES
        from ..eval.results import COSTS, load_evaluation, table_rows

        run = load_evaluation(folder)
        names = [*COSTS, *(name for name in MEASURES if any(name in e["result"]["values"] for e in run.entries))]
        rows = table_rows(run, names)
    kept = ("report.html", "results.jsonl", *(["attention.jsonl"] if run.attention else []), "environment.json")
    files = [str(folder / name) for name in (*kept, "videos")]
    if as_json:
        plain = [{name: dataclasses.asdict(v) if isinstance(v, Interval) else v for name, v in row.items()}
                 for row in rows]
        print_json({"methods": plain, "finished": len(run.entries), "planned": run.planned, "files": files})
        return
    # Methods are few and measures many: one row for each measure.
    present = [name for name in names if any(row[name] is not None for row in rows)]
    print_table(
        ["measure", *(row["label"] for row in rows)],
        [[name, *(None if row[name] is None else str(row[name]) for row in rows)] for name in present],
    )
    print_pairs({"clips": f"{len(run.entries)} of {run.planned}", "written": files})


def compare_evaluations(a: str, b: str, *, confidence: float = 0.95, as_json: bool = False) -> None:
    """Print which differences between two runs, or two methods, exceed noise."""
    with refusing():
        from ..eval.results import compare_runs

        found = compare_runs(a, b, confidence=confidence)
    if as_json:
        print_json({"a": a, "b": b, "confidence": confidence, "differences": [d.to_dict() for d in found]})
        return
    rows = [
        [d.label, d.name, f"{d.a:.4g}", f"{d.b:.4g}", str(d.difference), d.says, d.better or d.note or "-"]
        for d in found
    ]
    print_table(["method", "measure", "A", "B", f"B - A [{confidence:.0%}]", "B is", "better"], rows)
    real = sum(d.says in ("higher", "lower") for d in found)
    judged = sum(d.says != "too few prompts" for d in found)
    few = f"; too few prompts for {len(found) - judged}" * (judged < len(found))
    print_pairs({"A": a, "B": b, "prompts": found[0].difference.prompts,
                 "beyond noise": f"{real} of {judged}; by chance alone about {(1 - confidence) * judged:.1f}{few}"})


def list_measures(as_json: bool = False, *, dimensions: bool = False) -> None:
    """Print the measures: what each needs, its range and direction, and whether it can be taken here.

    Args:
        as_json: as JSON instead.
        dimensions: VBench's 16 dimensions instead, each with what measures it.
    """
    from ..eval.measures.table import MEASURES, coverage

    if dimensions:
        if as_json:
            print_json([dataclasses.asdict(row) for row in coverage()])
        else:
            columns = ["VBench's dimension", "VBench takes", "any video", "included model's world", "network given"]
            print_table(columns, [row.cells() for row in coverage()])
        return
    rows = [
        {"name": m.name, "kind": m.kind, "range": m.range, "direction": m.direction, "needs": m.needs,
         "reencode_bound": m.reencode_bound, "dimension": m.dimension, "missing": m.unmet()}
        for m in MEASURES.values()
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ["measure", "takes", "range", "better", "VBench dimension", "here"],
        [[*(row[name] or "-" for name in ("name", "kind", "range", "direction", "dimension")), row["missing"] or "yes"]
         for row in rows],
    )


def measure_files(
    video: Path, reference: Path | None = None, *, prompt: str | None = None, fps: float | None = None,
    names: list[str] | None = None, as_json: bool = False,
) -> None:
    """Measure a video from a file, by itself or against another, and print the numbers.

    Args:
        video, reference: any files that FFmpeg reads; both of the same size, length and frame rate.
        prompt: what the video should show.
        fps: frames per second that both must have; None takes the video's own.
        names: measures; None takes all that can be taken.
        as_json: as JSON instead.
    """
    with refusing():
        from ..eval.measures.clips import read_clip
        from ..eval.measures.table import MEASURES, check_names, measure, with_motion

        wanted = None if names is None else with_motion(check_names(names))
        for name in wanted or ():
            needed = {"pair": reference is None and "a second video", "prompt": prompt is None and "--prompt"}
            if lacking := needed.get(MEASURES[name].kind):
                raise ValueError(f"--measure {name} needs {lacking}; add it, or leave the measure out")
        clip = read_clip(video, fps=fps)
        other = None if reference is None else read_clip(reference, fps=clip.fps).video
        values, reasons = measure(clip.video, reference=other, prompt=prompt, fps=clip.fps, names=wanted)
    for name in wanted or ():
        if name not in values:
            reasons.setdefault(name, "does not apply to this prompt and clip")
    frames, _, height, width = clip.video.shape
    if as_json:
        print_json({"frames": frames, "height": height, "width": width, "fps": clip.fps, "values": values,
                    "reasons": reasons})
        return
    rows = [[name, f"{value:.5g}", MEASURES[name].direction] for name, value in values.items()]
    print_table(["measure", "value", "better"], rows)
    print_pairs({"clip": f"{width}x{height}, {frames} frames, {clip.fps:g} a second",
                 "not measured": [f"{name}: {why}" for name, why in reasons.items()] or "-"})


def blind_spots(*, size: int = 128, frames: int = 13, measures: list[str] | None = None, as_json: bool = False) -> None:
    """Spoil drawn clips in known ways; print which measure falls with the strength, and which do not see it."""
    with refusing():
        from ..eval.measures import degradations
        from ..eval.measures.table import MEASURES, check_names

        names = check_names(measures or [name for name, m in MEASURES.items() if not m.unmet()])
        clips = [degradations.draw(prompt, frames, size) for prompt in degradations.PROMPTS]
    with progress("measuring") as update:
        found: dict[str, dict[str, list[float]]] = {}
        for done, spoiled in enumerate(degradations.DEGRADATIONS, 1):
            for name, row in degradations.sensitivities(clips, names, [spoiled]).items():
                found.setdefault(name, {}).update(row)
            update(done, len(degradations.DEGRADATIONS))
    for name in names:
        if name not in found:
            warn(f"{name} was not measured: it needs a larger or longer clip (--size, --frames), or a package")
    blind = degradations.blind_spots(found)
    if as_json:
        print_json({"levels": [0.0, *degradations.LEVELS], "values": found, "blind": blind,
                    "not_promised": degradations.NOT_PROMISED})
        return

    def word(name: str, spoiled: str) -> str:
        if spoiled in blind.get(name, []):
            return "BLIND"
        return "falls" if degradations.answers(name, found[name][spoiled]) else "sees"

    kinds = list(degradations.DEGRADATIONS)
    print_table(["measure", *kinds], [[name, *(word(name, kind) for kind in kinds)] for name in found])
    unseen = [kind for kind in kinds if all(kind in blind.get(name, []) for name in found)]
    print_pairs({
        "falls": "worse with every strength", "sees": "worse at the strongest, not at every step",
        "BLIND": "not worse, or better, at the strongest", "seen by none": ", ".join(unseen) or "-",
        "nothing promised": [f"{name}: {why}" for name, why in degradations.NOT_PROMISED.items()],
    })


def export_vbench(
    output: Path, *, folder: Path | None = None, method: str | None = None, dimensions: list[str] | None = None,
    as_json: bool = False,
) -> None:
    """Copy a method's videos into VBench's layout; without a folder, write VBench's prompts in its layout."""
    if (folder is None) != (method is None):
        raise UserError("FOLDER and METHOD belong together; give both for videos, or none for VBench's prompts")
    with refusing(), refusing(OSError, prefix=f"--output {output}: "):
        if folder is None or method is None:
            from ..eval.vbench_prompts import prompts_of, write_prompts

            files, covered = write_prompts(output, dimensions), None
            count = len(prompts_of(dimensions))
        else:
            from ..eval.vbench import export_videos

            done = export_videos(folder, method, output, dimensions=dimensions)
            files, covered = done.files, done.coverage
    names = [str(path) for path in files]
    if as_json:
        print_json({"method": method, "files": names, "coverage": covered})
    elif covered is None:
        print_pairs({"prompts": count, "written": names})
    else:
        print_pairs({"videos": len(names), "written": str(output)})
        _say_coverage(covered)


def _say_coverage(covered: dict[str, tuple[int, int]]) -> None:
    """How much of each dimension a folder of videos covers: VBench scores what it finds, and warns of the rest."""
    if not covered:
        warn("none of these prompts is VBench's: its standard mode finds no video (use --mode=custom_input there)")
        return
    print_table(["dimension", "prompts", "of"], [[name, some, every] for name, (some, every) in covered.items()])
    if any(some < every for some, every in covered.values()):
        warn("scores of a dimension that is not complete cannot be compared with published ones")


def import_vbench(
    files: list[Path], *, folder: Path | None = None, method: str | None = None, as_json: bool = False
) -> None:
    """Print VBench's scores; with a folder and a method, keep them there and write its report anew."""
    if (folder is None) != (method is None):
        raise UserError("--folder and --method belong together; give both, or none")
    with refusing(ValueError, OSError):
        from ..eval.vbench import DIMENSIONS, keep_scores, read_scores

        found = read_scores(*files)
        if folder is not None and method is not None:
            keep_scores(folder, method, found)
            from ..eval.report import write_report

            write_report(folder)
    if as_json:
        print_json(found.to_dict())
        return
    rows = [[name, f"{found.raw[name]:.4f}", f"{100 * found.normalised[name]:.2f}", DIMENSIONS[name].weight]
            for name in DIMENSIONS if name in found.raw]
    print_table(["dimension", "as measured", "normalised, %", "weight"], rows)
    means = {"quality": found.quality, "semantic": found.semantic, "total": found.total}
    print_pairs({
        **{name: "not complete" if value is None else f"{100 * value:.2f} %" for name, value in means.items()},
        "missing": ", ".join(found.missing) or "-",
    })
