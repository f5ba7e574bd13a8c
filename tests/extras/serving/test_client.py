"""A request ends in time whatever a server does, follows nobody, and shows its key to nobody."""

from __future__ import annotations

import socket
import threading
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
        ("loading", "answers 503"),
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


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{",
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"[" * 200_000,
    ],
    ids=["another protocol", "breaks off", "endless headers", "too deep"],
)
def test_what_is_no_http_is_told_so(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def once() -> None:
            asked, _ = listening.accept()
            with asked:
                asked.recv(1 << 16)
                asked.sendall(said)

        threading.Thread(target=once, daemon=True).start()
        with pytest.raises(NoAnswerError, match=r"something that is no (HTTP|JSON)"):
            Client(f"http://127.0.0.1:{listening.getsockname()[1]}", seconds=5).get("/props")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "file:///etc/passwd", "http://", "http://user:key@host", "http://127.0.0.1:port",
        "http://[::1", "http://127.0.0.1:8000/a b", "http://127.0.0.1:8000/a\nb", "",
    ],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="--server"):
        Client(url)


def test_an_endpoint_leads_to_its_server() -> None:
    for behind in ("", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/models"):
        assert Client(f" http://127.0.0.1:9{behind}\n").url == "http://127.0.0.1:9"
    assert Client("https://host/openai/v1").url == "https://host/openai"


@pytest.mark.parametrize("key", ["sk-1\nsk-2", "sk-\u2026", "sk-1 sk-2"])
def test_what_is_no_key_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break would be an error of the HTTP library, which quotes the header."""
    monkeypatch.setenv("SERVER_KEY", key)
    with pytest.raises(UsageError, match="SERVER_KEY holds a line break or another") as error:
        Client("http://127.0.0.1:9", "SERVER_KEY")
    assert "sk-" not in str(error.value)


def test_an_empty_variable_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(UsageError, match="there is no environment variable NO_KEY"):
        Client("http://127.0.0.1:9", "NO_KEY")
