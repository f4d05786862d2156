"""The tables of a run as plain columns and rows, for the page and for Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import attention
from .bootstrap import Interval
from .config import DENSE
from .measures.table import MEASURES
from .results import Evaluation, interval_of

ARROWS = {
    "higher": "higher is better",
    "lower": "lower is better",
    "zero": "nearest to 0 is best",
    "neither": "informs only",
}


@dataclass(frozen=True)
class Table:
    """Columns by name, and rows of texts, numbers, intervals and None."""

    columns: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """The table as Markdown lines; None becomes a dash, intervals of several prompts show their ends."""
        lines = [self.columns, ["---"] * len(self.columns), *([_text(cell) for cell in row] for row in self.rows)]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _text(cell: Any) -> str:
    if isinstance(cell, Interval):
        return f"{cell.mean:.4g}" + (f" [{cell.low:.3g}, {cell.high:.3g}]" if cell.prompts > 1 else "")
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


def names_of(run: Evaluation, *kinds: str) -> list[str]:
    """Measures of these kinds that some clip of a run has."""
    have = {name for entry in run.entries for name in entry["result"]["values"]}
    return [name for name, entry in MEASURES.items() if entry.kind in kinds and name in have]


def speed(run: Evaluation) -> Table:
    """What every method cost: seconds, density, shares of attention and masks, memory, floating-point operations."""
    rows = []
    for label in run.labels:
        entries = run.of(label)
        seconds, steps, peak = _mean(entries, "seconds"), _mean(entries, "steps"), _mean(entries, "peak_bytes")
        flops = [_mean(entries, name) for name in ("flops_computed", "flops_dense_equivalent")]
        fallbacks = sum(sum(e["result"].get("fallbacks", {}).values()) for e in entries)
        rows.append([
            label, len(entries), interval_of(entries, "seconds"), seconds / steps if seconds and steps else None,
            interval_of(entries, "speedup") if label != DENSE else 1.0, interval_of(entries, "density"),
            _share(_mean(entries, "attention_seconds"), seconds), _share(_mean(entries, "routing_seconds"), seconds),
            None if peak is None else f"{peak / 2**30:.2f} GiB",
            *(None if value is None else f"{value / 1e12:.4g}" for value in flops), fallbacks,
        ])  # fmt: skip
    columns = ["method", "clips", "seconds a clip", "seconds a step", "speed-up", "density", "in attention", "in masks",
               "peak memory", "attention TFLOP computed", "attention TFLOP dense-equivalent", "fallbacks"]  # fmt: skip
    return Table(columns, rows)


def _mean(entries: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(e["result"][name]) for e in entries if e["result"].get(name) is not None]
    return sum(values) / len(values) if values else None


def _share(part: float | None, whole: float | None) -> str | None:
    return None if part is None or not whole else f"{100 * part / whole:.0f} %"


def fidelity(run: Evaluation) -> Table | None:
    """How near every method's clips are to the dense ones of the same seed; None when nothing was compared."""
    names, labels = names_of(run, "pair"), [label for label in run.labels if label != DENSE]
    if not names or not labels:
        return None
    rows = [[label, *(interval_of(run.of(label), name) for name in (*names, "latent_error"))] for label in labels]
    told = [f"{name} ({ARROWS[MEASURES[name].direction]})" for name in names]
    return Table(["method", *told, "latent error at the last step (lower is better)"], rows)


def quality(run: Evaluation) -> Table | None:
    """Measures of single clips, one row each, a column for every method; None when there are none."""
    names = names_of(run, "clip", "prompt")
    if not names:
        return None
    rows = [
        [f"{name} ({ARROWS[MEASURES[name].direction]})", *(interval_of(run.of(label), name) for label in run.labels)]
        for name in names
    ]
    return Table(["measure", *run.labels], rows)


def calls(run: Evaluation) -> Table | None:
    """Recall, error and cosine of single attention calls, mean over heads; None when none was looked into."""
    labels = [label for label in run.labels if label in run.attention]
    rows = []
    for label in labels:
        every = run.attention[label]
        found = attention.means(every)
        sparse, fallen = (sum(call["kind"] == kind for call in every) for kind in ("sparse", "fallback"))
        rows.append([label, f"{sparse} of {len(every)}", fallen, *(found.get(name) for name in attention.NAMES)])
    columns = ["method", "sparse calls", "fallbacks", "density", "recall of mass (higher is better)",
               "relative error (lower is better)", "cosine (higher is better)"]  # fmt: skip
    return Table(columns, rows) if rows else None
