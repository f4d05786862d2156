"""Does the included model follow its prompts? Shares of clips that pass each check, beside shuffled captions and drawn
clips: what the README says of the model, by `pipelines/embedded/evaluate.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .tables import Table

CHECKS = ("colour", "shape", "motion", "relation", "camera", "all")
RESULT, PICTURE = "following.json", "held-out.jpg"


@dataclass(frozen=True)
class Following:
    """One table of prompt following.

    Attributes:
        title: its heading.
        size, frames: of the clips, square.
        steps, guidance: of their making.
        captions: how many, held out of training.
        batch: clips made at a time.
        seconds: about what it takes on an H200.
    """

    title: str
    size: int
    frames: int
    steps: int
    guidance: float
    captions: int
    batch: int
    seconds: int


def follow(plan: Following, folder: Path, device: str, weights: str) -> dict[str, Any]:
    """Make and check the clips, or read what an earlier call found.

    Args:
        plan: what is made.
        folder: of the results, made when it is missing; a picture of the first clips lies there too.
        device: "cpu", "cuda", ...
        weights: digest of the model's files: results of other weights are made again.

    Returns:
        {"generated", "shuffled", "drawn", "through_vae": {check: share}, "clips", "seconds", "device", "key"}.
    """
    from dit_sparse.pipelines.embedded import evaluate
    from dit_sparse.pipelines.embedded import folder as shipped
    from dit_sparse.pipelines.video_io import finished_file

    from .evaluation import dated

    key = {**asdict(plan), "device": device, "weights": weights}
    kept = read_kept(folder / RESULT, key)
    if kept:
        return kept
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):  # what it tells on the way is in its results.json
        run = evaluate.Evaluation(evaluate.load_folder(shipped(), device), folder, float("inf"))
        spec = evaluate.held_out_specs(plan.captions, run.device)
        options = {"frames": plan.frames, "size": plan.size, "steps": plan.steps, "guidance": plan.guidance}
        run.score("generated", spec, plan.batch, PICTURE, extras=True, **options)
        run.ceiling("drawn", spec, plan.frames, plan.size)
    made, ceiling = run.results["generated"], run.results["drawn"]
    found = {
        "key": key,
        "environment": dated(device),
        "generated": {name: made[name] for name in CHECKS if name in made},
        "shuffled": made["shuffled"],
        "drawn": ceiling["drawn"],
        "through_vae": ceiling["through_vae"],
        "by_kind": made["by_kind"],
        "clips": made["clips"],
        "seconds": round(time.monotonic() - start, 1),
    }
    with finished_file(folder / RESULT) as part:
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def read_kept(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call with the same key wrote; empty when there is none, or it was of other settings."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    # As a file holds it: lists for tuples, texts for the keys of a mapping.
    return found if found.get("key") == json.loads(json.dumps(key)) else {}


def table(found: Mapping[str, Any]) -> Table:
    """Shares by check, a row for each kind of clip; None where no clip of this length shows it."""
    rows = [
        [title, found["clips"], *(found[name].get(check) for check in CHECKS)]
        for title, name in (
            ("generated", "generated"),
            ("the same clips, shuffled captions", "shuffled"),
            ("drawn clips: the ceiling of the checks", "drawn"),
            ("drawn clips through the VAE", "through_vae"),
        )
    ]
    return Table(["clips", "n", *CHECKS], rows)
