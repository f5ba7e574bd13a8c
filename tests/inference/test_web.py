"""The chat page: prompts as in training, a conversation for every tab, one answer at a time, and nobody else asked."""

from __future__ import annotations

import http.client
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import instructft
from instructft import cli
from instructft.errors import UsageError
from instructft.inference.chat import Chat
from instructft.inference.generator import Generator
from instructft.inference.reference_model import ReferenceModel
from instructft.inference.web import Guard, Settings, Turn, free_port, markdown, reply
from instructft.models.load_for_inference import load_for_inference
from tests.helpers.browser import Watched, browser
from tests.helpers.device import in_float32

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
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            for piece in self.pieces:
                if self.go is not None and not self.go.acquire(timeout=20):
                    raise AssertionError("nobody let the answer go on")
                yield piece
        finally:
            self.at_once -= 1
        return "stop"


@pytest.fixture
def scripted(tiny_model: Any, tokenizer: Any) -> Scripted:
    return Scripted(tiny_model, tokenizer)


def ask(
    generator: Generator, turns: list[Turn], question: str, reference: Any = None, **settings: Any
) -> list[dict[str, Any]]:
    """Ask, and put the turn behind `turns`; what the page shows at the end."""
    shown, turn = list(reply(generator, turns, question, Settings(**settings), reference))[-1]
    turns.append(turn)
    return shown


def said(shown: list[dict[str, Any]]) -> list[str]:
    """Answers as they are, what else is said by its title."""
    return [m["metadata"]["title"] if not m["content"] else m["content"][0]["text"] for m in shown]


# Answers


def test_answers_are_those_of_chat(tiny_model: Any, tokenizer: Any) -> None:
    """Prompt ids, settings and history as `instructft chat` has them: the same words come out, turn by turn."""
    with torch.no_grad():  # so that the words differ, and do not end at once
        tiny_model.transformer.wpe.weight.mul_(50)
    generator = Generator(tiny_model, tokenizer)
    prompts: list[list[int]] = []
    turns: list[Turn] = []
    chat = Chat(generator, system="Be brief.", max_new_tokens=6)
    for question in ("Hi", "And you?", "Bye"):
        shown = ask(generator, turns, question, system=" Be brief. ", max_new_tokens=6)
        answer = chat.send(question)
        assert turns[-1] == Turn(question, answer)
        assert said(shown)[0] == markdown(answer)
        prompts += generator.encoder.prompts([chat.messages])
        assert answer
    assert len(prompts[2]) > len(prompts[1]) > len(prompts[0])
    sampled = {tuple(said(ask(generator, [], "Hi", temperature=2.0, max_new_tokens=9))) for _ in range(5)}
    assert len(sampled) > 1


def test_an_answer_grows_piece_by_piece_and_what_there_is_of_it_stays(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instructft.inference.web.PACE", 0)
    answers = reply(scripted, [], "Hi", Settings())
    grown = [next(answers), next(answers)]
    assert [said(shown) for shown, _ in grown] == [["Hello"], ["Hello there"]]
    answers.close()  # type: ignore[attr-defined]  # the stop button
    assert scripted.at_once == 0  # the model's work has ended
    scripted.pieces = ["Yes."]
    assert said(ask(scripted, [grown[-1][1]], "More")) == ["Yes."]
    assert [m["content"] for m in scripted.asked[-1]] == ["Hi", "Hello there", "More"]


def test_a_full_context_drops_the_oldest_and_says_so(scripted: Scripted) -> None:
    turns: list[Turn] = []  # a context of 128 tokens
    questions = [f"{n} " + "1 2 3 4 5 6 7 8 9 " * 2 for n in range(4)]
    notices = [said(ask(scripted, turns, question, max_new_tokens=32))[:-1] for question in questions]
    assert notices[0] == []
    assert [n for ns in notices for n in ns] == [
        f"The context is full: the oldest {left} turns have left it." for left in sorted({t.left for t in turns} - {0})
    ]
    kept = [t.question for t in turns[turns[-1].left // 2 :]]
    assert [m["content"] for m in scripted.asked[-1] if m["role"] == "user"] == kept
    assert turns[-1].left > 0
    assert len(scripted.encoder.prompts([scripted.asked[-1]])[0]) + 32 <= 128
    assert "of the model's context of 128" in said(ask(scripted, turns, "1 2 3 " * 200))[0]
    assert turns[-1].answer == ""
    ask(scripted, turns, "Hi")
    assert not any("1 2 3 1" in m["content"] for m in scripted.asked[-1])  # it is no part of the conversation


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"temperature": 11.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens")],
)
def test_settings_that_do_not_work_are_told(settings: Any, named: str, scripted: Scripted) -> None:
    assert named in said(ask(scripted, [], "Hi", **settings))[0]
    assert scripted.asked == []


def test_no_answer_is_no_part_of_the_conversation(scripted: Scripted) -> None:
    turns: list[Turn] = []
    scripted.pieces = [" "]
    assert said(ask(scripted, turns, "Hi")) == ["No answer: it is no part of the conversation."]
    ask(scripted, turns, "Ho")
    assert [m["content"] for m in scripted.asked[-1]] == ["Ho"]


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("a <b>c</b> &lt; ![x](http://y)", "a &lt;b>c&lt;/b> &amp;lt; !\\[x](http://y)"),
        ("`<b>` and ``a ` <i>`` <u>", "`<b>` and ``a ` <i>`` &lt;u>"),
        ("```html\n<p>&amp;\n```\n<p>", "```html\n<p>&amp;\n```\n&lt;p>"),
        ("~~~\n<p>", "~~~\n<p>"),  # still being written
        ("bell \x07\tand\n    four", "bell \\x07\tand\n    four"),
    ],
)
def test_markdown_draws_no_html(text: str, drawn: str) -> None:
    assert markdown(text) == drawn


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
    run = str(instructft.train(instructft.load_recipe(write_recipe(text, "lora.yaml"), in_float32())).output_dir)
    generator = Generator(*load_for_inference(run))
    base = Generator(*load_for_inference(str(tmp_path / "base")))
    reference = ReferenceModel.of(run, "start", generator)
    turns: list[Turn] = []
    tuned_alone = Chat(generator, max_new_tokens=8)
    for question in ("Hi", "What is the capital of Norway?"):
        shown = [m for m in ask(generator, turns, question, reference, max_new_tokens=8) if m["content"]]
        asked = [*tuned_alone.turns, {"role": "user", "content": question}]
        expected = tuned_alone.send(question), "".join(base.stream(asked, 8)).strip()
        assert said(shown) == [markdown(text) for text in expected]
        assert shown[1]["metadata"] == {"title": "What it began from answers"}
        assert expected[0] != expected[1]
    assert turns[0].answer == tuned_alone.turns[1]["content"]
    ask(generator, turns := [], "Hi", max_new_tokens=8)
    assert turns[0].answer == tuned_alone.turns[1]["content"]  # the adapter is on again


# The page


@pytest.fixture
def page(scripted: Scripted) -> Any:
    pytest.importorskip("gradio", reason="no gradio: make venv installs it")
    from instructft.inference.web import build

    return build(scripted, EVIL, Settings(), samples=["A sample to try"])


def test_the_model_reads_its_own_turns_not_what_the_page_shows(page: Any, scripted: Scripted) -> None:
    """Retry, undo and an interrupted question shorten or lengthen the page's history; the exact turns follow."""

    def asked_with(message: str, history: list[str], turns: list[Turn]) -> list[Turn]:
        said = [{"role": "user" if i % 2 == 0 else "assistant", "content": one} for i, one in enumerate(history)]
        return list(page.fn(message, said, "", 0, 1, 32, False, turns))[-1][1]

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
def served(page: Any) -> Iterator[str]:
    from instructft.inference.web import start

    url = start(page, free_port(None))
    try:
        yield url
    finally:
        page.close(verbose=False)


def test_the_server_is_here_only_and_names_no_other(served: str) -> None:
    host, port = served.removeprefix("http://").rstrip("/").split(":")
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
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nsome\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError, match="403"):  # no file is taken
        urllib.request.urlopen(urllib.request.Request(f"{served}gradio_api/upload", form, kind), timeout=20)
    with socket.socket() as other:
        other.settimeout(2)
        assert other.connect_ex((_own_address(), int(port))) != 0


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/config", {"Host": "localhost:{port}"}, 200),
        ("GET", "/config", {"Host": "elsewhere.example"}, 421),
        ("GET", "/", {"Host": "127.0.0.1:80"}, 421),
        ("GET", "/", {"Host": "elsewhere.example:{port}"}, 421),
        ("POST", "/gradio_api/queue/join", {"Origin": "http://elsewhere.example"}, 403),
        ("POST", "/gradio_api/queue/join", {"Origin": "null"}, 403),
        ("POST", "/gradio_api/queue/join", {"Origin": "http://127.0.0.1:80"}, 403),
        ("POST", "/gradio_api/upload", {}, 403),
        ("POST", "/gradio_api/upload/", {"Origin": "http://127.0.0.1:{port}"}, 403),
        ("POST", "/gradio_api/queue/join", {"Content-Length": str(2 << 20)}, 413),
    ],
)
def test_another_page_in_the_same_browser_gets_nothing(
    served: str, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    port = int(served.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(
        method, path, headers={name: value.replace("{port}", str(port)) for name, value in headers.items()}
    )
    answer = connection.getresponse()
    assert answer.status == status, answer.read()
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_a_shared_page_answers_under_its_link_too() -> None:
    hosts = {"127.0.0.1:7860"}
    guard = Guard(None, hosts)
    scope = {"method": "POST", "path": "/gradio_api/queue/join", "headers": [(b"host", b"abc.gradio.live")]}
    assert guard.refusal(scope)[0] == 421
    hosts.add("abc.gradio.live")
    assert guard.refusal(scope) == (0, "")
    assert guard.refusal({**scope, "headers": [*scope["headers"], (b"origin", b"https://abc.gradio.live")]}) == (0, "")


def _own_address() -> str:
    """This machine's address in its network; one that nobody has where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            address = probe.getsockname()[0]
        except OSError:
            return "127.0.0.2"
    return address if not address.startswith("127.0.0.1") else "127.0.0.2"


def test_in_a_browser(served: str, scripted: Scripted) -> None:
    scripted.pieces, scripted.context = ["First ", "second ", "third."], 4096
    scripted.go = threading.Semaphore(0)
    with browser() as chromium:
        one, two = Watched(chromium), Watched(chromium, 380, 800, "dark")
        for seen in (one, two):
            seen.page.goto(served)
            seen.page.wait_for_selector("#box textarea")
            assert "template: instruction · cpu, float32" in seen.page.inner_text("#head")
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
