"""One JSON request to a server: bounded in time and size, never redirected, and the key is in no message."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from instructft.errors import UsageError

SECONDS = 120.0  # of one request, from its start to the last byte of its answer
MOST_BYTES = 64 << 20  # of one answer
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ENDPOINT = re.compile(r"/v1(/chat/completions|/completions|/models)?$")  # what people copy along with an address


class NoAnswerError(UsageError):
    """A server that is not there, does not answer in time, or answers with something that is no JSON."""


class RefusedError(NoAnswerError):
    """A server that answers a request with an error.

    Args:
        status: its HTTP status, such as 404 for a path that it does not know.
    """

    def __init__(self, message: str, status: int):
        self.status = status
        super().__init__(message)

    @property
    def of_this_request(self) -> bool:
        """Whether it is what was asked that is refused: not who asks, nor that anybody asks now."""
        return self.status not in (401, 403, 407, 408, 429, 502, 503, 504)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address would be handed the key; so a redirect is the server's answer and no more."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Client:
    """A server's address, and how it is asked.

    Args:
        url: of the server, with or without `/v1` or one of its endpoints behind it.
        key_env: the environment variable that holds its API key; None: it wants none.
        seconds: that one request may take.

    >>> Client("http://127.0.0.1:8000/v1/").url
    'http://127.0.0.1:8000'

    Raises:
        UsageError: no address of HTTP, or a variable that holds no key.
    """

    def __init__(self, url: str, key_env: str | None = None, seconds: float = SECONDS):
        url = url.strip()
        try:
            split = urlsplit(url)
            known = split.scheme in ("http", "https") and bool(split.hostname) and split.port != 0
        except ValueError:  # a port that is no number, brackets that do not close
            known = False
        if not known or not url.isprintable() or " " in url:
            raise UsageError(f"--server: found {url!r}, expected an address such as http://127.0.0.1:8000")
        if split.username or split.password or split.query:
            raise UsageError("--server: an address holds no key or password; name its variable with --api-key-env NAME")
        self.url = _ENDPOINT.sub("", url.rstrip("/")).rstrip("/")
        self.seconds = seconds
        self._key = ""
        if key_env is not None:
            self._key = os.environ.get(key_env, "").strip()
            if not self._key:
                raise UsageError(f"--api-key-env: there is no environment variable {key_env}, or it is empty")
            if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
                raise UsageError(
                    f"--api-key-env: {key_env} holds a line break or another character that no key has; expected the "
                    "key alone"
                )
        handlers: list[Any] = [_NoRedirect()]
        if split.hostname in LOOPBACK:  # a proxy is for other machines
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            NoAnswerError, RefusedError: as they say.
        """
        return self._ask(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a server answers to `body`; raises as `get`."""
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        until = time.monotonic() + self.seconds
        try:
            with self._opener.open(request, timeout=self.seconds) as answer:
                content = self._read(answer, until)
        except urllib.error.HTTPError as error:
            with error:
                said = self._hidden(error.read(2000).decode("utf-8", "replace").strip())
            hint = "; name the variable that holds its key: --api-key-env NAME" if error.code in (401, 403) else ""
            raise RefusedError(f"{self.url}{path} answers {error.code}{hint}: {said[:300]}", error.code) from None
        except TimeoutError:
            raise NoAnswerError(
                f"{self.url}{path} did not answer within {self.seconds:g} s (--timeout SECONDS gives it longer)"
            ) from None
        except http.client.HTTPException as error:
            why = self._hidden(f"{type(error).__name__} {str(error).strip()[:80]!r}")
            raise NoAnswerError(
                f"{self.url}{path} answers with something that is no HTTP, or breaks off ({why}). Is it the port of "
                "the server?"
            ) from None
        except (OSError, ValueError) as error:  # URLError is an OSError
            why = self._hidden(str(getattr(error, "reason", error)))
            raise NoAnswerError(f"{self.url} cannot be reached: {why}. Is the server running, and ready?") from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            said = self._hidden(content[:80].decode("utf-8", "replace"))
            raise NoAnswerError(f"{self.url}{path} answers with something that is no JSON: {said!r}") from None

    def _read(self, answer: Any, until: float) -> bytes:
        """The whole answer; one that trickles in is given up at the same time as one that does not come."""
        parts: list[bytes] = []
        total = 0
        while part := answer.read1(1 << 16):
            parts.append(part)
            total += len(part)
            if time.monotonic() > until:
                raise TimeoutError
            if total > MOST_BYTES:
                raise ValueError(f"an answer of more than {MOST_BYTES >> 20} MiB")
        return b"".join(parts)

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text
