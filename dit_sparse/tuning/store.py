"""What a tuning run has found so far, kept in a folder so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["Store", "weights_digest"]

FORMAT = "dit-sparse tuning state 2"
SAMPLES = 64  # numbers of a parameter that its digest looks at

Parts = tuple[dict[str, Any], dict[str, Tensor]]


class Store:
    """Results by name: plain data as JSON, tensors as safetensors. Without a folder they stay in memory.

    Args:
        folder: where to keep them, made when it is missing; None: nowhere.
        about: what the run is; a folder of another run is refused.

    Raises:
        ValueError: the folder belongs to another run, or cannot be used; one line.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self._held: dict[str, Parts] = {}
        if self.folder is None:
            return
        mine = {"format": FORMAT, **about}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / "run.json"
            if not file.is_file():
                _write(file, json.dumps(mine, indent=1).encode())
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"state={str(folder)!r} cannot be used: {str(error).splitlines()[0]}") from error
        mine = json.loads(json.dumps(mine))
        for name in mine:
            if not isinstance(theirs, dict) or theirs.get(name) != mine[name]:
                said = theirs.get(name) if isinstance(theirs, dict) else theirs
                raise ValueError(f"state={str(folder)!r} belongs to another run: {name}={str(said)[:80]}, not "
                                 f"{str(mine[name])[:80]}; use another folder")

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, name: str) -> Parts | None:
        """What was put under the name, or None; a damaged file counts as none."""
        if name in self._held or self.folder is None:
            return self._held.get(name)
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            tensors = load_file(file.with_suffix(".safetensors")) if data["tensors"] else {}
            self._held[name] = (data["data"], tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        return self._held[name]

    def once(self, name: str, make: Callable[[], Parts]) -> Parts:
        """What was put under the name; made and put when there is nothing yet."""
        held = self.get(name)
        if held is None:
            self.put(name, *make())
            held = self._held[name]
        return held

    def put(self, name: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep plain data and tensors under a name. The JSON file comes last: without it there is nothing."""
        kept = {key: value.detach().to("cpu").contiguous() for key, value in (tensors or {}).items()}
        self._held[name] = (json.loads(json.dumps(dict(data))), kept)
        if self.folder is None:
            return
        file = self.folder / f"{name}.json"
        if kept:
            from safetensors.torch import save

            _write(file.with_suffix(".safetensors"), save(kept))
        _write(file, json.dumps({"data": dict(data), "tensors": bool(kept)}, indent=1).encode())


def weights_digest(models: Iterable[nn.Module]) -> str:
    """Sixteen digits that tell the weights of models apart: names, shapes and some numbers of every parameter.

    Another fine-tuning or a loaded LoRA has other digits. Of parameters that are not in memory only the shape counts.
    """
    found = hashlib.sha256()
    for model in models:
        for name, weight in model.named_parameters():
            found.update(f"{name} {tuple(weight.shape)}".encode())
            if weight.device.type == "meta":
                continue
            with suppress(RuntimeError):  # a quantized tensor may have no such view
                some = weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLES)]
                found.update(some.cpu().double().numpy().tobytes())
    return found.hexdigest()[:16]


def _write(file: Path, content: bytes) -> None:
    """All of it or nothing."""
    from ..pipelines.video_io import finished_file

    with finished_file(file) as part:
        part.write_bytes(content)
