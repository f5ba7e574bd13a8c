"""`instructft chat`: over a pipe line by line, and once in a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from instructft.errors import UsageError
from instructft.inference.chat import Chat
from instructft.inference.terminal import HELP, Commands, Drawn, _answer, _turns, as_text, converse, history_file
from instructft.prompt.token_view import visible


@pytest.fixture
def talk(
    tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[str], Chat]]:
    """Types lines into a pipe, gives what came out and the chat."""

    def run(text: str, chat: Chat | None = None) -> tuple[list[str], Chat]:
        chat = chat or Chat(tiny_model, tokenizer, max_new_tokens=6)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        converse(chat, "tiny")
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines(), chat

    return run


def echo(chat: Chat, monkeypatch: pytest.MonkeyPatch, answer: str = "Yes, {}.") -> None:
    """Let the model answer with its question: what is tested here is the talk, not the model."""

    def stream(messages: list[dict[str, str]], *_: Any) -> Iterator[str]:
        yield from re.findall(r"\S+\s*", answer.format(messages[-1]["content"]))

    monkeypatch.setattr(chat.generator, "stream", stream)


def test_a_pipe_gives_answers_and_nothing_else(talk: Any, tiny_model: Any, tokenizer: Any) -> None:
    out, chat = talk("Hi\n\n   \nHo")  # no line break at the end
    again = Chat(tiny_model, tokenizer, max_new_tokens=6)
    expected = "\n".join([again.send("Hi") or "(no answer)", again.send("Ho") or "(no answer)"])
    assert "\n".join(line.rstrip() for line in out).split() == expected.split()
    assert chat.turns == again.turns
    assert not any("\x1b" in line or line.startswith(">") for line in out)


def test_nothing_said(talk: Any) -> None:
    assert talk("")[0] == []


def test_each_command(talk: Any, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(tiny_model, tokenizer, max_new_tokens=6)
    echo(chat, monkeypatch)

    def say(*lines: str) -> list[str]:
        return talk("\n".join(lines), chat)[0]

    assert say("one", "two") == ["Yes, one.", "Yes, two."]
    assert len(chat.turns) == 4
    assert say("/help") == HELP.splitlines()
    assert say("/system Be brief.") == ["(system prompt set; a new conversation)"]
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert say("three") == ["Yes, three."]
    assert say("/reset") == ["(a new conversation)"]
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert say("/system") == ["(no system prompt; a new conversation)"]
    assert chat.messages == []
    assert say("/temperature 0.7") == ["(temperature 0.7)"]
    assert chat.temperature == 0.7
    assert say("/temp 0") == ["(temperature 0)"]
    assert chat.temperature == 0
    for bad in ("-1", "11", "hot", "nan", ""):
        assert say(f"/temperature {bad}") == [f"(/temperature takes a number from 0 to 10, not {bad or 'nothing'})"]
    assert chat.temperature == 0
    assert say("/nonsense now") == ["(/nonsense is unknown; /help lists the commands)"]
    assert say("/exit", "never read") == []
    assert say("/quit", "never read") == []
    assert chat.turns == []


def test_sampling_limits(talk: Any, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(tiny_model, tokenizer, max_new_tokens=6)
    given: list[tuple[Any, ...]] = []

    def stream(messages: Any, *settings: Any) -> Iterator[str]:
        given.append(settings[:3])
        yield "ok"

    monkeypatch.setattr(chat.generator, "stream", stream)
    out, _ = talk("/top_p 0.9\n/temp 0.5\n/top-p 0.8\n/max 17\nHi\n", chat)
    assert out == [
        "(top_p 0.9, once /temp is above 0)",
        "(temperature 0.5)",
        "(top_p 0.8)",
        "(at most 17 tokens in an answer)",
        "ok",
    ]
    assert given == [(17, 0.5, 0.8)]
    for bad in ("0", "1.1", "x", "nan", ""):
        assert talk(f"/top_p {bad}", chat)[0] == [
            f"(/top_p takes a number above 0 and up to 1, not {bad or 'nothing'})"
        ]
    for bad in ("0", "-4", "1.5", "²", ""):
        assert talk(f"/max {bad}", chat)[0] == [f"(/max takes a number of tokens, 1 or more, not {bad or 'nothing'})"]
    assert (chat.top_p, chat.max_new_tokens) == (0.8, 17)


def test_undo_and_retry(talk: Any, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(tiny_model, tokenizer, max_new_tokens=6)
    echo(chat, monkeypatch)
    assert talk("/undo\n/retry\n", chat)[0] == [
        "(there is nothing to take back)",
        "(there is nothing to answer again)",
    ]
    talk("one\ntwo\n", chat)
    both = list(chat.turns)
    echo(chat, monkeypatch, "No, {}.")
    assert talk("/retry", chat)[0] == [
        "(temperature 0 gives the same answer again; /temp 0.7 varies it)",
        "No, two.",
    ]
    assert chat.turns == [*both[:3], {"role": "assistant", "content": "No, two."}]
    echo(chat, monkeypatch, "")
    assert talk("/temp 1\n/retry", chat)[0] == ["(temperature 1)", "(no answer)"]
    assert chat.turns[-1]["content"] == "No, two."  # nothing came: the old answer stays
    assert talk("/undo", chat)[0] == ["(taken back: two)"]
    assert chat.turns == both[:2]
    assert talk("/undo\n/undo", chat)[0] == ["(taken back: one)", "(there is nothing to take back)"]


def test_save_is_a_row_to_train_on(
    talk: Any, tiny_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All turns are in it, also those that have left the context; read back by the loader of training data."""
    from instructft.data.load import file_conversations

    chat = Chat(tiny_model, tokenizer, system="S", max_new_tokens=6)
    echo(chat, monkeypatch)
    file, digits = tmp_path / "talk.jsonl", "4" * 40
    assert talk(f"/save {file}", chat)[0] == ["(there is no conversation to save)"]
    out, _ = talk(f"{digits}\nnext\n{digits}\n/save {file}\n", chat)
    assert chat.left == 2
    assert out[-1] == f"(saved to {file})"
    turns = [(r, c) for q in (digits, "next", digits) for r, c in (("user", q), ("assistant", f"Yes, {q}."))]
    expected = [{"role": "system", "content": "S"}, *({"role": r, "content": c} for r, c in turns)]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"messages": expected}]
    (row,) = file_conversations(str(file))
    assert (row["messages"] if isinstance(row, dict) else row) == expected
    before = file.read_bytes()
    assert talk(f"/save {file}", chat)[0] == [f"({file} exists already; name another file)"]
    assert file.read_bytes() == before
    assert talk("/save talk.txt\n/save", chat)[0] == [
        "(/save takes a file name that ends in .jsonl, not talk.txt)",
        "(/save takes a file name that ends in .jsonl, not nothing)",
    ]
    assert "could not be written" in talk(f"/save {tmp_path / 'no' / 'x.jsonl'}", chat)[0][0]


def test_an_answer_that_was_cut_off_is_saved_without_loss(
    talk: Any, tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    import threading

    from instructft.prompt.loss_mask import encode_conversation

    with torch.no_grad():  # every position says the same letter
        tiny_model.transformer.ln_f.weight.zero_()
        tiny_model.transformer.ln_f.bias.fill_(1)
        tiny_model.transformer.wte.weight[tokenizer("z", add_special_tokens=False)["input_ids"][0]] = 5
    chat = Chat(tiny_model, tokenizer, max_new_tokens=6)
    chat.turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    assert chat.send("Hi")
    assert chat.finish_reason == "length"
    stopped = threading.Event()
    pieces = chat.stream("Ho", stopped)
    next(pieces)
    stopped.set()
    list(pieces)
    assert chat.finish_reason == "stopped"
    talk(f"/save {tmp_path / 'a.jsonl'}", chat)
    messages = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert [m.get("weight") for m in messages] == [None, None, None, 0, None, 0]
    labels = [label for label in encode_conversation(messages, tokenizer)["labels"] if label != -100]
    assert tokenizer.decode(labels) == "Ada." + tokenizer.eos_token
    assert not any("weight" in m for m in chat.messages)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_compare_asks_what_the_run_began_from(
    kind: str,
    talk: Any,
    write_recipe: Callable[..., Path],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The base's own answer, to the same conversation; of an adapter no second model is loaded."""
    import instructft
    from instructft.inference import reference_model as beside_module
    from instructft.inference.generator import Generator
    from instructft.models.load_for_inference import load_for_inference
    from tests.helpers.adapters import make_adapter, make_base

    if kind == "full":
        recipe = instructft.load_recipe(write_recipe())
        base = instructft.load_model(recipe, tokenizer).eval()
        tuned = instructft.load_model(recipe, tokenizer)
        with torch.no_grad():
            for weight in tuned.parameters():
                weight.mul_(3)
        tuned.save_pretrained(tmp_path / "run")
        tokenizer.save_pretrained(tmp_path / "run")
        (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    else:
        folder = make_base("gpt2", tmp_path / "base")
        make_adapter(folder, tmp_path / "run")
        base = type(load_for_inference(str(tmp_path / "run"))[0].get_base_model()).from_pretrained(folder)
    chat = Chat(str(tmp_path / "run"), max_new_tokens=8)
    loads: list[str] = []
    for name in ("load_model", "load_base", "load_bare"):
        original = getattr(beside_module, name)
        monkeypatch.setattr(
            beside_module, name, lambda *a, _o=original, _n=name, **k: (loads.append(_n), _o(*a, **k))[1]
        )

    def run(text: str) -> str:
        out: list[str] = []
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys, "stdout", Written(out))
        converse(chat, str(tmp_path / "run"))
        return "".join(out)

    assert run("/compare") == "(/compare takes a question, or comes after one)\n"
    assert loads == []
    said = run("Hello there\n/compare\n/compare And now?\n")
    own = chat.turns[1]["content"]
    other = Generator(base.eval(), chat.generator.tokenizer)
    history = [*chat.turns[:2], {"role": "user", "content": "And now?"}]
    first, second = ("".join(other.stream(asked, 8)) for asked in (history[:1], history))
    assert first.strip() != own
    assert f"tuned:\n{visible(own)}\nbase:\n{visible(first) or '(no answer)'}\ntuned:\n" in said
    assert said.endswith(f"base:\n{visible(second) or '(no answer)'}\n")
    assert loads == (["load_model"] if kind == "full" else [])
    assert "".join(chat.generator.stream(history[:1], 8)).strip() == own  # the tuned model is itself again


class Written(io.StringIO):
    """A standard output that collects what is printed."""

    def __init__(self, out: list[str]):
        super().__init__()
        self.out = out

    def write(self, text: str) -> int:
        self.out.append(text)
        return len(text)


def test_compare_where_nothing_is_known_of_a_base(talk: Any, tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    tiny_model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    chat = Chat(tiny_model, tokenizer, max_new_tokens=3)
    chat.turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(UsageError, match="says what the run began from; there is none beside"):
        Commands(chat, str(tmp_path / "m"), "start", print, lambda ask: None).carry_out("/compare")
    assert [m["content"] for m in chat.turns] == ["Hi", "Ho"]


def test_a_full_context_is_announced_before_the_answer(
    talk: Any, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(tiny_model, tokenizer, max_new_tokens=6)
    echo(chat, monkeypatch)
    digits = "4" * 40
    out, _ = talk(f"{digits}\nnext\n{digits}\n", chat)
    assert out == [
        f"Yes, {digits}.",
        "Yes, next.",
        "(the context is full: the oldest 2 turns have left it)",
        f"Yes, {digits}.",
    ]
    assert chat.left == 2


def test_a_turn_that_is_too_long_ends_nothing(
    talk: Any, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(tiny_model, tokenizer, max_new_tokens=6)
    echo(chat, monkeypatch)
    out, _ = talk(f"Hi\n{'4' * 200}\nHo\n", chat)
    assert len(out) == 3
    assert out[1].startswith("(this turn makes a prompt of 2")
    assert [out[0], out[2]] == ["Yes, Hi.", "Yes, Ho."]
    assert len(chat.turns) == 4


def test_no_answer_is_said(talk: Any, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(tiny_model, tokenizer)
    echo(chat, monkeypatch, "")
    assert talk("Hi", chat)[0] == ["(no answer)"]


def test_control_characters_are_shown_and_not_obeyed(
    talk: Any, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model's answers and of what was typed, wherever they are printed."""
    chat = Chat(tiny_model, tokenizer)
    echo(chat, monkeypatch, "\x1b]0;title\x07 {} \u202e")
    assert talk("a\x1b[2J\n/undo\n/\x1b[31mred\n", chat)[0] == [
        "\\x1b]0;title\\x07 a\\x1b[2J \\u202e",
        "(taken back: a\\x1b[2J)",
        "(/\\x1b[31mred is unknown; /help lists the commands)",
    ]


def drawn(*pieces: str, width: int = 40, height: int = 20) -> str:
    """What a terminal gets of an answer that comes in pieces."""
    screen = io.StringIO()
    shown = Drawn(Console(file=screen, width=width, height=height, force_terminal=True, color_system=None))
    for piece in pieces:
        shown.add(piece)
    shown.close()
    return screen.getvalue()


def test_what_holds_no_markdown_stays_as_it_came() -> None:
    assert drawn("Two ", "lines:\n", "2 * 3 * 4 < 5\n\nsnake_case_name") == (
        "Two lines:\n2 * 3 * 4 < 5\n\nsnake_case_name"
    )


def test_a_block_is_drawn_anew_when_it_is_whole() -> None:
    text = drawn("Look:\n\n- a **b**\n", "- c\n\nDone")
    assert text.startswith("Look:\n\n- a **b**\n- c\n\nDone\x1b[3A\r\x1b[J")
    assert text.endswith("Done")
    assert " • a b" in text


def test_tags_and_ends_of_lines_stay() -> None:
    shown = drawn("# <b>One</b>\n\nroses **red**\n<think>violets\n").rpartition("\x1b[J")[2]
    assert [line.strip() for line in shown.splitlines() if line.strip()] == ["roses red", "<think>violets"]
    assert "<b>One</b>" in drawn("# <b>One</b>")


def test_a_fence_holds_empty_lines_and_what_is_higher_than_the_window_stays() -> None:
    code = "```py\na = 1\n\nb = 2\n```\n"
    assert "```" not in drawn(code).rpartition("\x1b[J")[2]
    assert drawn(code, height=5) == code


def test_a_full_context_is_the_reason_that_is_named(
    tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(tiny_model, tokenizer, max_new_tokens=6)
    context = chat.generator.context

    def stream(*_: Any) -> Iterator[str]:
        yield "tea"
        return "length"

    monkeypatch.setattr(chat.generator, "stream", stream)
    for most, note in (
        (6, "(cut off; /max allows more tokens)"),
        (10_000, f"(cut off: the context of {context} tokens"),
    ):
        chat.max_new_tokens = most
        _answer(chat, partial(chat.stream, "Hi"), terminal=True)
        assert note in capsys.readouterr().out


def test_bytes_that_are_no_utf8_are_asked_with_a_sign(
    tmp_path: Path, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"Caf\xe9?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert list(_turns(terminal=False)) == ["Caf\ufffd?"]
    assert as_text("Caf\udce9?") == "Caf\ufffd?"


def test_where_lines_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INSTRUCTFT_HISTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    found = history_file()
    assert found == tmp_path / "state/instructft/chat-history"
    assert found.stat().st_mode & 0o777 == 0o600
    assert found.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("INSTRUCTFT_HISTORY", "")
    assert history_file() is None
    (tmp_path / "link").symlink_to(found)
    monkeypatch.setenv("INSTRUCTFT_HISTORY", str(tmp_path / "link"))
    assert history_file() is None  # a link leads to a file of somebody's choice


def test_every_option_is_a_command(talk: Any) -> None:
    """As it is written behind `instructft chat`, with `/` for the dashes."""
    from typer.testing import CliRunner

    from instructft.cli import app

    options = re.findall(r"--([a-z_-]+)", CliRunner().invoke(app, ["chat", "--help"]).output)
    assert {"temp", "temperature", "top-p", "max", "max-new-tokens", "system", "base", "plain"} <= set(options)
    for name in {*options} - {"help", "trust-remote-code"}:
        assert "unknown" not in talk(f"/{name}\n")[0][-1], name


# ------------------------------------------------------------------------------------------------------ a real terminal


class Terminal:
    """A program in a pseudo-terminal, and a person who types and waits for what appears."""

    def __init__(self, *command: str, **environment: str):
        import pty

        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(slave)
        self.screen = ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until `text` appears behind what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.screen[self._seen :]:
            assert time.monotonic() < end, f"no {text!r} in {self.screen[self._seen :]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.screen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self.master, 4096).decode())
                except OSError:  # Linux's way to say that the other side has closed
                    assert text in self.screen[self._seen :], self.screen
        self._seen = self.screen.index(text, self._seen) + len(text)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


def _own_terminal() -> None:
    """Make the pseudo-terminal the one whose Ctrl-C reaches the program."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal(tokenizer: Any, tmp_path: Path) -> None:
    """What needs a terminal: the prompt, its history, Ctrl-C and Ctrl-D. Only Ctrl-C ends the first answer in time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=8, n_positions=60_000, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # every position says the same letter, and never stops
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[tokenizer("z", add_special_tokens=False)["input_ids"][0]] = 5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kept = tmp_path / "state" / "history"
    command = ("-m", "instructft", "chat", str(tmp_path), "--max", "50000")
    terminal = Terminal(sys.executable, *command, INSTRUCTFT_HISTORY=str(kept))
    try:
        terminal.wait_for("/help lists the commands, /quit leaves")
        terminal.wait_for(">")
        terminal.type("Hello there\r")
        terminal.wait_for("zzzz")
        terminal.type("\x03\x03")  # twice: the second must not hit what clears up after the first
        terminal.wait_for("(stopped)")
        terminal.wait_for(">")
        terminal.type("\x03")  # at the prompt
        terminal.wait_for("(Ctrl-D or /quit leaves)")
        terminal.wait_for(">")
        terminal.type("/max 3\r")
        terminal.wait_for("(at most 3 tokens in an answer)")
        terminal.wait_for(">")
        terminal.type("\x1b[A\x1b[A")  # the arrow up: earlier lines come back
        terminal.wait_for("Hello there")
        terminal.type("\x03")
        terminal.wait_for(">")
        terminal.type("/reset\r")
        terminal.wait_for("(a new conversation)")
        terminal.wait_for(">")
        terminal.type("Hi \\\rand\x1b\rbye\r")  # three lines: two ways to begin another
        terminal.wait_for("zzz (cut off; /max allows more tokens)")
        terminal.type(f"/save {tmp_path}/said.jsonl\r")
        terminal.wait_for("(saved to")
        assert json.loads((tmp_path / "said.jsonl").read_text())["messages"][0]["content"] == "Hi \nand\nbye"
        terminal.wait_for(">")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
        assert "Traceback" not in terminal.screen
        assert "Error" not in terminal.screen
        assert "Hello there" in kept.read_text(encoding="utf-8")
        assert kept.stat().st_mode & 0o777 == 0o600
    finally:
        terminal.close()
