"""The Tune tab: a quality is named, a preset comes back: its plan by layer and head, its evidence, the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..commands.console import UserError
from ..tuning.steps import MODES
from ..tuning.targets import SIGNS
from . import forms, tune_words, words
from .fields import ShapeForm, shape_form
from .generate_tab import BUSY, CANCELLED, FREE, GONE, GenerateForm, connect_stop, queued
from .job import Cancelled, Progress
from .models import Shelf
from .sessions import Sessions
from .tune_work import check, run

EMPTY = "Name a quality: heads, budgets and patterns are chosen for it, and checked on clips that the choice never saw."
OWN = ("metric", "value", "mode", "statistic", "dense_steps", "dense_layers", "step_cache")  # beside those of a shape
START = {"psnr": 30.0, "ssim": 0.9, "lpips": 0.1, "speedup": 1.5}


def tune_tab(shelf: Shelf, sessions: Sessions, tabs: gr.Tabs, form: GenerateForm) -> None:
    """Draw the tab and connect its events.

    Args:
        shelf: the models.
        sessions: keeps what a visitor tuned.
        tabs: of the page, to go to Generate.
        form: the Generate tab's fields, which take over the preset and its size.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            with gr.Row():
                metric = gr.Dropdown([(f"{name} {sign}", name) for name, sign in SIGNS.items()], value="psnr",
                                     label="Target", elem_id="tune-metric", min_width=90)
                value = gr.Number(START["psnr"], label="of", elem_id="tune-value", step=0.5, min_width=90)
            with gr.Row():
                mode = gr.Dropdown(list(MODES), value="quick", label="Mode", elem_id="tune-mode", min_width=90)
                statistic = gr.Dropdown([("mean clip", "mean"), ("worst clip", "min")], value="mean",
                                        label="Reached by the", elem_id="tune-statistic", min_width=90)
            shape = shape_form(shelf, "tune", "Tune", several=True)
            with gr.Accordion("Calls that stay dense, step cache", open=False, elem_id="tune-more"):
                with gr.Row():
                    steps = gr.Textbox("", label="Dense steps (0.2 or 4)", placeholder="automatic", max_lines=1,
                                       elem_id="tune-dense-steps", min_width=90)
                    layers = gr.Number(0, label="Dense layers", step=1, elem_id="tune-dense-layers", min_width=90)
                cache = gr.Dropdown(["none", *forms.STEP_CACHES], value="none", label="Verify beside a step cache",
                                    elem_id="tune-cache")
        with gr.Column(scale=7, min_width=300):
            state = gr.HTML(words.card(EMPTY, "ds-empty"), elem_id="tune-state", label="Progress")
            use = gr.Button("Use it in Generate", visible=False, elem_id="tune-use")
            result = gr.HTML("", elem_id="tune-result", label="Preset", min_height=1)
    start, stop = shape.run, shape.stop
    inputs = [*shape.inputs, metric, value, mode, statistic, steps, layers, cache]  # the latter as in OWN
    event = queued(start, tuner(shelf, sessions, shape), inputs, [state, start, stop, use, result])
    connect_stop(stop, sessions, event, [state, start, stop])
    metric.input(START.get, metric, value, queue=False, show_progress="hidden", api_visibility="private")
    own = [field for name, field in zip(shape.NAMES, shape.inputs, strict=True) if name not in ("prompt", "seed")]
    theirs = [field for name, field in zip(shape.NAMES, form.shape.inputs, strict=True)
              if name not in ("prompt", "seed")]
    use.click(taker(sessions), own, [tabs, form.preset, state, *theirs], queue=False, show_progress="hidden",
              api_visibility="private")


def tuner(shelf: Shelf, sessions: Sessions, shape: ShapeForm) -> Any:
    """The function behind the button; it yields (state, run button, cancel button, use button, result)."""

    def tune(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        count, same = len(shape.inputs), (gr.skip(), gr.skip())
        own = dict(zip(OWN, values[count:], strict=True))
        try:
            asked = check(shelf, **shape.read(values[:count]), **own)
            yield words.progress_card(Progress()), *BUSY, gr.Button(visible=False), ""
            for found in sessions.follow(request.session_hash, lambda job: run(shelf, asked, job)):
                if isinstance(found, Progress):
                    yield words.progress_card(found), *BUSY, *same
                else:
                    sessions.keep_preset(request.session_hash, found.preset)
                    yield "", *FREE, gr.Button(visible=True), tune_words.outcome(found)
        except UserError as error:
            yield words.refusal(str(error)), *FREE, *same
        except Cancelled:
            yield words.card(CANCELLED, "ds-empty"), *FREE, *same

    return tune


def taker(sessions: Sessions) -> Any:
    """Takes the preset to the Generate tab, with the size that it was made for."""

    def take(request: gr.Request, *sizes: Any) -> tuple[Any, ...]:
        if sessions.preset(request.session_hash) is None:
            return gr.skip(), gr.skip(), words.refusal(GONE), *(gr.skip() for _ in sizes)
        return gr.Tabs(selected="generate"), gr.Checkbox(value=True, visible=True), gr.skip(), *sizes

    return take
