"""What a visitor asks for, checked before a job is queued or memory is spent. The page and its API share the checks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..commands import settings
from ..commands.console import UserError, refusing
from ..commands.request import Shape, check_seed, shape_of, sparse_proc
from ..grid import TokenGrid
from ..methods import all_methods
from ..pipelines.load import EMBEDDED
from . import forms
from .models import Shelf

if TYPE_CHECKING:
    from ..tuning.preset import Preset

MODES = ("both", "sparse", "dense")
LONGEST_PROMPT = 1000
OF_PRESET = ("dense_steps", "dense_layers")  # a preset's own plan says which steps and layers are dense
# Bytes of a run beside the weights, for each byte of the clip in float32 and of one activation of all tokens. Generous:
# one clip of 512x512x17 with the embedded model took 246 MiB on two cores (November 2026), and these give 930.
CLIP_COPIES, TOKEN_COPIES = 12, 24
SHARE = 0.8  # of the free memory that one job may take


@dataclass(frozen=True)
class Wanted:
    """One checked request.

    Attributes:
        model: name on the shelf; place: what `load` takes for it.
        prompt, seed, shape, mode: what to make; mode is one of `MODES`.
        proc: the SparseProc, also for mode "dense", where it is not used.
        settings: all of it as plain data, as the file of settings holds it.
        notes: remarks that do not keep the job from running.
    """

    model: str
    place: str
    prompt: str
    seed: int
    shape: Shape
    mode: str
    proc: Any
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


@contextmanager
def in_page_words() -> Any:
    """The command line's refusals without its dashes."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"--(\w+)", r"\1", str(error)).replace("PROMPT", "prompt")
        raise UserError(text) from error


def check(
    shelf: Shelf,
    *,
    model: str | None = None,
    prompt: str = "",
    width: float | None = None,
    height: float | None = None,
    frames: float | None = None,
    steps: float | None = None,
    seed: float = 0,
    guidance: float | None = None,
    mode: str = "both",
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    step_cache: str | None = None,
    step_cache_value: float | None = None,
    preset: Preset | None = None,
) -> Wanted:
    """Check everything that can be known before the model runs.

    Args:
        shelf: the models of the page.
        model: one of `shelf.names`; None takes the first.
        prompt: what to show.
        width, height: pixels; frames, steps, seed: whole numbers; guidance: scale, 1 is off. None: the model's own.
        mode: "both" (dense and sparse with the same seed), "sparse" or "dense".
        method: name of a method; None takes the default.
        options, shared: of the method, and of every method, by name.
        step_cache, step_cache_value: one of `forms.STEP_CACHES` or "none", and its number.
        preset: takes the place of the method and its options, and of `dense_steps` and `dense_layers`.

    Raises:
        UserError: one line that names what is allowed.
    """
    name = model if model else shelf.names[0]
    place = shelf.place(name)
    text = read_prompt(prompt)
    if mode not in MODES:
        raise UserError(f"mode={str(mode)[:40]!r} is not allowed; use one of {', '.join(MODES)}")
    with in_page_words():
        shape = _shape(shelf, name, width, height, frames, steps, guidance)
        number = whole("seed", seed)
        check_seed(number)
        proc = build_proc(method, options, shared, step_cache, step_cache_value, preset)
        fit_grid(proc, shape)
    check_memory(shelf, name, shape, clips=2 if mode == "both" else 1)
    fields = forms.fields_of(proc.method.name) if preset is None else []
    own = {f.name: getattr(proc.method, f.name) for f in fields}
    written = {
        "model": name, "prompt": text, "mode": mode, "seed": number, "width": shape.width, "height": shape.height,
        "frames": shape.frames, "steps": shape.steps, "guidance": shape.guidance_scale, "method": proc.method.name,
        "options": own, "shared": {n: getattr(proc.settings, n) for n in forms.SHARED},
        "step_cache": step_cache or "none", "step_cache_value": step_cache_value,
    } | ({} if preset is None else {"preset": preset.to_dict()})
    return Wanted(name, place, text, number, shape, mode, proc, written, _notes(place, text, shape))


def build_proc(
    method: str | None, options: Mapping[str, Any] | None, shared: Mapping[str, Any] | None = None,
    step_cache: str | None = None, step_cache_value: float | None = None, preset: Preset | None = None,
) -> Any:
    """A SparseProc from what the form holds; see `check`."""
    from .. import SparseProc

    if preset is not None:
        more = forms.read([f for f in forms.shared_fields() if f.name not in OF_PRESET], {
            name: value for name, value in (shared or {}).items() if name not in OF_PRESET})
        with refusing(ValueError, TypeError):
            return SparseProc(preset=preset, **more, step_cache=forms.step_cache(step_cache, step_cache_value))

    name = method or SparseProc.default_method
    if name not in all_methods():
        raise UserError(f"method={str(name)[:40]!r} is unknown; use one of {', '.join(all_methods())}")
    if not all(given is None or isinstance(given, Mapping) for given in (options, shared)):
        raise UserError("options: use names and values, for example {\"density\": 0.25}")
    own = forms.read(forms.fields_of(name), options or {})
    proc = sparse_proc(name, own | forms.read(forms.shared_fields(), shared or {}))
    cache = forms.step_cache(step_cache, step_cache_value)
    if cache is None:
        return proc
    with refusing(ValueError, TypeError):
        return SparseProc(proc.method, **{n: getattr(proc.settings, n) for n in forms.SHARED}, step_cache=cache)


def fit_grid(proc: Any, shape: Shape) -> None:
    """Refuse options that do not fit the size, where the model's geometry is known."""
    if shape.tokens is None:
        return
    assert shape.cells is not None and shape.frame_step is not None and shape.frames is not None  # else no tokens
    assert shape.height is not None and shape.width is not None
    with refusing():
        proc.method.check(TokenGrid((shape.frames - 1) // shape.frame_step + 1, shape.height // shape.cells[0],
                                    shape.width // shape.cells[1]))


def whole(name: str, value: Any) -> int:
    """A whole number, as a browser or a client sends it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or int(value) != value:
        raise UserError(f"{name}={str(value)[:40]!r} is not allowed; use a whole number")
    return int(value)


def check_memory(shelf: Shelf, name: str, shape: Shape, clips: int = 1) -> None:
    """Refuse a size that the memory left on the device cannot hold; unknown geometry is left to the host.

    Raises:
        UserError: with both numbers.
    """
    if shape.height is None or shape.width is None or shape.frames is None:
        return
    clip = 12 * shape.height * shape.width * shape.frames
    needed = clip * (CLIP_COPIES + 2 * clips)
    if shape.tokens is not None:
        needed += TOKEN_COPIES * shape.tokens * shelf.width(name) * (2 if shelf.cuda else 4)
    there = free_bytes(shelf.device)
    if needed > SHARE * there:
        raise UserError(
            f"size: {shape.width}x{shape.height} with {shape.frames} frames needs about {needed / 2**30:.1f} GiB; "
            f"{shelf.device} has {there / 2**30:.1f} GiB left; use a smaller size or fewer frames"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_prompt(prompt: Any) -> str:
    """The prompt without the space around it.

    Raises:
        UserError: it is empty or too long.
    """
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not text:
        raise UserError("prompt is empty; say what to show, or take one of the examples")
    if len(text) > LONGEST_PROMPT:
        raise UserError(f"prompt has {len(text)} characters; the limit is {LONGEST_PROMPT}")
    return text


def _shape(shelf: Shelf, name: str, width: Any, height: Any, frames: Any, steps: Any, guidance: Any) -> Shape:
    base = shelf.geometry(name)
    sides = {"width": width, "height": height}
    chosen = {key: base[key] if value is None else whole(key, value) for key, value in sides.items()}
    if None in chosen.values() and chosen["width"] != chosen["height"]:
        raise UserError("size: give width and height, or neither")
    if guidance is not None and (isinstance(guidance, bool) or not isinstance(guidance, (int, float))):
        raise UserError(f"guidance={str(guidance)[:40]!r} is not allowed; use a number from 0 to 100")
    for key, side in chosen.items():
        if side is not None and not settings.MIN_SIDE <= side <= settings.MAX_SIDE:
            raise UserError(f"{key}: {side} is not allowed; use a number from {settings.MIN_SIDE} to "
                            f"{settings.MAX_SIDE}")
    return shape_of(
        shelf.place(name),
        size=None if chosen["width"] is None else f"{chosen['width']}x{chosen['height']}",
        frames=None if frames is None else whole("frames", frames),
        steps=None if steps is None else whole("steps", steps),
        guidance_scale=guidance,
        base=base,
    )


def _notes(place: str, prompt: str, shape: Shape) -> tuple[str, ...]:
    """What the command line warns of: words that the embedded model does not know, sizes below its training."""
    if place != EMBEDDED:
        return ()
    from ..pipelines.embedded import DEFAULTS, unknown_words

    notes = []
    if unknown := unknown_words(prompt):
        notes.append(f"the embedded model does not know {', '.join(map(repr, unknown[:5]))}")
    least = DEFAULTS["height"]
    if min(shape.height or least, shape.width or least) < least:
        notes.append(f"the embedded model was trained at {least}x{least} and above; smaller clips show little")
    return tuple(notes)
