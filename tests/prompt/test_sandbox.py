"""Chat templates from elsewhere: one that does not end, or fills the memory, is refused and takes nothing with it."""

from __future__ import annotations

import copy
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

import pytest

from instructft.errors import TemplateError
from instructft.prompt import render, sandbox
from instructft.prompt.loss_mask import Encoder
from instructft.prompt.sandbox import Helper, at_most
from instructft.prompt.templates import BOS, TEMPLATES, is_built_in
from tests.helpers.telling import telling

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

USER = [{"role": "user", "content": "Hi"}]
WELL = "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set x = 'a' * 4000000000 %}"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child waits as long as a busy machine takes."""
    monkeypatch.setattr(sandbox, "_IDLE", 600)


@pytest.fixture
def given(bare_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a tokenizer a template, and trials a second."""
    monkeypatch.setattr(render, "SECONDS", 1)

    def give(template: str) -> Any:
        tokenizer = bare_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    return give


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (ENDLESS + WELL, "ran for more than 1 s"),
        pytest.param(HUGE + WELL, "took more than 1024 MiB of memory", marks=pytest.mark.battery),
        ("{{ 'a' * 4000000000 }}" + WELL, "took more than 1024 MiB of memory"),  # Jinja computes it to compile it
        # a second of the processor each
        pytest.param(
            "{% if messages|length > 20 %}" + ENDLESS + "{% endif %}" + WELL,
            "ran for more than 1 s",
            marks=pytest.mark.battery,
        ),
    ],
)
def test_a_bomb_is_refused(given: Any, template: str, says: str) -> None:
    with pytest.raises(TemplateError, match=f"the chat template {says} on a conversation of a few turns"):
        Encoder(given(template))


LATER = "{% if messages[0]['content'] == 'Hi' %}BOMB{% endif %}" + WELL
BOMBS = {
    ENDLESS: "does not come to an end",
    "{{ ('a' * messages[0]['content'] | length * 1000000000) | length }}": "fills the memory",
    "{{ ((messages | length + 9) ** (10 ** 9)) % 7 }}": "does not come to an end",  # in C, where signals wait
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "does not accept these messages: RecursionError",
    "{% include 'x' %}": "does not accept these messages: TypeError",
}


# of those that do not end, the one in C stands for the other: no signal of Python's would reach it
@pytest.mark.parametrize("bomb", telling(BOMBS, *[bomb for bomb in BOMBS if bomb != ENDLESS]))
def test_one_that_goes_off_later_is_stopped_in_any_thread(given: Any, bomb: str) -> None:
    encoder = Encoder(given(LATER.replace("BOMB", bomb)))
    said: list[str] = []

    def ask() -> None:
        try:
            encoder.render([USER], True)
        except TemplateError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)  # as the page's, where no signal arrives
    thread.start()
    thread.join()
    assert len(said) == 1
    assert "the chat template " + BOMBS[bomb] in said[0]
    assert encoder.render([[{"role": "user", "content": "Ho"}]], True) == ["Ho"]


def test_a_constant_is_not_folded_here(given: Any) -> None:
    """Jinja computes it when it compiles, whether it is ever shown or not."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert Encoder(given("{% if false %}{{ ('x' * 700000000) | length }}{% endif %}" + WELL)).render([USER]) == ["Hi"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_template_sees_what_the_tokenizer_has_now(given: Any) -> None:
    tokenizer = given("{{ eos_token }}" + WELL)
    renderer = render.Renderer(tokenizer)
    tokenizer.eos_token = "<other>"
    assert renderer.texts([USER]) == ["<other>Hi"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 10 ** 5000 }}" + WELL, "ValueError: Exceeds the limit"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{{ '%d' % 'x' }}", "TypeError"),
        ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
        ("{{ " + "(" * 600 + "1" + ")" * 600 + " }}", "RecursionError"),
    ],
)
def test_what_renders_nothing_says_why(given: Any, template: str, says: str) -> None:
    with pytest.raises(TemplateError, match="the chat template renders no conversation at all: ") as error:
        Encoder(given(template))
    assert says in str(error.value)


def test_what_refuses_some_conversations_is_used(given: Any) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WELL
    assert Encoder(given(strict)).render([USER], True) == ["Hi"]


def test_our_own_templates_have_no_helper(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "Helper", None)
    for template in TEMPLATES.values():
        assert is_built_in(template.text())
        assert is_built_in(BOS + template.text())
    assert not is_built_in(WELL)
    Encoder(given(TEMPLATES["instruction"].text()))


def test_a_helper_answers_raises_and_begins_anew() -> None:
    helper = Helper(lambda n: os._exit(n) if n > 1 else 1 // n)
    assert helper(1) == 1
    with pytest.raises(ZeroDivisionError):
        helper(0)
    with pytest.raises(ChildProcessError, match="ended with 3"):
        helper(3)
    assert helper(1) == 1
    os.kill(helper._child, signal.SIGKILL)  # while it waits
    os.waitid(os.P_PID, helper._child, os.WEXITED | os.WNOWAIT)
    assert helper(1) == 1
    assert copy.deepcopy(helper)(1) == 1


def test_a_helper_ends_with_its_owner_and_leaves_a_fork_alone() -> None:
    helper = Helper(lambda _: os.getpid())
    first = helper(None)
    assert first != os.getpid()
    if not (child := os.fork()):
        os._exit(helper(None) in (first, os.getpid()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert helper(None) == first
    del helper
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_few_helpers_wait_at_a_time() -> None:
    helpers = [Helper(lambda _: os.getpid()) for _ in range(7)]
    first = [helper(None) for helper in helpers]
    for child in first[:3]:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert [helper(None) for helper in helpers[3:]] == first[3:]
    assert helpers[0](None) not in first


def test_a_helper_that_is_asked_nothing_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds what its parent has changed since, which may be a whole model; the next question finds another one."""
    monkeypatch.setattr(sandbox, "_IDLE", 0.01)
    helper = Helper(lambda _: os.getpid())
    first = helper(None)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert helper(None) not in (first, os.getpid())


def test_a_helper_that_is_stuck_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_PATIENCE", 0.1)
    helper = Helper(lambda n: time.sleep(n) or n)
    with pytest.raises(TimeoutError):
        helper(600, seconds=1)
    monkeypatch.undo()
    assert helper(0) == 0


def test_time_of_the_processor_counts() -> None:
    assert Helper(lambda _: time.sleep(1.2))(None, seconds=1) is None


def test_a_timer_of_somebody_else_is_left_alone() -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000)
    try:
        with at_most(0.01):
            assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
