"""A method's options as form fields, read from its dataclass and docstring: a new method needs no form of its own."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..commands.console import UserError
from ..commands.request import parse_options
from ..methods import all_methods
from ..methods.base import Method
from ..processor import Settings
from ..stepcache.names import FASTERCACHE, FIRST_BLOCK, MAGCACHE, PAB, TAYLORSEER, TEACACHE

Kind = Literal["density", "choice", "yes or no", "whole number", "number", "text"]

# The options that every method takes and that make sense on a page; the others keep their defaults.
SHARED = ("dense_steps", "dense_layers", "dense_last_steps", "refresh")
LONGEST_TEXT = 120
LARGEST = 65_536  # no option of any method needs more; numbers without bound could fill the memory
# Step caches: name -> whether it takes a threshold here, what it does.
STEP_CACHES = {
    FIRST_BLOCK: (True, "skips a step whose first block changes less than a threshold"),
    TEACACHE: (True, "skips steps until their estimated changes add up to a threshold"),
    MAGCACHE: (False, "skips steps by norms that were measured before"),
    TAYLORSEER: (False, "predicts attention, and computes it at every fifth step"),
    PAB: (False, "computes self-attention at every second step"),
    FASTERCACHE: (False, "leaves out the unconditional half at some steps"),
}


@dataclass(frozen=True)
class Field:
    """One option: what it is called, its kind, default and allowed choices, and what its docstring says."""

    name: str
    kind: Kind
    default: Any
    choices: tuple[Any, ...] = ()
    optional: bool = False
    text: str = ""

    @property
    def label(self) -> str:
        """The name for people."""
        return self.name.replace("_", " ")

    def shown(self) -> str:
        """The default as one types it; None is an empty field."""
        if self.default is None:
            return ""
        if isinstance(self.default, tuple) and len(self.default) == 3 and all(type(n) is int for n in self.default):
            return "x".join(map(str, self.default))
        return self.default if isinstance(self.default, str) else repr(self.default)


def fields_of(method: str) -> list[Field]:
    """The method's own options; `density` leads, when it has one."""
    found = _fields(all_methods()[method])
    return sorted(found, key=lambda f: f.name != "density")


def shared_fields() -> list[Field]:
    """The options of `SHARED`."""
    known = {f.name: f for f in _fields(Settings)}
    return [known[name] for name in SHARED]


def read(fields: list[Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed into the fields as options; fields left at their defaults are left out.

    Args:
        fields: what may be given.
        given: by name, values of the form's components.

    Raises:
        UserError: an unknown name, or a value that cannot be read; what is allowed else, the method itself says.
    """
    known = {f.name: f for f in fields}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"unknown option {str(name)[:40]!r}; use one of {', '.join(known) or 'none'}")
        options[name] = _value(known[name], value)
    return {name: value for name, value in options.items() if not _same(value, known[name].default)}


def step_cache(name: str | None, value: float | None) -> Any:
    """The option `step_cache`: a name, a configuration with this threshold, or None for "none".

    Args:
        name: one of `STEP_CACHES`, or "none".
        value: the threshold; None is the cache's own.

    Raises:
        UserError: an unknown name or a value that is not allowed.
    """
    if name in (None, "", "none"):
        return None
    if name not in STEP_CACHES:
        raise UserError(f"step_cache={str(name)[:40]!r} is unknown; use none or one of {', '.join(STEP_CACHES)}")
    if value is None:
        return name
    if not STEP_CACHES[name][0]:
        raise UserError(f"step cache: {name} takes no threshold; leave step_cache_value out")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 100:
        raise UserError(f"step cache: threshold={value!r} is not allowed; use a number in (0, 100]")
    from diffusers import FirstBlockCacheConfig

    from ..stepcache import TeaCacheConfig

    return (FirstBlockCacheConfig if name == FIRST_BLOCK else TeaCacheConfig)(threshold=float(value))


def _fields(cls: type) -> list[Field]:
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # a name that only a type checker sees: the default tells enough
        hints = {}
    texts = _descriptions(cls)
    return [_field(f, hints.get(f.name), texts.get(f.name, "")) for f in dataclasses.fields(cls) if f.init]


def _field(field: dataclasses.Field[Any], hint: Any, text: str) -> Field:
    default = field.default if field.default is not dataclasses.MISSING else (
        field.default_factory() if field.default_factory is not dataclasses.MISSING else None)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = type(None) in parts or default is None
    parts = tuple(part for part in parts if part is not type(None))
    one = parts[0] if len(parts) == 1 else None
    if field.name == "density" and isinstance(default, (int, float)):
        return Field(field.name, "density", default, text=text)
    if typing.get_origin(one) is Literal:
        return Field(field.name, "choice", default, typing.get_args(one), optional, text)
    if one is bool or (hint is None and isinstance(default, bool)):
        return Field(field.name, "yes or no", default, (), optional, text)
    if set(parts) == {int} or (hint is None and type(default) is int):
        return Field(field.name, "whole number", default, (), optional, text)
    if parts and set(parts) <= {int, float} or (hint is None and type(default) is float):
        return Field(field.name, "number", default, (), optional, text)
    named = tuple(dict.fromkeys(re.findall(r'"([\w-]+)"', text)))  # the values that the docstring puts in quotes
    if isinstance(default, str) and default in named:
        return Field(field.name, "choice", default, named, optional, text)
    return Field(field.name, "text", default, (), optional, text)


def _descriptions(cls: type) -> dict[str, str]:
    """What the class's docstring says of each argument, on one line each; a method also has its base's."""
    texts: dict[str, str] = {}
    for owner in reversed([c for c in cls.__mro__ if c not in (object, Method) and c.__doc__]):
        inside, names = False, list[str]()
        for line in inspect.cleandoc(owner.__doc__ or "").splitlines():
            entry = re.match(r" {4}(\w+(?:, \w+)*):\s*(.*)", line)
            if not line.startswith(" ") and line.strip():
                inside, names = line.rstrip().lower().endswith(("args:", "arguments:")), []
            elif inside and entry:
                names = entry[1].split(", ")
                texts.update(dict.fromkeys(names, entry[2]))
            elif inside and line.strip():
                texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    return texts


def _value(field: Field, value: Any) -> Any:
    """A component's value as the option's type."""
    if isinstance(value, str):
        value = value.strip()
        if len(value) > LONGEST_TEXT:
            raise UserError(f"{field.name}: the text is longer than {LONGEST_TEXT} characters")
        if value == "" and field.optional:
            return None
        if field.kind != "choice":
            value = parse_options([f"{field.name}={value}"])[field.name]
    if isinstance(value, float) and value.is_integer() and field.kind != "density" and not isinstance(
            field.default, float):
        value = int(value)  # a browser knows one kind of numbers
    _bounded(field.name, value)
    return value


def _bounded(name: str, value: Any) -> None:
    numbers = value if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(n, (int, float)) and not abs(n) <= LARGEST for n in numbers):
        raise UserError(f"{name}: {str(value)[:40]} is not allowed; the page takes numbers up to {LARGEST}")


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default
