"""Sends the sample answers of a run to its trackers as text; transformers' own callbacks carry numbers only.

TensorBoard has a writer of the run's own. For the others the run that transformers has opened is used: Weights & Biases
gets a table at every evaluation, MLflow a text file among the run's artifacts, Comet a text in its experiment.
Trackers that take no text get none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from instructft.formatting import first_line

Texts = Sequence[tuple[str, str]]  # prompt, answer


def _wandb(module: Any, step: int, texts: Texts) -> None:
    if module.run is not None:
        table = module.Table(columns=["step", "prompt", "answer"], data=[[step, *pair] for pair in texts])
        module.log({"samples": table, "train/global_step": step})  # the step by which transformers plots there


def _mlflow(module: Any, step: int, texts: Texts) -> None:
    if module.active_run() is not None:
        written = "\n\n".join(f"{prompt}\n→ {answer}" for prompt, answer in texts)
        module.log_text(written, f"samples/step-{step}.txt")


def _comet(module: Any, step: int, texts: Texts) -> None:
    experiment = module.get_running_experiment()
    if experiment is not None:
        for prompt, answer in texts:
            experiment.log_text(answer, step=step, metadata={"prompt": prompt})


# name in `report_to` -> the module that transformers has imported for it, and how it takes text
TRACKERS: dict[str, tuple[str, Callable[[Any, int, Texts], None]]] = {
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
    "comet_ml": ("comet_ml", _comet),
}


def send(reporters: Sequence[str], step: int, texts: Texts, say: Callable[[str], Any] = print) -> list[str]:
    """Send texts to each tracker that takes them; returns the names of those that failed, told once with the reason.

    A tracker that fails ends no run.

    >>> send(["wandb"], 100, [("What is the capital of France?", "Paris.")])
    []
    """
    failed = []
    for name in reporters:
        module, log = TRACKERS.get(name, ("", None))
        if log is None or module not in sys.modules:
            continue
        try:
            log(sys.modules[module], step, texts)
        except Exception as error:  # of another library, over a network
            failed.append(name)
            reason = first_line(error)
            say(f"train.report_to: {name} took no sample answers: {reason}; no more are sent to it")
    return failed
