"""A walk over every transformer class of the installed Diffusers: supported, or why not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from types import ModuleType

from .families import family_of, reason_against
from .rebind import sparse_class


@dataclass(frozen=True)
class HostRow:
    """One transformer class.

    Args:
        cls: its name.
        supported: whether `enable` accepts it.
        family: name of its family, or "".
        text_at: where text tokens are in self-attention ("none": text is in cross-attention only).
        processors: attention processors of its module whose core attention can be replaced.
        detail: the family's notes, or the reason against.
    """

    cls: str
    supported: bool
    family: str
    text_at: str
    processors: tuple[str, ...]
    detail: str


def _processors(module: ModuleType) -> tuple[str, ...]:
    found = [value for name, value in vars(module).items() if inspect.isclass(value) and "Processor" in name]
    return tuple(sorted({cls.__name__ for cls in found if sparse_class(cls) is not None}))


def _row(cls: type, processors: tuple[str, ...]) -> HostRow:
    family = family_of(cls)
    if family is None:
        detail = reason_against(cls) or "no entry in dit_sparse/families.py: unknown to this version"
        return HostRow(cls.__name__, False, "", "", (), detail)
    if not processors:
        return HostRow(cls.__name__, False, family.name, family.text_at, (), "no attention call that can be replaced")
    return HostRow(cls.__name__, True, family.name, family.text_at, processors, family.notes)


def walk() -> list[HostRow]:
    """One row per transformer class that the installed Diffusers defines, supported ones first, by name."""
    import diffusers.models.transformers as package
    from diffusers.models.modeling_utils import ModelMixin

    rows = []
    for info in pkgutil.iter_modules(package.__path__):
        try:
            module = importlib.import_module(f"{package.__name__}.{info.name}")
        except (ImportError, RuntimeError) as error:
            rows.append(HostRow(info.name, False, "", "", (), f"cannot be imported: {str(error).splitlines()[0]}"))
            continue
        models = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
                  and issubclass(c, ModelMixin)]
        processors = _processors(module) if models else ()
        rows += [_row(cls, processors) for cls in models]
    return sorted(rows, key=lambda row: (not row.supported, row.family, row.cls))


def table(rows: list[HostRow]) -> str:
    """The rows as a Markdown table."""
    lines = ["| transformer | support | text in self-attention | remarks |", "| --- | --- | --- | --- |"]
    for row in rows:
        place = {"none": "none (cross-attention)", "": ""}.get(row.text_at, row.text_at)
        support = f"yes ({row.family})" if row.supported else "no"
        lines.append(f"| {row.cls} | {support} | {place if row.supported else ''} | {row.detail} |")
    return "\n".join(lines)
