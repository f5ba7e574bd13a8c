"""`train.early_stopping_patience`: a run ends when the validation loss falls no more, and goes back to its best.

How long it has not fallen is read from the trainer's own history, which every checkpoint holds: a resumed run stops at
the same evaluation as one that was never stopped. Upstream's callback counts for itself and begins anew after a resume
(transformers 5.23, unless `restore_callback_states_from_checkpoint` rebuilds all callbacks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback


def since_best(history: Sequence[Mapping[str, Any]]) -> tuple[int, int, float]:
    """Evaluations since the validation loss was lowest, the step where it was, and the loss there.

    >>> since_best([{"step": 10, "eval_loss": 2.0}, {"step": 20, "eval_loss": 2.1}, {"step": 30, "eval_loss": 2.0}])
    (2, 10, 2.0)
    """
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
    """Ends training, with a checkpoint, after `patience` evaluations without a lower validation loss.

    The trainer goes back to the best checkpoint then (`load_best_model_at_end`, which comes with the key).

    Args:
        patience: evaluations.
        say: told once, when training ends.
    """

    def __init__(self, patience: int, say: Callable[[str], Any] = print):
        self.patience = patience
        self.say = say
        self.stopped: dict[str, Any] | None = None  # what goes into `run.json`

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at once where the run that is gone on with had come to its end."""
        self._judge(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if it is time, with a checkpoint, so that the run is known to have come this far."""
        if self._judge(state, control):
            control.should_save = True

    def _judge(self, state: Any, control: Any) -> bool:
        count, step, best = since_best(state.log_history)
        if count < self.patience:
            return False
        control.should_training_stop = True
        if self.stopped is None:
            self.stopped = {"step": state.global_step, "patience": self.patience}
            self.say(
                f"step {state.global_step}: the validation loss has not fallen below {best:.4f} (step {step}) for "
                f"{count} evaluations: training ends here (train.early_stopping_patience: {self.patience})"
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
    return found


def restored(trainer: Any) -> int | None:
    """The step whose checkpoint the final model is; None where it is simply the last."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    return int(state.best_model_checkpoint.rpartition("-")[2])
