"""Requests to the Hub that are tried again while it is out of order or out of reach; a refusal is one clear message."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from instructft.errors import HubError
from instructft.formatting import first_line
from instructft.hub.files import secrets
from instructft.redaction import redact

TRIES = 6  # of each request
WAIT, LONGEST = 1.0, 30.0  # seconds before the second try, doubled each time up to the longest
STALLED = 300.0  # seconds without a byte after which a connection counts as broken
LOGIN = "set HF_TOKEN, or log in with: hf auth login. The token needs the role write"

Pause = Callable[[float], Any]
Result = TypeVar("Result")


def patiently(
    what: str, call: Callable[[], Result], pause: Pause = time.sleep, also: type[Exception] | tuple[()] = ()
) -> Result:
    """The result of a request that is safe to repeat, tried again while the Hub is out of order or out of reach.

    Args:
        what: for the message, `creating ada/support`.
        also: errors that the caller deals with.

    Raises:
        HubError: it was refused, or failed `TRIES` times.
    """
    for tries in range(1, TRIES + 1):
        time_out()
        try:
            return call()
        except HubError:
            raise
        except Exception as error:
            if also and isinstance(error, also):
                raise
            wait_or_give_up(error, tries, what, pause)
    raise AssertionError("unreachable")


def time_out() -> None:
    """The library's client waits for ever on a connection on which nothing comes."""
    from huggingface_hub import get_session

    get_session().timeout = STALLED


def wait_or_give_up(error: Exception, tries: int, what: str, pause: Pause) -> None:
    """Wait before the next try, longer each time, or as long as the Hub asks for.

    Args:
        tries: that failed so far.

    Raises:
        HubError: another try would not help, or `TRIES` of them have failed.
    """
    if not _passes(error):
        raise HubError(refusal(error, what)) from error
    if tries >= TRIES:
        raise HubError(f"{what} failed {tries} times, last with: {reason_of(error)}; try again later") from error
    pause(_retry_after(error) or min(WAIT * 2 ** (tries - 1), LONGEST))


def _passes(error: BaseException) -> bool:
    """Whether an error may be over soon: the Hub out of order, too many requests, a connection that broke."""
    status = status_of(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    return any(
        isinstance(one, ConnectionError | TimeoutError)
        or type(one).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
        or type(one).__name__ == "JSONDecodeError"  # the reply of something that stands before the Hub
        for one in _causes(error)
    )


def _causes(error: BaseException) -> Iterable[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a reply that was an error."""
    for one in _causes(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, as far as we are willing to."""
    for one in _causes(error):
        headers = getattr(getattr(one, "response", None), "headers", None)
        value = str(headers.get("retry-after", "")) if headers is not None else ""
        if value.strip().isdigit():
            return min(float(value), 10 * LONGEST)
    return None


def refusal(error: BaseException, what: str) -> str:
    """The message for a request that the Hub refused, with the way out; nothing secret is in it."""
    status = status_of(error)
    if status == 401:
        return f"{what}: the Hub does not know this access token (401); {LOGIN}"
    if status in (403, 404):
        why = "does not allow it" if status == 403 else "has no such repository, or this token may not see it"
        return f"{what}: the Hub {why} ({status}). Check the name; {LOGIN}"
    return f"{what} failed: {reason_of(error)}"


def reason_of(error: BaseException) -> str:
    """An error in one line, without anything secret."""
    text = first_line(error)
    for token in secrets():
        text = text.replace(token, "hf_…")
    return redact(text)
