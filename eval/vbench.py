"""VBench's own scores: videos in the layout that it reads, and its result file with its constants.

The official networks are in no package that installs beside a current Diffusers: VBench runs elsewhere, on the folder
that `export_videos` makes, and `read_scores` brings its numbers back. Constants and weights are those of its
leaderboard (arXiv 2311.17982; scripts/constant.py of its repository, Apache-2.0).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_sparse.pipelines.video_io import finished_file

from .results import load_evaluation

SCORES = "vbench.json"


@dataclass(frozen=True)
class Dimension:
    """How a dimension counts: the range that becomes 0 to 1, its weight, and whether it is of quality or of meaning."""

    low: float
    high: float
    weight: float
    quality: bool

    def normalised(self, value: float) -> float:
        """The value on the leaderboard's scale, before its weight."""
        return (value - self.low) / (self.high - self.low)


DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(0.1462, 1.0, 1.0, True),
    "background_consistency": Dimension(0.2615, 1.0, 1.0, True),
    "temporal_flickering": Dimension(0.6293, 1.0, 1.0, True),
    "motion_smoothness": Dimension(0.706, 0.9975, 1.0, True),
    "dynamic_degree": Dimension(0.0, 1.0, 0.5, True),
    "aesthetic_quality": Dimension(0.0, 1.0, 1.0, True),
    "imaging_quality": Dimension(0.0, 1.0, 1.0, True),
    "object_class": Dimension(0.0, 1.0, 1.0, False),
    "multiple_objects": Dimension(0.0, 1.0, 1.0, False),
    "human_action": Dimension(0.0, 1.0, 1.0, False),
    "color": Dimension(0.0, 1.0, 1.0, False),
    "spatial_relationship": Dimension(0.0, 1.0, 1.0, False),
    "scene": Dimension(0.0, 0.8222, 1.0, False),
    "appearance_style": Dimension(0.0009, 0.2855, 1.0, False),
    "temporal_style": Dimension(0.0, 0.364, 1.0, False),
    "overall_consistency": Dimension(0.0, 0.364, 1.0, False),
}
_QUALITY, _MEANING = 4.0, 1.0  # weights of the two halves of the total


@dataclass(frozen=True)
class Scores:
    """VBench's result.

    Attributes:
        raw: by dimension, as VBench wrote them.
        normalised: the same on the leaderboard's scale.
        quality, semantic: weighted means of the two halves; None while a dimension of that half is missing.
        total: of both; None while one is missing.
        missing: dimensions without a result.
    """

    raw: dict[str, float]
    normalised: dict[str, float]
    quality: float | None
    semantic: float | None
    total: float | None
    missing: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def scores(raw: Mapping[str, float]) -> Scores:
    """The leaderboard's arithmetic; where VBench counts a missing dimension as 0, here the mean stays open.

    Args:
        raw: by dimension, with underscores or spaces.

    Raises:
        ValueError: an unknown dimension, or a value that is not finite or beyond 1.
    """
    values = {name.replace(" ", "_"): value for name, value in raw.items()}
    for name, value in values.items():
        if name not in DIMENSIONS:
            raise ValueError(f"dimension {name!r} is unknown; VBench has {', '.join(DIMENSIONS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"dimension {name!r} is {value!r}; use a finite number")
        if abs(value) > 1:
            raise ValueError(f"dimension {name!r} is {value!r}; VBench's numbers are within -1 and 1, not per cent")
    normalised = {name: DIMENSIONS[name].normalised(float(value)) for name, value in values.items()}

    def half(quality: bool) -> float | None:
        names = [name for name, dimension in DIMENSIONS.items() if dimension.quality == quality]
        if any(name not in normalised for name in names):
            return None
        weights = [DIMENSIONS[name].weight for name in names]
        return sum(normalised[n] * w for n, w in zip(names, weights, strict=True)) / sum(weights)

    quality, semantic = half(True), half(False)
    total = None
    if quality is not None and semantic is not None:
        total = (quality * _QUALITY + semantic * _MEANING) / (_QUALITY + _MEANING)
    return Scores(dict(values), normalised, quality, semantic, total, [n for n in DIMENSIONS if n not in values])


def read_scores(*paths: str | Path) -> Scores:
    """Read VBench's result files, NAME_eval_results.json: {dimension: [mean, [...]]}, one or several dimensions each.

    Raises:
        ValueError: a file that is none, or a dimension in two files.
    """
    raw: dict[str, float] = {}
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(content, dict) or not content:
            raise ValueError(f"{path} is no result of VBench; it holds dimensions with a list each, the mean first")
        for name, value in content.items():
            if not isinstance(value, list) or not value:
                raise ValueError(f"{path}: {name!r} is no result of VBench; use a list, the mean first")
            if name in raw:
                raise ValueError(f"{path}: {name!r} stands in another file too")
            raw[name] = value[0]
    return scores(raw)


@dataclass(frozen=True)
class Export:
    """What `export_videos` wrote.

    Attributes:
        files: the videos.
        coverage: by dimension, how many of VBench's prompts have a video, and how many it has; those with none are
            left out, so that it is empty for prompts of one's own (VBench's --mode=custom_input takes those).
    """

    files: list[Path]
    coverage: dict[str, tuple[int, int]]


def export_videos(
    folder: str | Path, label: str, output: str | Path, *, dimensions: Iterable[str] | None = None
) -> Export:
    """Copy a method's videos to PROMPT-INDEX.mp4, index counting the seeds from 0: the layout that VBench reads.

    Nothing else is written there: VBench takes the type of the first file that it finds for that of all.

    Args:
        folder: of `dit-sparse eval run`.
        label: the method.
        output: a folder, made when it is missing.
        dimensions: only videos of the prompts that VBench has for these; None takes all videos of the method.

    Raises:
        ValueError: no run, an unknown label or dimension, no prompt of these dimensions, a video that is gone, or a
            prompt that no file can be named after.
    """
    from .vbench_prompts import coverage, texts_of

    run, output = load_evaluation(folder), Path(output)
    if label not in run.labels:
        raise ValueError(f"{folder} has no method {label!r}; use one of {', '.join(run.labels)}")
    names = None if dimensions is None else list(dimensions)
    wanted = None if names is None else set(texts_of(names))
    plan: list[tuple[Path, Path]] = []
    counts: dict[str, int] = {}
    for entry in run.of(label):
        prompt = entry["job"]["prompt"]
        if wanted is not None and prompt not in wanted:
            continue
        name = f"{prompt}-{counts.get(prompt, 0)}.mp4"
        counts[prompt] = counts.get(prompt, 0) + 1
        if "/" in name or "\0" in name or len(name.encode()) > 255:
            raise ValueError(f"prompt {prompt[:40]!r}... cannot be a file's name; VBench's prompts have none such")
        source = run.folder / entry["result"]["video"]
        if not source.is_file():
            raise ValueError(f"{source} is gone; run `eval run` in a new folder")
        plan.append((source, output / name))
    if not plan:
        raise ValueError(f"{folder} has no video of VBench's prompts for {', '.join(names or [])}; run its prompts "
                         "(`prompts: {vbench: [...]}`), or leave --dimension out")
    output.mkdir(parents=True, exist_ok=True)
    for source, target in plan:
        with finished_file(target) as part:
            shutil.copyfile(source, part)
    covered = {name: counted for name, counted in coverage(counts).items() if counted[0]}
    return Export([target for _, target in plan], covered)


def keep_scores(folder: str | Path, label: str, found: Scores) -> None:
    """Note a method's scores in the folder of a run, in place of older ones of that method.

    Raises:
        ValueError: no run, or an unknown label.
    """
    run = load_evaluation(folder)
    if label not in run.labels:
        raise ValueError(f"{folder} has no method {label!r}; use one of {', '.join(run.labels)}")
    kept = kept_scores(run.folder) | {label: found.to_dict()}
    with finished_file(run.folder / SCORES) as part:
        part.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def kept_scores(folder: Path) -> dict[str, Any]:
    """What `keep_scores` noted, by method; empty when nothing was.

    Raises:
        ValueError: the file is damaged.
    """
    if not (folder / SCORES).is_file():
        return {}
    try:
        return dict(json.loads((folder / SCORES).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / SCORES} is damaged; remove it and import the scores again") from error
