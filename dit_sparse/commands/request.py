"""Checks of what the user asked for, made before a model is loaded or memory is spent."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import settings
from .console import UserError, refusing, warn


@dataclass(frozen=True)
class Shape:
    """Size and length of a clip and of its run; None leaves the host's default (never for the embedded model).

    `cells` are the pixels (height, width) and `frame_step` the frames that one token stands for, as far as known.
    """

    height: int | None
    width: int | None
    frames: int | None
    steps: int | None
    guidance_scale: float | None
    cells: tuple[int, int] | None = None
    frame_step: int | None = None

    @property
    def tokens(self) -> int | None:
        """Video tokens of one forward, when the geometry is known."""
        if None in (self.height, self.width, self.frames, self.cells, self.frame_step):
            return None
        grid = (self.height // self.cells[0], self.width // self.cells[1])  # type: ignore[index, operator]
        return ((self.frames - 1) // self.frame_step + 1) * grid[0] * grid[1]  # type: ignore[operator]

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of text_to_video."""
        names = ("height", "width", "frames", "steps", "guidance_scale")
        return {name: getattr(self, name) for name in names}

    def made(self, clip: Any, steps: int | None) -> dict[str, Any]:
        """The same for a clip (F, 3, H, W) that was made, with what the host chose in place of None."""
        size = {"height": clip.shape[2], "width": clip.shape[3], "frames": clip.shape[0]}
        return {**self.arguments(), **size, "steps": self.steps if self.steps is not None else steps}


def read_prompts(prompt: str | None, file: Path | None, example: str) -> list[str]:
    """The prompts to make: the one given, those of a file (one a line, # for remarks), or the example."""
    if prompt is not None and file is not None:
        raise UserError("give either PROMPT or --prompts FILE, not both")
    if file is None:
        if prompt is not None and not prompt.strip():
            raise UserError("PROMPT is empty; say what to show, for example: " + repr(example))
        return [prompt.strip() if prompt else example]
    with refusing(OSError, UnicodeDecodeError, prefix=f"--prompts {file}: "):
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--prompts {file}: the file holds no prompt; write one a line")
    return prompts


def warn_of_unknown_words(model: str, prompts: Sequence[str]) -> None:
    """The embedded model knows the words of its world only; name the others."""
    if model != "embedded":
        return
    from ..pipelines.embedded import EXAMPLES, unknown_words

    for prompt in prompts:
        unknown = unknown_words(prompt)
        if unknown:
            words = ", ".join(repr(word) for word in unknown)
            warn(f"the embedded model does not know {words}; it knows such as: {EXAMPLES[0]!r}")


def warn_of_small_size(model: str, shape: Shape) -> None:
    """The embedded model was trained from its preview size up: what it makes below that is no picture."""
    from ..pipelines.embedded import DEFAULTS

    least = DEFAULTS["height"]
    if model == "embedded" and min(shape.height or least, shape.width or least) < least:
        warn(f"the embedded model was trained at {least}x{least} and above; smaller clips show little")


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs as keyword arguments; values are Python literals, triples such as 3x4x5, or text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(f"--option {pair!r} is not allowed; write name=value, for example dense_steps=0.25")
        known = {"true": True, "false": False, "none": None}
        if text.lower() in known:
            options[name] = known[text.lower()]
        elif re.fullmatch(r"\d+x\d+x\d+", text):
            options[name] = tuple(int(part) for part in text.split("x"))
        else:
            try:
                options[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                options[name] = text
    return options


def sparse_proc(method: str | None, options: Mapping[str, Any]) -> Any:
    """A checked SparseProc, before any model is loaded."""
    if not isinstance(options.get("step_cache"), str | None):
        raise UserError("step_cache takes a name or a file here; configurations are objects, for Python")
    with refusing(ValueError, TypeError):
        from .. import SparseProc

        return SparseProc(method, **options)


def shape_of(
    model: str,
    *,
    size: str | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    base: Mapping[str, Any] | None = None,
) -> Shape:
    """What the user asked for over the defaults in `base`, checked against the limits and the model's geometry.

    Raises:
        UserError: a value out of range, or one that the model cannot make (names the nearest it can).
    """
    base = base or {}
    width, height, count = _parse_size(size) if size else (base.get("width"), base.get("height"), None)
    if frames is not None and count is not None and frames != count:
        raise UserError(f"--size {size} and --frames {frames} contradict each other")
    frames = frames if frames is not None else count if count is not None else base.get("frames")
    steps = steps if steps is not None else base.get("steps")
    guidance_scale = guidance_scale if guidance_scale is not None else base.get("guidance_scale")
    _in_range("--frames", frames, 1, settings.MAX_FRAMES)
    _in_range("--steps", steps, 1, settings.MAX_STEPS)
    _in_range("--guidance", guidance_scale, 0, 100)
    for side in (width, height):
        _in_range("--size", side, settings.MIN_SIDE, settings.MAX_SIDE)
    cells, frame_step = _geometry(model)
    if cells is not None:
        for name, side, cell in (("width", width, cells[1]), ("height", height, cells[0])):
            if side is not None and side % cell:
                low = max(side // cell * cell, settings.MIN_SIDE)
                raise UserError(f"--size: {name} {side} is not a multiple of {cell}; use {low} or {low + cell}")
    if frame_step is not None and frames is not None and (frames - 1) % frame_step:
        low = (frames - 1) // frame_step * frame_step + 1
        raise UserError(f"--frames {frames} is not 1 + a multiple of {frame_step}; use {low} or {low + frame_step}")
    shape = Shape(height, width, frames, steps, guidance_scale, cells, frame_step)
    if (shape.tokens or 0) > settings.MAX_TOKENS:
        raise UserError(
            f"{width}x{height} with {frames} frames makes {shape.tokens} tokens; the limit is {settings.MAX_TOKENS}"
        )
    return shape


def _parse_size(text: str) -> tuple[int, int, int | None]:
    """`256`, `320x192` (width x height) or `512x512x33` (with frames)."""
    if not re.fullmatch(r"\d{1,9}(x\d{1,9}){0,2}", text.lower()):
        forms = "256, 320x192 (width x height) or 512x512x33 (and frames)"
        raise UserError(f"--size {text!r} is not allowed; write {forms}")
    numbers = [int(part) for part in text.lower().split("x")]
    width, height = numbers[0], numbers[1] if len(numbers) > 1 else numbers[0]
    return width, height, numbers[2] if len(numbers) == 3 else None


def _in_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise UserError(f"{name}: {value} is not allowed; use a number from {low} to {high}")


def check_seed(seed: int) -> None:
    """A seed that every generator takes."""
    _in_range("--seed", seed, 0, 2**63 - 1)


def _geometry(model: str) -> tuple[tuple[int, int] | None, int | None]:
    """Pixels and frames for each token, from the configuration files of a model on this disk."""
    from ..pipelines.load import locate

    with refusing():
        place = locate(model)
    if not isinstance(place, Path):
        return None, None
    try:
        vae = json.loads((place / "vae" / "config.json").read_text(encoding="utf-8"))
        transformer = json.loads((place / "transformer" / "config.json").read_text(encoding="utf-8"))
        patch = transformer["patch_size"]
        spatial, frame_step = int(vae["scale_factor_spatial"]), int(vae["scale_factor_temporal"]) * int(patch[0])
        cells = (spatial * int(patch[1]), spatial * int(patch[2]))
        return (cells, frame_step) if min(*cells, frame_step) > 0 else (None, None)
    except (OSError, ValueError, LookupError, TypeError):
        # Another architecture, or a damaged folder: the host, or the check while loading, has the last word.
        return None, None


def plan_outputs(
    output: Path | None, prompts: Sequence[str], suffix: str, seed: int = 0, *, into_folder: bool = False
) -> list[Path]:
    """Where the clips go: checked, so that a long run does not end with a path that cannot be written.

    A folder that does not exist yet is made by the caller, when nothing is left that could be refused.

    Args:
        output: the user's --output: a file, or a folder; None is the current folder.
        prompts: one clip each.
        suffix: ".mp4" or ".png".
        seed: part of the names that are made up here.
        into_folder: `output` is a folder, also when it does not exist yet (the prompts come from a file).
    """
    if output is not None and not into_folder and not os.path.isdir(output):
        if output.suffix == "":
            output = output.with_name(output.name + suffix)
        if output.suffix.lower() != suffix:
            raise UserError(f"--output {output}: a {_kind(suffix)} needs the suffix {suffix}")
        paths = [output]
    else:
        folder = output or Path()
        if not os.path.isdir(folder) and (folder.suffix or os.path.lexists(folder)):
            raise UserError(f"--output {output}: the clips of a file of prompts need a folder, not a file")
        several = len(prompts) > 1
        numbers = [f"{i:03d}-" if several else "" for i in range(1, len(prompts) + 1)]
        paths = [folder / f"{n}{_slug(p)}-{seed}{suffix}" for n, p in zip(numbers, prompts, strict=True)]
    with _trial_folder(paths[0].parent) if into_folder else contextlib.nullcontext():
        for path in paths:
            check_writable(path, sheet_path(path))
    return paths


def sheet_path(path: Path) -> Path:
    """The contact sheet beside a clip."""
    return path.with_name(path.stem + "-sheet.png")


def check_writable(*paths: Path, argument: str = "--output") -> None:
    """Refuse a file whose folder does not exist or takes no new file, whose name is too long, or that is a folder."""
    from ..pipelines.video_io import part_name

    for path in paths:
        if not os.path.isdir(path.parent):
            raise UserError(f"{argument} {path}: the folder {path.parent} does not exist")
        if os.path.isdir(path):
            raise UserError(f"{argument} {path} is a folder")
        with refusing(OSError, prefix=f"{argument} {path} cannot be written: "):
            with contextlib.suppress(FileNotFoundError):
                os.stat(path)  # the system knows which names are too long
            # The very file that the result will be written to before it gets its name.
            part = part_name(path)
            try:
                part.open("wb").close()
            finally:
                with contextlib.suppress(OSError):
                    part.unlink()


@contextlib.contextmanager
def _trial_folder(folder: Path) -> Iterator[None]:
    """The folder exists inside the block; what had to be made for that is gone afterwards."""
    missing = [place for place in (folder, *folder.parents) if not os.path.isdir(place)]
    try:
        with refusing(OSError, prefix=f"--output {folder}: "):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()


def _kind(suffix: str) -> str:
    return "single frame" if suffix == ".png" else "clip"


def _slug(prompt: str) -> str:
    """A part of a file name; where words are lost, a digest keeps the names of different prompts apart."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))
    slug = words[:60].rstrip("-")
    if slug and slug == words and prompt.isascii():
        return slug
    digest = hashlib.sha1(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{slug or 'clip'}-{digest}"
