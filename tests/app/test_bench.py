"""The Bench tab as it is on a GPU: what its buttons do, with a device that says it is one."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dit_sparse.app.sessions import Sessions

gr = pytest.importorskip("gradio", reason="needs Gradio: pip install 'dit-sparse[app]'")

REQUEST = SimpleNamespace(session_hash="visitor")


@pytest.fixture
def tab(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tab's blocks, and its events by the number of their inputs: 2 for kernels, 3 for a step."""
    from dit_sparse.app.bench_tab import bench_tab

    lock = threading.Lock()
    with gr.Blocks() as page:
        bench_tab(SimpleNamespace(cuda=True, device="cpu"), Sessions(lock))
    events = {len(event.inputs): event for event in page.fns.values() if event.inputs}
    return events


def pressed(event: Any, *values: Any) -> list[Any]:
    """What an event yields for values that come from the page."""
    read = [part.preprocess(value) for part, value in zip(event.inputs, values, strict=True)]
    return list(event.fn(REQUEST, *read))


def free(state: tuple[Any, ...]) -> bool:
    """Whether the button can be pressed again, and nothing be cancelled."""
    return bool(state[1]["interactive"]) and not state[2]["interactive"]


def test_kernels_are_timed_and_shown_as_a_table(tab: Any) -> None:
    *before, last = pressed(tab[2], 512, 0.25)
    assert free(last) and not any(free(state) for state in before)
    assert "<th scope=\"col\">median ms</th>" in last[0] and "TFLOP/s count the blocks that are computed" in last[0]
    assert "<td>512</td>" in last[0] and "dense" in last[0]


def test_a_step_is_timed_for_each_method(tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.eval import step_speed

    asked: dict[str, Any] = {}

    def timed(geometry: Any, methods: list[str], **words: Any) -> list[Any]:
        asked.update(words, methods=methods, name=geometry.name)
        for row in (row_of("dense"), row_of("svg")):
            words["on_row"](row)
        return [row_of("dense"), row_of("svg")]

    def row_of(name: str) -> Any:
        return SimpleNamespace(cells=lambda: [name] * len(step_speed.COLUMNS))

    monkeypatch.setattr(step_speed, "bench_step", timed)
    monkeypatch.setattr(step_speed, "note", lambda rows: "Random weights.")
    last = pressed(tab[3], "tiny", ["svg"], 0.25)[-1]
    assert free(last) and "Random weights." in last[0] and "<td>svg</td>" in last[0]
    assert (asked["methods"], asked["name"], asked["density"]) == (["svg"], "tiny", 0.25)


@pytest.mark.parametrize(("values", "said"), [
    ((0, 0.25), "tokens=0 is not allowed; use a number from 1 to 131072"),
    ((10**6, 0.25), "tokens=1000000 is not allowed"), ((None, 0.25), "tokens=None is not allowed"),
])
def test_wrong_numbers_are_refused_and_the_buttons_come_back(tab: Any, values: Any, said: str) -> None:
    last = pressed(tab[2], *values)[-1]
    assert said in last[0] and free(last)


def test_what_the_device_cannot_do_is_said_and_the_buttons_come_back(tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.eval import step_speed

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr(step_speed, "bench_step", full)
    last = pressed(tab[3], "wan-14b-720p", ["svg"], 0.25)[-1]
    assert "the device ran out of memory" in last[0] and free(last)


def test_a_recording_is_shown_where_there_is_no_gpu(tmp_path: Path) -> None:
    from urllib.request import urlopen

    from dit_sparse.app.models import Shelf
    from tests.app.recorded import serve

    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"head": "<p>another machine</p>", "kernels": "<p>kernels</p>", "step": "<p>step</p>"}))
    folder = os.environ.get("GRADIO_TEMP_DIR")
    running = serve(file)
    try:
        config = json.loads(urlopen(running.local_url + "config").read())
        shown = {part["props"].get("elem_id"): part["props"].get("value") for part in config["components"]}
        assert shown["head"] == "<p>another machine</p>" and "bench-state" in shown
        events = {len(event.inputs): event for event in running.fns.values()
                  if [part.elem_id for part in event.outputs[:1]] == ["bench-state"] and event.inputs}
        assert [next(events[count].fn(*range(count)))[0] for count in (2, 3)] == ["<p>kernels</p>", "<p>step</p>"]
        assert not Shelf(device="cpu").cuda, "the patches end when the page is built"
    finally:
        running.close(verbose=False)
        os.environ.pop("GRADIO_TEMP_DIR") if folder is None else os.environ.update(GRADIO_TEMP_DIR=folder)
