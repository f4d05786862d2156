"""The command line of the page: which models, which device, which address."""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from types import FrameType
from typing import Any

from ..commands.console import UserError
from ..commands.run import stay_offline

HOST, PORT = "127.0.0.1", 7860
LOOPBACK = (HOST, "localhost", "::1")


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="app.py", description="A page to make clips with sparse attention.")
    add = parser.add_argument
    add("--model", action="append", metavar="ID_OR_FOLDER", help="what visitors may choose; may be repeated")
    add("--device", help="cpu, cuda, cuda:1 ...; the GPU when there is one")
    add("--host", default=HOST, help="address to listen on; 0.0.0.0: every address of this machine")
    add("--port", type=int, default=PORT, help="port; 0 takes a free one")
    add("--share", action="store_true", help="a public address as well, through Gradio's servers")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted.

    Args:
        words: without the program's name; None takes sys.argv.

    Returns:
        Exit code: 0, or 2 for wrong input (one line on standard error).
    """
    asked = arguments_of(words)
    try:
        serve(asked.model or ["embedded"], device=asked.device, host=asked.host, port=asked.port, share=asked.share)
    except UserError as error:
        print(f"dit-sparse: error: {error}", file=sys.stderr)
        return 2
    return 0


def serve(
    models: Sequence[str], *, device: str | None = None, host: str = HOST, port: int = PORT,
    share: bool = False, wait: bool = True,
) -> Any:
    """Build the page and serve it.

    Args:
        models, device: see `page.build`.
        host, port: where to listen; port 0 takes a free one.
        share: a public address as well.
        wait: return when the page is stopped; else at once.

    Returns:
        The running page; `local_url` is its address, `close()` ends it.

    Raises:
        UserError: Gradio is missing, a wrong model or device, or a port that is taken.
    """
    for model in models:
        stay_offline(model)
    if not 0 <= port <= 65535:
        raise UserError(f"--port: {port} is not allowed; use a number from 0 to 65535")
    port = open_port(host, port)
    private_folder()
    try:
        from .page import build, launch_options
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: pip install 'dit-sparse[app]'") from error
    page = build(models, device)
    if host not in LOOPBACK or share:
        print("dit-sparse: warning: everyone who reaches this address can use this machine's device", file=sys.stderr)
    options = {**launch_options(), "share": share}
    page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, show_error=False, **options)
    print(f"dit-sparse: {page.local_url}" + (f" and {page.share_url}" if share else ""), flush=True)
    if wait:
        signal.signal(signal.SIGTERM, _interrupt)
        page.block_thread()
    return page


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Being told to stop ends like Ctrl-C: the private folder is removed."""
    raise KeyboardInterrupt


def private_folder() -> str:
    """A folder that only this user reads, for whatever Gradio puts on the disk; removed at the end."""
    folder = tempfile.mkdtemp(prefix="dit-sparse-app-")
    os.environ["GRADIO_TEMP_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def open_port(host: str, port: int) -> int:
    """The port, or a free one for 0, found before a model is loaded.

    Raises:
        UserError: nothing can be served there.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        text = f"--host {host} --port {port}: {error.strerror or error}; use another port, or 0 for a free one"
        raise UserError(text) from error
