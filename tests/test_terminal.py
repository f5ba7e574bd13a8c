"""`instructft chat`: over a pipe line by line, and once in a real terminal."""

from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from instructft.generate import Chat
from instructft.terminal import HELP, converse


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


# ------------------------------------------------------------------------------------------------------ a real terminal


class Terminal:
    """A program in a pseudo-terminal, and a person who types and waits for what appears."""

    def __init__(self, *command: str):
        import pty

        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
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
def test_in_a_terminal(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A model that never stops, in a context long enough that only Ctrl-C ends its answer in time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=8, n_positions=60_000, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    letter = tokenizer("z", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():  # every position says the same letter
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[letter] = 5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    terminal = Terminal(sys.executable, "-m", "instructft", "chat", str(tmp_path), "--max-new-tokens", "50000")
    try:
        terminal.wait_for("/help lists the commands, /exit leaves")
        terminal.wait_for(">")
        terminal.type("Hello there\r")
        terminal.wait_for("zzzz")
        terminal.type("\x03\x03")  # twice: the second must not hit what clears up after the first
        terminal.wait_for("(stopped)")
        terminal.wait_for(">")
        terminal.type("\x03")  # at the prompt
        terminal.wait_for("(Ctrl-D or /exit leaves)")
        terminal.wait_for(">")
        terminal.type("/help\r")
        terminal.wait_for("Ctrl-C stops an answer")
        terminal.wait_for(">")
        terminal.type("\x1b[A\x1b[A")  # the arrow up: earlier lines come back
        terminal.wait_for("Hello there")
        terminal.type("\x03")
        terminal.wait_for(">")
        terminal.type("/temp 0.5\r")
        terminal.wait_for("(temperature 0.5)")
        terminal.wait_for(">")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
        assert "Traceback" not in terminal.screen
        assert "Error" not in terminal.screen
    finally:
        terminal.close()
