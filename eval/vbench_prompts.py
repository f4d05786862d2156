"""VBench's prompts with the dimensions that each is for: 946 entries, 944 texts, as vbench 0.1.5 on PyPI has them.

vbench_prompts.json holds the content of that package's VBench_full_info.json (Apache-2.0, see NOTICE) in a quarter of
its size; `full_info` gives the original back, byte for byte, which a test checks by its SHA-256. (arXiv 2311.17982)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIDEOS = 5  # of each prompt: VBench looks for PROMPT-0.mp4 to PROMPT-4.mp4
FULL_INFO, ALL, FOLDER = "VBench_full_info.json", "all_dimension.txt", "prompts_per_dimension"


@dataclass(frozen=True)
class Prompt:
    """One entry of VBench's list.

    Attributes:
        text: the prompt, also the beginning of its videos' names.
        dimensions: that its videos are scored by.
        about: what VBench looks for (an object, a colour, a style, a scene; for two objects in place: first, second,
            relation); None where the text says it all.
    """

    text: str
    dimensions: tuple[str, ...]
    about: str | tuple[str, ...] | None = None


@functools.cache
def all_prompts() -> tuple[Prompt, ...]:
    """The list in VBench's order."""
    groups = json.loads(Path(__file__).with_name("vbench_prompts.json").read_text(encoding="utf-8"))
    found = []
    for group in groups:
        for entry in group["prompts"]:
            text, about = (entry, None) if isinstance(entry, str) else entry
            found.append(Prompt(text, tuple(group["dimensions"]), tuple(about) if isinstance(about, list) else about))
    return tuple(found)


@functools.cache
def dimensions() -> tuple[str, ...]:
    """VBench's 16 dimensions, as its list of prompts names them first."""
    return tuple(dict.fromkeys(name for prompt in all_prompts() for name in prompt.dimensions))


def prompts_of(wanted: Iterable[str] | None = None) -> list[Prompt]:
    """The entries that VBench scores by any of some dimensions.

    Args:
        wanted: VBench's names, see `dimensions`; None takes all entries.

    Raises:
        ValueError: an unknown dimension.
    """
    if wanted is None:
        return list(all_prompts())
    names = check_dimensions(wanted)
    return [prompt for prompt in all_prompts() if names & set(prompt.dimensions)]


def texts_of(wanted: Iterable[str] | None = None) -> list[str]:
    """The texts of `prompts_of`, each once: two of VBench's prompts stand in two entries and share their videos."""
    return list(dict.fromkeys(prompt.text for prompt in prompts_of(wanted)))


def check_dimensions(names: Iterable[str]) -> set[str]:
    """The names as a set.

    Raises:
        ValueError: one that VBench does not have.
    """
    wanted = set(names)
    for name in sorted(wanted):
        if name not in dimensions():
            raise ValueError(f"dimension {name!r} is unknown; VBench has {', '.join(dimensions())}")
    return wanted


def style_of(text: str) -> str | None:
    """The style that VBench looks for in videos of a prompt, such as "oil painting"; None for other prompts."""
    found = (p.about for p in all_prompts() if p.text == text and "appearance_style" in p.dimensions)
    about = next(found, None)
    return about if isinstance(about, str) else None


def coverage(texts: Iterable[str]) -> dict[str, tuple[int, int]]:
    """For each dimension, how many of its prompts are among some texts, and how many it has."""
    given = set(texts)
    found = {}
    for name in dimensions():
        wanted = texts_of([name])
        found[name] = (len(given.intersection(wanted)), len(wanted))
    return found


def full_info() -> list[dict[str, Any]]:
    """The content of VBench_full_info.json, which its official evaluation reads."""
    entries: list[dict[str, Any]] = []
    for prompt in all_prompts():
        entry: dict[str, Any] = {"prompt_en": prompt.text, "dimension": list(prompt.dimensions)}
        if prompt.about is not None:
            entry["auxiliary_info"] = {prompt.dimensions[0]: _about(prompt)}
        entries.append(entry)
    return entries


def _about(prompt: Prompt) -> dict[str, Any]:
    """What a prompt is about in the nesting that VBench has for its dimension."""
    name = prompt.dimensions[0]
    if name in ("object_class", "multiple_objects"):
        return {"object": prompt.about}
    if name == "scene":
        return {name: {name: prompt.about}}
    if name == "spatial_relationship":
        return {name: dict(zip(("object_a", "object_b", "relationship"), prompt.about or (), strict=True))}
    return {name: prompt.about}


def write_prompts(folder: str | Path, wanted: Iterable[str] | None = None) -> list[Path]:
    """Write prompts in VBench's layout: one text file for each dimension, one with all of them, and its JSON.

    Args:
        folder: made when it is missing.
        wanted: which dimensions; None writes all 16.

    Returns:
        The files: all_dimension.txt, prompts_per_dimension/NAME.txt, VBench_full_info.json (always complete: the
        evaluation takes its dimensions from the command line).

    Raises:
        ValueError: an unknown dimension.
        OSError: the folder cannot be written.
    """
    from dit_sparse.pipelines.video_io import finished_file

    folder, wanted = Path(folder), None if wanted is None else list(wanted)
    names = [name for name in dimensions() if wanted is None or name in check_dimensions(wanted)]
    lines = {ALL: [prompt.text for prompt in prompts_of(names)]}
    lines |= {f"{FOLDER}/{name}.txt": [prompt.text for prompt in prompts_of([name])] for name in names}
    contents = {name: "\n".join(texts) + "\n" for name, texts in lines.items()}
    contents[FULL_INFO] = json.dumps(full_info(), indent=4)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        with finished_file(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return [folder / name for name in contents]
