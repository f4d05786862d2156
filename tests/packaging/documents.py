"""The code blocks of the README and of docs/, and a world in which the Python ones run: tiny models, no GPU, no hub."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_hosts import BUILDERS, build_tiny_host
from tests.tiny_wan import save_tiny_wan

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LARGE = ("LTXPipeline", "FluxPipeline", "QwenImagePipeline")  # their tokens stand for more pixels


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language and its text."""

    file: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """All blocks in these languages, file by file."""
    return [block for file in FILES for block in blocks_of(file) if block.language in languages]


def blocks_of(file: Path) -> list[Block]:
    """The fenced blocks of a file in their order."""
    found, start, language, lines = [], 0, "", []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence is None:
            lines.append(line)
        elif start:
            found.append(Block(file, start, language, textwrap.dedent("\n".join(lines)) + "\n"))
            start = 0
        else:
            start, language, lines = number, fence[1], []
    assert not start, f"{file.name}:{start}: a block without an end"
    return found


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Make `from_pretrained` hand out tiny pipelines, "cuda" mean the CPU, and every call a small one.

    A real folder is really loaded. What needs a hub or a GPU besides (LoRA files, offloading, compiling) does nothing
    here: tests/bridge tests them on models of their own.

    Returns:
        A list that gets the summary of every sparse call of a pipeline.
    """
    import diffusers
    import torch

    from dit_sparse import disable
    from dit_sparse.pipelines import embedded

    told: list[Any] = []
    base, made = diffusers.DiffusionPipeline, {}
    real = base.from_pretrained.__func__

    def from_pretrained(cls: Any, model: Any, **options: Any) -> Any:
        assert "torch_dtype" not in options, "Diffusers calls it dtype"
        if Path(model).is_dir():
            return real(cls, model, **options)
        if cls.__name__ not in made:
            made[cls.__name__] = build_tiny_host(cls.__name__)
        made[cls.__name__].set_progress_bar_config(disable=True)
        return disable(made[cls.__name__])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedded, "folder", functools.cache(lambda: save_tiny_wan(tmp_path / "embedded")))
    monkeypatch.setattr(base, "from_pretrained", classmethod(from_pretrained))
    to = base.to
    monkeypatch.setattr(base, "to", lambda pipe, *a, **k: to(pipe, *("cpu" if x == "cuda" else x for x in a), **k))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in BUILDERS:
        cls = getattr(diffusers, name)
        monkeypatch.setattr(cls, "__call__", small(cls.__call__, told, sides=(128, 192) if name in LARGE else (64, 96)))
        for unneeded in ("enable_model_cpu_offload", "load_lora_weights"):
            monkeypatch.setattr(cls, unneeded, lambda pipe, *a, **k: None, raising=False)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *a, **k: None)
    monkeypatch.setattr(diffusers.ModelMixin, "compile_repeated_blocks", lambda module, *a, **k: None)
    return told


def small(call: Any, told: list[Any], *, sides: tuple[int, int]) -> Any:
    """A pipeline's call with the same arguments, checked, but a tiny size and three steps."""
    from dit_sparse import bridge, summary

    names = inspect.signature(call)

    @functools.wraps(call)
    def run(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = names.bind(pipe, *args, **kwargs).arguments
        tiny = {"height": sides[0], "width": sides[1], "num_frames": 9, "num_inference_steps": 3}
        arguments |= {name: value for name, value in tiny.items() if name in names.parameters}
        made = call(**{name: value for name, value in arguments.items() if value is not ...})  # "and so on"
        if bridge.binding_of(pipe.transformer) is not None:
            told.append(summary(pipe))
        return made

    return run


def commands(block: Block) -> list[str]:
    """The commands of a shell block: continued lines joined, remarks left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]
