"""Callbacks put into a run from outside, and signals that it gets at a chosen place. For the tests of resuming."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from transformers import TrainerCallback

from instructft.training.trainer import Trainer


class SignalAt(TrainerCallback):
    """Sends this process a signal at one place of the run."""

    def __init__(self, place: str, step: int, number: int = signal.SIGTERM):
        self.place, self.step, self.number = place, step, number
        self.sent = False

    def _send(self, place: str, state: Any) -> None:
        if place == self.place and state.global_step == self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send("step", state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send("evaluation", state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send("save", state)


def interrupt(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    began = Trainer.train

    def train_with(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.callback_handler.callbacks.insert(0, callback)
        return began(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train_with)
