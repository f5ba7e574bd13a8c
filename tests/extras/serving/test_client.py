"""A request ends in time whatever a server does, follows nobody, and shows its key to nobody."""

from __future__ import annotations

import time
from typing import Any

import pytest

from instructft.errors import UsageError
from instructft.extras.serving.client import Client, NoAnswerError
from tests.helpers.chat_servers import ChatServer


@pytest.fixture
def parts(tiny_model: Any, tokenizer: Any) -> tuple[Any, Any]:
    return tiny_model, tokenizer


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("slow", "did not answer within 0.5 s"),
        ("trickle", "did not answer within 0.5 s"),
        ("not JSON", "something that is no JSON"),
        ("redirect", "answers 302"),
        ("error", "answers 500"),
    ],
)
def test_a_server_at_fault_is_named_in_time(
    parts: tuple[Any, Any], fault: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_KEY", "secret-7")
    with ChatServer("vLLM", *parts, fault, key="secret-7") as server:
        client = Client(server.url, "SERVER_KEY", seconds=0.5)
        began = time.monotonic()
        with pytest.raises(NoAnswerError, match=said) as error:
            client.get("/v1/models")
        assert time.monotonic() - began < 2.5
    assert "secret-7" not in str(error.value)


def test_a_wrong_key_names_the_option(parts: tuple[Any, Any]) -> None:
    with (
        ChatServer("vLLM", *parts, key="secret-7") as server,
        pytest.raises(NoAnswerError, match=r"answers 401; name the variable that holds its key: --api-key-env NAME"),
    ):
        Client(server.url).get("/v1/models")


def test_nobody_there() -> None:
    with pytest.raises(NoAnswerError, match=r"http://127.0.0.1:9 cannot be reached: .*refused"):
        Client("http://127.0.0.1:9", seconds=2).get("/v1/models")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://user:key@host"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="--server"):
        Client(url)


def test_an_empty_variable_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(UsageError, match="there is no environment variable NO_KEY"):
        Client("http://127.0.0.1:9", "NO_KEY")
