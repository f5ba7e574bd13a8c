"""One commit on the Hub: retried, never made twice, never half.

::

    look at the head ─► what differs from it ─► large files first ─► one commit on that head ─► read it back
         ▲                                                              │
         └──────── the head had moved, or the reply was lost ◄──────────┘

After a lost reply the Hub is looked at before anything is sent again: a commit that carries our mark was made. Files
that are there already, byte for byte, are not sent.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from instructft.errors import HubError
from instructft.formatting import first_line
from instructft.hub.files import Leaving, secrets
from instructft.redaction import redact
from instructft.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

TRIES = 6  # of each request
MOVES = 20  # times that others may commit before us, before we give up
WAIT, LONGEST = 1.0, 30.0  # seconds before the second try, doubled each time up to the longest, with jitter
STALLED = 300.0  # seconds without a byte after which a connection counts as broken; the Hub may ask to wait as long
LOGIN = "set HF_TOKEN, or log in with: hf auth login. The token needs the role write"

Pause = Callable[[float], Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Remote:
    """A file on the Hub."""

    size: int  # bytes
    blob: str  # git's SHA-1
    sha256: str | None  # of a large file


Tree = Mapping[str, Remote]  # path in the repository -> file


@dataclass(frozen=True)
class Commit:
    """What a commit left on the Hub.

    Args:
        repo_id: with the name of its owner.
        oid: the commit that holds our files.
        url: of the repository.
        made: False where everything was there already, and no commit was needed.
        sent: files that it added or changed.
        deleted: paths that it deleted.
    """

    repo_id: str
    oid: str
    url: str
    made: bool
    sent: int
    deleted: tuple[str, ...]


def commit(
    repo_id: str,
    leaving: Iterable[Leaving],
    delete: Callable[[Tree, str], Iterable[str]] = lambda tree, head: (),
    *,
    message: str,
    private: bool = True,
    say: Callable[[str], Any] = lambda line: None,
    pause: Pause = time.sleep,
) -> Commit:
    """Bring files to a repository and take others away, in one commit; the repository is created where there is none.

    Args:
        delete: called with what the head holds, and its commit; the paths that go in the same commit.
        message: first line of the commit.
        private: what the repository must be; a new one is made so.
        say: told what is sent.
        pause: sleeps between tries; it may raise to give up.

    Example::

        commit("ada/support", gather(Path("runs/support")).leaving, message="Model of support").made
        # True

    Raises:
        HubError: the Hub cannot be reached, or refuses; the repository is as it was, or holds all of it.
    """
    files = {file.path_in_repo: file for file in leaving}
    mark = f"instructft {__version__} push {uuid.uuid4().hex}"
    api = connect()
    repo_id = open_repository(api, repo_id, private, pause)
    url, sent, gone = f"{api.endpoint}/{repo_id}", 0, []
    asked = False

    def attempt() -> str | None:
        """The commit that holds everything; None where another one came in between."""
        nonlocal asked, sent, gone
        head, tree = look(api, repo_id, pause)
        if asked and (oid := _made(api, repo_id, mark, pause)):  # the reply was lost, the commit was not
            return oid
        add = [file for path, file in files.items() if not same(file, tree.get(path))]
        gone = sorted((set(delete(tree, head)) & set(tree)) - set(files))
        sent = len(add)
        if not add and not gone:
            return head
        operations = _send_large(api, repo_id, add, say, pause)
        asked = True
        try:
            return _commit(api, repo_id, [*operations, *_deletions(gone)], message, mark, head)
        except Exception as error:
            if status_of(error) not in (409, 412):
                raise
            return None

    for move in range(1, MOVES + 1):
        oid = retried(f"committing to {repo_id}", attempt, pause)
        if oid is not None:
            break
        pause(min(WAIT, 0.1 * move))
    else:
        raise HubError(f"committing to {repo_id}: {MOVES} times another commit came first; try again later")
    if not sent and not gone:
        return Commit(repo_id, oid, url, False, 0, ())
    _require_there(api, repo_id, oid, files, gone, pause)
    return Commit(repo_id, oid, url, True, sent, tuple(gone))


# --------------------------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------------------------


def limit_waits() -> None:
    """From now on no request to the Hub waits for ever on a connection on which nothing comes.

    Nor those of other libraries: the client has no limit, and some calls name none (`repo_info`, huggingface_hub 2.4).
    """
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)


def _limit(request: Any) -> None:
    limits = {name: STALLED if value is None else value for name, value in request.extensions["timeout"].items()}
    request.extensions = {**request.extensions, "timeout": limits}


def retried(
    what: str, call: Callable[[], Result], pause: Pause = time.sleep, also: type[Exception] | tuple[()] = ()
) -> Result:
    """The result of a request that is safe to repeat, retried while the Hub is out of order or out of reach.

    Args:
        what: for the message, `creating ada/support`.
        pause: sleeps between tries; it may raise to give up.
        also: refusals that the caller deals with.

    Raises:
        HubError: it was refused, or failed `TRIES` times; nothing secret is in the message.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt

    retrying = Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_attempt(TRIES),
        wait=lambda state: _retry_after(cast(Any, state.outcome).exception()) or _spread(state.attempt_number),
        sleep=pause,
        before=lambda state: limit_waits(),
        reraise=True,
    )
    try:
        return retrying(call)
    except HubError:
        raise
    except Exception as error:
        if also and isinstance(error, also):
            raise
        if _is_transient(error):
            raise HubError(f"{what} failed {TRIES} times, last with: {reason_of(error)}; try again later") from error
        raise HubError(refusal(error, what)) from error


# not the process's own numbers, as `tenacity` would: a run draws from those, and its checkpoints hold where they stand
_CHANCE = random.Random()


def _spread(tried: int) -> float:
    """Seconds to wait after so many tries; two that fail together do not come back together."""
    return min(WAIT * 2.0 ** (tried - 1) + _CHANCE.uniform(0.0, WAIT), LONGEST)


def _is_transient(error: BaseException) -> bool:
    """Whether an error may be over soon: the Hub out of order, too many requests, a connection that broke."""
    if isinstance(error, HubError):  # has been retried
        return False
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
            return min(float(value), STALLED)
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


def require_login(repo_id: str = "") -> None:
    """See that the Hub may be asked and that there is a login; no Hub is asked.

    Args:
        repo_id: whose owner, where it names none, follows from the login.

    Raises:
        HubError: there is no login, or the network is switched off.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise HubError("the Hub cannot be reached: HF_HUB_OFFLINE=1 is set; unset it to push")
    if not get_token():
        owner = f"{repo_id} names no owner: write OWNER/{repo_id}. And " if repo_id and "/" not in repo_id else ""
        raise HubError(f"{owner}there is no access token for the Hub; {LOGIN}")


def connect() -> HfApi:
    """The Hub, as this process is logged in to it.

    Raises:
        HubError: there is no login, or the network is switched off.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    require_login()
    disable_progress_bars()  # they would write into the training log
    return HfApi(library_name="instructft", library_version=__version__)


def open_repository(api: HfApi, repo_id: str, private: bool, pause: Pause = time.sleep) -> str:
    """Find or create a repository; its id with the owner's name.

    Raises:
        HubError: it is public and should be private; it cannot be created, or read.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if "/" not in repo_id:
            owner = retried("asking who is logged in", lambda: api.whoami()["name"], pause)
            repo_id = f"{owner}/{repo_id}"
        for attempt in (1, 2):
            try:
                info = retried(
                    f"reading {repo_id}", lambda: api.repo_info(repo_id), pause, also=RepositoryNotFoundError
                )
                break
            except RepositoryNotFoundError as error:
                if attempt == 2 or status_of(error) == 401:
                    raise HubError(refusal(error, f"reading {repo_id}")) from error
            make = lambda: api.create_repo(repo_id, private=private, exist_ok=True)  # noqa: E731
            retried(f"creating {repo_id}", make, pause)
    except HFValidationError as error:
        raise HubError(f"{repo_id} is no name for a repository on the Hub; expected name or org/name") from error
    if private and not info.private:
        raise HubError(
            f"{repo_id} is public, and this push is private: nothing was uploaded. Name another repository, or say "
            "that it may be public: --public, in a recipe hub.private: false"
        )
    return repo_id


def look(
    api: HfApi, repo_id: str, pause: Pause = time.sleep, revision: str | None = None
) -> tuple[str, dict[str, Remote]]:
    """The head of a repository, or the revision given, and every file in it."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    def read() -> tuple[str, dict[str, Remote]]:
        head = revision or api.repo_info(repo_id).sha or ""
        try:
            found = list(api.list_repo_tree(repo_id, recursive=True, revision=head or None))
        except EntryNotFoundError:  # a repository without a file
            found = []
        files = [entry for entry in found if isinstance(entry, RepoFile)]
        return head, {f.path: Remote(f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in files}

    return retried(f"reading {repo_id}", read, pause)


def same(file: Leaving, remote: Remote | None) -> bool:
    """Whether the Hub holds this file, byte for byte."""
    if remote is None or remote.size != file.size:
        return False
    return remote.sha256 == file.sha256 if remote.sha256 else remote.blob == file.blob


# --------------------------------------------------------------------------------------------------------------------
# The commit
# --------------------------------------------------------------------------------------------------------------------


def _send_large(
    api: HfApi, repo_id: str, add: list[Leaving], say: Callable[[str], Any], pause: Pause
) -> list[CommitOperationAdd]:
    """The additions of a commit, the contents of large files sent ahead.

    One by one: the library sends several in threads of a pool, for which a process that was told to end would wait.
    """
    from huggingface_hub import CommitOperationAdd

    operations = []
    for file in add:
        pause(0)  # a moment to give up
        content = file.content if isinstance(file.content, bytes) else str(file.content)
        operation = CommitOperationAdd(file.path_in_repo, content)
        operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # what was scanned, and nothing else
        if not isinstance(file.content, bytes) or file.path_in_repo.endswith((".safetensors", ".pt", ".png", ".pdf")):
            if not isinstance(file.content, bytes):
                say(f"uploading {file.path_in_repo}, {file.size / 2**20:,.0f} MiB")
            send = lambda one=operation: api.preupload_lfs_files(repo_id, [one], free_memory=False)  # noqa: E731
            retried(f"uploading {file.path_in_repo} to {repo_id}", send, pause)
        operations.append(operation)
    return operations


def _commit(api: HfApi, repo_id: str, operations: list[Any], message: str, mark: str, head: str) -> str:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about the card
        info = api.create_commit(
            repo_id, operations, commit_message=message, commit_description=mark, parent_commit=head or None
        )
    return str(info.oid)


def _deletions(paths: Iterable[str]) -> list[Any]:
    from huggingface_hub import CommitOperationDelete

    return [CommitOperationDelete(path, is_folder=False) for path in paths]


def _made(api: HfApi, repo_id: str, mark: str, pause: Pause) -> str | None:
    """The commit that carries our mark, if the Hub has made it."""
    commits = retried(f"reading the commits of {repo_id}", lambda: api.list_repo_commits(repo_id), pause)
    return next((one.commit_id for one in commits if mark in f"{one.title}\n{one.message}"), None)


def _require_there(
    api: HfApi, repo_id: str, oid: str, files: Mapping[str, Leaving], gone: Iterable[str], pause: Pause
) -> None:
    """Read a commit back: every file with our size and hash, and what was deleted gone."""
    _, tree = look(api, repo_id, pause, revision=oid)
    wrong = [path for path, file in files.items() if not same(file, tree.get(path))]
    wrong += [path for path in gone if path in tree]
    if wrong:
        raise HubError(
            f"{repo_id} at {oid[:8]} is not what was sent: {', '.join(wrong[:3])} ({len(wrong)} in all) differ. A "
            ".gitignore in the repository leaves files out; push again, or to another repository"
        )
