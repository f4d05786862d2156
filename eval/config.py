"""The file that `dit-sparse eval run` takes: read strictly, so that a misspelt key never changes what is measured.

    pipeline: embedded
    methods:
      - svg
      - {name: svg, label: svg-15, options: {density: 0.15}}
    prompts: ["a large red star moving right on a black background"]
    seeds: [0, 1]
    steps: 20
    size: 256x256x17
    guidance: 3.0
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measures.networks import Networks

DENSE = "dense"  # label of the untouched pipeline
LIMIT = 50_000  # clips of one run: VBench's prompts with five seeds and nine methods
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")


@dataclass(frozen=True)
class MethodEntry:
    """One method of a run.

    Attributes:
        name: of the sparse method.
        label: its name in results; unique.
        options: keyword arguments of SparseProc.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)


# Dense attention by another kernel, in another order of the tokens: nothing sparse can be nearer than rounding allows.
CEILING = MethodEntry(
    "rainfusion2", "noise-ceiling", {"density": 1.0, "dense_steps": 0, "dense_layers": 0, "dense_last_steps": 0}
)


@dataclass(frozen=True)
class EvalConfig:
    """What one evaluation makes: every prompt with every seed, dense and with every method.

    Attributes:
        pipeline: "embedded", a Diffusers folder or a hub id.
        methods: sparse methods; the dense clip is always made.
        prompts: what to show.
        seeds: of each prompt.
        steps, guidance: None leaves the model's own.
        size: as text, "256", "320x192" or "512x512x33"; None leaves the model's own.
        fps: of the videos.
        measures: names; None takes all that can be taken.
        clips: how many prompts the report shows side by side.
        device: None takes the GPU when there is one.
        attention: prompts (the first ones, first seed) whose attention is looked into, layer by layer.
        dino, clip: folders with these networks, for VBench's own consistencies.

    The key `noise_ceiling: true` adds a method that is dense by another kernel.
    """

    pipeline: str
    methods: tuple[MethodEntry, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    size: str | None = None
    guidance: float | None = None
    fps: int = 8
    measures: tuple[str, ...] | None = None
    clips: int = 6
    device: str | None = None
    attention: int = 0
    dino: str | None = None
    clip: str | None = None

    @property
    def networks(self) -> Networks:
        """The folders as the measures take them."""
        from .measures.networks import Networks

        return Networks(*(None if name is None else Path(name) for name in (self.dino, self.clip)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the form of the file."""
        methods = [{"name": m.name, "label": m.label, "options": m.options} for m in self.methods]
        listed = {"prompts": list(self.prompts), "seeds": list(self.seeds)}
        measures = None if self.measures is None else list(self.measures)
        return {**self.__dict__, **listed, "methods": methods, "measures": measures}


def read_config(path: str | Path) -> EvalConfig:
    """Read and check a configuration file.

    Raises:
        ValueError: missing file, no YAML, an unknown key, a wrong type, an unknown method, option or measure; one line
            that names the key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_config(_load(text, path), folder=path.parent, source=str(path))


def _load(text: str, path: Path) -> Any:
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise ValueError("reading YAML needs PyYAML: pip install 'dit-sparse[eval]', or write JSON") from error
    try:
        return yaml.load(text, Loader=_strict_loader(yaml))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path}{where}: {getattr(error, 'problem', None) or 'no YAML'}") from error


def _strict_loader(yaml: Any) -> Any:
    """The safe loader, refusing a key that stands twice: the last one would win unseen."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        seen: set[Any] = set()
        for key, _ in node.value:
            name = loader.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is not text", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return dict(loader.construct_mapping(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def parse_config(content: Any, *, folder: Path | None = None, source: str = "configuration") -> EvalConfig:
    """Check the content of a configuration.

    Args:
        content: what the file holds.
        folder: where a file of prompts is looked for.
        source: name in errors.

    Raises:
        ValueError: as `read_config`.
    """
    try:
        if not isinstance(content, Mapping):
            raise ValueError(f"holds {_kind(content)}; write keys such as pipeline, methods and prompts")
        _known("key", content, KEYS)
        for name in ("methods", "prompts"):
            if name not in content:
                raise ValueError(f"{name} is missing; keys are {', '.join(KEYS)}")
        values = {name: KEYS[name](name, value, folder or Path()) for name, value in content.items()}
        if values.pop("noise_ceiling", False):
            values["methods"] += (CEILING,)
            _once("methods, labels", [entry.label for entry in values["methods"]])
        config = EvalConfig(**{"pipeline": "embedded", **values})
        count = len(config.prompts) * len(config.seeds) * (1 + len(config.methods))
        if count > LIMIT:
            raise ValueError(f"prompts, seeds and methods make {count} clips; the limit is {LIMIT}")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return config


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return "nothing" if value is None else names.get(type(value), "keys and values")


def _known(what: str, given: Mapping[str, Any], allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), list(allowed), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"use some of {', '.join(allowed)}"
            raise ValueError(f"{what} {name!r} is unknown; {hint}")


def _text(name: str, value: Any, folder: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {'blank' if isinstance(value, str) else _kind(value)}; write a text")
    return value


def _optional(check: Callable[[str, Any, Path], Any]) -> Callable[[str, Any, Path], Any]:
    return lambda name, value, folder: None if value is None else check(name, value, folder)


def _whole(low: int, high: int) -> Callable[[str, Any, Path], int]:
    def check(name: str, value: Any, folder: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}; write a whole number from {low} to {high}")
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; use a whole number from {low} to {high}")
        return value

    return check


def _guidance(name: str, value: Any, folder: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise ValueError(f"{name} is {value!r}; use a number from 0 to 100")
    return float(value)


def _flag(name: str, value: Any, folder: Path) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; write true or false")
    return value


def _size(name: str, value: Any, folder: Path) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,5}(x\d{1,5}){0,2}", text):
        raise ValueError(f"{name} is {value!r}; write 256, 320x192 (width x height) or 512x512x33 (and frames)")
    return text


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {'an empty list' if value == [] else _kind(value)}; write a list")
    return value


def _once(name: str, values: list[Any]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{name}: {value!r} stands twice")


def _prompts(name: str, value: Any, folder: Path) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        return _vbench_prompts(name, value)
    if isinstance(value, str):
        try:
            lines = (folder / value).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: the file {value} cannot be read; write a list, or a file's name") from error
        value = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    prompts = [_text(f"{name}, entry {i}", prompt, folder).strip() for i, prompt in enumerate(_list(name, value), 1)]
    _once(name, prompts)
    return tuple(prompts)


def _vbench_prompts(name: str, value: Mapping[str, Any]) -> tuple[str, ...]:
    """VBench's prompts: `{vbench: all}`, or those of some dimensions."""
    from .vbench_prompts import texts_of

    _known(f"{name}: key", value, ("vbench",))
    wanted = value.get("vbench")
    if wanted == "all":
        return tuple(texts_of())
    if isinstance(wanted, str) or wanted is None:
        raise ValueError(f"{name}, vbench is {wanted!r}; write all, or a list of dimensions")
    try:
        return tuple(texts_of(_text(f"{name}, vbench", entry, Path()) for entry in _list(f"{name}, vbench", wanted)))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error


def _network(name: str, value: Any, folder: Path) -> str:
    from .measures.networks import check_network

    return str(check_network("dino" if name == "dino" else "clip", (folder / _text(name, value, folder)).resolve()))


def _seeds(name: str, value: Any, folder: Path) -> tuple[int, ...]:
    seeds = [_whole(0, 2**63 - 1)(f"{name}, entry {i}", seed, folder) for i, seed in enumerate(_list(name, value), 1)]
    _once(name, seeds)
    return tuple(seeds)


def _measures(name: str, value: Any, folder: Path) -> tuple[str, ...]:
    from .measures.table import check_names, with_motion

    names = [_text(f"{name}, entry {i}", entry, folder) for i, entry in enumerate(_list(name, value), 1)]
    _once(name, names)
    return tuple(with_motion(check_names(names)))


def _methods(name: str, value: Any, folder: Path) -> tuple[MethodEntry, ...]:
    entries = [_method(f"{name}, entry {i}", entry, folder) for i, entry in enumerate(_list(name, value), 1)]
    labels = [entry.label for entry in entries]
    if DENSE in labels:
        raise ValueError(f"{name}: the label {DENSE!r} belongs to the untouched pipeline, which is always made")
    _once(f"{name}, labels", labels)
    return tuple(entries)


def _method(name: str, value: Any, folder: Path) -> MethodEntry:
    from dit_sparse import SparseProc

    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or "name" not in given:
        raise ValueError(f"{name} is {_kind(value)}; write a method's name, or name, label and options")
    _known(f"{name}: key", given, ("name", "label", "options"))
    method = _text(f"{name}, name", given["name"], folder)
    label = _text(f"{name}, label", given.get("label", method), folder)
    if not _LABEL.fullmatch(label):
        raise ValueError(f"{name}: label {label!r} is not allowed; use up to 40 letters, digits and . _ + -")
    options = given.get("options") or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"{name}: options is {_kind(options)}; write keys and values")
    options = {key: tuple(item) if isinstance(item, list) else item for key, item in options.items()}
    if not isinstance(options.get("step_cache"), str | None):
        raise ValueError(f"{name}: step_cache takes a name or a file here; configurations are objects, for Python")
    try:
        SparseProc(method, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error
    return MethodEntry(method, label, options)


KEYS: dict[str, Callable[[str, Any, Path], Any]] = {
    "pipeline": _text,
    "methods": _methods,
    "prompts": _prompts,
    "seeds": _seeds,
    "steps": _optional(_whole(1, 200)),
    "size": _optional(_size),
    "guidance": _optional(_guidance),
    "fps": _whole(1, 120),
    "measures": _optional(_measures),
    "clips": _whole(0, 100),
    "noise_ceiling": _flag,
    "device": _optional(_text),
    "attention": _whole(0, 100),
    "dino": _optional(_network),
    "clip": _optional(_network),
}
