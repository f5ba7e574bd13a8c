"""Names the process that no longer answers, where the others have waited for it as long as `train.ddp_timeout` says.

torch says which connection was silent, not whose. So those that gave up waiting say so in the store by which they all
found each other; who has not said it a few seconds later is the one that hangs.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from instructft.errors import InstructftError

if TYPE_CHECKING:
    from accelerate import PartialState

_GRACE = 5.0  # seconds between the first process that gives up and the last
_KEY = "instructft/answers/{}"


def state_of(cpu: bool, seconds: float) -> PartialState:
    """The processes of a run, found before anything else; each wait for another is at most so long.

    Args:
        cpu: no GPU is used.
        seconds: `train.ddp_timeout`.

    Example::

        state_of(cpu=True, seconds=1800).num_processes
        # 1
    """
    from accelerate import PartialState

    return PartialState(cpu=cpu, timeout=datetime.timedelta(seconds=seconds))


@contextlib.contextmanager
def silent_named(state: PartialState, seconds: float) -> Iterator[None]:
    """Inside, a wait that took too long is an error that names who was waited for.

    Raises:
        InstructftError: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:  # of NCCL it is a kind of it
        if state.num_processes == 1 or not re.search(r"time[d]?[ -]?out", str(error), re.IGNORECASE):
            raise
        silent = _silent(state)
        one, others = (len(silent) == 1, ", ".join(map(str, silent)))
        who = f"the process{'' if one else 'es'} of rank {others} of {state.num_processes}" if silent else "a process"
        was = "did not answer" if silent else "came late, and all answer again"
        raise InstructftError(
            f"{who} {was} for {seconds:g} s (train.ddp_timeout), so the others ended too. The same command resumes "
            "from the newest checkpoint; where a step or an evaluation takes that long, raise train.ddp_timeout"
        ) from error


def _silent(state: PartialState) -> list[int]:
    from torch.distributed.distributed_c10d import _get_default_store

    ranks = range(state.num_processes)
    try:
        store = _get_default_store()
        store.set(_KEY.format(state.process_index), "yes")
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            left = [rank for rank in ranks if not store.check([_KEY.format(rank)])]
            if not left:
                break
            time.sleep(0.2)
    except (RuntimeError, ValueError, OSError):  # the process that holds the store is gone
        return []
    return left
