"""Time of one attention call of Wan2.1-14B at 720p, modelled from a table of measured times.

The included model is too small for its wall time to say anything about a method's speed. `method_speed` measures, on a
GPU and at 21x45x80 tokens, each method's plan and attention at some densities, and the kernel alone by block size and
density. The time of a row is that method's plan and attention at the measured density next to its own, moved along the
kernel's curve to its own. `python -m dit_sparse.eval.method_speed` says how the table is made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "data" / "attention_time.json"


@dataclass(frozen=True)
class Times:
    """A table of times.

    Args:
        where: device and versions.
        grid: tokens, in words.
        dense_ms: dense attention.
        kernels: {block size: [(density, milliseconds)]} by rising density.
        rows: as `method_speed.MethodRow`, as plain data.
    """

    where: dict[str, str]
    grid: str
    dense_ms: float
    kernels: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def kernel(self, block_size: int, density: float) -> float | None:
        """Milliseconds of the kernel alone, between the two measured densities around this one, or None without."""
        curve = self.kernels.get(block_size, [])
        if len(curve) < 2:
            return None
        above = next((i for i, (d, _) in enumerate(curve) if d >= density), len(curve) - 1)
        (d0, t0), (d1, t1) = curve[max(above, 1) - 1], curve[max(above, 1)]
        return t0 + (t1 - t0) * (density - d0) / (d1 - d0)

    def milliseconds(self, label: str, asked: float | str, density: float) -> float | None:
        """Plan and attention of a method at a density; None where nothing was measured that it could be told from.

        Args:
            label: the method; "random" and the noise ceiling are the kernel alone.
            asked: the density asked for, or "own": the settings that the row was measured with.
            density: of the calls, measured.
        """
        if label not in {row["method"] for row in self.rows}:
            return self.kernel(128, density) if label in ("random", "noise-ceiling") else None
        rows = [row for row in self.rows if row["method"] == label]
        own = [row for row in rows if (row["options"] == "own") == (asked == "own")]
        row = min(own or rows, key=lambda row: abs(row["density"] - density))
        here, there = (self.kernel(row["block_size"], d) for d in (row["density"], density))
        if here is None or there is None:
            return None
        return float(row["plan_ms"] + row["attention_ms"] + there - here)

    def state_bytes(self) -> dict[str, int]:
        """What one layer and guidance branch of each method keeps between steps, the most of its rows."""
        found: dict[str, int] = {}
        for row in self.rows:
            found[row["method"]] = max(found.get(row["method"], 0), int(row["state_bytes"]))
        return found


def read_times(file: Path = FILE) -> Times | None:
    """The table in a file, or None when it was not measured yet.

    Raises:
        ValueError: the file holds something else; one line.
    """
    if not file.is_file():
        return None
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        kernels: dict[int, list[tuple[float, float]]] = {}
        for cell in held["kernels"]:
            kernels.setdefault(int(cell["block"]), []).append((float(cell["density"]), float(cell["ms"])))
        return Times(dict(held["where"]), str(held["grid"]), float(held["dense_ms"]),
                     {block: sorted(curve) for block, curve in kernels.items()}, list(held["rows"]))
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{file} is no table of times; make it with python -m dit_sparse.eval.method_speed") from error
