"""Gradio components for `forms`: a choice of a method with its options, drawn anew when another method is chosen.

What is typed goes, in the browser, into one hidden component by name and value: whatever the method, an event has the
same inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..methods import all_methods
from . import forms
from .models import Shelf


@dataclass(frozen=True)
class MethodForm:
    """The components of one choice: `method` holds its name, `options` {name: value} of what was typed."""

    method: gr.Dropdown
    options: gr.JSON


def method_form(label: str, value: str, name: str, *, dense: bool = False) -> MethodForm:
    """A dropdown of all methods and, below it, the options of the chosen one.

    Args:
        label: of the dropdown.
        value: the method at the start.
        name: prefix of the components' ids.
        dense: whether the method `dense` is offered.
    """
    known = {key: cls for key, cls in all_methods().items() if dense or key != "dense"}
    choices = [(f"{cls.title} ({key})" if cls.title else key, key) for key, cls in known.items()]
    method = gr.Dropdown(choices, value=value, label=label, elem_id=f"{name}-method", filterable=True)
    options = gr.JSON({}, visible=False, label=f"{label}: options")
    method.change(None, None, options, js="() => ({})", show_progress="hidden", api_visibility="private")

    @gr.render(inputs=method, show_progress="hidden", queue=False)
    def draw(chosen: str) -> None:
        if chosen not in known:
            return
        paper = known[chosen].arxiv
        if paper:
            gr.HTML(f'<div class="ds"><p class="faint">Paper: arXiv {paper}</p></div>', key=f"{name}-{chosen}-paper")
        fields = forms.fields_of(chosen)
        lead, others = [f for f in fields if f.name == "density"], [f for f in fields if f.name != "density"]
        option_fields(lead, options, f"{name}-{chosen}")
        if others:
            with gr.Accordion("Options of the method", open=False, elem_id=f"{name}-options"):
                option_fields(others, options, f"{name}-{chosen}")

    return MethodForm(method, options)


def shared_form(name: str) -> tuple[gr.JSON, gr.Dropdown, gr.Number]:
    """The options of every method, and the step cache with its number."""
    options = gr.JSON({}, visible=False, label="options of every method")
    option_fields(forms.shared_fields(), options, name)
    caches = [("none", "none"), *((key, key) for key in forms.STEP_CACHES)]
    texts = "; ".join(f"{key}: {text}" for key, (_, text) in forms.STEP_CACHES.items())
    cache = gr.Dropdown(caches, value="none", label="step cache", info=texts, elem_id=f"{name}-cache")
    number = gr.Number(None, label="threshold of the step cache (empty: its own)", visible=False, step=0.01,
                       elem_id=f"{name}-threshold")

    def chosen(key: str) -> Any:
        return gr.Number(value=None, visible=forms.STEP_CACHES.get(key, (False, ""))[0])

    cache.change(chosen, cache, number, queue=False, show_progress="hidden", api_visibility="private")
    return options, cache, number


def option_fields(fields: list[forms.Field], options: gr.JSON, name: str) -> None:
    """A component for each field; what is typed is written into `options` without asking the server."""
    for field in fields:
        component = _component(field, f"{name}-{field.name}")
        note = f"(value, all) => ({{...(all || {{}}), {field.name}: value}})"
        events = [component.input] + ([component.change] if field.kind == "density" else [])
        gr.on(events, None, [component, options], options, js=note, show_progress="hidden", queue=False,
              api_visibility="private")


def _component(field: forms.Field, name: str) -> Any:
    common: dict[str, Any] = {"label": field.label, "info": field.text or None, "elem_id": name, "key": name,
                              "interactive": True}
    if field.kind == "density":
        return gr.Slider(0.01, 1, value=field.default, step=0.01, **common)
    if field.kind == "yes or no":
        return gr.Checkbox(value=bool(field.default), **common)
    if field.kind == "choice":
        choices = [*field.choices, *([("automatic", "")] if field.optional else [])]
        return gr.Dropdown(choices, value="" if field.default is None else field.default, **common)
    if field.kind in ("whole number", "number") and not field.optional:
        step = 1 if field.kind == "whole number" else 0.01
        return gr.Number(field.default, step=step, **common)
    return gr.Textbox(field.shown(), placeholder="automatic" if field.optional else None, max_lines=1, **common)


@dataclass(frozen=True)
class ShapeForm:
    """Model, prompt, size and the like: `inputs` in the order of `NAMES`; the two buttons below the prompt."""

    NAMES = ("model", "prompt", "width", "height", "frames", "steps", "seed", "guidance")
    inputs: list[Any]
    run: gr.Button
    stop: gr.Button

    def read(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Values of `inputs` as arguments of `wanted.check`."""
        return dict(zip(self.NAMES, values, strict=True))


def shape_form(shelf: Shelf, name: str, verb: str, *, several: bool = False, **start: Any) -> ShapeForm:
    """The fields of what to make.

    Args:
        shelf: the models.
        name: prefix of the components' ids.
        verb: on the button that begins.
        several: the prompt is a list, one a line, that may be empty.
        start: replaces the model's own values.
    """
    from ..pipelines.embedded import EXAMPLES

    base = {**shelf.geometry(shelf.names[0]), **start}
    model = gr.Dropdown(shelf.names, value=shelf.names[0], label="Model", elem_id=f"{name}-model",
                        visible=len(shelf.names) > 1)
    label = "Prompts, one a line; the last is held out (empty: those that come along)" if several else "Prompt"
    prompt = gr.Textbox("" if several else EXAMPLES[0], label=label, lines=2, max_lines=4, elem_id=f"{name}-prompt")
    with gr.Row():
        run = gr.Button(verb, variant="primary", elem_id=f"{name}-run", scale=2)
        stop = gr.Button("Cancel", variant="stop", elem_id=f"{name}-stop", interactive=False, min_width=90)
    if not several:
        gr.Examples([[text] for text in EXAMPLES], [prompt], label="Examples", examples_per_page=4,
                    cache_examples=False, elem_id=f"{name}-examples", api_visibility="private")
    with gr.Row():
        width = _number("Width", base["width"], f"{name}-width", 16)
        height = _number("Height", base["height"], f"{name}-height", 16)
        frames = _number("Frames", base["frames"], f"{name}-frames", 2)
    with gr.Row():
        steps = _number("Steps", base["steps"], f"{name}-steps", 1)
        seed = _number("Seed", start.get("seed", 0), f"{name}-seed", 1)
        guidance = _number("Guidance (1: off)", base["guidance_scale"], f"{name}-guidance", 0.5)
    sizes = (width, height, frames, steps, guidance)

    def other_model(chosen: str) -> list[Any]:
        found = shelf.geometry(chosen) if chosen in shelf.names else {}
        return [found.get(key) for key in ("width", "height", "frames", "steps", "guidance_scale")]

    model.change(other_model, model, list(sizes), queue=False, show_progress="hidden", api_visibility="private")
    return ShapeForm([model, prompt, width, height, frames, steps, seed, guidance], run, stop)


def _number(label: str, value: Any, name: str, step: float) -> gr.Number:
    """A number without bounds of its own: `wanted.check` says what is allowed."""
    return gr.Number(value, label=label, step=step, elem_id=name, min_width=90)
