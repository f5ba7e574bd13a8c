"""What ends training before its last step: a signal, and a validation loss that falls no more.

A signal once finishes the step and saves it, SIGTERM or SIGINT twice stops now. A scheduler that takes a machine back
sends SIGTERM and waits half a minute, or SIGUSR1 some time before; a terminal that is closed sends SIGHUP, which
`nohup` leaves out. Only some of the processes of a run may get it, and at different moments; they agree after each
step, so that all of them save the same one. Others get it twice at once, from the scheduler and from the launcher that
passes it on; only one that comes a second later asks again.

How long the validation loss has not fallen (`train.early_stopping_patience`) is read from the trainer's own history,
which every checkpoint holds: a resumed run stops at the same evaluation as one that was never stopped. Upstream's
callback counts for itself and begins anew after a resume (transformers 5.23, unless
`restore_callback_states_from_checkpoint` rebuilds all callbacks).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from instructft.errors import Stopped
from instructft.formatting import figure
from instructft.training.launch.signals import AGAIN, TWICE, listen

_CHILDREN: Any = getattr(signal, "SIGCHLD", None)  # Windows has none


class Stop(TrainerCallback):
    """Ends training at the next step with a checkpoint once a signal has come to any process.

    Use it as a context manager around `Trainer.train`: the handlers stand in between only.
    """

    def __init__(self) -> None:
        self.signal = 0  # the number of the signal that came to this process
        self._since = 0.0  # when one came that stops now if it comes again, by the monotonic clock
        self.agreed = 0  # the one that all processes have agreed on
        self.left_evaluation = False  # one was due or under way, and is left to the resumed run
        self._before: dict[int, Any] = {}
        self._of_children: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            self._before = listen(self._received)
            if _CHILDREN is not None:
                self._of_children = signal.SIG_DFL if _is_torchs() else signal.getsignal(_CHILDREN) or signal.SIG_DFL
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since and number in TWICE and now - self._since >= AGAIN:
            os._exit(128 + number)  # now: nothing on the way out may hold it up
        self._since = self._since or (now if number in TWICE else 0.0)
        if self.signal:
            return
        self.signal = number
        name = signal.Signals(number).name
        with contextlib.suppress(OSError, ValueError):  # the terminal may be what is gone
            os.write(2, f"\n{name}: finishing this step, then saving it; again stops now\n".encode())

    def raise_if_stopped(self, checkpoint: str | None) -> None:
        """Raise `Stopped` after a training that a signal has ended."""
        if self.agreed:
            name = signal.Signals(self.agreed).name
            raise Stopped(f"stopped by {name}; {checkpoint or 'no step'} is saved", 128 + self.agreed)

    def agree(self, args: Any) -> bool:
        """Whether any process has received a signal; every process must ask at the same place."""
        if not self.agreed:
            self.agreed = self.signal
            if args.world_size > 1:
                flag = torch.tensor(self.signal, device=args.device)
                torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
                self.agreed = int(flag)
        return bool(self.agreed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hear of a process that loads rows and has ended where its next rows are asked for, between two steps.

        torch's handler would raise in the middle of a step, which could not be saved then (torch 2.13).
        """
        if self._of_children is not None and _is_torchs():
            signal.signal(_CHILDREN, self._of_children)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop; an evaluation that is due now is made up for by the resumed run."""
        if self.agree(args):
            self.left_evaluation = control.should_evaluate
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave an evaluation; it is begun anew by the resumed run."""
        if self.agree(args):
            raise EvaluationLeft


def _is_torchs() -> bool:
    """Whether what hears of children that have ended is torch's loader of data."""
    return str(getattr(signal.getsignal(_CHILDREN), "__module__", "")).startswith("torch.utils.data.")


class EvaluationLeft(Exception):
    """An evaluation that a signal has ended."""


BEST_STEP = "eval_best_step"  # the best step by a figure of answers, as an evaluation logs it


def since_best(history: Sequence[Mapping[str, Any]], metric: str = "loss") -> tuple[int, int, float]:
    """Evaluations since the best one, its step, and its figure: the lowest validation loss, or what `BEST_STEP` says.

    >>> since_best([{"step": 10, "eval_loss": 2.0}, {"step": 20, "eval_loss": 2.1}, {"step": 30, "eval_loss": 2.0}])
    (2, 10, 2.0)
    """
    if metric != "loss":
        judged = [entry for entry in history if BEST_STEP in entry]
        step = int(judged[-1][BEST_STEP]) if judged else 0
        there = next((entry for entry in judged if entry["step"] == step), {})
        return sum(entry["step"] > step for entry in judged), step, there.get(f"eval_{metric}", float("nan"))
    count, step, best = 0, 0, float("inf")
    for entry in history:
        if "eval_loss" not in entry:
            continue
        if entry["eval_loss"] < best:  # a loss that is no number is never better
            count, step, best = 0, entry["step"], entry["eval_loss"]
        else:
            count += 1
    return count, step, best


class EarlyStopping(TrainerCallback):
    """Ends training, with a checkpoint, after `patience` evaluations without a better one.

    The trainer goes back to the best checkpoint then (`load_best_model_at_end`, which comes with the key).

    Args:
        patience: evaluations.
        say: told once, when training ends.
        metric: `loss`, or the figure of answers by which the best is judged.
    """

    def __init__(self, patience: int, say: Callable[[str], Any] = print, metric: str = "loss"):
        self.patience = patience
        self.metric = metric
        self.say = say
        self.stopped: dict[str, Any] | None = None  # what goes into `run.json`

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at once where the run that is resumed had come to its end."""
        self._judge(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if it is time, with a checkpoint, so that the run is known to have come this far."""
        if self._judge(state, control):
            control.should_save = True

    def _judge(self, state: Any, control: Any) -> bool:
        count, step, best = since_best(state.log_history, self.metric)
        if count < self.patience:
            return False
        control.should_training_stop = True
        if self.stopped is None:
            self.stopped = {"step": state.global_step, "patience": self.patience}
            what = f"the validation loss has not fallen below {best:.4f}"
            if self.metric != "loss":
                what = f"nothing was better beyond chance than {figure(self.metric, best)}"
            self.say(
                f"step {state.global_step}: {what} (step {step}) for {count} evaluations: training ends here "
                f"(train.early_stopping_patience: {self.patience})"
            )
        return True


def ending(trainer: Any) -> dict[str, Any]:
    """What `run.json` says under `train` of how the run ended: `stopped_early`, and `best` where it went back to it."""
    found: dict[str, Any] = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopped:
            found["stopped_early"] = callback.stopped
    if (step := restored(trainer)) is not None:
        found["best"] = {"step": step, "metric": trainer.args.metric_for_best_model, "value": trainer.state.best_metric}
    elif trainer.judge is not None and (best := trainer.judge.best) is not None and best.step is not None:
        found["best"] = {"step": best.step, "metric": best.name, "value": best.value, "restored": False}
    return found


def restored(trainer: Any) -> int | None:
    """The step whose checkpoint the final model is; None where it is simply the last."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    return int(state.best_model_checkpoint.rpartition("-")[2])
