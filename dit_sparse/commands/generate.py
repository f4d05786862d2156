"""`dit-sparse generate`: clips from prompts, contact sheets, and a summary of what sparse attention did."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import typer

from . import settings
from .console import UserError, print_json, print_pairs, refusing
from .many import Clip, forget, make_all, supervise, worker_of
from .request import (
    check_seed,
    check_writable,
    parse_options,
    plan_outputs,
    read_prompts,
    shape_of,
    sheet_path,
    sparse_proc,
    warn_of_small_size,
    warn_of_unknown_words,
)


def generate(
    prompt: str | None,
    *,
    prompts_file: Path | None = None,
    output: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    size: str | None = None,
    frames: int | None = None,
    guidance_scale: float | None = None,
    method: str | None = None,
    density: float | None = None,
    options: list[str] | None = None,
    step_cache: str | None = None,
    preset: str | None = None,
    model: str = "embedded",
    device: str | None = None,
    fps: int = settings.FPS,
    resume: bool | None = None,
    as_json: bool = False,
) -> None:
    """Check everything, load the model once, then make, write and report one clip after the other.

    With `resume`, or in several processes, as `many` says: a file of prompts in whoever's hands.
    """
    worker = worker_of(os.environ, resume) if prompts_file is not None else None
    if worker is None and resume is not None and prompts_file is None:
        raise UserError("--resume belongs to --prompts FILE")
    if worker is not None:
        supervise(worker, output or Path())
    from .run import device_name, make_clip, open_pipeline, stay_offline

    stay_offline(model)
    from ..pipelines.embedded import DEFAULTS, EXAMPLES

    check_seed(seed)
    prompts = read_prompts(prompt, prompts_file, EXAMPLES[0])
    base = DEFAULTS if model == "embedded" else {}
    shape = shape_of(model, size=size, frames=frames, steps=steps, guidance_scale=guidance_scale, base=base)
    suffix, many = ".png" if shape.frames == 1 else ".mp4", prompts_file is not None
    if worker is not None and output is not None and not output.suffix:
        with refusing(OSError, prefix=f"--output {output}: "):
            output.mkdir(parents=True, exist_ok=True)  # for good: other processes may be using it
    paths = plan_outputs(output, prompts, suffix, seed, into_folder=many)
    given = parse_options(options or []) | ({} if density is None else {"density": density})
    given |= {} if step_cache is None else {"step_cache": step_cache}
    if preset is not None:
        given["preset"] = preset
    elif method is None and model == "embedded":
        given = settings.usual_options(settings.PREVIEW, given)
    proc = sparse_proc(method, given)
    warn_of_unknown_words(model, prompts)
    warn_of_small_size(model, shape)
    pipe = open_pipeline(model, device if worker is None else worker.device(device), proc)
    with refusing():
        from .. import enable, summary

        enable(pipe, proc)

    asked = {"seed": seed, "model": model, "method": repr(proc), "fps": fps, **shape.arguments()}
    if proc.preset is not None:  # a plan's name does not say what is in it
        asked["preset"] = digest(proc.preset.to_dict())
    clips = [Clip(number, text, path, {"prompt": text, **asked})
             for number, (text, path) in enumerate(zip(prompts, paths, strict=True), start=1)]

    def make(one: Clip) -> dict[str, Any]:
        if one.number > 1:
            check_writable(one.path, sheet_path(one.path))
        label = "denoising" if len(prompts) == 1 else f"denoising {one.number}/{len(prompts)}"
        clip, seconds = make_clip(pipe, one.prompt, shape, seed, label)
        if many:
            with refusing(OSError, prefix=f"--output {one.path.parent}: "):
                one.path.parent.mkdir(parents=True, exist_ok=True)
        files = write_clip(one.path, clip, fps)
        report = summary(pipe).to_dict()
        made = shape.made(clip, report["steps"])
        return describe(one.prompt, seed, made, report, seconds, device_name(pipe), files)

    if worker is not None:
        raise typer.Exit(make_all(worker, clips, make, as_json))
    results = []
    for one in clips:
        if many:
            forget(one)
        results.append(make(one))
        if not as_json:
            print_summary(results[-1], first=one.number == 1)
    if as_json:
        print_json(results[0] if len(results) == 1 and prompts_file is None else results)


def write_clip(path: Path, clip: Any, fps: int) -> list[Path]:
    """Write the clip (one frame: the image) and its contact sheet; returns both paths."""
    from ..pipelines.video_io import contact_sheet, write_image, write_video

    with refusing(OSError, prefix=f"{path} cannot be written: "):
        if path.suffix.lower() == ".png":
            write_image(path, clip[0])
        else:
            write_video(path, clip, fps)
        write_image(sheet_path(path), contact_sheet(clip))
    return [path, sheet_path(path)]


def digest(data: Any) -> str:
    """A short name for plain data: the same for the same data in every process."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def describe(
    prompt: str,
    seed: int,
    size: dict[str, Any],
    report: dict[str, Any],
    seconds: float,
    device: str,
    files: list[Path],
) -> dict[str, Any]:
    """What was made (`size`: Shape.made) and how (`report`: of the run), as the document that --json prints."""
    attention = min(report["attention_seconds"], seconds)
    return {
        "prompt": prompt,
        "seed": seed,
        **size,
        "files": [str(file) for file in files],
        "device": device,
        "backends": report["backends"],
        "method": report["method"],
        "tokens": report["tokens"],
        "density": report["density"],
        "sparse_density": report["sparse_density"],
        "seconds": {
            "all": round(seconds, 3),
            "attention": round(attention, 3),
            "elsewhere": round(seconds - attention, 3),
        },
        "fallbacks": report["fallbacks"],
        "summary": report,
    }


def skipped(report: dict[str, Any]) -> dict[str, str]:
    """The line on the step cache, where there is one."""
    if not report.get("step_cache"):
        return {}
    calls = report["calls"] + report["skipped_calls"]
    return {"step cache": f"{report['step_cache']}: answered {report['skipped_calls']} of {calls} attention calls, in "
            f"{report['skipped_steps']} of {report['steps']} steps"}


def print_summary(result: dict[str, Any], first: bool = True) -> None:
    """The result for people."""
    report, seconds = result["summary"], result["seconds"]
    if not first:
        print()
    sparse = result["sparse_density"]
    inside = "" if sparse is None else f" ({sparse:.3f} in the sparse ones)"
    frames = "1 frame" if result["frames"] == 1 else f"{result['frames']} frames"
    size = f"{result['width']}x{result['height']}, {frames}, {result['steps']} steps"
    print_pairs(
        {
            "prompt": result["prompt"],
            "clip": f"{size}, seed {result['seed']}",
            "device": result["device"],
            "method": result["method"],
            "backend": ", ".join(f"{name} ({n} calls)" for name, n in result["backends"].items()) or "-",
            "tokens": f"{result['tokens']} ({report['grid']})" if result["tokens"] else "-",
            "density": f"{result['density']:.3f} over all {report['calls']} attention calls{inside}",
            "seconds": f"{seconds['all']:.1f}: {seconds['attention']:.1f} in attention, "
            f"{seconds['elsewhere']:.1f} elsewhere",
            "fallbacks": [f"{n} x {reason}" for reason, n in result["fallbacks"].items()] or "none",
            **skipped(report),
            **({"notes": report["notes"]} if report.get("notes") else {}),
            "written": result["files"],
        }
    )
