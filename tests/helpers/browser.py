"""A real headless browser for tests of pages: Playwright drives the Chromium that `scripts/browser.sh` finds."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def browser() -> Iterator[Any]:
    """A browser that was started; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: make venv installs it")
    found = subprocess.run(["sh", "scripts/browser.sh", "--find"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no Chromium: sh scripts/browser.sh installs one")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found.stdout.strip(), args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


class Watched:
    """A page of its own context, with every request it made and every complaint of its console."""

    def __init__(self, chromium: Any, width: int = 1280, height: int = 900, scheme: str = "light"):
        context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self._asking: list[Any] = []  # requests under way
        self.page.on("request", lambda request: self._asking.append(request))
        for event in ("requestfinished", "requestfailed"):
            self.page.on(event, lambda request: self._asking.remove(request))

    def reload(self) -> None:
        """Load the page anew when all that it asked for is there: what is broken off it complains of, as it should.

        Gradio's heartbeat is a request that never ends.
        """
        for _ in range(400):
            if not [request for request in self._asking if "/heartbeat/" not in request.url]:
                break
            self.page.wait_for_timeout(50)
        else:
            raise AssertionError(f"still under way: {[request.url for request in self._asking]}")
        self.page.reload()

    @property
    def scrolls_sideways(self) -> bool:
        """Whether the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
