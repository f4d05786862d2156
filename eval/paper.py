"""The repository's own tables: every method on the included model, at sizes that anyone can make again.

Each size is one evaluation (`evaluation.evaluate`) in a folder of its own, so that a run that was stopped goes on where
it was, and has a page of its own; `write_tables` puts their numbers into one Markdown file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import tables
from .config import EvalConfig, parse_config
from .results import Evaluation

TABLES, RUNS = "methods.md", "runs"
MARK = "<!-- made by dit-sparse eval paper -->"
DENSITY = 0.25
# One line for each method that is compared; radial has no density of its own to ask for.
METHODS = (
    {"name": "svg", "options": {"density": DENSITY}},
    {"name": "rainfusion", "options": {"density": DENSITY}},
    {"name": "rainfusion2", "options": {"density": DENSITY}},
    {"name": "gna", "options": {"density": DENSITY}},
    {"name": "radial", "options": {"decay": 0.2}},
)


@dataclass(frozen=True)
class Size:
    """One evaluation.

    Attributes:
        title: its heading.
        size: width x height x frames.
        steps, guidance: of every clip.
        prompts: how many held-out captions.
        attention: of how many the attention is looked into.
    """

    title: str
    size: str
    steps: int
    guidance: float
    prompts: int
    attention: int


FULL: Mapping[str, Size] = {
    "preview": Size("Preview size", "256x256x17", 20, 3.0, 32, 4),
    "long": Size("Long size", "512x512x33", 20, 3.0, 12, 2),
}
QUICK: Mapping[str, Size] = {"quick": Size("Quick size", "128x128x5", 3, 1.0, 2, 1)}
SEED = 11  # of the captions, as in the model's own evaluation


def sizes(quick: bool) -> Mapping[str, Size]:
    """The evaluations by the name of their folder."""
    return QUICK if quick else FULL


def captions(count: int) -> list[str]:
    """Different captions whose combination of colour, shape and third word was never drawn in training.

    Args:
        count: how many; the first ones of a longer list are those of a shorter one.
    """
    import torch

    from dit_sparse.pipelines.embedded import world

    # A longer sample would begin otherwise: always the same one.
    drawn = world.sample(256, "held", "cpu", generator=torch.Generator().manual_seed(SEED))
    return list(dict.fromkeys(world.captions(drawn)))[:count]


def config_of(size: Size, device: str | None = None) -> EvalConfig:
    """What one size makes: dense, every method, and the noise ceiling.

    Args:
        size: of `sizes`.
        device: None takes the GPU when there is one.
    """
    return parse_config({
        "pipeline": "embedded", "methods": [dict(entry) for entry in METHODS], "prompts": captions(size.prompts),
        "steps": size.steps, "size": size.size, "guidance": size.guidance, "noise_ceiling": True, "clips": 4,
        "attention": size.attention, "device": device,
    })  # fmt: skip


def check_folder(out: Path) -> None:
    """Refuse a place where the tables cannot lie.

    Raises:
        ValueError: a file in place of the folder, or a methods.md that is somebody's own.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    file = out / TABLES
    if file.exists() and not (file.is_file() and file.read_text(encoding="utf-8", errors="replace").startswith(MARK)):
        raise ValueError(f"--out {out}: {TABLES} was not made by this command; name another folder")


def write_tables(out: Path, runs: Mapping[str, Evaluation], command: str, quick: bool) -> Path:
    """Write the Markdown file of all sizes.

    Args:
        out: exists.
        runs: finished evaluations by the name of their size.
        command: that makes them again.
        quick: whether they are of the quick size.

    Returns:
        The file.
    """
    from dit_sparse.pipelines.video_io import finished_file

    parts = [f"{MARK}\n# Methods on the included model\n\n`{command}`\n", _preface(quick)]
    parts += [_section(sizes(quick)[name], name, run) for name, run in runs.items()]
    with finished_file(out / TABLES) as part:
        part.write_text("\n".join(parts), encoding="utf-8")
    return out / TABLES


def _preface(quick: bool) -> str:
    text = (
        f"Methods are asked for density {DENSITY} (radial: decay 0.2, whose density follows from the grid); the first "
        "fifth of the steps and the\nfirst layer are dense and counted. Captions are held out of training, one seed. "
        "Brackets are 95 % bootstrap intervals over the\ncaptions. `noise-ceiling` is dense attention by another "
        "kernel. Definitions: `dit-sparse eval measures` and each report.\n"
    )
    return (
        "**Quick size: it shows that everything runs, and says nothing about methods.**\n\n" if quick else ""
    ) + text


def _section(size: Size, name: str, run: Evaluation) -> str:
    where = run.environment
    versions = ", ".join(f"{key} {where[key]}" for key in ("torch", "cuda", "triton", "diffusers") if where.get(key))
    tokens = next((e["result"]["tokens"] for e in run.entries if e["result"].get("tokens")), None)
    counted = "" if tokens is None else f", {tokens:,} tokens"
    shape = (f"{size.size} (width x height x frames){counted}, {size.steps} steps, guidance {size.guidance:g}, "
             f"{len(run.config['prompts'])} captions.")  # fmt: skip
    missing = run.planned - len(run.entries)
    state = f"\n**Unfinished: {missing} of {run.planned} clips are missing.**\n" if missing else ""
    parts = [("Speed", tables.speed(run)), ("Fidelity to dense, same seed", tables.fidelity(run)),
             ("Prompt following and quality", tables.quality(run)),
             (f"Attention, call by call, on a dense run ({size.attention} captions)", tables.calls(run))]  # fmt: skip
    body = "".join(f"\n### {title}\n\n{table.markdown()}" for title, table in parts if table is not None)
    return (
        f"## {size.title}\n\n{where.get('date', '')}, {where.get('device', '')}; {versions}.\n{shape} Page with clips "
        f"and maps: {RUNS}/{name}/report.html.\n{state}{body}"
    )
