"""Runs what comes from elsewhere, a chat template, within limits of time and memory.

Jinja's sandbox keeps a template from the machine's files and from Python's insides; it does not keep it from a loop
without end or from a text of a terabyte. A template is first tried in a child of this process, which the system stops;
what it does later, on other conversations, is timed. Where the system has no `fork` (Windows) neither is done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator

SECONDS, MIB = 10, 1024  # of the processor, and above what the process holds


def breaks(work: Callable[[], object], seconds: int = SECONDS, mib: int = MIB) -> str:
    """Try `work` in a child; which limit it broke, in words, or nothing. Its own errors are for the caller to meet.

    >>> breaks(lambda: [None for _ in iter(int, 1)], seconds=1)
    'ran for more than 1 s'
    """
    if not hasattr(os, "fork"):
        return ""
    with warnings.catch_warnings():  # of threads, which the child does not have and does not need
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _limited(work, seconds, mib)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGXCPU:
        return f"ran for more than {seconds} s"
    # what else may end a child that was forked beside threads says nothing about the work
    return f"took more than {mib} MiB of memory" if status in (1, -signal.SIGKILL) else ""


def _limited(work: Callable[[], object], seconds: int, mib: int) -> None:
    """The child: never returns."""
    code = 1
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as pages:  # Linux
            held = int(pages.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + (mib << 20), resource.RLIM_INFINITY))
        work()
        code = 0
    except MemoryError:
        pass
    except BaseException:
        code = 0
    finally:
        os._exit(code)


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
