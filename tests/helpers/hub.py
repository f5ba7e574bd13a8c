"""A small Hub on 127.0.0.1, its state in memory, that the real `huggingface_hub` and `datasets` talk to.

Two servers, as with the real one: the Hub itself, which knows tokens, and the storage of large files at another
address (another port), where the Hub redirects downloads and sends uploads, and which must never see a token:

    client ── /api/…, /{repo}/resolve/… ──> Hub ── 302, LFS "href" ──> client ── GET, PUT ──> storage

What it holds to, because the real one does: a new repo has a first commit with `.gitattributes`; who has no access
sees a private repo as missing (401 without a token, 404 with one); users write under their own name alone (403);
`parentCommit` must be the head (412); a commit may name a large file only after its bytes have arrived (400).

What `huggingface_hub` 2.4 retries by itself (`test_what_the_client_retries_by_itself` holds it to this):

    503, 429, no reply   preupload, lfs_batch, lfs_upload, lfs_verify, tree, commits: 6 requests, 1, 2, 4, 8, 8 s apart
    never                whoami, create, info, paths_info, refs, validate, **commit**: these belong to the caller
    resolve, HEAD        503 and 429 as above after one request more; no reply: never
    resolve, GET         429 as above; no reply or cut: 6 requests, 1 s apart, each from the last full chunk (10 MiB);
                         503: never (but `HfFileSystem`, and so data sets that stream: all as in the first line)
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import string
import threading
import traceback
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub_routes import ROUTES, TABLE, Work
from tests.helpers.hub_store import LARGE, Blob, Commit, Refusal, Repo, Request, is_large, said

KINDS = ("503", "429", "drop", "lost", "reset_midway")


class LocalHub:
    """A Hub on 127.0.0.1. `token` may write under `tester/`; `read_token` is the same user's and may not write.

    Set `page` to see pagination, `part_bytes` to have larger files uploaded in parts, `retry_after` to send that header
    with 503 and 429, `before` to be called with each request before any work is done (to kill a child just then).

    Example:
        >>> with LocalHub() as hub:
        ...     hub.put("tester/words", {"train.jsonl": '{"text": "a"}\\n'}, type="dataset")
    """

    def __init__(self, port: int = 0) -> None:
        letters = random.SystemRandom().choices
        self.token, self.read_token, self.stranger_token = (
            "hf_" + "".join(letters(string.ascii_letters, k=34)) for _ in range(3)
        )
        self.tokens = {
            self.token: ("tester", "write"),
            self.read_token: ("tester", "read"),
            self.stranger_token: ("stranger", "write"),
        }
        self.requests: list[Request] = []
        self.errors: list[str] = []  # tracebacks of this server's own mistakes
        self.page, self.part_bytes, self.retry_after = 1000, 0, -1
        self.before: Callable[[Request], None] | None = None
        self.repos: dict[tuple[str, str], Repo] = {}
        self._faults: dict[str, list[list[Any]]] = {}
        self._signature = "".join(letters(string.digits, k=12))
        self._lock = threading.RLock()
        self._servers = [_Server(self, port), _Server(self, 0)]
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> LocalHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.stop()

    # What tests say and ask

    def create(self, repo_id: str, type: str = "model", private: bool = False) -> None:
        repo = self.repos[type, repo_id] = Repo(type, repo_id, private)
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE)
        repo.commit({".gitattributes": Blob(attributes.encode(), False)}, "initial commit")

    def put(
        self,
        repo_id: str,
        files: dict[str, bytes | str | Path],
        type: str = "model",
        message: str = "put",
        delete: Iterable[str] = (),
    ) -> str:
        """One commit on `main` of a repo that is made where it is missing. Returns its oid (40 hex)."""
        with self._lock:
            if (type, repo_id) not in self.repos:
                self.create(repo_id, type)
            repo = self.repos[type, repo_id]
            blobs = {path: blob for path, blob in repo.at("main").blobs.items() if path not in set(delete)}
            for path, given in files.items():
                data = (
                    given.read_bytes()
                    if isinstance(given, Path)
                    else given.encode()
                    if isinstance(given, str)
                    else given
                )
                blobs[path] = Blob(data, is_large(path, len(data)))
                if blobs[path].lfs:
                    repo.stored[blobs[path].sha256] = data
            return repo.commit(blobs, message).oid

    def files(self, repo_id: str, type: str = "model", revision: str = "main") -> dict[str, bytes]:
        return self.repos[type, repo_id].at(revision).files

    def commits(self, repo_id: str, type: str = "model") -> list[Commit]:
        return self.repos[type, repo_id].history("main")

    def fault(self, route: str, kind: str, times: int = 1) -> None:
        """The next `times` requests of `route` fail so; faults of one route queue up.

        "drop": closed with no reply, nothing done; "lost": the work is done, then closed; "reset_midway": half of the
        reply's body, then closed (a HEAD, a redirect and an empty reply, as that of "lfs_upload", do not count).
        """
        if route not in ROUTES or kind not in KINDS:
            raise ValueError(f"no such fault: {route!r}, {kind!r}; routes {sorted(ROUTES)}, kinds {KINDS}")
        with self._lock:
            self._faults.setdefault(route, []).append([kind, times])

    def pending(self) -> dict[str, int]:
        """Faults that have not happened yet, by route."""
        left = {route: sum(times for _, times in queue) for route, queue in self._faults.items()}
        return {route: times for route, times in left.items() if times}

    def environment(self, home: Path) -> dict[str, str]:
        """What a child process needs on top of `os.environ` to talk to this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
        }

    # What a request meets

    def _take(self, route: str, kinds: tuple[str, ...]) -> str | None:
        with self._lock:
            queue = self._faults.get(route, [])
            while queue and queue[0][1] <= 0:
                queue.pop(0)
            if not queue or queue[0][0] not in kinds:
                return None
            queue[0][1] -= 1
            return str(queue[0][0])

    def _user(self, request: Request) -> tuple[str | None, str]:
        given = request.headers.get("authorization")
        if given is None:
            return None, ""
        known = self.tokens.get(given.removeprefix("Bearer "))
        if known is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return known

    def _repo(self, request: Request, type: str, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        user, role = self._user(request)
        repo = self.repos.get((type, repo_id))
        owner = user is not None and repo_id.startswith(f"{user}/")
        if repo is None or (repo.private and not owner):
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not (owner and role == "write"):
            raise Refusal(403, "Forbidden: you must have write access to content in this repo.")
        if content and repo.gated and not owner:
            raise Refusal(401 if user is None else 403, f"Access to {type} {repo_id} is restricted.", "GatedRepo")
        return repo

    def work(self, request: Request) -> Work | None:
        """Finds what a request asks for, and notes its route. None where there is no such route."""
        target = urlsplit(request.path)
        query = {key: values[-1] for key, values in parse_qs(target.query).items()}
        for route, method, pattern, name in TABLE:
            match = re.fullmatch(pattern, target.path)
            if match and request.method in method.split("|"):
                request.route = route
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return Work(self, request, name, groups, query)
        return None


class _Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def __init__(self, hub: LocalHub, port: int) -> None:
        self.hub, self.open = hub, set[socket.socket]()
        super().__init__(("127.0.0.1", port), _Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def stop(self) -> None:
        """Stops listening and closes kept-alive connections, so that no later test is answered by this Hub."""
        self.shutdown()
        self.thread.join()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the server, and says nothing on the test's screen."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for headers and body: without it each reply waits 40 ms for the delayed ACK
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Quiet: `LocalHub.requests` is the log."""

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _serve(self) -> None:
        hub, headers = self.server.hub, {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self._body(), "unknown")
        try:
            work = hub.work(request)
            hub.requests.append(request)
            if hub.before:
                hub.before(request)
            reply = work.run() if work else said({"error": f"No such route: {self.command} {self.path}"}, 404)
        except Exception:
            hub.errors.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
            reply = said({"error": "the Hub of the tests failed; see `hub.errors`"}, 500)
        request.status = reply.status
        if not reply.status:
            return self._hang_up()
        self.send_response(reply.status)
        for key, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if reply.status < 300 and len(reply.body) > 1 and hub._take(request.route, ("reset_midway",)):
            self.wfile.write(reply.body[: len(reply.body) // 2])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(reply.body)
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


REPO_ID = "tester/model"


def push(folder: Path, repo_id: str = REPO_ID, **more: Any) -> Any:
    """`push_to_hub` that says nothing."""
    from instructft.hub.push import push_to_hub

    return push_to_hub(folder, repo_id, say=lambda line: None, **more)


def own(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a repository without those of the Hub."""
    return {name: content for name, content in files.items() if name != ".gitattributes"}
