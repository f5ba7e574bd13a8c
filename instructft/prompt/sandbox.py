"""Runs what comes from elsewhere, a chat template, within limits of time and memory.

Jinja's sandbox keeps a template from the machine's files and from Python's insides; it does not keep it from a loop
without end or from a text of a terabyte. So a foreign template is compiled and rendered in a child of this process
(`Helper`), which the system stops: in every thread, on every conversation, while it is compiled too. Where the system
has no `fork` (Windows) nothing of this is done.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

SECONDS, MIB = 10, 1024  # of the processor, and above what the process holds
_PATIENCE = 12  # times these seconds of the clock: a child that does not even use the processor is stuck
_MOST = 1 << 28  # bytes of an answer
_CHILDREN = 4  # of this process that wait at a time: each holds memory that its parent has changed since
_IDLE = 5  # seconds without a question, behind which a child ends: what it holds may be as large as a model


class Helper:
    """A child that calls a function on what it is given; it is stopped where that breaks a limit, and made anew.

    >>> helper = Helper(lambda n: [None for _ in iter(int, n)])
    >>> helper(1, seconds=1)
    Traceback (most recent call last):
    TimeoutError
    """

    def __init__(self, work: Callable[[Any], Any], mib: int = MIB):
        self._work, self._mib = work, mib
        self._lock, self._owner = threading.Lock(), 0
        self._end: Callable[[], object] | None = None

    def __getstate__(self) -> tuple[Callable[[Any], Any], int]:
        return self._work, self._mib  # a copy makes a child of its own

    def __setstate__(self, state: tuple[Callable[[Any], Any], int]) -> None:
        Helper.__init__(self, *state)

    def __call__(self, given: Any, seconds: float = SECONDS) -> Any:
        """What the function gives for it; both must be plain values.

        Raises:
            TimeoutError, MemoryError: it took more than it may.
            Exception: of the function; or the child has ended otherwise.
        """
        if self._owner != os.getpid():  # a fork of its owner makes one of its own
            self._lock, self._end = threading.Lock(), None
            self._owner = os.getpid()
        with self._lock:
            failed, found = self._asked(given, seconds)
        if failed:
            raise found
        return found

    def _asked(self, given: Any, seconds: float) -> tuple[bool, Any]:
        """What the child answers; one that ended while it had nothing to do is made anew."""
        while True:
            anew, sent = self._end is None, False
            if anew:
                self._begin()
            try:
                self._pipe.send((given, seconds))
                sent = True
                if not self._pipe.poll(seconds * _PATIENCE):
                    self._stop(kill=True)
                    raise TimeoutError
                answer: tuple[bool, Any] = self._pipe.recv()
                return answer
            except (EOFError, ConnectionError):
                status = self._stop()
                if not anew and (status == 0 or not sent):
                    continue
                known = {-signal.SIGXCPU: TimeoutError(), -signal.SIGKILL: MemoryError(), 1: MemoryError()}
                raise known.get(status, ChildProcessError(f"its process ended with {status}")) from None
            except BaseException:  # a signal in between, or no answer: what comes later must not be taken for the next
                if self._end is not None:
                    self._stop(kill=True)
                raise

    def _begin(self) -> None:
        waiting = [one for one in list(_LIVE) if one._owner == os.getpid() and one is not self]
        for one in waiting[: max(0, len(waiting) - _CHILDREN + 1)]:
            if one._lock.acquire(blocking=False):  # it begins anew when it is asked
                try:
                    if one._end is not None:
                        one._stop(kill=True)
                finally:
                    one._lock.release()
        ours, theirs = Pipe()
        with warnings.catch_warnings():  # of threads, which the child does not have and does not need
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _serve(theirs, self._work, self._mib)
        theirs.close()
        self._child, self._pipe = child, ours
        self._end = weakref.finalize(self, _end, ours, child, os.getpid())
        _LIVE[self] = None

    def _stop(self, kill: bool = False) -> int:
        """End the child; how it ended."""
        if kill:
            os.kill(self._child, signal.SIGKILL)
        self._pipe.close()
        if isinstance(self._end, weakref.finalize):
            self._end.detach()
        self._end = None
        _LIVE.pop(self, None)
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])


_LIVE: weakref.WeakKeyDictionary[Helper, None] = weakref.WeakKeyDictionary()  # those with a child, the oldest first


def _end(pipe: Connection, child: int, owner: int) -> None:
    """End a child that nobody needs any more."""
    if os.getpid() == owner:
        pipe.close()
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _serve(pipe: Connection, work: Callable[[Any], Any], mib: int) -> None:
    """The child: never returns, and ends when the other end of its pipe is closed."""
    try:
        import resource

        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # they are for its parent
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        # of other helpers above all: they would not see their parent end
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, pipe.fileno() + 4096)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_memory(mib)
        while pipe.poll(_IDLE):
            given, seconds = pipe.recv()
            used = time.process_time()
            most = max(int(used + seconds), int(used) + 1)  # the system counts whole seconds
            resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
            try:
                answer = pickle.dumps((False, work(given)))
            except MemoryError:
                os._exit(1)
            except Exception as error:
                answer = pickle.dumps((True, error))
                with contextlib.suppress(Exception):
                    pickle.loads(answer)
                    pipe.send_bytes(answer)
                    continue
                answer = pickle.dumps((True, ValueError(f"{type(error).__name__}: {error}")))
            if len(answer) > _MOST:
                os._exit(1)
            pipe.send_bytes(answer)
    finally:
        os._exit(0)


def limit_memory(mib: int) -> None:
    """Let this process have so much more than it holds; on Linux, which says what that is."""
    import resource

    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as pages:
        held = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (mib << 20), resource.RLIM_INFINITY))


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what takes longer, in seconds of the processor; in the main thread only, where signals arrive.

    Raises:
        TimeoutError: it did.
    """
    here = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not here or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:  # somebody else is timing
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before if before is not None else signal.SIG_DFL)
