"""The endpoints that programs call: stable names, plain data in and out, the page's own checks. See docs/app.md."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from ..commands.console import UserError
from ..eval.attention import NAMES
from ..methods import all_methods
from ..processor import SparseProc
from . import forms, wanted
from .capture import Recording
from .generate_tab import DEVICE
from .inspect_tab import recording_work
from .job import Cancelled, Job
from .models import Shelf
from .sessions import Sessions
from .work import Outcome, make


def endpoints(shelf: Shelf, sessions: Sessions) -> None:
    """Add the endpoints /info, /generate, /inspect and /cancel to the page that is being built."""

    def info() -> dict:
        """The models, the device, and every method with its options."""
        methods = {name: {"title": cls.title, "arxiv": cls.arxiv, "options": {f.name: {
            "kind": f.kind, "default": _plain(f.default), "choices": list(f.choices), "text": f.text,
        } for f in forms.fields_of(name)}} for name, cls in all_methods().items()}
        return {"models": shelf.names, "device": shelf.device_text(), "methods": methods,
                "shared_options": {f.name: f.text for f in forms.shared_fields()}, "step_caches": [*forms.STEP_CACHES]}

    def generate(
        prompt: str, method: str | None = None, options: dict | None = None, mode: str = "both",
        width: int | None = None, height: int | None = None, frames: int | None = None, steps: int | None = None,
        seed: int = 0, guidance: float | None = None, model: str | None = None, shared_options: dict | None = None,
        step_cache: str = "none", step_cache_value: float | None = None, request: gr.Request = None,  # type: ignore
    ) -> dict:
        """Make a clip dense, sparse or both; clips come as base64 of an mp4 (a PNG for one frame)."""
        def work() -> Callable[[Job], Any]:
            asked = wanted.check(
                shelf, model=model, prompt=prompt, width=width, height=height, frames=frames, steps=steps, seed=seed,
                guidance=guidance, mode=mode, method=method, options=options, shared=shared_options,
                step_cache=step_cache, step_cache_value=step_cache_value,
            )
            return lambda job: make(shelf, asked, job)

        return outcome(_last(sessions, request, work))

    def inspect(
        prompt: str, method_a: str = SparseProc.default_method, method_b: str = "rainfusion2",
        options_a: dict | None = None, options_b: dict | None = None, width: int | None = None,
        height: int | None = None, frames: int | None = None, steps: int = 8, seed: int = 0, guidance: float = 1.0,
        model: str | None = None,
        request: gr.Request = None,  # type: ignore
    ) -> dict:
        """Make a clip dense; density, recall, error and cosine of both methods at the kept steps, layers and heads."""
        def work() -> Callable[[Job], Any]:
            shape = {"model": model, "prompt": prompt, "width": width, "height": height, "frames": frames,
                     "steps": steps, "seed": seed, "guidance": guidance}
            return recording_work(shelf, shape, (method_a, options_a or {}), (method_b, options_b or {}))

        return looked(_last(sessions, request, work))

    def cancel(request: gr.Request = None) -> int:  # type: ignore
        """Stop what this client runs; how many jobs there were."""
        return sessions.cancel(request.session_hash if request else None)

    for function in (generate, inspect):
        gr.api(function, api_name=function.__name__, concurrency_id=DEVICE, concurrency_limit=1)
    gr.api(info, api_name="info", queue=False)
    gr.api(cancel, api_name="cancel", queue=False)


def outcome(result: Outcome) -> dict[str, Any]:
    """A finished job as plain data."""
    clips = {name: {"kind": kind, "base64": base64.b64encode(data).decode()}
             for name, (data, kind) in result.clips.items()}
    return json.loads(json.dumps({
        "settings": result.wanted.settings, "numbers": result.numbers, "summary": result.summary,
        "density": result.density, "notes": result.wanted.notes, "clips": clips,
    }, default=str))


def looked(recording: Recording) -> dict[str, Any]:
    """The numbers of a recording as plain data."""
    detail = recording.detail
    assert detail is not None
    calls = []
    for (step, layer), moment in sorted(recording.moments.items()):
        for label, view in moment.views.items():
            entry: dict[str, Any] = {"step": step, "layer": layer, "method": label, "reason": view.reason}
            if view.numbers is not None:
                entry |= {name: dict(zip(map(str, detail.heads), row, strict=True))
                          for name, row in zip(NAMES, view.numbers.tolist(), strict=True)}
            calls.append(entry)
    return {"grid": str(recording.grid), "steps": [*detail.steps], "layers": [*detail.layers],
            "heads": [*detail.heads], "calls": calls}


def _last(sessions: Sessions, request: Any, prepare: Callable[[], Callable[[Job], Any]]) -> Any:
    """The result of a job; refusals and a stop as Gradio's own errors, which reach the client in words."""
    try:
        return list(sessions.follow(request.session_hash if request else None, prepare()))[-1]
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Cancelled as error:
        raise gr.Error("cancelled", print_exception=False) from error


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
