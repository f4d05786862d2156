"""`dit-sparse inspect METHOD --layer N`: what a method does to one attention call of the included model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .console import UserError, print_json, print_pairs, progress, quiet_libraries, refusing, warn
from .request import check_seed, check_writable, parse_options, warn_of_unknown_words
from .run import check_device

STEPS, DENSE = 10, 2  # of the run; what methods are compared on: its first fifth is dense


def inspect_layer(
    method: str,
    *,
    layer: int,
    head: int = 0,
    step: int = 5,
    prompt: str | None = None,
    seed: int = 0,
    density: float | None = None,
    options: list[str] | None = None,
    png: Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """Run the included model dense at its preview size, show the method one layer's calls, and draw one of them.

    Args:
        method: its name.
        layer, head: of the transformer, from 0.
        step: of `STEPS`, from 0; those before `DENSE` are dense.
        prompt, seed: of the clip.
        density, options: of the method.
        png: picture; None makes up a name.
        device: None takes the GPU when there is one.
        as_json: print one JSON document.
    """
    given = parse_options(options or []) | ({} if density is None else {"density": density})
    with refusing(ValueError, TypeError):
        from .. import SparseProc

        proc = SparseProc(method, dense_steps=DENSE, dense_layers=0, num_steps=STEPS, **given)
    if not DENSE <= step < STEPS:
        raise UserError(f"--step {step} is not allowed; use {DENSE} to {STEPS - 1}: the steps before are dense")
    if png is not None and png.suffix.lower() != ".png":
        raise UserError(f"--png {png}: a picture needs the suffix .png")
    name = re.sub(r"[^a-z0-9-]", "", method.lower())
    target = png or Path(f"layer-{name}-{layer}-{head}-{step}.png")
    check_writable(target, argument="--png")
    check_device(device)
    check_seed(seed)
    _check_place(layer, head)
    from ..pipelines.embedded import EXAMPLES

    text = prompt if prompt is not None else EXAMPLES[0]
    warn_of_unknown_words("embedded", [text])
    found = _look(proc, text, seed, layer, head, step, device, target)
    found = {"method": method, "layer": layer, "head": head, "step": step, "prompt": text, **found}
    if as_json:
        print_json({**found, "picture": str(target)})
        return
    print_pairs({**found, "picture": target})


def _check_place(layer: int, head: int) -> None:
    import json

    from ..pipelines.embedded import folder

    config = json.loads((folder() / "transformer" / "config.json").read_text(encoding="utf-8"))
    for flag, value, count in (("--layer", layer, config["num_layers"]), ("--head", head,
                                                                          config["num_attention_heads"])):
        if not 0 <= value < count:
            raise UserError(f"{flag} {value} is not allowed; the included model has 0 to {count - 1}")


def _look(proc: Any, prompt: str, seed: int, layer: int, head: int, step: int, device: str | None, target: Path
          ) -> dict[str, Any]:
    """The call's numbers, once the picture is written."""
    import torch

    from ..eval.bed import Bed, Replay
    from ..layermap import draw_layer
    from ..pipelines.embedded import DEFAULTS
    from ..pipelines.load import load
    from ..pipelines.video_io import finished_file

    with refusing():
        quiet_libraries()
        pipe = load("embedded", device=device)
    bed = Bed(pipe, int(DEFAULTS["frames"]), int(DEFAULTS["height"]), STEPS, 1.0)
    ids = pipe.tokenizer([prompt], padding="max_length", max_length=DEFAULTS["max_sequence_length"], truncation=True,
                         return_tensors="pt").input_ids.to(bed.device)  # fmt: skip
    with progress("dense run"):
        captured = bed.capture(ids, bed.noise([0], seed), layer=layer, last=step)
    replay = Replay(proc, captured.layers, keep=True)
    with torch.no_grad():
        calls = replay.replay(captured)
    made = next((planned for planned in replay.planned if planned[0].step == step), None)
    numbers = next(call for call in calls if call["step"] == step)
    if made is None:
        raise UserError(f"method {proc.method.name!r} is dense at layer {layer}, step {step}: {numbers['reason']}")
    if numbers["kind"] == "fallback":
        warn(f"the call cannot run sparse: {numbers['reason']}")
    _, call, plan = made
    values = {key: numbers[key][head] for key in ("density", "recall", "relative_error")}
    line = (f"density {values['density']:.3f}, recall of the mass {values['recall']:.3f}, relative error "
            f"{values['relative_error']:.3f}; {plan.operator.title}")
    title = f"{proc.method.name}: layer {layer}, head {head}, step {step} of {STEPS}, {call.grid}"
    with refusing(OSError, prefix=f"{target} cannot be written: "), finished_file(target) as part:
        draw_layer(plan.mask, call, head, part, title, line)
    return {"grid": str(call.grid), "blocks": f"{plan.mask.query.blocks} x {plan.mask.key.blocks} of "
            f"{plan.mask.query.block_size} tokens", "operator": plan.operator.title, **values,
            "recall of each head": ", ".join(f"{x:.3f}" for x in numbers["recall"])}
