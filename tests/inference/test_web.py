"""The chat page: every tab its own conversation, one answer at a time, stopped when asked to, and nobody else asked."""

from __future__ import annotations

import http.client
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import instructft
from instructft import cli
from instructft.errors import UsageError
from instructft.inference.chat import Chat, Generator, load_for_inference
from instructft.inference.reference_model import Beside
from instructft.inference.web import free_port
from instructft.inference.web_sessions import LEFT, Desk, Settings
from tests.helpers.browser import Watched, browser

EVIL = '<img src="http://evil.example/x.png"><script>alert(1)</script> ![p](http://evil.example/y.png) **b** \x1b[31m'


class Scripted(Generator):
    """Answers with the pieces it is given, each when `go` says so; keeps what it was asked."""

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__(model, tokenizer)
        self.pieces: list[str] = ["Hello", " there", "."]
        self.go: threading.Semaphore | None = None
        self.asked: list[list[Any]] = []
        self.at_once = self.most_at_once = 0

    def stream(self, messages: Any, *settings: Any) -> Iterator[str]:
        self.asked.append(list(messages))
        stopped = settings[-1]
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            for piece in self.pieces:
                while self.go is not None and not self.go.acquire(timeout=0.02):
                    if stopped.is_set():
                        return
                if stopped.is_set():
                    return
                yield piece
        finally:
            self.at_once -= 1


@pytest.fixture
def scripted(tiny_model: Any, tokenizer: Any) -> Scripted:
    return Scripted(tiny_model, tokenizer)


def ask(desk: Desk, tab: str, question: str, compare: bool = False, **settings: Any) -> Any:
    return list(desk.answer(tab, question, Settings(**settings), compare))[-1]


def texts(turns: list[Any]) -> list[str]:
    return [turn["content"] for turn in turns]


# Behind the page


def test_answers_are_those_of_chat(tiny_model: Any, tokenizer: Any) -> None:
    """Prompt ids, settings and history as `instructft chat` has them: the same words come out, turn by turn."""
    with torch.no_grad():  # so that the words differ, and do not end at once
        tiny_model.transformer.wpe.weight.mul_(50)
    generator = Generator(tiny_model, tokenizer)
    prompts: list[list[int]] = []
    desk, chat = Desk(generator), Chat(generator, system="Be brief.", max_new_tokens=6)
    for question in ("Hi", "And you?", "Bye"):
        seen = ask(desk, "a", question, system=" Be brief. ", max_new_tokens=6)
        answer = chat.send(question)
        assert texts(seen.tuned[-2:]) == [question, answer]
        prompts += generator.encoder.prompts([chat.messages])
        assert answer
    assert len(prompts[2]) > len(prompts[1]) > len(prompts[0])
    assert desk.talk("a").tuned.chat.turns == chat.turns
    assert len({tuple(texts(ask(desk, t, "Hi", temperature=2.0, max_new_tokens=9).tuned)) for t in "bcdef"}) > 1


def test_an_answer_grows_piece_by_piece(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instructft.inference.web_sessions.PACE", 0)
    seen = [texts(s.tuned) for s in Desk(scripted).answer("a", " Hi ", Settings())]
    assert seen == [["Hi"], ["Hi", "Hello"], ["Hi", "Hello there"], ["Hi", "Hello there."], ["Hi", "Hello there."]]


def test_tabs_do_not_mix_and_answer_one_after_the_other(scripted: Scripted) -> None:
    desk = Desk(scripted)
    threads = [
        threading.Thread(target=lambda tab=tab: [ask(desk, tab, f"{tab} {n}") for n in range(3)]) for tab in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert scripted.most_at_once == 1
    assert len(scripted.asked) == 12
    for tab in "abcd":
        assert texts(desk.talk(tab).seen().tuned)[::2] == [f"{tab} {n}" for n in range(3)]
    assert all(len({m["content"][0] for m in asked if m["role"] == "user"}) == 1 for asked in scripted.asked)


def wait_for(said: Callable[[], Any]) -> None:
    for _ in range(1000):
        if said():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to that in 10 s")


def under_way(desk: Desk, generator: Scripted, tab: str, question: str) -> tuple[threading.Thread, list[Any]]:
    """An answer whose first piece has been given out, and which waits for the next."""
    generator.go = threading.Semaphore(1)
    seen: list[Any] = []

    def run() -> None:
        for one in desk.answer(tab, question, Settings()):
            seen.append(one)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_for(lambda: seen and "Hello" in texts(seen[-1].tuned))
    return thread, seen


def test_stopping_keeps_what_there_is(scripted: Scripted) -> None:
    desk = Desk(scripted)
    thread, seen = under_way(desk, scripted, "a", "Hi")
    desk.stop("b")  # another tab's button
    assert thread.is_alive()
    desk.stop("a")
    thread.join(10)
    assert not thread.is_alive()
    assert texts(seen[-1].tuned) == ["Hi", "Hello"]
    assert seen[-1].notice == "Stopped."
    scripted.go = None
    assert texts(ask(desk, "a", "More").tuned) == ["Hi", "Hello", "More", "Hello there."]


def test_while_one_is_answered_others_wait_and_may_leave(scripted: Scripted) -> None:
    desk = Desk(scripted)
    thread, _ = under_way(desk, scripted, "a", "Hi")
    again = ask(desk, "a", "And?")  # the same tab
    assert again.back == "And?"
    assert "One question at a time" in again.notice
    waiting: list[Any] = []
    other = threading.Thread(
        target=lambda: [waiting.append(s) for s in desk.answer("b", "Me", Settings())], daemon=True
    )
    other.start()
    wait_for(lambda: waiting and "Waiting" in waiting[-1].notice)
    desk.stop("b")
    other.join(10)
    assert (waiting[-1].back, waiting[-1].tuned) == ("Me", [])
    assert thread.is_alive()
    desk.forget("a")  # the tab was closed
    thread.join(10)
    assert not thread.is_alive()
    assert len(scripted.asked) == 1
    assert desk.talk("a").seen().tuned == []


def test_a_new_conversation_in_the_middle_of_an_answer(scripted: Scripted) -> None:
    desk = Desk(scripted)
    thread, seen = under_way(desk, scripted, "a", "Hi")
    desk.talk("a").reset()
    thread.join(10)
    assert (seen[-1].tuned, desk.talk("a").seen().tuned) == ([], [])
    scripted.go = None
    ask(desk, "a", "New")
    assert texts(scripted.asked[-1]) == ["New"]


def test_taking_back(scripted: Scripted) -> None:
    desk = Desk(scripted)
    ask(desk, "a", "One")
    ask(desk, "a", "Two")
    assert desk.talk("a").undo() == "Two"
    assert texts(desk.talk("a").seen().tuned) == ["One", "Hello there."]
    assert [desk.talk("a").undo(), desk.talk("a").undo()] == ["One", ""]


def test_a_full_context_drops_the_oldest_and_says_so(scripted: Scripted) -> None:
    desk = Desk(scripted)  # a context of 128 tokens
    questions = [f"{n} " + "1 2 3 4 5 6 7 8 9 " * 2 for n in range(4)]
    notices = [(s := ask(desk, "a", q, max_new_tokens=32)).notice for q in questions]
    assert notices[0] == ""
    assert "The context is full: the oldest" in "".join(notices)
    assert "turns have left it" in "".join(notices)
    shown = texts(s.tuned)
    assert LEFT in shown
    assert [t.strip() for t in shown if t[:1].isdigit()] == [
        q.strip() for q in questions
    ]  # nothing that was read is gone
    kept = shown[shown.index(LEFT) + 1 :]
    assert texts(scripted.asked[-1]) == kept[:-1]
    assert len(scripted.encoder.prompts([scripted.asked[-1]])[0]) + 32 <= 128
    long = ask(desk, "a", "1 2 3 " * 200)
    assert "of the model's context of 128" in long.notice
    assert long.back == ("1 2 3 " * 200).strip()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"temperature": 11.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens")],
)
def test_settings_that_do_not_work_are_told(settings: Any, said: str, scripted: Scripted) -> None:
    seen = ask(Desk(scripted), "a", "Hi", **settings)
    assert said in seen.notice
    assert (seen.back, seen.tuned, scripted.asked) == ("Hi", [], [])


def test_what_it_began_from_answers_beside_it(
    write_recipe: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    """With an adapter: its base in the same memory, the adapter off for that answer only."""
    recipe = instructft.load_recipe(write_recipe())
    own = instructft.load_tokenizer(recipe)
    model = instructft.load_model(recipe, own)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)  # so that answers do not end at once
    model.save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    text = f"""
model: {{name_or_path: {tmp_path / "base"}}}
data: {{datasets: [{{name: quickstart, rows: 60}}], template: instruction, max_length: 128}}
adapter: {{type: lora, r: 8, alpha: 64}}
train: {{max_steps: 6, learning_rate: 0.05, use_cpu: true, logging_steps: 6}}
output_dir: {tmp_path / "run"}
"""
    run = str(instructft.train(instructft.load_recipe(write_recipe(text, "lora.yaml"))).output_dir)
    generator = Generator(*load_for_inference(run))
    base = Generator(*load_for_inference(str(tmp_path / "base")))
    desk = Desk(generator, Beside.of(run, "start", generator))
    tuned_alone, base_alone = Chat(generator, max_new_tokens=8), Chat(base, max_new_tokens=8)
    for question in ("Hi", "What is the capital of Norway?"):
        seen = ask(desk, "a", question, compare=True, max_new_tokens=8)
        expected = tuned_alone.send(question), base_alone.send(question)
        assert (seen.tuned[-1]["content"], seen.base[-1]["content"]) == expected
        assert expected[0] != expected[1]
    assert ask(desk, "b", "Hi", max_new_tokens=8).base == []
    assert ask(desk, "b", "Hi", max_new_tokens=8).tuned[1] == tuned_alone.turns[1]  # the adapter is on again


# The server


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port: {number} cannot be used"):
            free_port(number)
    assert free_port(number) == number
    assert 7860 <= free_port(None) < 7960


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["instructft", "ui", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command(monkeypatch, "no/such/model") == 2
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


@pytest.fixture
def served(scripted: Scripted) -> Iterator[tuple[str, Desk]]:
    pytest.importorskip("gradio", reason="no gradio: make venv installs it")
    from instructft.inference.web import start
    from instructft.inference.web_page import build

    desk = Desk(scripted)
    page, url = start(build(desk, EVIL, Settings()), free_port(None))
    try:
        yield url, desk
    finally:
        page.close(verbose=False)


def test_the_server_is_here_only_and_names_no_other(served: Any) -> None:
    url, _ = served
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    assert host == "127.0.0.1"
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("GET", "/")
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    for outside in ("googleapis", "gstatic", "cdnjs", "jsdelivr", "unpkg"):
        assert outside not in text
    with socket.socket() as other:
        other.settimeout(2)
        assert other.connect_ex((_own_address(), int(port))) != 0


def _own_address() -> str:
    """This machine's address in its network; one that nobody has where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            address = probe.getsockname()[0]
        except OSError:
            return "127.0.0.2"
    return address if not address.startswith("127.0.0.1") else "127.0.0.2"


def test_in_a_browser(served: Any, scripted: Scripted) -> None:
    url, _ = served
    scripted.pieces, scripted.context = ["First ", "second ", "third."], 4096
    scripted.go = threading.Semaphore(0)
    with browser() as chromium:
        one, two = Watched(chromium), Watched(chromium, 380, 800, "dark")
        for seen in (one, two):
            seen.page.goto(url)
            seen.page.wait_for_selector("#box textarea")
        one.page.fill("#box textarea", "Tell me " + EVIL)
        one.page.press("#box textarea", "Enter")
        scripted.go.release()
        one.page.wait_for_selector("#tuned >> text=First")
        assert "second" not in one.page.inner_text("#tuned")  # it is streamed
        two.page.fill("#box textarea", "From the other tab")
        two.page.click("#send")
        two.page.wait_for_selector("#notice >> text=Waiting")
        scripted.pieces = [EVIL, " end"]
        one.page.click("#stop")
        one.page.wait_for_selector("#notice >> text=Stopped")
        scripted.go = None
        two.page.wait_for_selector("#tuned >> text=end")
        for seen in (one, two):
            seen.page.wait_for_selector("#send")
            assert not seen.scrolls_sideways
        first, second = one.page.inner_text("#tuned"), two.page.inner_text("#tuned")
        shown = EVIL.replace("\x1b", "\\x1b")
        assert "Tell me " + shown in first
        assert "First" in first
        assert "end" not in first.split()
        assert "From the other tab" in second
        assert shown in second  # as it was written: no markup, no picture
        assert "Tell me" not in second
        two.page.click("#undo")
        two.page.wait_for_function("!document.querySelector('#tuned').innerText.includes('other tab')")
        assert two.page.input_value("#box textarea") == "From the other tab"
        one.page.click("#reset")
        one.page.wait_for_function("!document.querySelector('#tuned').innerText.includes('Tell')")
        for seen in (one, two):
            assert len(seen.requests) > 10
            assert [u for u in seen.requests if not u.startswith((url, "data:", "blob:" + url))] == []
            assert [c for c in seen.complaints if "favicon" not in c] == []
