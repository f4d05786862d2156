"""The page: a head, four tabs, the API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from ..commands.console import quiet_libraries
from .api import endpoints
from .bench_tab import bench_tab
from .generate_tab import generate_tab
from .inspect_tab import inspect_tab
from .models import Shelf
from .sessions import Sessions
from .style import CSS, theme
from .tune_tab import tune_tab

TITLE = "dit-sparse"
MOST_WAITING = 32


def build(models: Sequence[str] = ("embedded",), device: str | None = None) -> gr.Blocks:
    """The page as Gradio blocks; the first model is loaded at once.

    `launch_options()` has what `launch` needs beside a host and a port: Gradio takes the style there.

    Args:
        models: "embedded", Diffusers folders or hub ids: what visitors may choose.
        device: None takes the first CUDA device, or the CPU when there is none.

    Raises:
        UserError: a model or device that does not exist.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    quiet_libraries()
    shelf = Shelf(models, device)
    shelf.open(shelf.names[0])
    sessions = Sessions(shelf.lock)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        endpoints(shelf, sessions)  # before the page's own events, which would take their names
        gr.HTML(_head(shelf), elem_id="head")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                form = generate_tab(shelf, sessions)
            with gr.Tab("Inspect", id="inspect"):
                inspect_tab(shelf, sessions)
            with gr.Tab("Tune", id="tune"):
                tune_tab(shelf, sessions, tabs, form)
            with gr.Tab("Bench", id="bench"):
                bench_tab(shelf, sessions)
        page.unload(_leave(sessions))
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=8)
    return page


def launch_options() -> dict[str, Any]:
    """Arguments of `Blocks.launch` that belong to the page: its style, and what a visitor's browser may do.

    Nothing is uploaded (the limit of a file is one byte), shared, measured or sent elsewhere.
    """
    return {
        "theme": theme(), "css": CSS, "footer_links": ["api", "settings"], "max_file_size": 1, "share": False,
        "pwa": False, "mcp_server": False, "enable_monitoring": False, "ssr_mode": False, "strict_cors": True,
        "run_history": False,
    }


def _head(shelf: Shelf) -> str:
    return (
        f'<div class="ds ds-head"><h1>{TITLE}</h1><p>Sparse attention for diffusion transformers: what it keeps, what '
        f'it gains, what it costs.</p><span class="ds-chip" id="device">{escape(shelf.device_text())}</span>'
        f'<span class="ds-chip">{escape(", ".join(shelf.names))}</span></div>'
    )


def _leave(sessions: Sessions) -> Any:
    def leave(request: gr.Request) -> None:
        sessions.forget(request.session_hash)

    return leave
