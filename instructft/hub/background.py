"""Uploads during training: a thread that takes the newest sealed checkpoint, and at the end the model.

::

    training    ──■──────■──────■──────────────■─ sealed ──► links, so that retention cannot take it away
                  │      └─ newer: this one is dropped ──┐
    the thread    └─ uploading ─────────────────► next: ─┴─ uploading ──►

Nothing that happens here ends a run: what could not be pushed is said, with the command that would push it.

`HfApi.run_as_future` does not serve: Python waits for the threads of its pool at exit (a run that was told to end was
held 8.6 s by a job of 8 s), and its queue keeps every checkpoint in place of the newest. This thread is a daemon.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints import manifest
from instructft.errors import InstructftError
from instructft.formatting import clock
from instructft.hub import commit
from instructft.hub.commit import reason_of, retried
from instructft.hub.push import Pushed, clean_place, push_checkpoint, push_to_hub
from instructft.redaction import without_places_by_key

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe

UPLOADS = ".upload"  # in the run folder: links to the files of checkpoints that wait or are on their way
STOP_LIMIT = 20.0  # seconds that a run which was told to stop waits for an upload
# Seconds that a run which has reached its end waits for all that is left, and bytes a second that it may take beyond.
FINAL_LIMIT, SLOWEST = 900.0, 1 << 20
_LENGTH = ("train.max_steps", "train.num_train_epochs")  # of a run these may grow


@dataclass(frozen=True)
class Status:
    """How the uploads of a run ended.

    Args:
        pushed: the final model is on the Hub, or of a run that was stopped its last checkpoint.
        url: of the repository, if anything was pushed.
        reason: why not; with `pushed`, what became of the last checkpoint.
        command: that would push what is missing.
    """

    pushed: bool
    url: str | None = None
    reason: str | None = None
    command: str | None = None

    def __str__(self) -> str:
        lines = [f"pushed {self.url}"] if self.pushed else []
        lines += [f"not pushed: {self.reason}"] if self.reason else []
        lines += [f"  {self.command}"] if self.command else []
        return "\n".join(lines)


@dataclass(frozen=True)
class _Waiting:
    folder: Path  # the links
    original: Path
    tokens: int
    loss: float | None
    keep: frozenset[str]


class _Stopped(BaseException):
    """Ends an upload between two requests; no `except Exception` on its way takes it for a fault of the Hub."""


class Publisher:
    """Uploads what `hub.push` asks for. Only the first process has one.

    Args:
        run: the run folder.
        say: told what was pushed and what was not.

    Example::

        publisher = Publisher(recipe, Path(recipe.output_dir), print)
        publisher.checkpoint_sealed(Path("runs/a/checkpoint-40"), 40, 512_000, 1.2345, ["checkpoint-40"])
        print(publisher.finish(final=True))
        # pushed https://huggingface.co/ada/a
    """

    def __init__(self, recipe: Recipe, run: Path, say: Callable[[str], Any]):
        self._hub, self._run, self._say = recipe.hub, run, say
        self._changed = threading.Condition()
        self._next: _Waiting | None = None
        self._busy = self._ending = self._stop = False
        self._thread: threading.Thread | None = None
        self._last: Pushed | None = None
        self._failed: tuple[Path, str] | None = None  # the newest checkpoint, if it could not be pushed
        self._known: dict[tuple[str, str], Any] = {}  # manifests on the Hub, by path and content
        shutil.rmtree(run / UPLOADS, ignore_errors=True)  # of a process that was killed

    # -- called by training -------------------------------------------------------------------------------------------

    def checkpoint_sealed(self, folder: Path, step: int, tokens: int, loss: float | None, keep: Iterable[str]) -> None:
        """Have a sealed checkpoint uploaded, as soon as the one before it is; never raises, never waits.

        Args:
            tokens: trained so far, by all processes.
            loss: the last one logged.
            keep: names of the checkpoints that the run folder still holds; others of this run go on the Hub too.
        """
        if self._hub.push != "checkpoints":
            return
        try:
            aside = self._run / UPLOADS / f"{time.monotonic_ns()}" / folder.name
            _link(folder, aside)
            waiting = _Waiting(aside, folder, tokens, loss, frozenset({*keep, folder.name}))
            with self._changed:
                dropped, self._next = self._next, waiting
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="instructft-upload", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
            if dropped:
                _remove(dropped.folder)
        except Exception as error:
            self._fail(folder, f"{type(error).__name__}: {error}")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to upload; False if that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._next and not self._busy, timeout)

    def finish(self, final: bool) -> Status:
        """Wait for what is under way; push the final model, if the run has reached its end. Never raises.

        Args:
            final: the run folder holds its final model. Otherwise the run was stopped or failed, and the process is
                held for `STOP_LIMIT` seconds at most.
        """
        try:
            if not final:
                return self._stopped(late=not self._join(STOP_LIMIT))
            if self._hub.push == "never":
                return Status(False, reason="hub.push is never", command=self._command(self._run))
            return self._finished()
        except Exception as error:
            return Status(False, self._last.url if self._last else None, _reason(error), self._command(self._run))
        finally:
            if not (self._thread and self._thread.is_alive()):
                shutil.rmtree(self._run / UPLOADS, ignore_errors=True)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (waiting := self._take()) is not None:
            try:
                self._last = self._push(waiting)
                self._failed = None
                self._say(f"{waiting.original.name}: {self._last}")
            except _Stopped:
                return
            except Exception as error:
                self._fail(waiting.original, _reason(error))
            finally:
                _remove(waiting.folder)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _take(self) -> _Waiting | None:
        """The checkpoint to upload next, waited for; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._next or self._ending)
            waiting, self._next = (None if self._stop else self._next), None
            self._busy = waiting is not None
            return waiting

    def _push(self, waiting: _Waiting) -> Pushed:
        return push_checkpoint(
            waiting.folder,
            str(self._hub.repo_id),
            clean_place(self._hub.path_in_repo),
            waiting.tokens,
            waiting.loss,
            retired=lambda tree, head: self._retired(tree, head, waiting),
            private=self._hub.private,
            pause=self._pause,
        )

    def _retired(self, tree: commit.Tree, head: str, waiting: _Waiting) -> Iterable[str]:
        """The files on the Hub of those checkpoints of this run that are no longer kept."""
        place = clean_place(self._hub.path_in_repo)
        own = _made_of(manifest.read_manifest(waiting.folder)["identity"], self._run)
        for path, file in tree.items():
            folder, _, name = path.rpartition("/")
            above, _, last = folder.rpartition("/")
            if name != manifest.MANIFEST or above != place or not last.startswith("checkpoint_"):
                continue
            known = self._manifest(path, file.blob, head)
            try:
                of_this_run = _made_of(known["identity"], self._run) == own
                gone = of_this_run and f"checkpoint-{known['step']}" not in waiting.keep
            except (KeyError, TypeError, AttributeError):
                continue  # not ours
            if gone:
                yield path
                yield from (f"{folder}/{inner}" for inner in known["files"])

    def _manifest(self, path: str, blob: str, head: str) -> Any:
        """A checkpoint's manifest on the Hub; {} where it is not one."""
        if (path, blob) not in self._known:
            api, repo_id = commit.connect(), str(self._hub.repo_id)
            repo_id = commit.open_repository(api, repo_id, self._hub.private, self._pause)
            with tempfile.TemporaryDirectory() as place:
                fetch = lambda: api.hf_hub_download(repo_id, path, revision=head, local_dir=place)  # noqa: E731
                text = Path(retried(f"reading {path}", fetch, self._pause)).read_text(encoding="utf-8")
            try:
                self._known[path, blob] = json.loads(text)["manifest"]
            except (ValueError, KeyError, TypeError):
                self._known[path, blob] = {}
        return self._known[path, blob]

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._stop, seconds):
                raise _Stopped

    def _fail(self, folder: Path, reason: str) -> None:
        if self._failed is None or self._failed[1] != reason:  # the same trouble again is no news
            self._say(f"{folder.name} not pushed: {reason}. Training continues; the next checkpoint is tried again")
        self._failed = (folder, reason)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _join(self, timeout: float | None) -> bool:
        """`wait`, and let the thread end."""
        if self._thread is None:
            return True
        done = self.wait(timeout)
        with self._changed:
            self._ending = True
            self._stop = not done
            self._changed.notify_all()
        self._thread.join(None if done else 1.0)
        return done

    def _finished(self) -> Status:
        """Push the final model, in a thread that is left behind where that takes too long."""
        size = sum(path.stat().st_size for path in self._run.iterdir() if path.is_file())
        limit = FINAL_LIMIT + size / SLOWEST
        until = time.monotonic() + limit
        ended: list[Pushed | Exception] = []

        def push() -> None:
            try:
                ended.append(push_to_hub(
                    self._run, str(self._hub.repo_id), private=self._hub.private,
                    path_in_repo=self._hub.path_in_repo, say=self._say, checked=True,
                    pause=self._pause,
                ))  # fmt: skip
            except _Stopped:
                return
            except Exception as error:
                ended.append(error)

        if self._join(limit):
            last = threading.Thread(target=push, name="instructft-push", daemon=True)
            last.start()
            last.join(max(until - time.monotonic(), 0.0))
        url = self._last.url if self._last else None
        if not ended:
            with self._changed:
                self._stop = True
                self._changed.notify_all()
            return Status(False, url, f"the Hub did not take it in {clock(limit)}", self._command(self._run))
        if isinstance(ended[0], Exception):
            raise ended[0]
        missing = f"{self._failed[0].name}: {self._failed[1]}" if self._failed else None
        return Status(True, ended[0].url, missing, self._command(self._failed[0]) if self._failed else None)

    def _stopped(self, late: bool) -> Status:
        if self._hub.push != "checkpoints":
            return Status(False, reason="the run has not reached its end; its model is pushed when it has")
        newest = next((path for path in manifest.folders(self._run) if manifest.kind(path) == "sealed"), None)
        if late:
            what = f"{newest.name} was" if newest else "a checkpoint was"
            return Status(False, self._last.url if self._last else None, f"{what} still on its way when the run ended",
                          self._command(newest or self._run))  # fmt: skip
        if self._failed:
            return Status(False, None, f"{self._failed[0].name}: {self._failed[1]}", self._command(self._failed[0]))
        if self._last is None:
            return Status(False, reason="there is no checkpoint yet")
        return Status(True, self._last.url)

    def _command(self, what: Path) -> str:
        words = ["instructft", "push", str(what), str(self._hub.repo_id or "REPO_ID")]
        words += [] if self._hub.private else ["--public"]
        words += ["--path-in-repo", self._hub.path_in_repo] if self._hub.path_in_repo else []
        return shlex.join(words)


def _made_of(identity: Any, run: Path) -> dict[str, Any]:
    """What makes two checkpoints those of one run, wherever it was resumed."""
    told = without_places_by_key(identity, [run])
    return {key: value for key, value in told.items() if key not in _LENGTH}


def _link(folder: Path, aside: Path) -> None:
    """A second set of names for a checkpoint's files; copies where the disk knows no links. The manifest comes last."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    for name in sorted(names, key=lambda name: name.as_posix() == manifest.MANIFEST):
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, aside / name)
        except OSError:
            shutil.copy2(folder / name, aside / name)


def _remove(aside: Path) -> None:
    shutil.rmtree(aside.parent, ignore_errors=True)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, InstructftError) else reason_of(error)
