"""The chat page: a conversation for every tab, kept over a reload; for eyes, for ears and for keyboards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from instructft import cli
from instructft.inference.web.answers import Settings, Turn, reply
from instructft.inference.web.page import build, told_apart
from instructft.inference.web.server import free_port, start
from tests.helpers.browser import ROOT, Watched, browser
from tests.helpers.inference import EVIL, Scripted


def test_the_model_reads_its_own_turns_not_what_the_page_shows(scripted: Scripted) -> None:
    """Retry, undo and an interrupted question shorten or lengthen the page's history; the exact turns follow."""

    def asked_with(message: str, history: list[str], turns: list[Turn]) -> list[Turn]:
        said = [{"role": "user" if i % 2 == 0 else "assistant", "content": one} for i, one in enumerate(history)]
        before, question = told_apart(message, said, turns)
        return [*before, list(reply(scripted, before, question, Settings(max_new_tokens=32)))[-1]]

    scripted.pieces = ["<b>\x07  x"]
    turns = asked_with("  a\n    b  ", [], [])
    turns = asked_with("Two", ["a\nb", "&lt;b>\\x07 x"], turns)
    assert [m["content"] for m in scripted.asked[-1]] == ["a\n    b", "<b>\x07  x", "Two"]
    assert [t.question for t in turns] == ["a\n    b", "Two"]
    again = asked_with("Two", ["a\nb", "shown"], turns)  # retry
    assert again == turns
    assert asked_with("a\nb", [], turns)[0].question == "a\n    b"  # as it was written, after an undo too
    assert [t.question for t in asked_with("New", [], turns)] == ["New"]
    late = asked_with("Three", ["a", "shown", "Two", "shown", "stopped in the queue"], turns)
    assert [t.question for t in late] == ["a\n    b", "Two", "", "Three"]
    assert [m["content"] for m in scripted.asked[-1]][::2] == ["a\n    b", "Two", "Three"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["instructft", "ui", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command(monkeypatch, str(tmp_path)) == 2
    assert "pip install 'instructft[ui]'" in capsys.readouterr().err


def test_usage_errors_come_before_any_weight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="no gradio: make venv installs it")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for arguments, said in (
        (["./nowhere"], "there is no model folder ./nowhere"),
        ([str(tmp_path), "--temperature", "11"], "temperature: found 11.0"),
        ([str(tmp_path), "--base", "start"], "needs a run folder"),
    ):
        assert command(monkeypatch, *arguments) == 2
        assert said in capsys.readouterr().err


def test_in_a_browser(served: str, scripted: Scripted) -> None:
    scripted.pieces, scripted.context = ["First ", "second ", "third."], 4096
    scripted.go = threading.Semaphore(0)
    with browser() as chromium:
        one, two = Watched(chromium), Watched(chromium, 380, 800, "dark")
        for seen in (one, two):
            seen.page.goto(served)
            seen.page.wait_for_selector("#box textarea")
            assert "gpt2, 0.1 million weights · template: instruction · cpu, float32" in seen.page.inner_text("#head")
            assert EVIL.replace("\x1b", "\\x1b") in seen.page.inner_text("#head")
        one.page.fill("#box textarea", "Tell me")
        one.page.press("#box textarea", "Enter")
        scripted.go.release()
        one.page.wait_for_selector("#chat >> text=First")
        assert "second" not in one.page.inner_text("#chat")  # it is streamed
        two.page.click("text=A sample to try")
        two.page.wait_for_selector("text=queue:")  # one answer at a time
        one.page.click("button.stop-button")
        scripted.pieces = [EVIL, " end"]
        scripted.go.release(9)
        two.page.wait_for_selector("#chat >> text=end")
        one.page.wait_for_selector("button.submit-button")
        for seen in (one, two):
            assert not seen.scrolls_sideways
        assert scripted.most_at_once == 1
        first, second = one.page.inner_text("#chat"), two.page.inner_text("#chat")
        assert "First" in first
        assert "third" not in first
        assert "A sample to try" in second
        assert EVIL.replace("\x1b", "\\x1b").replace("**b**", "b") in second  # Markdown, but no markup and no picture
        assert "Tell me" not in second
        scripted.pieces = ["Another one"]
        one.page.click("button[title=Retry], button[aria-label=Retry]")
        one.page.wait_for_selector("#chat >> text=Another one")
        assert [m["content"] for m in scripted.asked[-1]] == ["Tell me"]
        one.page.wait_for_selector("button.submit-button")
        one.page.click("button[title=Undo], button[aria-label=Undo]")
        one.page.wait_for_function("!document.querySelector('#chat').innerText.includes('Another')")
        assert one.page.input_value("#box textarea") == "Tell me"
        scripted.go = threading.Semaphore(1)
        scripted.pieces = ["Not", "for", "anybody"]
        two.page.fill("#box textarea", "Never mind")
        two.page.press("#box textarea", "Enter")
        two.page.wait_for_selector("#chat >> text=Not")
        two.page.close()  # the tab
        threading.Event().wait(0.5)
        scripted.go.release()
        for _ in range(500):
            if not scripted.at_once:
                break
            threading.Event().wait(0.01)
        assert not scripted.at_once  # nothing is generated for nobody
        for seen in (one, two):
            assert len(seen.requests) > 10
            assert [u for u in seen.requests if not u.startswith((served, "data:", "blob:" + served))] == []
            assert [c for c in seen.complaints if "favicon" not in c] == []


@pytest.fixture
def compared(scripted: Scripted) -> Iterator[tuple[str, Scripted]]:
    """A page with a model to compare with: its address, and that model."""
    pytest.importorskip("gradio", reason="no gradio: make venv installs it")
    other = Scripted(scripted.model, scripted.tokenizer)
    other.pieces = ["From the", " base."]

    class Reference:
        base = "start"

        @contextmanager
        def answering(self) -> Iterator[Scripted]:
            yield other

    page: Any = build(scripted, "runs/one", Settings(), Reference(), ["A sample", "Another"])  # type: ignore[arg-type]
    url = start(page, free_port(None))
    try:
        yield url, other
    finally:
        page.close(verbose=False)


def answered(page: Any, text: str, times: int = 1) -> None:
    """Wait for an answer, and until another question can be asked."""
    page.wait_for_function(
        "([text, times]) => [...document.querySelectorAll('#chat [data-testid=bot]')]"
        ".filter((one) => one.innerText.includes(text)).length === times",
        arg=[text, times],
    )
    page.wait_for_selector("button.submit-button")


def kept(page: Any, turns: int) -> None:
    page.wait_for_function(
        "(turns) => (JSON.parse(sessionStorage.getItem('instructft runs/one')) ?? {turns: []}).turns.length === turns",
        arg=turns,
    )


def test_a_conversation_by_keyboard_alone_kept_over_a_reload_and_saved(
    compared: tuple[str, Scripted], scripted: Scripted, tmp_path: Path
) -> None:
    url, other = compared

    def tab_to(name: str) -> None:
        """Press Tab until what has the focus is called that; no mouse is needed to get there."""
        for _ in range(60):
            page.keyboard.press("Tab")
            called = page.evaluate(
                "(({ariaLabel, innerText, tagName}) => [tagName, ariaLabel || innerText])(document.activeElement)"
            )
            if called[0] == "BUTTON" and name in called[1]:
                return
        raise AssertionError(f"Tab does not reach {name}")

    with browser() as chromium:
        seen = Watched(chromium)
        page = seen.page
        page.goto(url)
        page.wait_for_selector("#box textarea")
        tab_to("A sample")
        page.keyboard.press("Enter")
        answered(page, "Hello there.")
        page.focus("#box textarea")
        page.keyboard.type("More <b>")
        page.keyboard.press("Enter")
        answered(page, "Hello there.", 2)
        tab_to("Settings")
        page.keyboard.press("Enter")
        page.focus("#compare input")
        page.keyboard.press("Space")
        page.wait_for_selector("#beside", state="visible")
        tab_to("Retry")
        scripted.pieces = ["Again."]
        page.keyboard.press("Enter")
        answered(page, "Again.")
        page.wait_for_selector("#base >> text=From the base.")
        assert [m["content"] for m in other.asked[-1]] == ["A sample", "Hello there.", "More <b>"]
        page.wait_for_function("sessionStorage.getItem('instructft runs/one').includes('From the base.')")
        seen.reload()
        answered(page, "Again.")
        page.wait_for_selector("#base >> text=From the base.")  # what it was compared with comes back too
        page.focus("#box textarea")
        page.keyboard.type("Third")
        page.keyboard.press("Enter")
        answered(page, "Again.", 2)
        assert [m["content"] for m in scripted.asked[-1]] == ["A sample", "Hello there.", "More <b>", "Again.", "Third"]
        assert [m["content"] for m in other.asked[-1]][2:] == ["More <b>", "From the base.", "Third"]
        kept(page, 3)
        tab_to("Undo")
        page.keyboard.press("Enter")
        kept(page, 2)
        page.wait_for_function("!document.querySelector('#base').innerText.includes('Third')")
        tab_to("Save as JSONL")
        with page.expect_download() as download:
            page.keyboard.press("Enter")
        download.value.save_as(tmp_path / "saved.jsonl")
        (line,) = (tmp_path / "saved.jsonl").read_text(encoding="utf-8").splitlines()
        assert [m["content"] for m in json.loads(line)["messages"]] == [
            "A sample",
            "Hello there.",
            "More <b>",
            "Again.",
        ]
        other_tab = page.context.new_page()
        other_tab.goto(url)
        other_tab.wait_for_selector("text=Another")  # the samples: it has a conversation of its own
        tab_to("Clear")
        page.keyboard.press("Enter")
        kept(page, 0)
        seen.reload()
        page.wait_for_selector("text=Another")
        assert seen.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(compared: tuple[str, Scripted], scripted: Scripted, scheme: str) -> None:
    """By the rules of WCAG 2: samples, code and two models side by side, on the screens of desks and phones."""
    axe = subprocess.run(["sh", "scripts/axe.sh", "--find"], cwd=ROOT, capture_output=True, text=True)
    if axe.returncode:
        pytest.skip("no axe-core: sh scripts/axe.sh fetches it through npm")
    source = Path(axe.stdout.strip()).read_text(encoding="utf-8")
    scripted.pieces = ["Like `so`:\n\n```python\ndef f(x: int) -> str:  # a comment\n    return 'x' + str(1.5)\n```\n"]

    def serious() -> list[str]:
        page.evaluate(source)
        found = page.evaluate("axe.run()")["violations"]
        nodes = [(one["id"], one["impact"], node["html"][:200]) for one in found for node in one["nodes"]]
        return [str(one) for one in nodes if one[1] in ("serious", "critical")]

    with browser() as chromium:
        seen = Watched(chromium, 1440, 900, scheme)
        page = seen.page
        page.goto(compared[0])
        page.wait_for_selector("text=A sample")
        page.wait_for_selector("[aria-label='Prompts to begin with']")
        assert serious() == []
        page.click("#settings button")
        page.check("#compare input")
        page.fill("#box textarea", "How?")
        page.press("#box textarea", "Enter")
        page.wait_for_selector("#base >> text=From the base.")
        page.wait_for_selector("#chat .token.comment")
        page.wait_for_selector("button.submit-button")
        for width in (1440, 800, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert serious() == []
            assert not seen.scrolls_sideways
