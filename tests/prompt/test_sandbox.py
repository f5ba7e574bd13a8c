"""Chat templates from elsewhere: one that does not end, or fills the memory, is refused and takes nothing with it."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest

from instructft.errors import TemplateError
from instructft.prompt import render, sandbox
from instructft.prompt.loss_mask import Encoder
from instructft.prompt.sandbox import at_most, breaks
from instructft.prompt.templates import BOS, TEMPLATES, is_built_in

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

USER = [{"role": "user", "content": "Hi"}]
WELL = "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set x = 'a' * 4000000000 %}"


@pytest.fixture
def given(bare_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a tokenizer a template, and trials a second."""
    monkeypatch.setattr(render, "breaks", lambda work: sandbox.breaks(work, seconds=1))
    monkeypatch.setattr(render, "SECONDS", 0.5)

    def give(template: str) -> Any:
        tokenizer = bare_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    return give


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (ENDLESS + WELL, "ran for more than 1 s"),
        (HUGE + WELL, "took more than 1024 MiB of memory"),
        ("{{ 'a' * 4000000000 }}" + WELL, "took more than 1024 MiB of memory"),  # Jinja computes it to compile it
        ("{% if messages|length > 20 %}" + ENDLESS + "{% endif %}" + WELL, "ran for more than 1 s"),
    ],
)
def test_a_bomb_is_refused(given: Any, template: str, says: str) -> None:
    with pytest.raises(TemplateError, match=f"the chat template {says} on a conversation of a few turns"):
        Encoder(given(template))


def test_one_that_goes_off_later_is_stopped(given: Any) -> None:
    encoder = Encoder(given("{% if messages[0]['content'] == 'Hi' %}" + ENDLESS + "{% endif %}" + WELL))
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(TemplateError, match="does not come to an end on these messages"):
        encoder.render([USER], True)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert encoder.render([[{"role": "user", "content": "Ho"}]], True) == ["Ho"]


def test_what_refuses_some_conversations_is_used(given: Any) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WELL
    assert Encoder(given(strict)).render([USER], True) == ["Hi"]


def test_our_own_templates_are_not_tried(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(work: Any) -> str:
        raise AssertionError

    monkeypatch.setattr(render, "breaks", never)
    for template in TEMPLATES.values():
        assert is_built_in(template.text())
        assert is_built_in(BOS + template.text())
    assert not is_built_in(WELL)
    Encoder(given(TEMPLATES["instruction"].text()))


def test_the_child_leaves_nothing_behind() -> None:
    assert breaks(lambda: None) == ""
    assert breaks(lambda: 1 / 0) == ""  # its own errors are for the caller
    assert breaks(lambda: time.sleep(1.2), seconds=1) == ""  # time of the processor counts
    assert breaks(lambda: os.kill(os.getpid(), signal.SIGTERM)) == ""


def test_a_timer_of_somebody_else_is_left_alone() -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000)
    try:
        with at_most(0.01):
            assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
