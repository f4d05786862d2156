"""The Inspect tab: one dense run looked into, then any step, layer, head and query of it without the model."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from ..commands.console import UserError
from ..eval.attention import NAMES
from . import maps, wanted, words
from .capture import Moment, Recording, View, record
from .fields import ShapeForm, method_form, shape_form
from .generate_tab import BUSY, CANCELLED, FREE, connect_stop, queued
from .job import Cancelled, Job, Progress
from .models import Shelf
from .preview import Strip
from .sessions import Sessions
from .work import arguments, forget_run

EMPTY = "Record a run: it is made dense, and both methods are laid beside every attention call. Then look around."
MASKS = [("A and B", "ab"), ("A", "a"), ("B", "b"), ("none", "none")]
GONE = "The recording is gone; record again."
# A click on the sheet of frames tells where, in shares of its sides.
PICK = """element.addEventListener('click', e => { const image = e.target.closest('img'); if (!image) return;
const box = image.getBoundingClientRect();
trigger('click', {x: (e.clientX - box.left) / box.width, y: (e.clientY - box.top) / box.height}); });"""


def inspect_tab(shelf: Shelf, sessions: Sessions) -> None:
    """Draw the tab and connect its events."""
    from .. import SparseProc

    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            shape = shape_form(shelf, "inspect", "Record a run", steps=8, guidance_scale=1.0)
            first = method_form("Method A", SparseProc.default_method, "inspect-a")
            second = method_form("Method B", "rainfusion2", "inspect-b")
        with gr.Column(scale=7, min_width=300):
            state = gr.HTML(words.card(EMPTY, "ds-empty"), elem_id="inspect-state", label="Progress")
            with gr.Column(visible=False, elem_id="inspect-view") as view:
                with gr.Row():
                    step = gr.Dropdown([], label="Step", elem_id="inspect-step", min_width=80)
                    layer = gr.Dropdown([], label="Layer", elem_id="inspect-layer", min_width=80)
                    head = gr.Dropdown([], label="Head", elem_id="inspect-head", min_width=80)
                    mask = gr.Dropdown(MASKS, value="ab", label="Masks", elem_id="inspect-mask", min_width=80)
                look = gr.HTML("", elem_id="inspect-look", label="Attention map")
                with gr.Row():
                    frame = gr.Slider(0, 1, value=0, step=1, label="Query: frame", elem_id="inspect-frame")
                    row = gr.Slider(0, 1, value=0, step=1, label="row", elem_id="inspect-row")
                    column = gr.Slider(0, 1, value=0, step=1, label="column", elem_id="inspect-column")
                query = gr.HTML("", elem_id="inspect-query", js_on_load=PICK, label="Attention of one query")
    run, stop = shape.run, shape.stop
    choices, place = [step, layer, head, mask], [frame, row, column]
    inputs = [*shape.inputs, first.method, first.options, second.method, second.options]
    event = queued(run, recorder(shelf, sessions, shape), inputs,
                   [state, run, stop, view, *choices, *place, look, query])
    connect_stop(stop, sessions, event, [state, run, stop])
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private",
                             "trigger_mode": "always_last"}
    gr.on([c.input for c in choices], shower(sessions), [*choices, *place], [look, query], **quick)
    gr.on([c.input for c in place], pointer(sessions), [*choices, *place], query, **quick)
    query.click(picker(sessions), choices, [*place, query], **quick)


def recorder(shelf: Shelf, sessions: Sessions, shape: ShapeForm) -> Any:
    """The function behind the button; yields (state, buttons, view, choices, places, look, query)."""
    same = (gr.skip(),) * 9

    def record_run(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        count = len(shape.inputs)
        try:
            work = recording_work(shelf, shape.read(values[:count]), values[count : count + 2], values[count + 2 :])
            yield words.progress_card(Progress()), *BUSY, gr.Column(visible=False), *same
            for found in sessions.follow(request.session_hash, work):
                if isinstance(found, Progress):
                    yield words.progress_card(found), *BUSY, gr.skip(), *same
                else:
                    sessions.keep(request.session_hash, found)
                    yield words.card(described(found)), *FREE, gr.Column(visible=True), *first_look(found)
        except UserError as error:
            yield words.refusal(str(error)), *FREE, gr.skip(), *same
        except Cancelled:
            yield words.card(CANCELLED, "ds-empty"), *FREE, gr.skip(), *same

    return record_run


def recording_work(shelf: Shelf, shape: dict[str, Any], *methods: tuple[str, dict[str, Any]]) -> Any:
    """What a job does to record: work(job) returns a Recording.

    Args:
        shelf: the models.
        shape: arguments of `wanted.check`.
        methods: name and options of each, at most two.

    Raises:
        UserError: a wrong request.
    """
    # Of the layers none is kept dense: each can be looked at.
    asked = [wanted.check(shelf, **shape, mode="dense", method=name, options=options, shared={"dense_layers": 0})
             for name, options in methods]
    procs = {f"{letter}: {one.proc.method.name}": one.proc for letter, one in zip("AB", asked, strict=False)}

    def work(job: Job) -> Recording:
        from .. import disable

        pipe = shelf.open(asked[0].model)
        preview = shelf.preview(asked[0].model)
        job.tell(steps=asked[0].shape.steps or 0)
        try:
            with job.watching(pipe), job.part("recording", Strip(preview) if preview is not None else None):
                found, _ = record(pipe, asked[0].prompt, procs, seed=asked[0].seed,
                                  shape=arguments(pipe, asked[0], job))
        finally:
            disable(pipe)
            forget_run(pipe)
        if not found.moments or found.pictures is None:
            raise UserError(f"{type(pipe).__name__}: no attention call with a known grid to look at")
        return found

    return work


def described(recording: Recording) -> str:
    """One line on what was kept."""
    detail = recording.detail
    assert detail is not None
    return (f"Kept: steps {_listed(detail.steps)} of {recording.num_steps}, {len(detail.layers)} layers, "
            f"{len(detail.heads)} heads, {len(detail.queries)} queries over {detail.keys[0]}x{detail.keys[1]}x"
            f"{detail.keys[2]} keys; {recording.nbytes / 2**20:.0f} MiB.")


def first_look(recording: Recording) -> tuple[Any, ...]:
    """The choices and places of a new recording, and its first pictures."""
    detail, grid = recording.detail, recording.grid
    assert detail is not None and grid is not None
    step, layer, head = detail.steps[-1], detail.layers[len(detail.layers) // 2], detail.heads[0]
    place = detail.queries[len(detail.queries) // 2]
    options = [gr.Dropdown(list(values), value=value)
               for values, value in zip((detail.steps, detail.layers, detail.heads), (step, layer, head), strict=True)]
    sliders = [gr.Slider(0, max(length - 1, 1), value=at, step=1)
               for length, at in zip((grid.frames, grid.height, grid.width), place, strict=True)]
    look, query = look_at(recording, step, layer, head, "ab"), query_at(recording, step, layer, head, "ab", *place)
    return *options, gr.Dropdown(value="ab"), *sliders, look, query


def shower(sessions: Sessions) -> Any:
    """Another step, layer, head or mask."""

    def show(step: Any, layer: Any, head: Any, mask: Any, frame: Any, row: Any, column: Any, request: gr.Request
             ) -> tuple[str, str]:
        recording = sessions.recording(request.session_hash)
        if recording is None:
            return words.refusal(GONE), ""
        return (look_at(recording, step, layer, head, mask),
                query_at(recording, step, layer, head, mask, frame, row, column))

    return show


def pointer(sessions: Sessions) -> Any:
    """Another query, by its sliders."""

    def point(step: Any, layer: Any, head: Any, mask: Any, frame: Any, row: Any, column: Any, request: gr.Request
              ) -> str:
        recording = sessions.recording(request.session_hash)
        return words.refusal(GONE) if recording is None else query_at(recording, step, layer, head, mask, frame, row,
                                                                      column)

    return point


def picker(sessions: Sessions) -> Any:
    """Another query, by a click on the frames."""

    def pick(step: Any, layer: Any, head: Any, mask: Any, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        recording = sessions.recording(request.session_hash)
        if recording is None:
            return *(gr.skip(),) * 3, words.refusal(GONE)
        x, y = (getattr(event, name, None) for name in ("x", "y"))
        if not isinstance(x, (int, float)) or not isinstance(y, (int, float)):
            return (gr.skip(),) * 4
        token = maps.token_at(recording, x, y)
        if token is None:
            return (gr.skip(),) * 4
        assert recording.detail is not None
        place = recording.detail.queries[maps.query_index(recording.detail, *token)]
        return *place, query_at(recording, step, layer, head, mask, *place)

    return pick


Views = list[tuple[str, View | None]]  # by label; a None is the bare map


def chosen(recording: Recording, step: Any, layer: Any, head: Any, mask: Any) -> tuple[Moment, int, Views] | None:
    """The kept call, the place of the head in it and the masks to show; None for what was not kept."""
    detail = recording.detail
    moment = recording.moments.get((step, layer)) if isinstance(step, int) and isinstance(layer, int) else None
    if detail is None or moment is None or head not in detail.heads:
        return None
    views: Views = [(label, moment.views[label]) for letter, label in zip("ab", recording.labels, strict=False)
                    if isinstance(mask, str) and mask != "none" and letter in mask]
    return moment, detail.heads.index(head), views or [("dense", None)]


def look_at(recording: Recording, step: Any, layer: Any, head: Any, mask: Any) -> str:
    """The map of a head with masks on it, the masks by blocks, the mass between frames, and both methods' numbers."""
    found = chosen(recording, step, layer, head, mask)
    if found is None:
        return words.refusal("this call was not kept; choose another")
    moment, place, views = found
    panels = "".join(_panel(recording, moment, place, label, view) for label, view in views)
    frames = {f"from frame {i}": dict(enumerate(line)) for i, line in enumerate(moment.frames[place].tolist())}
    return (
        f'<div class="ds"><div class="ds-card">{numbers(recording, moment, place)}'
        f"<h3>Attention of head {head} in layer {layer} at step {step}</h3>"
        f'<div class="ds-maps">{panels}</div>'
        '<p class="faint">Queries down, keys across, frame by frame; brighter is more attention.'
        '<span class="ds-key" style="background:#1a8c96"></span>kept'
        '<span class="ds-key" style="background:#aa3030"></span>lost: attention that the mask drops. '
        "Small picture: the mask by blocks in its own order, blue whole, orange tested pair by pair.</p>"
        + words.heat("Mass between frames, dense", frames, "to frame", "mass") + "</div></div>"
    )


def _panel(recording: Recording, moment: Moment, head: int, label: str, view: View | None) -> str:
    picture = maps.address(maps.attention_map(recording, moment, head, view))
    blocks = maps.block_picture(view, head) if view is not None else None
    beside = f'<img class="ds-blocks" alt="Mask of {escape(label)} by blocks" src="{maps.address(blocks)}">' if (
        blocks is not None) else ""
    reason = f" no mask: {escape(view.reason)}" if view is not None and view.kept is None else ""
    return (f'<figure><img alt="Attention map, {escape(label)}" src="{picture}">{beside}'
            f"<figcaption><b>{escape(label)}</b>{reason}</figcaption></figure>")


def query_at(recording: Recording, step: Any, layer: Any, head: Any, mask: Any, frame: Any, row: Any, column: Any
             ) -> str:
    """The map of the query nearest to a token, laid over the frames, once for each mask."""
    found = chosen(recording, step, layer, head, mask)
    if found is None or not all(isinstance(n, (int, float)) for n in (frame, row, column)):
        return ""
    moment, place, views = found
    assert recording.detail is not None
    query = maps.query_index(recording.detail, int(frame), row, column)
    at = recording.detail.queries[query]
    text = f"What the token in frame {at[0]}, row {at[1]}, column {at[2]} looks at"
    sheets = []
    for label, view in views:
        picture = maps.address(maps.query_over_frames(recording, moment, place, query, view))
        kept = "" if view is None or view.mass is None else f", keeps {float(view.mass[place, query]):.0%} of it"
        sheets.append(f'<figure><img alt="{escape(text)}, {escape(label)}" src="{picture}">'
                      f"<figcaption><b>{escape(label)}</b>{kept}</figcaption></figure>")
    return (f'<div class="ds ds-pick"><div class="ds-card"><h3>{escape(text)} (ringed)</h3>{"".join(sheets)}'
            '<p class="faint">Click a place in a frame to look from there, or use the sliders.</p></div></div>')


def numbers(recording: Recording, moment: Moment, head: int) -> str:
    """Recall, error and the like of both methods, of this head and over the kept heads."""
    rows = []
    for label in recording.labels:
        view = moment.views[label]
        if view.numbers is None:
            rows.append([label, "-", "-", "-", "-", view.reason])
            continue
        one = dict(zip(NAMES, view.numbers[:, head].tolist(), strict=True))
        mean = dict(zip(NAMES, view.numbers.mean(1).tolist(), strict=True))
        rows.append([label, f"{one['density']:.3f}", f"{one['recall']:.3f}", f"{one['relative_error']:.3f}",
                     f"{one['cosine']:.4f}", f"all heads: recall {mean['recall']:.3f}, error "
                     f"{mean['relative_error']:.3f}; {view.operator}"])
    return words.table(["method", "density", "recall", "error", "cosine", ""], rows)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
