"""The words of `dit-sparse eval`: its commands, their options and their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .words import Device, Json

eval_app = typer.Typer(help="Measure methods: speed, fidelity to dense, quality; one report for each run.")


@eval_app.command("run", epilog="Example: dit-sparse eval run methods.yaml --output results/methods")
def eval_run(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file, see docs/evaluation.md.")],
    output: Annotated[Path | None, typer.Option(help="Folder, made or continued; else eval-CONFIG.")] = None,
    as_json: Json = False,
) -> None:
    """Make every prompt dense and with every method, measure the clips, write report.html; killed, it goes on later."""
    from .evaluation import evaluate as run

    run(config, output=output, as_json=as_json)


@eval_app.command("paper", epilog="Example: dit-sparse eval paper --quick --out paper")
def eval_paper(
    out: Annotated[Path, typer.Option(help="Folder of the tables, made or continued.")] = Path("paper"),
    quick: Annotated[bool, typer.Option("--quick", help="A size that two cores make in under a minute.")] = False,
    part: Annotated[list[str] | None, typer.Option(help="Only a part; may be repeated.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="About how long it may take; it goes on later.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make the project's own tables on the included model: prompt following, speed, fidelity; killed, it goes on."""
    from .paper import paper as run

    run(out, quick=quick, names=part, seconds=seconds, device=device, as_json=as_json)


@eval_app.command("methods", epilog="Example: dit-sparse eval methods --quick --out methods")
def eval_methods(
    out: Annotated[Path, typer.Option(help="Folder of the tables, made or continued.")] = Path("methods"),
    quick: Annotated[bool, typer.Option("--quick", help="Two methods at a size that a CPU makes in seconds.")] = False,
    steps: Annotated[int | None, typer.Option(min=2, max=200, help="Denoising steps, else 10.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="Guidance scale, else 3; 1 is off.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=64, help="Clips that are made at once, else 8.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods; may be repeated.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Begin nothing new after these; 0: tables only.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare all methods on the included model at the same densities: tables and a picture; killed, it goes on."""
    from .methods_comparison import compare_methods as run

    run(
        out,
        quick=quick,
        steps=steps,
        guidance=guidance,
        batch=batch,
        methods=method,
        seconds=seconds,
        device=device,
        as_json=as_json,
    )


@eval_app.command("tune", epilog="Example: dit-sparse eval tune --quick --out tuned")
def eval_tune(
    out: Annotated[Path, typer.Option(help="Folder of the tables, made or continued.")] = Path("tuned"),
    quick: Annotated[bool, typer.Option("--quick", help="A size that a CPU makes in under a minute.")] = False,
    seconds: Annotated[float | None, typer.Option(min=0, help="Begin nothing new after these; 0: tables only.")] = None,
    state: Annotated[Path | None, typer.Option(help="Where tunings keep their clips, else OUT/state.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tune the included model to 26, 30 and 34 dB and bring every method to the same PSNR; killed, it goes on."""
    from .tuned_comparison import compare_tuned as run

    run(out, quick=quick, seconds=seconds, state=state, device=device, as_json=as_json)


@eval_app.command("caches", epilog="Example: dit-sparse eval caches --size preview --out caches")
def eval_caches(
    out: Annotated[Path, typer.Option(help="Folder of the tables, made or continued.")] = Path("caches"),
    size: Annotated[str, typer.Option(help="preview or long; both may share a folder.")] = "preview",
    quick: Annotated[bool, typer.Option("--quick", help="Two caches at a size that a CPU makes in seconds.")] = False,
    captions: Annotated[int | None, typer.Option(min=1, max=64, help="Held-out captions, else 8.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Begin nothing new after these; 0: tables only.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare the step caches on the included model, alone and beside sparse attention; killed, it goes on."""
    from .caches_comparison import compare_caches as run

    run(out, size=size, quick=quick, captions=captions, seconds=seconds, device=device, as_json=as_json)


@eval_app.command("show", epilog="Example: dit-sparse eval show results/methods")
def eval_show(
    folder: Annotated[Path, typer.Argument(help="Folder of `eval run`.")],
    as_json: Json = False,
) -> None:
    """Print the tables of a run, finished or not, and write its report anew."""
    from .evaluation import show as run

    run(folder, as_json=as_json, write=True)


@eval_app.command("compare", epilog="Example: dit-sparse eval compare results/methods:svg results/methods:radial")
def eval_compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of `eval run`, or FOLDER:METHOD.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; methods are paired by name.")],
    confidence: Annotated[float, typer.Option(help="Of the intervals, between 0 and 1.")] = 0.95,
    as_json: Json = False,
) -> None:
    """Say which differences between two runs, or two methods, exceed noise."""
    from .evaluation import compare_evaluations as run

    run(a, b, confidence=confidence, as_json=as_json)


@eval_app.command("measures", epilog="Example: dit-sparse eval measures --dimensions")
def eval_measures(
    dimensions: Annotated[bool, typer.Option("--dimensions", help="VBench's 16, and what measures each.")] = False,
    as_json: Json = False,
) -> None:
    """List the measures, what they need, and whether they can be taken here."""
    from .evaluation import list_measures as run

    run(as_json, dimensions=dimensions)


@eval_app.command("clip", epilog="Example: dit-sparse eval clip sparse.mp4 dense.mp4 --measure psnr")
def eval_clip(
    video: Annotated[Path, typer.Argument(help="Video file.")],
    reference: Annotated[Path | None, typer.Argument(help="Video to compare it with, of the same size.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the video should show.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second that both must have.")] = None,
    measure: Annotated[list[str] | None, typer.Option(help="Name of a measure; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Measure any video, by itself or against another."""
    from .evaluation import measure_files as run

    run(video, reference, prompt=prompt, fps=fps, names=measure, as_json=as_json)


@eval_app.command("blind-spots", epilog="Example: dit-sparse eval blind-spots --size 64 --frames 9")
def eval_blind_spots(
    size: Annotated[int, typer.Option(min=32, max=512, help="Sides of the drawn clips.")] = 128,
    frames: Annotated[int, typer.Option(min=1, max=65, help="Frames of the drawn clips.")] = 13,
    measure: Annotated[list[str] | None, typer.Option(help="Name of a measure; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Spoil drawn clips in known ways; say which measure sees it and which does not."""
    from .evaluation import blind_spots as run

    run(size=size, frames=frames, measures=measure, as_json=as_json)


@eval_app.command("export-vbench", epilog="Example: dit-sparse eval export-vbench results svg --output vbench")
def eval_export(
    output: Annotated[Path, typer.Option(help="Folder, made when it is missing.")],
    folder: Annotated[Path | None, typer.Argument(help="Folder of `eval run`.")] = None,
    method: Annotated[str | None, typer.Argument(help="Label of the method, or dense.")] = None,
    dimension: Annotated[
        list[str] | None, typer.Option(help="Only the prompts of a dimension of VBench; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a method's videos to the names that VBench reads; without FOLDER, write VBench's own prompts."""
    from .evaluation import export_vbench as run

    run(output, folder=folder, method=method, dimensions=dimension, as_json=as_json)


@eval_app.command("import-vbench", epilog="Example: dit-sparse eval import-vbench svg_eval_results.json")
def eval_import(
    files: Annotated[list[Path], typer.Argument(help="VBench's ..._eval_results.json, one or more.")],
    folder: Annotated[Path | None, typer.Option(help="Folder of `eval run` whose report shows them.")] = None,
    method: Annotated[str | None, typer.Option(help="Label of the method, or dense; with --folder.")] = None,
    as_json: Json = False,
) -> None:
    """Read VBench's results: each dimension on the leaderboard's scale, quality, semantic and total score."""
    from .evaluation import import_vbench as run

    run(files, folder=folder, method=method, as_json=as_json)
