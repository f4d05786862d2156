"""Presets of model families: what the authors of a method used, as data; untested on weights here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .evidence import is_text
from .preset import FOLDER, FORMAT, Preset, check_names

__all__ = ["FamilyPreset", "family_presets"]

UNTESTED = "untested on weights"


@dataclass(frozen=True)
class FamilyPreset(Preset):
    """What the authors of a method used for a model family.

    Args:
        family: name of the family ("wan", ...).
        method: name of the method.
        options: the method's options, with `dense_steps` and `dense_layers`.
        evidence: what is known of its quality.
        source: where the settings come from.
    """

    family: str
    method: str
    options: dict[str, Any]
    evidence: str
    source: str

    kind: ClassVar[str] = "family"

    @classmethod
    def read(cls, held: Mapping[str, Any]) -> FamilyPreset:
        """From plain data, checked; see `Preset.from_dict`."""
        from ..processor import SparseProc

        names = ("family", "method", "options", "evidence", "source")
        check_names(held, names)
        for name in names:
            if name != "options" and not is_text(held[name]):
                raise ValueError(f"{name}={str(held[name])[:60]!r} is not allowed; use a text of one line")
        options = held["options"]
        if not isinstance(options, dict) or {"self", "method", "preset"} & set(options):
            raise ValueError(f"options={str(options)[:60]!r} is not allowed; use an object of options")
        options = {name: _tuples(value) for name, value in options.items()}
        SparseProc(held["method"], **options)
        return cls(held["family"], held["method"], options, held["evidence"], held["source"])

    def to_dict(self) -> dict[str, Any]:
        """See `Preset.to_dict`."""
        return {"format": FORMAT, "kind": self.kind, "family": self.family, "method": self.method,
                "options": self.options, "evidence": self.evidence, "source": self.source}

    def describe(self) -> str:
        """See `Preset.describe`."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"family      {self.family}\nmethod      {self.method}: {options}\nevidence    {self.evidence}\n" \
               f"source      {self.source}"

    def check(self, target: Any) -> str:
        """See `Preset.check`: the family must be this one."""
        from ..bridge import transformers_of
        from ..families import family_of

        for _, model, _ in transformers_of(target):
            family = family_of(model)
            name = None if family is None else family.name
            if name != self.family:
                raise ValueError(f"preset is for the family {self.family!r}, not {name!r}; use the method by name")
        return "exact"

    def method_and_options(self, method: str | None, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """See `Preset.method_and_options`."""
        if method not in (None, self.method):
            raise ValueError(f"method={str(method)!r} is not allowed: the preset is for {self.method!r}; leave it out")
        return self.method, {**self.options, **given}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def family_presets() -> dict[str, FamilyPreset]:
    """The presets that the methods' own `family_defaults` make, by name; the files that come along hold the same."""
    from ..methods import all_methods

    found = {}
    for name, method in all_methods().items():
        for family, options in method.family_defaults.items() if method.arxiv else ():
            paper = f"{method.title}, arXiv {method.arxiv}"
            found[f"{family}-{name.replace('_', '-')}"] = FamilyPreset(
                family, name, dict(options), UNTESTED, f"{paper}: the authors' settings for this family")
    return found


def write_all(folder: Path) -> list[Path]:
    """Write them into a folder (`python -m dit_sparse.tuning.family` into the one that comes along)."""
    files = []
    for name, preset in family_presets().items():
        files.append(folder / f"{name}.json")
        preset.save(files[-1])
    return files


if __name__ == "__main__":
    write_all(FOLDER)
