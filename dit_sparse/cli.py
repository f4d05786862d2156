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
from .commands.eval_app import eval_app
from .commands.words import (
    Density,
    Device,
    Fps,
    Frames,
    Guidance,
    Json,
    MethodName,
    Model,
    Options,
    PresetName,
    Prompt,
    Seed,
    Size,
    StepCache,
    Steps,
)

INTERRUPTED = 130  # as shells say it

app = typer.Typer(
    name="dit-sparse",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sparse attention for the diffusion transformers of Hugging Face Diffusers.",
    epilog='Try: dit-sparse generate "a red circle moving right"',
)


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
    step_cache: StepCache = None,
    preset: PresetName = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="With --prompts: leave out the clips that are finished.")
    ] = None,
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
        resume=resume,
        output=output,
        seed=seed,
        steps=steps,
        size=size,
        frames=frames,
        guidance_scale=guidance,
        method=method,
        density=density,
        options=option,
        step_cache=step_cache,
        preset=preset,
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
    step_cache: StepCache = None,
    preset: PresetName = None,
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
        step_cache=step_cache,
        preset=preset,
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
            "one idea a line; generate: a whole generation, added up from steps."
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
    model: Annotated[
        list[str] | None, typer.Option(help="step, generate: such as wan-14b-720p; may be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="routing, step, generate: methods to time; may be repeated.")
    ] = None,
    fp8: Annotated[
        list[str] | None, typer.Option(help="step: linear, attention or both in 8-bit floats as well; may be repeated.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="step: where the time goes, by kind of kernel.")
    ] = False,
    dense_steps: Annotated[
        str | None, typer.Option(help="generate: first steps that stay dense, a number or a share such as 0.1.")
    ] = None,
    dense_layers: Annotated[int | None, typer.Option(min=0, help="generate: first layers that stay dense.")] = None,
    step_cache: Annotated[
        str | None, typer.Option(help="generate: whose reported skip rate, magcache or teacache.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="ladder, generate: folder for a table and a picture.")] = None,
    device: Device = None,
    seconds: Annotated[float, typer.Option(min=0.01, max=60, help="Timed calls for each row.")] = 0.4,
    as_json: Json = False,
) -> None:
    """Measure speed on this machine, dense and sparse: the kernels, the masks, a denoising step, a generation."""
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
        dense_steps=dense_steps,
        dense_layers=dense_layers,
        step_cache=step_cache,
        out=out,
        device=device,
        seconds=seconds,
        as_json=as_json,
    )


@app.command(epilog="Example: dit-sparse calibrate teacache --model FOLDER --prompts prompts.txt --steps 50")
def calibrate(
    cache: Annotated[str, typer.Argument(help="magcache or teacache.")],
    model: Model = "embedded",
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line; a handful suffices.")] = None,
    output: Annotated[Path | None, typer.Option(help="File (.json); else magcache.json or teacache.json.")] = None,
    steps: Steps = None,
    size: Size = None,
    frames: Frames = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure what MagCache or TeaCache needs to know about a model; the file goes to --step-cache."""
    from .commands.calibrate import calibrate as run

    run(
        cache,
        model=model,
        prompts_file=prompts,
        output=output,
        steps=steps,
        size=size,
        frames=frames,
        guidance_scale=guidance,
        seed=seed,
        device=device,
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


@app.command(epilog='Example: dit-sparse tune --target "psnr>=30" --mode quick')
def tune(
    target: Annotated[str, typer.Option(help="psnr>=30, ssim>=0.9, lpips<=0.1 or speedup>=1.5.")] = "psnr>=30",
    mode: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "standard",
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line; the last is held out.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="drop, soft, spread or band; repeatable; else all.")] = None,
    statistic: Annotated[str, typer.Option(help="mean or min over the clips.")] = "mean",
    dense_steps: Annotated[
        str | None, typer.Option(help="Leading steps that stay dense, a share (0.2) or a number (4); else a tenth.")
    ] = None,
    dense_layers: Annotated[int, typer.Option(help="Leading layers that stay dense.")] = 0,
    step_cache: Annotated[
        str | None, typer.Option(help="Verify the plan once more beside this step cache; names as in generate.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Clips that are made together, where memory allows.")] = 1,
    seed: Seed = 0,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    output: Annotated[Path | None, typer.Option(help="Preset file (.json); else preset-TARGET.json.")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder of what was found: an interrupted run goes on.")] = None,
    model: Model = "embedded",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the cheapest plan, head by head, that reaches a quality, and write it as a preset."""
    from .commands.tune import tune as run

    run(
        target=target,
        mode=mode,
        prompts_file=prompts,
        patterns=pattern,
        statistic=statistic,
        dense_steps=dense_steps,
        dense_layers=dense_layers,
        step_cache=step_cache,
        batch=batch,
        seed=seed,
        size=size,
        frames=frames,
        steps=steps,
        guidance_scale=guidance,
        output=output,
        state=state,
        model=model,
        device=device,
        as_json=as_json,
    )


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


app.add_typer(eval_app, name="eval")


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
