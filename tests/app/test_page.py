"""The page in a real browser: clips, comparison, a stop, wrong input, two visitors, a reload, looks, no network."""

import base64
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import PROMPT, fill, generate, jobs, until

LONG = {"width": 256, "height": 256, "frames": 17, "steps": 40}
# Buttons and fields that nothing names, and texts of too little contrast (WCAG 2: 4.5 to 1).
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, video, img, [role=slider]')]
  .filter(e => e.offsetParent !== null && !(e.labels && e.labels.length) && !e.getAttribute('aria-label')
    && !e.getAttribute('aria-labelledby') && !e.innerText.trim() && !e.title && !e.alt && !e.closest('label'))
  .map(e => e.outerHTML.slice(0, 200))"""
CONTRAST = """selectors => { const rgb = s => (s.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055)
    ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const back = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > .9) return c; } return [255, 255, 255]; };
  return selectors.map(s => { const e = document.querySelector(s);
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x);
    return [s, (a + .05) / (b + .05)]; }); }"""


def decoded(link: str) -> bytes:
    return base64.b64decode(link.partition(",")[2])


def test_compare(visit: Any, tmp_path: Path) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    page.click("#generate-options > button")
    page.fill("#generate-auto-rows input", "17")
    page.fill("#generate-auto-max_error input[type=number]", "0.4")
    text = generate(page, prompt=PROMPT, seed=7)
    for words in ("PSNR", "SSIM", "speed-up", "Density by layer and step", "No call fell back", "seed 7", "rows=17",
                  "max_error=0.4"):
        assert words in text, words
    # Three clips that play, and as many heat cells as layers and steps.
    page.wait_for_function("() => [...document.querySelectorAll('#generate-result video')].length === 3 &&"
                           "[...document.querySelectorAll('#generate-result video')].every(v => v.videoWidth === 64)")
    assert page.locator("#generate-result svg rect.heat").count() == 8 * 3
    # One button for all of them.
    page.click("#generate-result .ds-play")
    page.wait_for_function("() => [...document.querySelectorAll('#generate-result video')].every(v => v.paused)")
    links = page.locator("#generate-result a[download]")
    names = [links.nth(i).get_attribute("download") for i in range(2)]
    assert names == ["dit-sparse-sparse-7.mp4", "dit-sparse-sparse-7.json"]
    clip = tmp_path / "clip.mp4"
    with page.expect_download() as download:
        links.first.click()
    download.value.save_as(clip)
    from dit_sparse.pipelines.video_io import read_video

    assert read_video(clip).shape == (5, 3, 64, 64)
    settings = json.loads(decoded(links.nth(1).get_attribute("href")))
    assert (settings["options"]["rows"], settings["options"]["max_error"], settings["steps"]) == (17, 0.4, 3)
    assert not page.said


def test_another_method_has_its_own_options(visit: Any) -> None:
    page = visit()
    page.get_by_role("button", name="a large purple circle shrinking").click()
    page.wait_for_function("() => document.querySelector('#generate-prompt textarea').value.includes('purple')")
    page.click("#generate-method input")
    page.get_by_role("option", name="radial", exact=False).first.click()
    page.wait_for_selector("#generate-radial-decay", state="attached")
    assert page.locator("#generate-auto-rows").count() == 0
    page.click("#generate-mode label:has-text('Sparse only')")
    text = generate(page)
    assert "SparseProc('radial'" in text and "PSNR" not in text and "a large purple circle" in text
    assert page.locator("#generate-result video").count() == 1


def test_wrong_input_says_what_is_allowed(visit: Any) -> None:
    page = visit()
    for values, words in (
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": PROMPT, "width": 250}, "not a multiple of 16; use 240 or 256"),
        ({"width": 100_000}, "use a number from 32 to 2048"),
        ({"width": 64, "steps": 0}, "use a number from 1 to 200"),
        ({"steps": 2, "seed": -1}, "seed: -1 is not allowed"),
    ):
        fill(page, **values)
        page.click("#generate-run")
        page.wait_for_selector(f"#generate-state [role=alert]:has-text('{words}')")
        page.wait_for_selector("#generate-run:enabled")
    assert not jobs()
    assert "SSIM" in generate(page, seed=0)


def test_cancel_stops_the_run(visit: Any) -> None:
    page = visit()
    fill(page, **LONG)
    page.click("#generate-run")
    page.wait_for_selector("#generate-state [role=progressbar]")
    page.wait_for_selector("#generate-state :text('step 0 of 80')")
    assert len(jobs()) == 1
    page.click("#generate-stop")
    page.wait_for_selector("#generate-state :text('Cancelled')")
    until(lambda: not jobs(), 5)
    page.wait_for_selector("#generate-run:enabled")
    assert "SSIM" in generate(page)


def test_reload_in_the_middle(visit: Any) -> None:
    page = visit()
    fill(page, **LONG)
    page.click("#generate-run")
    page.wait_for_selector("#generate-state [role=progressbar]")
    until(jobs)
    page.reload()
    page.wait_for_selector("#generate-options")
    until(lambda: not jobs())  # who has left does not keep the device busy
    assert "The clip appears here" in page.inner_text("#generate-state")
    assert "SSIM" in generate(page)


def test_two_visitors_at_once(visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.app import generate_tab

    running, most, guard, real = [0], [0], threading.Lock(), generate_tab.make

    def counted(*words: Any) -> Any:
        with guard:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return real(*words)
        finally:
            with guard:
                running[0] -= 1

    monkeypatch.setattr(generate_tab, "make", counted)
    pages = [visit(), visit()]
    for seed, page in enumerate(pages, 11):
        fill(page, width=64, height=64, frames=5, steps=6, seed=seed)
        page.click("#generate-run")
    for seed, page in enumerate(pages, 11):
        page.wait_for_selector("#generate-result [data-state=done]")
        text = page.inner_text("#generate-result")
        assert f"seed {seed}" in text and "SSIM" in text
    assert most[0] == 1


def test_cancel_in_the_queue(visit: Any) -> None:
    first, second = visit(), visit()
    for page in (first, second):
        fill(page, **LONG)
        page.click("#generate-run")
        page.wait_for_selector("#generate-stop:enabled")
    second.wait_for_selector("#generate-state :text('queue:')")
    second.click("#generate-stop")
    second.wait_for_selector("#generate-state :text('Cancelled')")
    assert len(jobs()) == 1
    first.click("#generate-stop")
    until(lambda: not jobs())
    assert "SSIM" in generate(first)
    assert "Cancelled" in second.inner_text("#generate-state") and not jobs()


def test_inspect(visit: Any) -> None:
    page = visit(viewport={"width": 1280, "height": 1000})
    page.get_by_role("tab", name="Inspect").click()
    page.wait_for_selector("#inspect-b-options")
    fill(page, "inspect", width=64, height=64, frames=5, steps=3)
    page.click("#inspect-run")
    page.wait_for_selector("#inspect-query img")
    text = page.inner_text("#inspect-look")
    for words in ("A: auto", "B: rainfusion2", "recall", "error", "Mass between frames", "layer 4 at step 2"):
        assert words in text, words
    assert page.locator("#inspect-look .ds-maps figure").count() == 2
    assert page.locator("#inspect-look svg rect.heat").count() == 3 * 3
    # Another layer, without the model: no job is started.
    started = []
    page.on("request", lambda request: started.extend(jobs()))
    page.click("#inspect-layer input")
    page.get_by_role("option", name="7", exact=True).click()
    page.wait_for_selector("#inspect-look :text('layer 7 at step 2')")
    # A click on the top left corner of the last frame.
    image = page.locator("#inspect-query img").first
    box = image.bounding_box()
    image.click(position={"x": box["width"] * 0.7, "y": box["height"] * 0.1})
    page.wait_for_selector("#inspect-query :text('frame 2, row 0, column 0')")
    assert page.input_value("#inspect-frame input[type=number]") == "2"
    # The same by keyboard.
    page.focus("#inspect-row input[type=range]")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#inspect-query :text('frame 2, row 1, column 0')")
    assert not started and not page.said


def test_bench_says_why_it_is_not_there(visit: Any) -> None:
    page = visit()
    page.get_by_role("tab", name="Bench").click()
    assert "Bench needs a GPU, and this page runs on cpu" in page.inner_text("#bench-none")


def test_nothing_comes_from_elsewhere(visit: Any, address: str) -> None:
    page = visit()
    hosts = {urlsplit(url).netloc for url in page.seen if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).netloc}
    fonts = page.evaluate("() => getComputedStyle(document.querySelector('.gradio-container')).fontFamily")
    assert "system-ui" in fonts and not page.said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_contrast_keyboard_and_a_narrow_screen(visit: Any, scheme: str) -> None:
    page = visit(color_scheme=scheme, viewport={"width": 360, "height": 740})
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(NAMELESS) == []
    label = "#generate-prompt [data-testid=block-info]"
    places = ["#head p", "#device", "#generate-state .ds-card", "#generate-run", label]
    for place, ratio in page.evaluate(CONTRAST, places):
        assert ratio >= 4.5, (place, ratio)
    # From the prompt to the button by keyboard alone.
    fill(page, width=64, height=64, frames=1, steps=2, prompt='<b id="evil">a red heart')
    page.focus("#generate-prompt textarea")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "generate-run"
    page.keyboard.press("Enter")
    page.wait_for_selector("#generate-result [data-state=done]")
    assert page.locator("#generate-result img").count() == 3  # one frame: images
    assert page.locator("#evil").count() == 0 and '<b id="evil">' in page.inner_text("#generate-result")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(NAMELESS) == []
    page.get_by_role("tab", name="Tune").click()
    page.wait_for_selector("#tune-run")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(NAMELESS) == []
