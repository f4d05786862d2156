"""Makes the pictures of docs/app.md from a page that is being served.

    python -m tests.app.pictures [ADDRESS [generate] [inspect] [tune] [bench]]

The Bench tab is there on a GPU only; `tests/app/recorded.py` serves the page with what it showed on one. Needs
Playwright and Chromium. Each picture stays below 200 kB.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser import find_browser

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
MOST = 200_000


def save(page: Any, name: str, *, whole: bool = True) -> None:
    """A picture of the page, as a PNG of few enough colours to be small."""
    image = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    for colours in (256, 128, 64, 32):
        buffer = io.BytesIO()
        image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() < MOST:
            break
    (FOLDER / f"app-{name}.png").write_bytes(buffer.getvalue())


def generate(page: Any, steps: int) -> None:
    """The Generate tab while it runs, and with its result."""
    page.fill("#generate-steps input", str(steps))
    page.fill("#generate-guidance input", "1")
    page.click("#generate-run")
    page.wait_for_selector(f"#generate-state :text('step {steps + steps // 2} of')", timeout=300_000)
    page.wait_for_selector("#generate-state .ds-strip")
    save(page, "progress", whole=False)
    page.wait_for_selector("#generate-result [data-state=done]", timeout=300_000)
    page.wait_for_function("() => [...document.querySelectorAll('#generate-result video')].every(v => v.videoWidth)")
    page.click("#generate-result .ds-play")
    page.eval_on_selector("#generate-result .ds-seek", "e => { e.value = .8; e.dispatchEvent(new Event('input', "
                          "{bubbles: true})); }")
    page.wait_for_timeout(1000)
    save(page, "generate")


def inspect(page: Any) -> None:
    """The Inspect tab with a recording."""
    page.get_by_role("tab", name="Inspect").click()
    page.wait_for_selector("#inspect-b-options")
    page.click("#inspect-run")
    page.wait_for_selector("#inspect-query img", timeout=300_000)
    for name, value in (("layer", "3"), ("head", "1")):
        page.click(f"#inspect-{name} input")
        page.get_by_role("option", name=value, exact=True).click()
        page.wait_for_selector("[role=option]", state="detached")
    page.wait_for_selector("#inspect-look :text('head 1 in layer 3')")
    image = page.locator("#inspect-query img").first
    box = image.bounding_box()
    image.click(position={"x": box["width"] * 0.91, "y": box["height"] * 0.22})
    page.wait_for_timeout(1500)
    save(page, "inspect")


def tune(page: Any, target: float) -> None:
    """The Tune tab with a preset, quick, at the preview size with fewer steps."""
    page.get_by_role("tab", name="Tune").click()
    page.wait_for_selector("#tune-run")
    for name, value in {"steps": 10, "guidance": 1}.items():
        page.fill(f"#tune-{name} input", str(value))
    page.fill("#tune-value input", str(target))
    page.click("#tune-run")
    page.wait_for_selector("#tune-result [data-state=done]", timeout=600_000)
    page.wait_for_timeout(500)
    save(page, "tune")


def bench(page: Any) -> None:
    """The Bench tab with the times of a step."""
    page.get_by_role("tab", name="Bench").click()
    page.click("#bench-step")
    page.wait_for_selector("#bench-state table", timeout=300_000)
    page.wait_for_timeout(500)
    save(page, "bench", whole=False)


def main(address: str = "http://127.0.0.1:7860", *parts: str) -> None:
    """Make the pictures of these parts, else all."""
    from playwright.sync_api import sync_playwright

    FOLDER.mkdir(exist_ok=True)
    parts = parts or ("generate", "inspect", "tune")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        page.goto(address)
        page.wait_for_selector("#generate-options")
        if "generate" in parts:
            generate(page, 10)
        if "tune" in parts:
            tune(page, 24)
        if "bench" in parts:
            bench(page)
        dark = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="dark")
        dark.goto(address)
        dark.wait_for_selector("#generate-options")
        if "inspect" in parts:
            inspect(dark)
        if parts == ("bench",):
            browser.close()
            return
        phone = browser.new_page(viewport={"width": 380, "height": 820}, color_scheme="light")
        phone.goto(address)
        phone.wait_for_selector("#generate-options")
        save(phone, "narrow", whole=False)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
