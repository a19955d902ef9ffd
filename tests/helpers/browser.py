"""A headless Chromium for the tests of web pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect, sync_playwright


@contextmanager
def browser_page(width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Yield a page of Debian's Chromium; a test without it is skipped, with what to install."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium (make browser)")
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        # Root has no sandbox.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()
