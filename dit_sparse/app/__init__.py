"""The demo: a page on this machine's own address to make clips, look into their attention, and measure speed.

    python app.py            # or: dit-sparse app

`build()` gives the page as `gr.Blocks`, `main()` reads the command line and serves it. Needs Gradio
(`pip install '.[app]'`); nothing else of the package does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["build", "main"]


def build(models: Sequence[str] = ("embedded",), device: str | None = None) -> gr.Blocks:
    """The page; see `page.build`."""
    from .page import build as build_page

    return build_page(models, device)


def main(arguments: Sequence[str] | None = None) -> Any:
    """Serve the page until interrupted; see `serve.main`."""
    from .serve import main as serve

    return serve(arguments)
