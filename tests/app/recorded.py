"""The page as it was on another machine: its Bench tab shows what was recorded there, on a machine without a GPU.

    python -m tests.app.recorded FILE [PORT]

FILE is JSON: "head", the HTML of the page's head, and "kernels" and "step", the HTML that the tab showed for its two
buttons. For pictures of the documentation: everything but these values is the page's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


def serve(file: Path, port: int = 0, *, wait: bool = False) -> Any:
    """Serve the page with a recording.

    Args:
        file: the recording.
        port: where to listen; 0 takes a free one.
        wait: return when the page is stopped; else at once.

    Returns:
        The running page; `local_url` is its address, `close()` ends it.
    """
    from dit_sparse.app import bench_tab, page
    from dit_sparse.app.generate_tab import FREE
    from dit_sparse.app.models import Shelf
    from dit_sparse.app.serve import serve as serve_page

    recorded = json.loads(file.read_text(encoding="utf-8"))

    def timer(sessions: Any, measure: Callable[..., Any]) -> Any:
        def run(*values: Any) -> Iterator[tuple[Any, ...]]:
            yield recorded["kernels" if len(values) == 2 else "step"], *FREE

        return run

    def default_models(device: str) -> list[str]:
        return ["wan-14b-720p"]

    with (mock.patch.object(Shelf, "cuda", property(lambda shelf: True)), mock.patch.object(bench_tab, "timer", timer),
          mock.patch.object(page, "_head", lambda shelf: recorded["head"]),
          mock.patch("dit_sparse.eval.step_speed.default_models", default_models)):
        return serve_page(["embedded"], device="cpu", port=port, wait=wait)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 7860, wait=True)
