"""What the Tune tab shows of a preset, as HTML text: numbers, the plan as pictures and as a table, the evidence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..tuning.evidence import cache_lines
from . import words
from .work import address

if TYPE_CHECKING:
    from ..tuning.preset import TunedPreset
    from .tune_work import Outcome

FILE = "dit-sparse-preset.json"


def outcome(found: Outcome) -> str:
    """Everything about a finished job."""
    preset = found.preset
    written = (json.dumps(preset.to_dict(), indent=1) + "\n").encode()
    link = (f'<div class="ds-tools"><a download="{FILE}" href="{address(written, "application/json")}">'
            "Download the preset</a></div>")
    met = "met" if preset.met else "NOT met"
    text = f"{preset.target} ({preset.statistic}): {met} on {preset.judged_by}"
    kind = "" if preset.met else ' class="ds-missed"'
    return (f'<div class="ds" data-state="done"><div class="ds-card"><h3{kind}>{escape(text)}</h3>{numbers(found)}'
            f"{link}{pictures(preset)}{evidence(preset)}{plan(preset)}"
            f'<pre class="faint">{escape(preset.describe())}</pre></div></div>')


def numbers(found: Outcome) -> str:
    """The main numbers as tiles."""
    preset = found.preset
    rows = [("density", f"{preset.table.density():.2f}"), ("layers x heads", f"{preset.table.layers} x "
            f"{preset.table.heads}"), ("tokens", f"{preset.tokens:,}"), ("took", words.seconds(found.seconds))]
    if preset.ceiling_db is not None:
        rows.insert(0, ("ceiling", f"{preset.ceiling_db:.1f} dB"))
    return words.number_list(rows)


def pictures(preset: TunedPreset) -> str:
    """A heat map of density by layer and head for every stretch of the run."""
    table = preset.table
    maps = [words.heat(
        f"{_steps(preset, bucket)}: density by layer and head",
        {f"layer {layer}": {head: one.density for head, one in enumerate(table.of(bucket, layer))}
         for layer in range(table.layers)}, "head", "density") for bucket in range(table.buckets)]
    return '<div class="ds-maps">' + "".join(f"<div>{one}</div>" for one in maps) + "</div>"


def plan(preset: TunedPreset) -> str:
    """The plan as a table, a row for every stretch and layer; folded until it is asked for."""
    table, rows = preset.table, []
    for bucket in range(table.buckets):
        for layer in range(table.layers):
            chosen = table.of(bucket, layer)
            many = Counter(map(str, chosen)).most_common()
            mean = sum(one.density for one in chosen) / len(chosen)
            rows.append([_steps(preset, bucket), layer, f"{mean:.2f}", ", ".join(f"{n} x {name}" for name, n in many)])
    inside = words.table(["steps", "layer", "density", "heads"], rows)
    return f"<details><summary>The plan by layer, as a table</summary>{inside}</details>"


def evidence(preset: TunedPreset) -> str:
    """One row for every clip that was verified, and below the same clips beside a step cache."""
    if not preset.evidence:
        return '<p class="faint">No clip was verified.</p>'
    return f"<h3>Evidence</h3>{_clips(preset.evidence)}{_with_cache(preset.step_cache)}"


def _with_cache(held: Mapping[str, Any] | None) -> str:
    if held is None:
        return ""
    title = f"<h3>With the step cache {escape(cache_lines(held)[0])}</h3>"
    return title + (_clips(held["clips"]) if "clips" in held else "")


def _clips(entries: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    return words.table(names, [[_text(entry.get(name)) for name in names] for entry in entries])


def _steps(preset: TunedPreset, bucket: int) -> str:
    steps = preset.table.steps_of(bucket)
    return f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
