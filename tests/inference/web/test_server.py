"""The page's server: here only, for its own page only, and nobody else is asked for anything."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request

import pytest

from instructft.errors import UsageError
from instructft.inference.web.server import Guard, free_port


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port: {number} cannot be used"):
            free_port(number)
    assert free_port(number) == number
    assert 7860 <= free_port(None) < 7960


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
