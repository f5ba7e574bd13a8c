"""SIGTERM and SIGINT while training: once finishes the step and saves it, twice stops now.

A scheduler that takes a machine back sends SIGTERM and waits half a minute. Only some of the processes of a run may get
it, and at different moments; they agree after each step, so that all of them save the same one. Others get it twice at
once, from the scheduler and from the launcher that passes it on; only one that comes a second later asks again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from instructft.errors import EXIT_SIGINT, EXIT_SIGTERM, Stopped

_AGAIN = 1.0  # seconds; what comes sooner is the same request, on another way
_EXIT = {signal.SIGTERM: EXIT_SIGTERM, signal.SIGINT: EXIT_SIGINT}


class Stop(TrainerCallback):
    """Ends training at the next step with a checkpoint once a signal has come to any process.

    Use it as a context manager around `Trainer.train`: the handlers stand in between only.
    """

    def __init__(self) -> None:
        self.signal = 0  # the number of the signal that came to this process
        self._since = 0.0  # when, by the monotonic clock
        self.agreed = 0  # the one that all processes have agreed on
        self.left_evaluation = False  # one was due or under way, and is left to the run that goes on
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            self._before = {number: signal.signal(number, self._received) for number in _EXIT}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if time.monotonic() - self._since >= _AGAIN:
                os._exit(_EXIT[signal.Signals(number)])  # now: nothing on the way out may hold it up
            return
        self.signal, self._since = number, time.monotonic()
        name = signal.Signals(number).name
        os.write(sys.stderr.fileno(), f"\n{name}: finishing this step, then saving it; again stops now\n".encode())

    def raise_if_stopped(self, checkpoint: str | None) -> None:
        """Raise `Stopped` after a training that a signal has ended."""
        if self.agreed:
            name = signal.Signals(self.agreed).name
            raise Stopped(f"stopped by {name}; {checkpoint or 'no step'} is saved", _EXIT[signal.Signals(self.agreed)])

    def agree(self, args: Any) -> bool:
        """Whether any process has received a signal; every process must ask at the same place."""
        if not self.agreed:
            self.agreed = self.signal
            if args.world_size > 1:
                flag = torch.tensor(self.signal, device=args.device)
                torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
                self.agreed = int(flag)
        return bool(self.agreed)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop; an evaluation that is due now is made up for by the run that goes on from here."""
        if self.agree(args):
            self.left_evaluation = control.should_evaluate
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave an evaluation; it is begun anew by the run that goes on."""
        if self.agree(args):
            raise EvaluationLeft


class EvaluationLeft(Exception):
    """An evaluation that a signal has ended."""
