"""A model that answers what a test tells it to, and its page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.inference import EVIL, Scripted


@pytest.fixture
def scripted(tiny_model: Any, tokenizer: Any) -> Scripted:
    return Scripted(tiny_model, tokenizer)


@pytest.fixture
def page(scripted: Scripted) -> Any:
    pytest.importorskip("gradio", reason="no gradio: make venv installs it")
    from instructft.inference.web.answers import Settings
    from instructft.inference.web.page import build

    return build(scripted, EVIL, Settings(), samples=["A sample to try"])


@pytest.fixture
def served(page: Any) -> Iterator[str]:
    from instructft.inference.web.server import free_port, start

    url = start(page, free_port(None))
    try:
        yield url
    finally:
        page.close(verbose=False)
