"""The models that a page offers: named on the command line, never by a visitor; one loaded at a time beside the first.

A page has one device. Whoever runs a model holds the shelf's lock: one job at a time for each device.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..commands.console import UserError, refusing
from ..commands.run import check_device, device_name
from ..pipelines.hosts import HOST_NAMES
from ..pipelines.load import EMBEDDED, load, locate
from .preview import Preview

KEPT = 2  # models in memory at once: the first of the list, and the last that was asked for


class Shelf:
    """Models by the names that the page shows.

    Args:
        models: "embedded", Diffusers folders or hub ids; the first is loaded when the page starts.
        device: None takes the first CUDA device, or the CPU when there is none.

    Raises:
        UserError: an unknown model or device, or two folders of one name.
    """

    def __init__(self, models: Sequence[str] = (EMBEDDED,), device: str | None = None) -> None:
        check_device(device)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.lock = threading.Lock()
        self._places: dict[str, str] = {}
        for model in models:
            with refusing():
                place = locate(model)
            # A folder goes by its own name: where it lies on this machine is nobody's business.
            name = place.resolve().name if isinstance(place, Path) and model != EMBEDDED else str(model)
            if self._places.get(name, model) != model:
                raise UserError(f"--model {model}: another model of this page is called {name!r}; rename the folder")
            self._places[name] = str(model)
        if not self._places:
            raise UserError("--model: name at least one model, for example 'embedded'")
        self._loaded: dict[str, Any] = {}
        self._previews: dict[str, Preview | None] = {}

    @property
    def names(self) -> list[str]:
        """What the page offers, the first is the default."""
        return list(self._places)

    @property
    def cuda(self) -> bool:
        """Whether the page runs on a GPU."""
        return self.device.type == "cuda"

    def place(self, name: str) -> str:
        """What `load` and the checks of a request take for a name.

        Raises:
            UserError: the page does not offer such a model.
        """
        if name not in self._places:
            raise UserError(f"model {str(name)[:60]!r} is not offered; use one of {', '.join(self._places)}")
        return self._places[name]

    def open(self, name: str) -> Any:
        """The pipeline, loaded when it is not; the caller holds `lock` (or is alone, at the start)."""
        place = self.place(name)
        if name not in self._loaded:
            for other in list(self._loaded)[1 : len(self._loaded) - KEPT + 2]:
                del self._loaded[other], self._previews[other]
                if self.cuda:
                    torch.cuda.empty_cache()
            with refusing():
                pipe = load(place, device=str(self.device))
            pipe.set_progress_bar_config(disable=True)
            self._loaded[name], self._previews[name] = pipe, Preview.fit(pipe)
        return self._loaded[name]

    def preview(self, name: str) -> Preview | None:
        """How latents of a loaded model become pictures, or None when that is not known for it."""
        return self._previews.get(name)

    def width(self, name: str) -> int:
        """Channels of a token; 0 when that is not known before the model is loaded."""
        pipe, place = self._loaded.get(name), locate(self.place(name))
        if pipe is not None:
            config = getattr(getattr(pipe, "transformer", None), "config", {})
        else:
            config = _json(place / "transformer" / "config.json") if isinstance(place, Path) else {}
        heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
        return heads * size if isinstance(heads, int) and isinstance(size, int) else 0

    def device_text(self) -> str:
        """What the page runs on, for people."""
        first = next(iter(self._loaded.values()), None)
        return device_name(first) if first is not None else str(self.device)

    def geometry(self, name: str) -> dict[str, Any]:
        """The model's own sizes and steps for the form; None what is not known before a hub model is loaded."""
        if self.place(name) == EMBEDDED:
            from ..pipelines.embedded import DEFAULTS

            return {key: DEFAULTS[key] for key in HOST_NAMES}
        pipe = self._loaded.get(name)
        return host_defaults(_class_of(self.place(name)) if pipe is None else type(pipe))


def host_defaults(host: Any) -> dict[str, Any]:
    """Sizes and steps that a pipeline class takes when nothing is said, by our names; None where it says nothing."""
    names = inspect.signature(host.__call__).parameters if host is not None else {}
    found = {ours: getattr(names.get(theirs), "default", None) for ours, theirs in HOST_NAMES.items()}
    return {ours: value if isinstance(value, (int, float)) else None for ours, value in found.items()}


def _class_of(place: str) -> Any:
    """The pipeline class of a folder, as Diffusers has it; None for a hub id or a class of the folder's own."""
    import diffusers

    name = _json(Path(place) / "model_index.json").get("_class_name")
    return getattr(diffusers, name, None) if isinstance(name, str) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
