"""The browser that tests look at pages with."""

import shutil

import pytest


def find_browser() -> str:
    """Path of Chromium or Chrome; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs a browser: sudo apt install chromium")
    return found
