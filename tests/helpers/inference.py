"""Questions with their answers, rows of a file, and a look at what a model is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from instructft.inference.generator import Generator
from instructft.prompt.loss_mask import encode_prompt
from tests.helpers.device import on

CAPITALS = {"France": "Paris.", "Japan": "東京 🗼!", "Peru": "Lima\nis it.", "Cuba": "La Habana, Cuba."}


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, Any]]:
    return ask(f"Capital of {text}?")


def sharpen(model: Any) -> Any:
    """Random weights with clear choices, so that no greedy tie hangs on the last bit of a float."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6)
    return model


def reference(model: Any, tokenizer: Any, messages: list[Any], max_new_tokens: int) -> list[int]:
    """Greedy ids by the plainest loop there is: one row, no padding, no cache."""
    ids = encode_prompt(messages, tokenizer)
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < max_new_tokens and len(ids) < model.config.max_position_embeddings:
            ids.append(int(model(on(model, torch.tensor([ids]))).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return ids[start:]


def record_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `model.generate` receives."""
    calls: list[dict[str, Any]] = []
    original = model.generate

    def spy(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(**kwargs)

    monkeypatch.setattr(model, "generate", spy)
    return calls


def forced(model: Any, prompt: list[int], answer: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `model` say exactly `answer` after `prompt`."""
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        position = int(kwargs["attention_mask"].shape[1]) - len(prompt)
        out.logits = torch.full_like(out.logits, -100.0)
        out.logits[:, -1, answer[min(position, len(answer) - 1)]] = 100.0
        return out

    monkeypatch.setattr(model, "forward", forward)


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


ROWS: list[dict[str, Any]] = [
    {"prompt": "Hi", "id": 7, "nested": {"a": [1, 2.5, None, True]}},
    {"instruction": "Add.", "input": "3 and 4"},
    {"instruction": "Who?", "context": "Ada wrote it.", "category": "qa"},
    {"prompt": "日本の首都は？ 🗼\u2028 next line\u0085"},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "prompt": 3},
    {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
    {"instruction": "Name a city. " * 4, "input": "", "output": "Paris"},
]  # fmt: skip


ASKED: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Add.", "input": "3 and 4"}],
    [{"role": "user", "content": "Who?", "context": "Ada wrote it."}],
    [{"role": "user", "content": ROWS[3]["prompt"]}],
    ROWS[4]["messages"],
    ROWS[5]["messages"],
    [{"role": "user", "content": ROWS[6]["instruction"]}],
]


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
