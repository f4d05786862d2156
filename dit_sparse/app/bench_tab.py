"""The Bench tab: kernels and denoising steps timed on the page's GPU; on a CPU it says why it is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from ..commands.console import UserError
from ..methods import all_methods
from . import words
from .generate_tab import BUSY, CANCELLED, FREE, connect_stop, queued
from .job import Cancelled, Job, Progress
from .models import Shelf
from .sessions import Sessions

NO_GPU = ("Bench needs a GPU, and this page runs on {device}: on a CPU the times of attention say little about the "
          "kernels. On this machine, in a terminal: dit-sparse bench kernels --device cpu")
MOST_TOKENS = 131_072
SECONDS = 0.3  # of timed calls for each row


def bench_tab(shelf: Shelf, sessions: Sessions) -> None:
    """Draw the tab and connect its events."""
    if not shelf.cuda:
        gr.HTML(words.card(NO_GPU.format(device=shelf.device_text()), "ds-empty"), elem_id="bench-none")
        return
    from ..eval import step_speed

    device = str(shelf.device)
    names = [name for name in all_methods() if name != "dense"]
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            density = gr.Slider(0.05, 1, value=0.25, step=0.05, label="Density", elem_id="bench-density")
            # Without bounds of its own: Gradio would refuse before the function runs that gives the buttons back.
            tokens = gr.Number(32768, label="Tokens (kernels)", step=128)
            model = gr.Dropdown(list(step_speed.GEOMETRIES), value=step_speed.default_models(device)[0],
                                label="Model (step)")
            methods = gr.Dropdown(names, value=["svg"], multiselect=True, max_choices=4, label="Methods (step)")
            with gr.Row():
                kernels = gr.Button("Time kernels", variant="primary", elem_id="bench-kernels")
                step = gr.Button("Time a step", variant="primary", elem_id="bench-step")
                stop = gr.Button("Cancel", variant="stop", interactive=False, min_width=90)
        with gr.Column(scale=7, min_width=300):
            state = gr.HTML("", elem_id="bench-state", label="Progress")
    event = queued(kernels, timer(sessions, lambda job, *v: kernel_rows(job, device, *v)), [tokens, density],
                   [state, kernels, stop])
    connect_stop(stop, sessions, event, [state, kernels, stop])
    other = queued(step, timer(sessions, lambda job, *v: step_rows(job, device, *v)), [model, methods, density],
                   [state, step, stop])
    connect_stop(stop, sessions, other, [state, step, stop])


def timer(sessions: Sessions, measure: Callable[..., tuple[Sequence[str], list[Any], str]]) -> Any:
    """The function behind a button: measure(job, *inputs) gives columns, rows and a note; yields tables."""

    def run(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        try:
            for found in sessions.follow(request.session_hash, lambda job: measure(job, *values)):
                if isinstance(found, Progress):
                    yield words.progress_card(found), *BUSY
                else:
                    columns, rows, note = found
                    text = words.table(columns, rows) + f'<p class="faint">{escape(note)}</p>'
                    yield f'<div class="ds"><div class="ds-card">{text}</div></div>', *FREE
        except UserError as error:
            yield words.refusal(str(error)), *FREE
        except Cancelled:
            yield words.card(CANCELLED, "ds-empty"), *FREE

    return run


def kernel_rows(job: Job, device: str, tokens: Any, density: Any) -> tuple[Sequence[str], list[Any], str]:
    """Attention alone: each backend at a density, and dense attention beside it."""
    from ..commands.bench import CPU, CUDA
    from ..eval.speed import COLUMNS, bench_attention

    if not isinstance(tokens, (int, float)) or not 1 <= tokens <= MOST_TOKENS:
        raise UserError(f"tokens={tokens!r} is not allowed; use a number from 1 to {MOST_TOKENS}")
    defaults: dict[str, Any] = CUDA if device.startswith("cuda") else CPU
    shape = {name: value for name, value in defaults.items() if name != "tokens"}
    job.tell(phase="timing kernels")
    rows = bench_attention(tokens=int(tokens), densities=[_density(density)], device=device, seconds=SECONDS,
                           on_row=lambda _row: job.tell(done=job.progress.done + 1), **shape)
    return COLUMNS, [row.cells() for row in rows], "TFLOP/s count the blocks that are computed."


def step_rows(job: Job, device: str, model: Any, methods: Any, density: Any) -> tuple[Sequence[str], list[Any], str]:
    """A whole denoising step of a model's geometry with random weights."""
    from ..eval import step_speed

    if model not in step_speed.GEOMETRIES:
        raise UserError(f"model={str(model)[:40]!r} is unknown; use one of {', '.join(step_speed.GEOMETRIES)}")
    names = [name for name in methods or [] if name != "dense"]
    if unknown := [name for name in names if name not in all_methods()]:
        raise UserError(f"method={str(unknown[0])[:40]!r} is unknown; use one of {', '.join(all_methods())}")
    job.tell(phase="timing a step", steps=1 + len(names))
    rows = step_speed.bench_step(step_speed.GEOMETRIES[model], names, density=_density(density), device=device,
                                 dtype="bf16" if device.startswith("cuda") else "fp32", seconds=SECONDS,
                                 on_row=lambda _row: job.tell(done=job.progress.done + 1))
    return step_speed.COLUMNS, [row.cells() for row in rows], step_speed.note(rows)


def _density(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise UserError(f"density={str(value)[:40]!r} is not allowed; use a number in (0, 1]")
    return float(value)
