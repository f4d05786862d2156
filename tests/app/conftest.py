"""One page for all tests of the app, in a thread of this process, and a real browser to look at it."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser import find_browser

PROMPT = "a large red heart growing on a drifting background"
SMALL = {"width": 64, "height": 64, "frames": 5, "steps": 3}


def jobs() -> list[threading.Thread]:
    """The jobs that run or wait in this process."""
    return [thread for thread in threading.enumerate() if thread.name == "dit-sparse-job"]


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until something holds; what it gave."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def shelf() -> Any:
    """The embedded model, loaded once."""
    from dit_sparse.app.models import Shelf

    shelf = Shelf(device="cpu")
    shelf.open("embedded")
    return shelf


@pytest.fixture(scope="session")
def address(shelf: Any) -> Iterator[str]:
    """Where the page is served."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'dit-sparse[app]'")
    from dit_sparse.app import page, serve

    folder = os.environ.get("GRADIO_TEMP_DIR")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "Shelf", lambda *words: shelf)
        running = serve.serve(["embedded"], device="cpu", port=0, wait=False)
    yield running.local_url
    running.close(verbose=False)
    os.environ.pop("GRADIO_TEMP_DIR") if folder is None else os.environ.update(GRADIO_TEMP_DIR=folder)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = find_browser()
    with sync_api.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def visit(chromium: Any, address: str) -> Iterator[Callable[..., Any]]:
    """visit(**context) opens the page as a new visitor; its page has `seen`, the addresses asked for, and `said`."""
    contexts = []

    def open_page(**context: Any) -> Any:
        contexts.append(chromium.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.seen, page.said = [], []
        page.on("request", lambda request: page.seen.append(request.url))
        page.on("console", lambda line: page.said.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#generate-options")
        return page

    yield open_page
    for context in contexts:
        context.close()
    until(lambda: not jobs())


def fill(page: Any, tab: str = "generate", **values: Any) -> None:
    """Type numbers and the prompt into a tab's fields."""
    for name, value in values.items():
        page.fill(f"#{tab}-{name} {'textarea' if name == 'prompt' else 'input'}", str(value))


def generate(page: Any, **values: Any) -> str:
    """Fill in a small request, run it, and wait; the text of the result."""
    fill(page, **{**SMALL, **values})
    page.click("#generate-run")
    page.wait_for_selector("#generate-result [data-state=done]")
    return page.inner_text("#generate-result")
