"""`dit-sparse calibrate`: the numbers that MagCache and TeaCache need of a model, measured and written to a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..stepcache.names import CALIBRATED
from .console import UserError, print_json, print_pairs, progress, refusing
from .request import check_seed, check_writable, read_prompts, shape_of, sparse_proc

PROMPTS = 4  # of the included model's examples, when none are given


def calibrate(
    kind: str,
    *,
    model: str = "embedded",
    prompts_file: Path | None = None,
    output: Path | None = None,
    steps: int | None = None,
    size: str | None = None,
    frames: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """Check everything, run every prompt in full, write the file and say how to use it."""
    from .run import open_pipeline, stay_offline

    if kind not in CALIBRATED:
        raise UserError(f"{kind!r} cannot be calibrated; use {' or '.join(CALIBRATED)}")
    stay_offline(model)
    from ..pipelines.embedded import DEFAULTS, EXAMPLES

    check_seed(seed)
    if prompts_file is None and model != "embedded":
        raise UserError("--prompts FILE is needed: prompts that the model is used for, one a line")
    prompts = list(EXAMPLES[:PROMPTS]) if prompts_file is None else read_prompts(None, prompts_file, "")
    base = DEFAULTS if model == "embedded" else {}
    shape = shape_of(model, size=size, frames=frames, steps=steps, guidance_scale=guidance_scale, base=base)
    if shape.steps is not None and shape.steps < 2:
        raise UserError(f"--steps {shape.steps}: a calibration compares each step with the last one; use at least 2")
    path = output or Path(f"{kind}.json")
    if path.suffix != ".json":
        raise UserError(f"--output {path}: a calibration needs the suffix .json")
    check_writable(path)
    pipe = open_pipeline(model, device, sparse_proc("dense", {}))
    from ..stepcache.calibrate import calibrate as measure

    number = iter(range(1, len(prompts) + 1))

    def make(prompt: str, callback: Callable[[int, int], None]) -> None:
        label = f"calibrating {next(number)}/{len(prompts)}"
        with progress(label) as shown:

            def both(done: int, count: int) -> None:
                callback(done, count)
                if shown is not None:
                    shown(done, count)

            _run(pipe, prompt, seed, shape.arguments(), both)

    with refusing(ValueError, MemoryError):
        document = measure(kind, pipe, prompts, make, model=model)
    _write(path, document)
    use = f'enable(pipe, step_cache="{path}"), or --step-cache {path}'
    if as_json:
        print_json({**document, "file": str(path)})
    else:
        shown = document.get("ratios") or document["coefficients"]
        print_pairs({"cache": kind, "model": f"{model} ({document['class']}, configuration {document['config']})",
                     "measured": f"{len(prompts)} prompts, {document['steps']} steps",
                     "numbers": ", ".join(f"{x:.5g}" for x in shown), "written": str(path), "use": use})


def _run(pipe: Any, prompt: str, seed: int, shape: dict[str, Any], callback: Callable[[int, int], None]) -> None:
    """One run of a video or image pipeline."""
    from ..pipelines.hosts import accepted
    from ..pipelines.text_to_image import text_to_image
    from ..pipelines.text_to_video import text_to_video

    if "num_frames" in accepted(pipe):
        text_to_video(pipe, prompt, seed=seed, callback=callback, **shape)
    else:
        shape = {name: value for name, value in shape.items() if name != "frames"}
        text_to_image(pipe, prompt, seed=seed, callback=callback, **shape)


def _write(path: Path, document: dict[str, Any]) -> None:
    """The file appears under its name when it is complete."""
    from ..pipelines.video_io import finished_file

    with refusing(OSError, prefix=f"--output {path} cannot be written: "), finished_file(path) as part:
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
