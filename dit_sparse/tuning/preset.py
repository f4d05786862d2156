"""Presets: settings as a file. A tuned one holds what `tune` chose for every head, a family one what papers used."""

from __future__ import annotations

import base64
import binascii
import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..choicefile import reason_of
from ..modelid import config_hash
from .candidates import Candidate
from .evidence import (
    cache_lines,
    check_text,
    evidence_text,
    is_cache,
    is_checks,
    is_evidence,
    is_loop,
    is_number,
    is_text,
    loop_text,
    whole,
)
from .headplan import HeadPlan
from .targets import Target

__all__ = ["FORMAT", "Preset", "TunedPreset", "attention_layers", "model_identity", "presets"]

FORMAT = 1
FOLDER = Path(__file__).resolve().parent.parent / "presets"


class Preset(ABC):
    """Base of both kinds; `Preset.load` reads either."""

    kind: ClassVar[str] = ""

    @staticmethod
    def load(source: str | PathLike[str]) -> Preset:
        """Read a preset and check everything in it.

        Args:
            source: the name of one that comes along (`presets()`), or a JSON file.

        Raises:
            ValueError: no such preset, or a file that holds something else; one line that names the field.
        """
        if not isinstance(source, (str, PathLike)):
            raise ValueError(f"preset={str(source)[:60]!r} is not allowed; use a Preset, a name or a JSON file")
        try:
            file = FOLDER / f"{source}.json"
            if Path(source).suffix == ".json" or Path(source).is_file():
                file = Path(source)
            elif not _is_name(str(source)) or not file.is_file():
                raise LookupError
            held = json.loads(file.read_text(encoding="utf-8"))
        except LookupError:
            raise ValueError(f"preset={str(source)!r} is unknown; use a JSON file or one of "
                             f"{', '.join(presets())}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"preset={str(source)[:200]!r} cannot be read: {reason_of(error)}") from error
        try:
            return Preset.from_dict(held)
        except ValueError as error:
            raise ValueError(f"preset={str(source)!r}: {reason_of(error)}") from error

    @staticmethod
    def from_dict(held: Any) -> Preset:
        """The preset in plain data, checked.

        Raises:
            ValueError: something is missing, unknown or not allowed; one line that names the field.
        """
        if not isinstance(held, dict):
            raise ValueError("it holds no JSON object")
        if type(held.get("format")) is not int or held["format"] != FORMAT:
            raise ValueError(f"format={held.get('format')!r} is not allowed; use {FORMAT}")
        from .family import FamilyPreset

        kinds: dict[str, type[TunedPreset] | type[FamilyPreset]] = {"tuned": TunedPreset, "family": FamilyPreset}
        if str(held.get("kind")) not in kinds:
            raise ValueError(f"kind={held.get('kind')!r} is not allowed; use one of {', '.join(kinds)}")
        return kinds[str(held["kind"])].read({k: v for k, v in held.items() if k not in ("format", "kind")})

    @staticmethod
    def of(source: Preset | str | PathLike[str]) -> Preset:
        """A preset as it is, or loaded by name or path."""
        return source if isinstance(source, Preset) else Preset.load(source)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is saved."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as one JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a few lines."""

    @abstractmethod
    def check(self, target: Any) -> str:
        """Hold it against a pipeline or transformer.

        Returns:
            "exact", or "transferred" when it was made for another configuration of the same class.

        Raises:
            ValueError: it does not fit; one line.
        """

    @abstractmethod
    def method_and_options(self, method: str | None, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What a SparseProc is made of: a method (or its name) and options, the given ones first.

        Args:
            method: what the user named beside the preset.
            given: the user's own options.
        """

    def fitted(self, proc: Any, target: Any) -> Any:
        """The SparseProc as it runs on this target, checked."""
        self.check(target)
        return proc


def check_names(held: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse fields that are unknown or missing.

    Raises:
        ValueError: one line that names the field.
    """
    for name in held:
        if name not in names:
            raise ValueError(f"{str(name)[:60]!r} is unknown; the fields are {', '.join(names)}")
    for name in names:
        if name not in held:
            raise ValueError(f"{name} is missing")


def _is_name(text: str) -> bool:
    return bool(text) and "/" not in text and "\\" not in text and text not in (".", "..")


def presets() -> list[str]:
    """Names of the presets that come along."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def model_identity(model: Any) -> dict[str, Any]:
    """Class, digest of the configuration, and number of self-attention layers and their heads."""
    layers = attention_layers(model)
    heads = {getattr(module, "heads", None) for _, module in layers}
    return {"class": type(model).__name__, "config_hash": config_hash(model), "layers": len(layers),
            "heads": heads.pop() if len(heads) == 1 else None}


def attention_layers(model: Any) -> list[tuple[str, Any]]:
    """The self-attention modules of a transformer that a session receives, in order: path and module."""
    from ..families import family_of

    family = family_of(model)
    return [(path, module) for path, module in model.named_modules()
            if callable(getattr(module, "processor", None)) and family is not None and not family.against(model, path)]


@dataclass(frozen=True, eq=False)
class TunedPreset(Preset):
    """What `tune` chose, for which model and size, and how it was verified.

    Args:
        model: "class", "config_hash", "layers" and "heads" of the transformer.
        grid: frames, rows and columns of the video's tokens.
        text: text tokens in the same sequence.
        steps: denoising steps.
        scheduler, cfg, dtype, gpu, dense_kernel: what it was tuned with.
        target: such as "psnr>=28".
        statistic: "mean" or "min" over the clips.
        met: whether the held-out clips and the loop's, taken together, reached the target.
        ceiling_db: PSNR that rounding alone leaves; None where it was not measured.
        buckets: first step of every bucket, and the number of steps.
        candidates: what heads may compute.
        choices: uint8 (buckets, layers, heads), indices into `candidates`.
        evidence: one entry for each verified clip.
        version, date: of the program, and of the day.
        loop: of the loop's clips with this plan: "clips" (how many), "measure", "mean", "standard_error" (of the
            mean) and "worst"; None where none was run with it.
        step_cache: of the held-out clips beside a step cache: "name", "met" and "clips", or "name" and "refused", the
            reason; None where no cache was named.
        checks: forwards with the plans that were compared before the loop: "patterns" ("all", or one alone),
            "milliseconds" and, by bucket, the error of the velocity "predicted" and "measured"; None without any.
    """

    model: dict[str, Any]
    grid: tuple[int, int, int]
    text: int
    steps: int
    scheduler: str
    cfg: float | None
    dtype: str
    gpu: str
    dense_kernel: str
    target: str
    statistic: str
    met: bool
    ceiling_db: float | None
    buckets: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    choices: np.ndarray = field(repr=False)
    evidence: tuple[dict[str, Any], ...]
    version: str
    date: str
    loop: dict[str, Any] | None = None
    step_cache: dict[str, Any] | None = None
    checks: tuple[dict[str, Any], ...] | None = None

    kind: ClassVar[str] = "tuned"

    @property
    def table(self) -> HeadPlan:
        """The plan."""
        return HeadPlan(self.candidates, self.buckets, self.choices)

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text

    @property
    def judged_by(self) -> str:
        """The clips that `met` speaks of, in words."""
        held = f"{len(self.evidence)} held-out clip{'s' * (len(self.evidence) != 1)}"
        return held if self.loop is None else f"{held} and the loop's {self.loop['clips']}, taken together"

    @classmethod
    def read(cls, held: Mapping[str, Any]) -> TunedPreset:
        """From plain data, checked; see `Preset.from_dict`."""
        names = [*_FIELDS, "plan"]
        held = {**dict.fromkeys(_OPTIONAL), **held}
        check_names(held, names)
        for name, (good, allowed) in _FIELDS.items():
            if not good(held[name]):
                raise ValueError(f"{name}={str(held[name])[:60]!r} is not allowed; use {allowed}")
        buckets, shape = tuple(held["buckets"]), (held["model"]["layers"], held["model"]["heads"])
        if buckets[-1] != held["steps"]:
            raise ValueError(f"buckets={list(buckets)} is not allowed; use rising numbers from 0 to steps")
        candidates = tuple(_candidate(item) for item in held["candidates"])
        choices = _unpacked(held["plan"], (len(buckets) - 1, *shape))
        HeadPlan(candidates, buckets, choices)
        given = {name: held[name] for name in _FIELDS if name not in _TUPLES}
        return cls(**given, grid=tuple(held["grid"]), buckets=buckets, candidates=candidates, choices=choices,
                   evidence=tuple(held["evidence"]), checks=tuple(held["checks"]) if held["checks"] else None)

    def to_dict(self) -> dict[str, Any]:
        """See `Preset.to_dict`; the plan is base64 of uint8 [bucket][layer][head]."""
        found: dict[str, Any] = {"format": FORMAT, "kind": self.kind}
        for name in _FIELDS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            found[name] = [c.to_dict() for c in value] if name == "candidates" else _plain(value)
        found["plan"] = base64.b64encode(self.choices.tobytes()).decode("ascii")
        return found

    def describe(self) -> str:
        """See `Preset.describe`."""
        table = self.table
        grid = "x".join(map(str, self.grid)) + (f" and {self.text} text" if self.text else "")
        ceiling = "not measured" if self.ceiling_db is None else f"{self.ceiling_db:.1f} dB"
        lines = [
            f"target      {self.target} ({self.statistic}): {'met' if self.met else 'NOT met'} on {self.judged_by}",
            f"model       {self.model['class']} {self.model['config_hash']}, {table.layers} layers of {table.heads}",
            f"size        {grid} tokens, {self.steps} steps, guidance {self.cfg}, {self.dtype} on {self.gpu}",
            f"ceiling     {ceiling}",
            f"density     {table.density():.3f}: " + ", ".join(
                f"steps {table.edges[b]}-{table.edges[b + 1] - 1} {d:.2f}" for b, d in enumerate(table.densities())),
        ]
        if self.loop is not None:
            lines.append(f"loop        {loop_text(self.loop)}")
        lines += [f"held out    {evidence_text(entry)}" for entry in self.evidence]
        lines += [f"with cache  {line}" for line in (cache_lines(self.step_cache) if self.step_cache else ())]
        return "\n".join(lines + [f"forwards    {check_text(check)}" for check in self.checks or ()])

    def check(self, target: Any) -> str:
        """See `Preset.check`. Size and steps are held against a run when it begins."""
        from ..bridge import transformers_of

        match = "exact"
        for _, model, _ in transformers_of(target):
            mine = model_identity(model)
            if mine["class"] != self.model["class"]:
                raise ValueError(f"preset was made for {self.model['class']}, not {mine['class']}; run dit-sparse tune")
            for name in ("layers", "heads"):
                if mine[name] != self.model[name]:
                    raise ValueError(f"preset was made for {self.model[name]} {name}, not {mine[name]}; run dit-sparse "
                                     "tune")
            if mine["config_hash"] != self.model["config_hash"]:
                match = "transferred"
        return match

    def method_and_options(self, method: str | None, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """See `Preset.method_and_options`; the plan says itself which steps and layers are dense."""
        from ..methods.tuned import Tuned
        from ..processor import SETTINGS

        if method is not None:
            raise ValueError(f"method={str(method)!r} is not allowed with a tuned preset; leave it out")
        for name in given:
            if name not in SETTINGS:
                raise ValueError(f"option {name!r} is not allowed with a tuned preset; use {', '.join(SETTINGS)}")
        return Tuned(self.table, self.grid, self.text), {"dense_steps": 0, "dense_layers": 0, **given}

    def fitted(self, proc: Any, target: Any) -> Any:
        """See `Preset.fitted`."""
        from ..methods.tuned import Tuned

        transferred = self.check(target) == "transferred"
        if transferred == proc.method.transferred:
            return proc
        proc = copy.copy(proc)
        proc.method = Tuned(self.table, self.grid, self.text, transferred)
        return proc


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _candidate(item: Any) -> Candidate:
    if not isinstance(item, dict) or set(item) - {"pattern", "order", "density"} or "pattern" not in item:
        raise ValueError(f"candidates: {str(item)[:60]!r} is not allowed; use pattern, order and density")
    if item["pattern"] != "dense" and len(item) < 3:
        raise ValueError(f"candidates: {item} lacks order or density")
    return Candidate(**item)


def _unpacked(text: Any, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"plan is no base64: {reason_of(error)}") from error
    size = shape[0] * shape[1] * shape[2]
    if len(content) != size:
        raise ValueError(f"plan has {len(content)} bytes; {' x '.join(map(str, shape))} buckets, layers and heads are "
                         f"{size}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _number_or_none(x: Any) -> bool:
    return x is None or is_number(x)


def _is_target(x: Any) -> bool:
    with suppress(ValueError):
        return isinstance(x, str) and bool(Target.read(x))
    return False


def _is_model(x: Any) -> bool:
    return (isinstance(x, dict) and set(x) == {"class", "config_hash", "layers", "heads"} and is_text(x["class"])
            and is_text(x["config_hash"]) and whole(1)(x["layers"]) and whole(1)(x["heads"]))


def _is_buckets(x: Any) -> bool:
    return (isinstance(x, list) and len(x) >= 2 and all(type(n) is int for n in x) and x[0] == 0
            and all(a < b for a, b in zip(x, x[1:], strict=False)))


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_model, "an object with class, config_hash, layers and heads"),
    "grid": (lambda x: isinstance(x, list) and len(x) == 3 and all(map(whole(1), x)), "three whole numbers >= 1"),
    "text": (whole(0), "a whole number >= 0"),
    "steps": (whole(1), "a whole number >= 1"),
    "scheduler": (is_text, "a name"),
    "cfg": (_number_or_none, "a number or null"),
    "dtype": (is_text, "a name"),
    "gpu": (is_text, "a name"),
    "dense_kernel": (is_text, "a name"),
    "target": (_is_target, "such as psnr>=28"),
    "statistic": (lambda x: x in ("mean", "min"), "mean or min"),
    "met": (lambda x: isinstance(x, bool), "true or false"),
    "ceiling_db": (_number_or_none, "a number or null"),
    "buckets": (_is_buckets, "rising whole numbers from 0 to steps"),
    "candidates": (lambda x: isinstance(x, list) and 1 <= len(x) <= 256, "a list of 1 to 256 candidates"),
    "evidence": (is_evidence, "a list of objects of numbers and short texts"),
    "version": (is_text, "a text"),
    "date": (is_text, "a text"),
    "loop": (is_loop, "an object with clips, measure, mean, standard_error and worst, or leave it out"),
    "step_cache": (is_cache, "an object with name, met and clips, or with name and refused, or leave it out"),
    "checks": (is_checks, "a list of objects with patterns, milliseconds, buckets, predicted and measured, or "
               "leave it out"),
}
_OPTIONAL = ("loop", "step_cache", "checks")
_TUPLES = ("grid", "buckets", "candidates", "evidence", "checks")
