"""The command line: arguments and help texts. What a command does is in dit_sparse/commands, imported when it runs.

Nothing here imports torch or Diffusers, so that --help answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from .commands.console import UserError

INTERRUPTED = 130  # as shells say it

app = typer.Typer(
    name="dit-sparse",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sparse attention for the diffusion transformers of Hugging Face Diffusers.",
    epilog='Try: dit-sparse generate "a red circle moving right"',
)

Prompt = Annotated[str | None, typer.Argument(help="What to show; left out, the model's first example.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; the included model's own: 20.")]
Size = Annotated[
    str | None,
    typer.Option(help="256, 320x192 (width x height), 512x512x33 (and frames); the included model's own: 256x256x17."),
]
Frames = Annotated[int | None, typer.Option(help="Frames of the clip; 1 makes an image.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1: none; the included model's own: 3.")]
MethodName = Annotated[str | None, typer.Option(help="See `dit-sparse methods`; else svg; `dense` is none.")]
Density = Annotated[float | None, typer.Option(help="Share of the attention that is computed, in (0, 1]; svg: .25.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="Option of the method, as name=value; may be repeated.")
]
Model = Annotated[str, typer.Option(help="'embedded', a Diffusers folder, or a hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU when there is one.")]
Fps = Annotated[int, typer.Option(min=1, max=120, help="Frames per second of the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


@app.command(epilog='Example: dit-sparse generate "a red circle moving right" --size 256 --frames 17')
def generate(
    prompt: Prompt = None,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="File (.mp4; .png for one frame) or folder.")] = None,
    steps: Steps = None,
    size: Size = None,
    frames: Frames = None,
    guidance: Guidance = None,
    method: MethodName = None,
    density: Density = None,
    option: Options = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line.")] = None,
    model: Model = "embedded",
    device: Device = None,
    fps: Fps = 8,
    as_json: Json = False,
) -> None:
    """Make a video from a prompt with sparse attention, and say what it did."""
    from .commands.generate import generate as run

    run(
        prompt,
        prompts_file=prompts,
        output=output,
        seed=seed,
        steps=steps,
        size=size,
        frames=frames,
        guidance_scale=guidance,
        method=method,
        density=density,
        options=option,
        model=model,
        device=device,
        fps=fps,
        as_json=as_json,
    )


@app.command(epilog='Example: dit-sparse compare "a red circle moving right" --method radial')
def compare(
    prompt: Prompt = None,
    long: Annotated[bool, typer.Option("--long", help="512x512x33, 17,408 tokens, 8 steps without guidance.")] = False,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="File (.mp4) or folder.")] = None,
    steps: Steps = None,
    size: Size = None,
    frames: Frames = None,
    guidance: Guidance = None,
    method: MethodName = None,
    density: Density = None,
    option: Options = None,
    model: Model = "embedded",
    device: Device = None,
    fps: Fps = 8,
    as_json: Json = False,
) -> None:
    """Make the same clip dense and sparse: side by side, PSNR, SSIM, seconds and speed-up."""
    from .commands.compare import compare as run

    run(
        prompt,
        long=long,
        output=output,
        seed=seed,
        steps=steps,
        size=size,
        frames=frames,
        guidance_scale=guidance,
        method=method,
        density=density,
        options=option,
        model=model,
        device=device,
        fps=fps,
        as_json=as_json,
    )


@app.command(epilog="Example: dit-sparse inspect svg --grid 21x45x80 --density 0.25")
def inspect(
    method: Annotated[str, typer.Argument(help="Sparse method, see `dit-sparse methods`.")],
    grid: Annotated[str | None, typer.Option(help="Tokens (frames x rows x columns); else 21x45x80.")] = None,
    text: Annotated[int, typer.Option(min=0, max=100_000, help="Text tokens in the same sequence.")] = 0,
    text_at: Annotated[str, typer.Option(help="front or back.")] = "back",
    density: Density = None,
    option: Options = None,
    png: Annotated[Path | None, typer.Option(help="Picture of the mask; else mask-METHOD-GRID.png.")] = None,
    query_tile: Annotated[str | None, typer.Option(help="For gna: tile of the simulated kernel, as 4x8x8.")] = None,
    key_tile: Annotated[str | None, typer.Option(help="For gna: the same for keys.")] = None,
    layer: Annotated[int | None, typer.Option(help="Look at a call of the included model's layer instead.")] = None,
    head: Annotated[int, typer.Option(help="With --layer: which head.")] = 0,
    step: Annotated[int, typer.Option(help="With --layer: which of 10 denoising steps, 2 to 9.")] = 5,
    prompt: Annotated[str | None, typer.Option(help="With --layer: what the clip shows.")] = None,
    seed: Annotated[int, typer.Option(help="With --layer: seed of the clip.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show what a method does to a grid, or to a call of the included model: density, blocks and a picture."""
    if layer is not None:
        if grid is not None or text or query_tile or key_tile:
            raise UserError("--layer looks at the included model's own grid; leave --grid, --text and the tiles out")
        from .commands.inspect_layer import inspect_layer

        inspect_layer(
            method,
            layer=layer,
            head=head,
            step=step,
            prompt=prompt,
            seed=seed,
            density=density,
            options=option,
            png=png,
            device=device,
            as_json=as_json,
        )
        return
    if prompt is not None:
        raise UserError("--prompt belongs to --layer: a bare grid shows no clip")
    from .commands.inspect import inspect as run

    run(
        method,
        grid=grid or "21x45x80",
        text=text,
        text_at=text_at,
        density=density,
        options=option,
        png=png,
        query_tile=query_tile,
        key_tile=key_tile,
        as_json=as_json,
    )


@app.command(epilog="Example: dit-sparse methods --json")
def methods(as_json: Json = False) -> None:
    """List the sparse methods with their options."""
    from .commands.listing import list_methods

    list_methods(as_json)


@app.command(epilog="Example: dit-sparse bench kernels --tokens 4096 --density 0.25")
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="kernels: attention alone; routing: each method's masks; step: a model's step; ladder: the kernels, "
            "one idea a line."
        ),
    ] = "kernels",
    tokens: Annotated[list[int] | None, typer.Option(help="Length of the sequence; may be repeated.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, max=1024, help="Attention heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=8, max=512, help="Channels of a head.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32.")] = None,
    block_size: Annotated[int | None, typer.Option(min=16, max=1024, help="Tokens of a block.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Share that is computed; may be repeated.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernel, see `dit-sparse doctor`; else the fastest.")] = None,
    grid: Annotated[
        str | None, typer.Option(help="routing, ladder: frames x height x width, such as 21x45x80.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="step: such as wan-14b-720p; may be repeated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="routing, step: methods to time; may be repeated.")] = None,
    fp8: Annotated[
        list[str] | None, typer.Option(help="step: linear, attention or both in 8-bit floats as well; may be repeated.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="step: where the time goes, by kind of kernel.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="ladder: folder for a table and a picture.")] = None,
    device: Device = None,
    seconds: Annotated[float, typer.Option(min=0.01, max=60, help="Timed calls for each row.")] = 0.4,
    as_json: Json = False,
) -> None:
    """Measure speed on this machine, dense and sparse: the kernels, the masks, or a whole denoising step."""
    from .commands.bench import bench as run

    run(
        what,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        block_size=block_size,
        densities=density,
        backend=backend,
        grid=grid,
        models=model,
        methods=method,
        fp8=fp8,
        profile=profile or None,
        out=out,
        device=device,
        seconds=seconds,
        as_json=as_json,
    )


@app.command(epilog="Example: dit-sparse doctor --hosts")
def doctor(
    hosts: Annotated[bool, typer.Option("--hosts", help="List every transformer class of Diffusers instead.")] = False,
    as_json: Json = False,
) -> int:
    """Say what works on this machine, what does not, and what to do about it."""
    from .commands.listing import show_doctor, show_hosts

    return show_hosts(as_json) if hosts else show_doctor(as_json)


@app.command("app", epilog="Example: dit-sparse app --port 7860")
def demo(
    model: Annotated[list[str] | None, typer.Option(help="A model that visitors may choose; may be repeated.")] = None,
    device: Device = None,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0: every address of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="A public address as well, through Gradio's servers.")] = False,
) -> None:
    """Serve the demo page: make clips, look into their attention, measure speed. Needs the extra `app`."""
    from .app.serve import serve

    serve(model or ["embedded"], device=device, host=host, port=port, share=share)


eval_app = typer.Typer(help="Measure methods: speed, fidelity to dense, quality; one report for each run.")
app.add_typer(eval_app, name="eval")


@eval_app.command("run", epilog="Example: dit-sparse eval run methods.yaml --output results/methods")
def eval_run(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file, see docs/evaluation.md.")],
    output: Annotated[Path | None, typer.Option(help="Folder, made or continued; else eval-CONFIG.")] = None,
    as_json: Json = False,
) -> None:
    """Make every prompt dense and with every method, measure the clips, write report.html; killed, it goes on later."""
    from .commands.evaluation import evaluate as run

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
    from .commands.paper import paper as run

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
    from .commands.methods_comparison import compare_methods as run

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


@eval_app.command("show", epilog="Example: dit-sparse eval show results/methods")
def eval_show(
    folder: Annotated[Path, typer.Argument(help="Folder of `eval run`.")],
    as_json: Json = False,
) -> None:
    """Print the tables of a run, finished or not, and write its report anew."""
    from .commands.evaluation import show as run

    run(folder, as_json=as_json, write=True)


@eval_app.command("compare", epilog="Example: dit-sparse eval compare results/methods:svg results/methods:radial")
def eval_compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of `eval run`, or FOLDER:METHOD.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; methods are paired by name.")],
    confidence: Annotated[float, typer.Option(help="Of the intervals, between 0 and 1.")] = 0.95,
    as_json: Json = False,
) -> None:
    """Say which differences between two runs, or two methods, exceed noise."""
    from .commands.evaluation import compare_evaluations as run

    run(a, b, confidence=confidence, as_json=as_json)


@eval_app.command("measures", epilog="Example: dit-sparse eval measures --dimensions")
def eval_measures(
    dimensions: Annotated[bool, typer.Option("--dimensions", help="VBench's 16, and what measures each.")] = False,
    as_json: Json = False,
) -> None:
    """List the measures, what they need, and whether they can be taken here."""
    from .commands.evaluation import list_measures as run

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
    from .commands.evaluation import measure_files as run

    run(video, reference, prompt=prompt, fps=fps, names=measure, as_json=as_json)


@eval_app.command("blind-spots", epilog="Example: dit-sparse eval blind-spots --size 64 --frames 9")
def eval_blind_spots(
    size: Annotated[int, typer.Option(min=32, max=512, help="Sides of the drawn clips.")] = 128,
    frames: Annotated[int, typer.Option(min=1, max=65, help="Frames of the drawn clips.")] = 13,
    measure: Annotated[list[str] | None, typer.Option(help="Name of a measure; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Spoil drawn clips in known ways; say which measure sees it and which does not."""
    from .commands.evaluation import blind_spots as run

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
    from .commands.evaluation import export_vbench as run

    run(output, folder=folder, method=method, dimensions=dimension, as_json=as_json)


@eval_app.command("import-vbench", epilog="Example: dit-sparse eval import-vbench svg_eval_results.json")
def eval_import(
    files: Annotated[list[Path], typer.Argument(help="VBench's ..._eval_results.json, one or more.")],
    folder: Annotated[Path | None, typer.Option(help="Folder of `eval run` whose report shows them.")] = None,
    method: Annotated[str | None, typer.Option(help="Label of the method, or dense; with --folder.")] = None,
    as_json: Json = False,
) -> None:
    """Read VBench's results: each dimension on the leaderboard's scale, quality, semantic and total score."""
    from .commands.evaluation import import_vbench as run

    run(files, folder=folder, method=method, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes sys.argv.

    Returns:
        Exit code: 0 done, 1 `doctor` found a problem, 2 wrong input (one line on standard error), 130 interrupted.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        # A prompt holds what the terminal's encoding may lack: never a reason to fail after a long run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # Threads that wait for each other by spinning make PyTorch many times slower as soon as another program wants the
    # cores (2 cores, one busy: 97 s instead of 11 s, November 2026). Read once, when PyTorch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        words = None if arguments is None else list(arguments)
        code = app(args=words, prog_name="dit-sparse", standalone_mode=False)
        # The argument parser turns Ctrl-C into this code, or into Abort.
        return _interrupted() if code == INTERRUPTED else code if isinstance(code, int) else 0
    except UserError as error:
        return _refuse(error)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        # The reader of our output went away (`| head`): point stdout at nothing, so that the flush at exit is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # Errors of the argument parser know how to describe themselves.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _refuse(error)
        raise


def _interrupted() -> int:
    print("dit-sparse: interrupted; files that were not finished have been removed", file=sys.stderr)
    return INTERRUPTED


def _refuse(error: Any) -> int:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    print(f"dit-sparse: error: {' '.join(text.split())}", file=sys.stderr)
    if os.environ.get("DIT_SPARSE_DEBUG"):
        raise error
    return 2


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Being told to stop ends like Ctrl-C: unfinished files are removed."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
