"""`dit-sparse compare`: one prompt dense and sparse, side by side, with what was gained and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import settings
from .console import UserError, print_json, print_pairs, print_table, progress, refusing
from .generate import skipped
from .request import (
    check_seed,
    parse_options,
    plan_outputs,
    read_prompts,
    shape_of,
    sheet_path,
    sparse_proc,
    warn_of_small_size,
    warn_of_unknown_words,
)


def compare(
    prompt: str | None,
    *,
    long: bool = False,
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
    as_json: bool = False,
) -> None:
    """Check everything, make both clips, write them side by side and print the numbers."""
    from .run import device_name, open_pipeline, stay_offline

    stay_offline(model)
    from ..pipelines.embedded import DEFAULTS, EXAMPLES

    if long and model != "embedded":
        raise UserError("--long is a size of the embedded model; for another model give --size and --steps")
    check_seed(seed)
    text = read_prompts(prompt, None, EXAMPLES[0])[0]
    usual = settings.COMPARE["long" if long else "preview"]
    base = {**DEFAULTS, **usual} if model == "embedded" else {}
    shape = shape_of(model, size=size, frames=frames, steps=steps, guidance_scale=guidance_scale, base=base)
    path = plan_outputs(output or Path(f"compare-{seed}.mp4"), [text], ".mp4")[0]
    given = parse_options(options or []) | ({} if density is None else {"density": density})
    given |= {} if step_cache is None else {"step_cache": step_cache}
    # The table's options belong to the table's method; another method starts from its own defaults.
    own = usual["options"] if method in (None, usual["method"]) and (long or model == "embedded") else {}
    if preset is not None:
        proc = sparse_proc(method, {**given, "preset": preset})
    else:
        proc = sparse_proc(method or usual["method"], settings.usual_options(own, given))
    warn_of_unknown_words(model, [text])
    warn_of_small_size(model, shape)
    pipe = open_pipeline(model, device, proc)
    import torch

    from .. import SparseFallbackError
    from ..eval.compare import compare as run_comparison

    with refusing(ValueError, SparseFallbackError, MemoryError, torch.OutOfMemoryError):
        numbers, dense, sparse = run_comparison(
            pipe, text, proc, seed=seed, shape=shape.arguments(), bar=progress
        )
    files = _write(path, dense, sparse, numbers, fps)
    result = {
        **numbers.to_dict(),
        **shape.made(dense, numbers.summary["steps"]),
        "device": device_name(pipe),
        "files": [str(file) for file in files],
    }
    if as_json:
        print_json(result)
    else:
        _print(result)


def _write(path: Path, dense: Any, sparse: Any, numbers: Any, fps: int) -> list[Path]:
    from ..pipelines.video_io import CELL, contact_sheet, side_by_side, write_image, write_video

    labels = [
        f"dense  {numbers.dense_seconds:.1f} s",
        f"sparse {numbers.sparse_seconds:.1f} s  density {numbers.density:.2f}  PSNR {numbers.psnr:.1f} dB",
    ]
    both = side_by_side([dense, sparse], labels)
    with refusing(OSError, prefix=f"{path} cannot be written: "):
        write_video(path, both, fps)
        write_image(sheet_path(path), contact_sheet(both, most=6, columns=2, cell=2 * CELL))
    return [path, sheet_path(path)]


def _print(result: dict[str, Any]) -> None:
    sparse, guidance = result["sparse_density"], result["guidance_scale"]
    rows = [
        ["dense", f"{result['dense_seconds']:.1f}", "1.000", "-", "-", "-"],
        [
            "sparse",
            f"{result['sparse_seconds']:.1f}",
            f"{result['density']:.3f}",
            f"{result['psnr']:.2f}",
            f"{result['psnr_frames']:.2f}",
            f"{result['ssim']:.4f}",
        ],
    ]
    print_table(["run", "seconds", "density", "PSNR dB", "PSNR of frames", "SSIM"], rows)
    print_pairs(
        {
            "speed-up": f"{result['speedup']:.2f}x in wall time, text and decoding included",
            "prompt": f"{result['prompt']} (seed {result['seed']})",
            "clip": f"{result['width']}x{result['height']}, {result['frames']} frames, {result['steps']} steps, "
            + ("" if guidance is None else f"guidance {guidance}, ")
            + f"{result['tokens']} tokens",
            "method": result["method"],
            "density": f"{result['density']:.3f} over all calls"
            + ("" if sparse is None else f", {sparse:.3f} in the sparse ones"),
            "attention": f"{result['attention_seconds']:.1f} s of the sparse run",
            **skipped(result["summary"]),
            "fallbacks": [f"{n} x {reason}" for reason, n in result["summary"]["fallbacks"].items()] or "none",
            "device": result["device"],
            "written": result["files"],
        }
    )
