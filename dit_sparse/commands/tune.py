"""`dit-sparse tune`: from a target to a preset file, with a progress bar that says how long it takes yet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .console import UserError, fraction_bar, print_json, print_pairs, print_table, refusing
from .request import (
    check_seed,
    check_writable,
    parse_options,
    read_prompts,
    shape_of,
    warn_of_small_size,
    warn_of_unknown_words,
)


def tune(
    *,
    target: str,
    model: str = "embedded",
    mode: str = "standard",
    prompts_file: Path | None = None,
    patterns: list[str] | None = None,
    statistic: str = "mean",
    dense_steps: str | None = None,
    dense_layers: int = 0,
    step_cache: str | None = None,
    batch: int = 1,
    seed: int = 0,
    size: str | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    output: Path | None = None,
    state: Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """Check everything, tune, write the preset and print what it holds."""
    from .run import device_name, open_pipeline, stay_offline

    stay_offline(model)
    from .. import SparseProc
    from ..pipelines.embedded import DEFAULTS
    from ..pipelines.hosts import host_arguments
    from ..schedule import Schedule
    from ..stepcache import check_name
    from ..tuning.candidates import patterns_of
    from ..tuning.steps import MODES
    from ..tuning.targets import STATISTICS, Target, check_batch

    check_seed(seed)
    for flag, value, allowed in (("--mode", mode, tuple(MODES)), ("--statistic", statistic, STATISTICS)):
        if value not in allowed:
            raise UserError(f"{flag} {value!r} is not allowed; use one of {', '.join(allowed)}")
    with refusing():
        check_batch(batch, Target.parse(target))
        patterns_of(patterns or "auto")
        check_name(step_cache)
        leading = None if dense_steps is None else parse_options([f"dense_steps={dense_steps}"])["dense_steps"]
        Schedule(dense_steps=0.0 if leading is None else leading, dense_layers=dense_layers)
    prompts = None if prompts_file is None else read_prompts(None, prompts_file, "")
    shape = shape_of(model, size=size, frames=frames, steps=steps, guidance_scale=guidance_scale,
                     base=DEFAULTS if model == "embedded" else {})
    path = output or Path(f"preset-{re.sub('[^a-z0-9.]+', '-', target.lower())}.json")
    if path.suffix != ".json":
        raise UserError(f"--output {path}: a preset needs the suffix .json")
    check_writable(path)
    warn_of_unknown_words(model, prompts or [])
    warn_of_small_size(model, shape)
    pipe = open_pipeline(model, device, SparseProc("dense"))
    from ..tuning.tune import tune as run

    call = host_arguments(shape.arguments())
    with refusing(), fraction_bar("tuning") as progress:
        preset = run(pipe, target, prompts, mode, patterns or "auto", statistic, seed, state=state, progress=progress,
                     call=call, dense_steps=leading, dense_layers=dense_layers, step_cache=step_cache, batch=batch)
    with refusing(OSError, prefix=f"{path} cannot be written: "):
        preset.save(path)
    if as_json:
        print_json({**preset.to_dict(), "files": [str(path)], "device": device_name(pipe)})
    else:
        _print(preset, path)


def _print(preset: Any, path: Path) -> None:
    """The preset for people: what was verified, and how dense each bucket and layer is."""
    for line in preset.describe().splitlines():
        print(line)
    table = preset.table
    rows = []
    for bucket in range(table.buckets):
        steps = table.steps_of(bucket)
        layers = [sum(c.density for c in table.of(bucket, layer)) / table.heads for layer in range(table.layers)]
        rows.append([f"{steps[0]}-{steps[-1]}", " ".join(f"{density:.2f}" for density in layers)])
    print_table(["steps", "density of each layer"], rows)
    print_pairs({"written": path, "use": f'dit-sparse generate --preset {path}'})
