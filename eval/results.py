"""Reading a folder that `dit-sparse eval run` filled, and comparing two of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .attention import ATTENTION
from .bootstrap import Interval, interval, verdict
from .config import DENSE
from .evaluation import ENVIRONMENT, RESULTS, RUN
from .measures.table import FROZEN_IS_BEST, MEASURES, MOTION
from .run import finished

# Numbers of a result that are no measures, and which way is good.
COSTS: dict[str, str] = {"seconds": "lower", "speedup": "higher", "density": "neither", "latent_error": "lower"}


@dataclass(frozen=True)
class Evaluation:
    """A run as it lies in its folder.

    Attributes:
        folder: of the run.
        command: that made it.
        config: its configuration, as plain data.
        environment: versions, device and date.
        entries: {"job": ..., "result": ...} of its finished clips, in the order of the jobs.
        planned: how many clips it has when it is finished.
        attention: the calls of clips whose attention was looked into, by method; see `attention.look`.
        looked, planned_looks: of how many clips that is, and will be when it is finished.
    """

    folder: Path
    command: str
    config: dict[str, Any]
    environment: dict[str, Any]
    entries: list[dict[str, Any]]
    planned: int
    attention: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    looked: int = 0
    planned_looks: int = 0

    @property
    def labels(self) -> list[str]:
        """Dense first, then the methods in the order of the configuration, those with finished clips."""
        return list(dict.fromkeys(entry["job"]["label"] for entry in self.entries))

    def of(self, label: str) -> list[dict[str, Any]]:
        """The entries of one method."""
        return [entry for entry in self.entries if entry["job"]["label"] == label]


def load_evaluation(folder: str | Path) -> Evaluation:
    """Read the folder of a run, finished or not.

    Raises:
        ValueError: no such folder, or one that holds no run.
    """
    folder = Path(folder)
    content = _read(folder / RUN)
    known, looks = finished(folder / RESULTS), finished(folder / ATTENTION)
    try:
        keys = list(content["jobs"])
        entries = [known[key] for key in keys if key in known]
        command, config = str(content["command"]), dict(content["config"])
        environment = _read(folder / ENVIRONMENT)
        planned_looks = list(content.get("attention", []))
        looked = [looks[key] for key in planned_looks if key in looks]
        attention: dict[str, list[dict[str, Any]]] = {}
        for entry in looked:
            attention.setdefault(entry["job"]["label"], []).extend(entry["result"]["calls"])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RUN} is damaged ({type(error).__name__}); run `eval run` again") from error
    if not entries:
        raise ValueError(f"{folder} holds no finished clip; run `dit-sparse eval run` again")
    speeds = {(e["job"]["prompt"], e["job"]["seed"]): e["result"]["seconds"] for e in entries
              if e["job"]["label"] == DENSE}
    for entry in entries:
        # The speed-up belongs to a pair of clips: it is worked out here, so that no line depends on another.
        base = speeds.get((entry["job"]["prompt"], entry["job"]["seed"]))
        entry["result"]["speedup"] = base / entry["result"]["seconds"] if base else None
    return Evaluation(
        folder, command, config, environment, entries, len(keys), attention, len(looked), len(planned_looks)
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give a folder of `dit-sparse eval run`") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; run `dit-sparse eval run` again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: no JSON object; run `dit-sparse eval run` again")
    return content


def number(result: Mapping[str, Any], name: str) -> float | None:
    """One number of a result: a measure, or one of `COSTS`."""
    if name == "latent_error":
        errors = result.get("latent_errors") or []
        return float(errors[-1]) if errors else None
    value = result.get(name) if name in COSTS else result.get("values", {}).get(name)
    return None if value is None else float(value)


def per_prompt(entries: Iterable[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Mean over the seeds of one number, by prompt; prompts without it are left out."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        value = number(entry["result"], name)
        if value is not None:
            found.setdefault(entry["job"]["prompt"], []).append(value)
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}


def interval_of(entries: Iterable[Mapping[str, Any]], name: str) -> Interval | None:
    """Mean of one number over the prompts with its bootstrap interval; None where no clip has it."""
    values = list(per_prompt(entries, name).values())
    return interval(values) if values else None


def table_rows(run: Evaluation, names: Iterable[str]) -> list[dict[str, Any]]:
    """One row for each method: label, clips, and an interval by name."""
    return [
        {"label": label, "clips": len(run.of(label)), **{name: interval_of(run.of(label), name) for name in names}}
        for label in run.labels
    ]


@dataclass(frozen=True)
class Difference:
    """B minus A for one number of one method, over the prompts that both have.

    Attributes:
        label: of the method, or of both when they differ.
        name: of the measure or cost.
        a, b: means.
        difference: B - A, paired by prompt, with its interval.
        says: "higher", "lower", "within noise" or "too few prompts".
        better: "A", "B", or "" when nothing is said, neither way is good, or the gain may be that the clips move less.
        note: why nothing is called better, where that may surprise.
    """

    label: str
    name: str
    a: float
    b: float
    difference: Interval
    says: str
    better: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def compare_runs(a: str, b: str, *, confidence: float = 0.95) -> list[Difference]:
    """Which differences between two runs, or two methods, exceed noise: a paired bootstrap over the prompts.

    Args:
        a, b: folders of runs, compared method by method; or FOLDER:LABEL, one method of a run.
        confidence: of each interval, in (0, 1). Of many differences that are none, one in twenty exceeds 0.95.

    Raises:
        ValueError: no run, an unknown label, or nothing in common.
    """
    first, second = _side(a), _side(b)
    if (len(first) == 1) != (len(second) == 1) and ":" in a + b:
        raise ValueError(f"{a} and {b}: write FOLDER:LABEL for both, or for neither")
    pairs = [(x, y) for x in first for y in second if x == y] if len(first) > 1 or len(second) > 1 else [
        (next(iter(first)), next(iter(second)))
    ]
    found: list[Difference] = []
    for x, y in pairs:
        label = x if x == y else f"{x} / {y}"
        rows = [
            row for name in (*COSTS, *MEASURES) for row in _difference(label, name, first[x], second[y], confidence)
        ]
        found += _none_for_standing_still(rows)
    if not found:
        raise ValueError(f"{a} and {b} have no method with a prompt and a measure in common")
    return found


def _none_for_standing_still(rows: list[Difference]) -> list[Difference]:
    """Frozen clips never win: nothing is better where standing still is best, on the side that moves less."""
    still = {"lower": "B", "higher": "A"}
    less = {still[row.says] for row in rows if row.name in MOTION and row.says in still}
    return [
        replace(row, better="", note=f"{row.better} moves less")
        if row.name in FROZEN_IS_BEST and row.better in less else row
        for row in rows
    ]


def _side(text: str) -> dict[str, list[dict[str, Any]]]:
    """Entries by label of FOLDER or FOLDER:LABEL."""
    if Path(text).is_dir():
        run = load_evaluation(text)
        return {label: run.of(label) for label in run.labels}
    folder, colon, label = text.rpartition(":")
    if not colon or not Path(folder).is_dir():
        raise ValueError(f"{text} is no folder of `dit-sparse eval run`; write FOLDER or FOLDER:LABEL")
    run = load_evaluation(folder)
    if label not in run.labels:
        raise ValueError(f"{folder} has no method {label!r}; use one of {', '.join(run.labels)}")
    return {label: run.of(label)}


def _difference(label: str, name: str, a: list[Any], b: list[Any], confidence: float) -> list[Difference]:
    left, right = per_prompt(a, name), per_prompt(b, name)
    shared = [prompt for prompt in left if prompt in right]
    if not shared:
        return []
    between = interval([right[p] - left[p] for p in shared], confidence=confidence)
    first, second = (sum(side[p] for p in shared) / len(shared) for side in (left, right))
    says = verdict(between)
    return [Difference(label, name, first, second, between, says, _better(name, says, first, second))]


def _better(name: str, says: str, a: float, b: float) -> str:
    direction = COSTS.get(name) or MEASURES[name].direction
    if says not in ("higher", "lower") or direction == "neither":
        return ""
    if direction == "zero":
        return "B" if abs(b) < abs(a) else "A"
    return "B" if (says == "higher") == (direction == "higher") else "A"
