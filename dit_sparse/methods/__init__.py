"""The methods: one file each. They are found by looking into this package; there is no list to edit."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

from .base import Call, Method, Plan

__all__ = ["Call", "Method", "Plan", "all_methods", "build", "family_options"]


def all_methods() -> dict[str, type[Method]]:
    """Every method of this installation, by name, sorted.

    A method is a subclass of `Method` with a `name`, defined in a module of this package.

    Raises:
        ValueError: when two modules claim the same name.
    """
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for item in vars(module).values():
            if not (isinstance(item, type) and issubclass(item, Method)):
                continue
            if item.__module__ != module.__name__ or not item.name or item.hidden:
                continue
            if item.name in found:
                places = f"{found[item.name].__module__} and {item.__module__}"
                raise ValueError(f"two methods are called {item.name!r}, in {places}")
            found[item.name] = item
    return dict(sorted(found.items()))


def build(name: str, **options: Any) -> Method:
    """A method by name, with options.

    Args:
        name: one of `all_methods()`.
        options: fields of the method's dataclass; what is left out keeps its default.

    Raises:
        ValueError: unknown name, unknown option or a value that is not allowed; one line that says what is.
    """
    known = all_methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}; use one of {', '.join(known)}")
    allowed = [f.name for f in dataclasses.fields(known[name])]
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"unknown option {option!r}; method {name!r} takes {', '.join(allowed) or 'none'}"
            )
    return known[name](**options)


def family_options(name: str, family: str) -> dict[str, Any]:
    """What the method's authors used for a model family: its options, `dense_steps` and `dense_layers`.

    Args:
        name: one of `all_methods()`.
        family: name of the model family ("wan", "hunyuan", ...).

    Returns:
        A new dict, empty when the paper and its code say nothing about the family.
    """
    return dict(all_methods()[name].family_defaults.get(family, {}))


class _Callable(ModuleType):
    """`dit_sparse.methods` is this package and also the public function `methods()`: Python binds the name of a
    subpackage on its parent as soon as anything imports it, so the two must be one object."""

    def __call__(self) -> list[Any]:
        """All methods of this installation; see `dit_sparse.processor.methods`."""
        from ..processor import methods

        return methods()


sys.modules[__name__].__class__ = _Callable
