"""The Generate tab: a prompt and a method; progress with a preview; the clips, the numbers, the density map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..commands.console import UserError
from . import wanted, words
from .fields import ShapeForm, method_form, shape_form, shared_form
from .job import Cancelled, Progress
from .models import Shelf
from .sessions import Sessions
from .work import make

MODES = [("Dense and sparse", "both"), ("Sparse only", "sparse"), ("Dense only", "dense")]
CANCELLED = "Cancelled."
# The two buttons, while a job runs and otherwise.
BUSY = (gr.update(interactive=False), gr.update(interactive=True))
FREE = (gr.update(interactive=True), gr.update(interactive=False))
GONE = "The preset is gone; tune again, or untick it."
DEVICE = "device"  # events of one name wait for each other: one job at a time


@dataclass(frozen=True)
class GenerateForm:
    """What another tab may fill in: the fields of the size, and whether the visitor's preset is used."""

    shape: ShapeForm
    preset: gr.Checkbox


def generate_tab(shelf: Shelf, sessions: Sessions) -> GenerateForm:
    """Draw the tab and connect its events."""
    from .. import SparseProc

    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            shape = shape_form(shelf, "generate", "Generate")
            mode = gr.Radio(MODES, value="both", label="Make", elem_id="generate-mode")
            preset = gr.Checkbox(False, label="Use the preset from Tune in place of the method", visible=False,
                                 elem_id="generate-preset")
            form = method_form("Method", SparseProc.default_method, "generate")
            with gr.Accordion("Options of every method", open=False, elem_id="generate-shared"):
                shared, cache, threshold = shared_form("generate-all")
        with gr.Column(scale=7, min_width=300):
            state = gr.HTML(words.card(words.EMPTY, "ds-empty"), elem_id="generate-state", label="Progress")
            result = gr.HTML("", elem_id="generate-result", label="Result", js_on_load=words.PLAYER, min_height=1)
    run, stop = shape.run, shape.stop
    inputs = [*shape.inputs, mode, preset, form.method, form.options, shared, cache, threshold]
    event = queued(run, generator(shelf, sessions, shape), inputs, [state, run, stop, result])
    connect_stop(stop, sessions, event, [state, run, stop])
    return GenerateForm(shape, preset)


def queued(run: gr.Button, function: Any, inputs: list[Any], outputs: list[Any]) -> Any:
    """Connect a button to a job of the device; at once it says that it waits, and can be cancelled.

    Args:
        run: the button.
        function: a generator function; it yields values of `outputs`.
        inputs: of the function.
        outputs: the component that shows the progress, both buttons, and more.

    Returns:
        The event, for `connect_stop`.
    """
    state = outputs[0]
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    waiting = run.click(lambda: (words.progress_card(Progress()), *BUSY), None, outputs[:3], scroll_to_output=True,
                        **quick)
    return waiting.then(function, inputs, outputs, concurrency_id=DEVICE, concurrency_limit=1, show_progress="full",
                        show_progress_on=state, api_visibility="private")


def connect_stop(stop: gr.Button, sessions: Sessions, event: Any, outputs: list[Any]) -> None:
    """The button that stops the visitor's job, running or waiting in the queue."""

    def cancel(request: gr.Request) -> Any:
        sessions.cancel(request.session_hash)
        return words.card(CANCELLED, "ds-empty"), *FREE

    stop.click(cancel, None, outputs, cancels=[event], queue=False, show_progress="hidden", api_visibility="private")


def generator(shelf: Shelf, sessions: Sessions, shape: ShapeForm) -> Any:
    """The function behind the button; it yields (state, run button, cancel button, result)."""

    def generate(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        count = len(shape.inputs)
        mode, tuned, method, options, shared, cache, threshold = values[count:]
        try:
            preset = sessions.preset(request.session_hash) if tuned else None
            if tuned and preset is None:
                raise UserError(GONE)
            asked = wanted.check(
                shelf, **shape.read(values[:count]), mode=mode, method=method, options=options, shared=shared,
                step_cache=cache, step_cache_value=threshold, preset=preset,
            )
            yield words.progress_card(Progress()), *BUSY, ""
            for found in sessions.follow(request.session_hash, lambda job: make(shelf, asked, job)):
                if isinstance(found, Progress):
                    yield words.progress_card(found), *BUSY, gr.skip()
                else:
                    yield "", *FREE, words.outcome(found)
        except UserError as error:
            yield words.refusal(str(error)), *FREE, ""
        except Cancelled:
            yield words.card(CANCELLED, "ds-empty"), *FREE, ""

    return generate
