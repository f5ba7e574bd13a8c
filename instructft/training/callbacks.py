"""What one sees of a run while it trains, and its early end: a progress line, `metrics.jsonl`, sample answers.

How long the validation loss has not fallen is read from the trainer's own history, which every checkpoint holds: a
resumed run stops at the same evaluation as one that was never stopped. Upstream's callback counts for itself and begins
anew after a resume (transformers 5.23, unless `restore_callback_states_from_checkpoint` rebuilds all callbacks).
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from instructft.formatting import first_line, name_of, perplexity, spread
from instructft.inference.generator import Generator
from instructft.prompt.token_view import visible
from instructft.report.logs import append_log, attempt, keep_until
from instructft.training.judging.budget import Budget

Texts = Sequence[tuple[str, str]]  # prompt, answer
_IN_THE_REPORT = ("eval_token_f1", "eval_rougeL", "eval_stops", "eval_tool_names")  # and in metrics.jsonl: not printed
_SHOWN = {"loss": "loss {:.4f}", "eval_loss": "validation loss {:.4f}"}


class MetricsFile(TrainerCallback):
    """Writes `metrics.jsonl`: one line of strict JSON for each logged step, on disk as soon as it is logged.

    Training and validation of one step arrive one after the other; they end up in one line. `tokens_per_second` is
    added to the trainer's values: of the training steps since the line before, without the time that evaluation took.
    """

    def __init__(self, path: Path, say: Callable[[str], Any] = print):
        self.path = path
        self._step: int | None = None
        self._start = 0  # where the last line begins
        self._record: dict[str, Any] = {}
        self._tokens: float | None = 0.0  # at the line before; None where it is not known
        self._begun: float | None = None  # when the first step since then began
        self._behind: list[str] = []  # lines that could not be written yet
        self._at: int | None = None  # where they belong; None is the end of the file
        self._say = say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that the run continues from; a fresh run starts an empty file."""
        if not state.is_world_process_zero:
            return
        kept, said = keep_until(state.global_step, self.path, logged=_logged(state.log_history))
        if said:
            self._say(said)
        if kept:  # what is still to come of this step belongs into its line
            self._record = kept[-1]
            lines = self.path.read_bytes().splitlines(keepends=True)
            self._step, self._start = self._record["step"], sum(map(len, lines[:-1]))
        else:
            self.path.write_bytes(b"")
        if state.global_step:
            self._tokens = self._record.get("num_tokens") if self._step == state.global_step else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of `tokens_per_second`."""
        self._begun = self._begun or time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the values of one step."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs and "num_tokens" in logs:
            tokens, now = float(logs["num_tokens"]), time.perf_counter()
            if self._tokens is not None and self._begun is not None and tokens > self._tokens:
                logs = {**logs, "tokens_per_second": round((tokens - self._tokens) / (now - self._begun), 1)}
            self._tokens, self._begun = tokens, None
        again = state.global_step == self._step
        if not again:
            self._step, self._record = state.global_step, {"step": state.global_step}
        self._record.update({key: _strict(value) for key, value in logs.items()})
        line = json.dumps(self._record, allow_nan=False) + "\n"
        if not self._behind:
            self._at = self._start if again else None
        if again and self._behind:
            self._behind[-1] = line
        else:
            self._behind.append(line)
        attempt(self.path.name, str(self.path), self._write)

    def _write(self) -> None:
        """Bring the lines to the disk that are not there yet."""
        content = [line.encode() for line in self._behind]
        with self.path.open("r+b" if self.path.exists() else "w+b", buffering=0) as file:
            end = file.seek(0, 2)
            at = file.seek(end if self._at is None else min(self._at, end))
            if file.write(b"".join(content)) < sum(map(len, content)):
                file.truncate(at)  # half a line is worse than none
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate()
        self._start = at + sum(map(len, content[:-1]))
        self._behind.clear()


def _logged(history: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a trainer's history says was logged: step -> the values of its line.

    >>> _logged([{"start_loss": 7.3, "step": 0}, {"loss": 7.1, "step": 1}, {"eval_loss": 7.2, "step": 1}])
    {1: {'step': 1, 'loss': 7.1, 'eval_loss': 7.2}}
    """
    found: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "start_loss" not in entry or "loss" in entry:  # else it is logged with the first step
            line = found.setdefault(entry["step"], {"step": entry["step"]})
            line.update({key: _strict(value) for key, value in entry.items()})
    return found


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; they are written as the words, never as a number that looks fine."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class ProgressLine(TrainerCallback):
    """One line that moves in a terminal; in a log file, one line for each logged step."""

    def __init__(self, console: Console):
        self.console = console
        self.progress: Progress | None = None
        self._last = (0.0, 0.0)  # time and tokens when a step was last logged
        self._now: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the progress bar."""
        self._last = (time.perf_counter(), 0.0)
        self._began = time.perf_counter()
        self._began_at = state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.progress.start()
            self._task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, now="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.progress:
            self.progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show loss, learning rate, tokens a second and the time left."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        parts = [text.format(logs[key]) for key, text in _SHOWN.items() if key in logs]
        if "eval_loss" in logs:
            parts.append(f"perplexity {perplexity(logs['eval_loss'])}")
            parts += _of_answers(logs)
        if "loss" in logs:
            parts.append(f"lr {logs['learning_rate']:.2e}")
            now, tokens = time.perf_counter(), float(logs.get("num_tokens", 0.0))
            if tokens > self._last[1]:
                parts.append(f"{(tokens - self._last[1]) / (now - self._last[0]):,.0f} tokens/s")
            self._last = (now, tokens)
        if self.progress:
            if "eval_loss" in logs:
                self.progress.console.print(f"step {state.global_step}: " + " · ".join(parts))
            else:
                self.progress.update(self._task, now=" · ".join(parts))
        else:
            done = state.global_step - self._began_at
            left = (time.perf_counter() - self._began) / max(done, 1) * (state.max_steps - state.global_step)
            clock = f"{int(left) // 60}:{int(left) % 60:02d} left"
            self.console.print(f"step {state.global_step}/{state.max_steps} · " + " · ".join([*parts, clock]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; also called when a run fails."""
        if self.progress:
            self.progress.stop()
            self.progress = None


def _of_answers(logs: Mapping[str, Any]) -> list[str]:
    """The figures of answers with their intervals, less those that say the same once more."""
    found = []
    for key in [key for key in logs if f"{key}_low" in logs and key not in _IN_THE_REPORT]:
        name = key.removeprefix("eval_")
        found.append(f"{name_of(name)} {spread(name, logs[key], logs[f'{key}_low'], logs[f'{key}_high'])}")
    return found


class Samples(TrainerCallback):
    """Answers the recipe's `samples` at every evaluation, as far as the run's budget allows, and at the last one.

    They are printed, kept in `samples.jsonl`, and sent to the trackers.
    """

    def __init__(
        self, prompts: tuple[str, ...], generator: Generator, path: Path, console: Console, writer: Any,
        budget: Budget, reporters: Sequence[str] = (),
    ):  # fmt: skip
        self.prompts = prompts
        self.generator = generator
        self.path = path
        self.console = console
        self.writer = writer
        self.budget = budget
        self.reporters = list(reporters)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the answers up to the step that the run continues from, and show what the model says before."""
        if state.is_world_process_zero:
            _, said = keep_until(state.global_step, self.path)
            if said:
                self.console.print(said, markup=False, highlight=False)
            self.path.touch()
        if state.global_step == 0:
            self._answer(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer all samples, if there is time for it."""
        if self.budget.allows("samples", args, state, control):
            self._answer(state)

    def _answer(self, state: Any) -> None:
        # under FSDP2 a model can be run by all processes together only
        if state.is_world_process_zero or isinstance(self.generator.model, FSDPModule):
            with self.budget.part("samples"):
                self.answer(state.global_step, write=state.is_world_process_zero)

    def answer(self, step: int, write: bool = True) -> None:
        """Answer all samples greedily with the model as it is now."""
        conversations = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
        answers = self.generator.answers(conversations, max_new_tokens=64)
        if not write:
            return
        made = list(zip(self.prompts, answers, strict=True))
        names = ("response", "finish_reason")
        append_log(
            self.path,
            [{"step": step, "prompt": p, **dict(zip(names, (a.text, a.finish_reason), strict=True))} for p, a in made],
        )
        for prompt, answer in made:
            ending = "" if answer.finish_reason == "stop" else " …"
            shown = answer.text if len(answer.text) <= 200 else answer.text[:200] + "…"
            shown = (visible(shown) or "(an empty answer)").replace("\n", "\n    ")
            asked = visible(prompt).replace("\n", "\n  ")
            self.console.print(f"  {asked}", style="dim", markup=False, highlight=False)
            self.console.print(f"  → {shown}{ending}", markup=False, highlight=False)
        if self.writer:
            shown_there = functools.partial(self._to_board, made, step)
            self.writer = self.writer if attempt("tensorboard", "tensorboard", shown_there) else None
        texts = [(prompt, answer.text) for prompt, answer in made]
        failed = send(self.reporters, step, texts, functools.partial(self.console.print, markup=False, highlight=False))
        self.reporters = [name for name in self.reporters if name not in failed]

    def _to_board(self, made: Sequence[tuple[str, Any]], step: int) -> None:
        for prompt, answer in made:
            self.writer.add_text(f"samples/{prompt[:80]}", answer.text, step)


class Outlasted(TrainerCallback):
    """Another library's callback that only watches; its first failure is told and its last, and the run goes on.

    What it does when training begins may fail as it likes: nothing is lost yet. That training ends it hears only at
    `end`: most trackers close there, and what is evaluated after the last step would open a second run.
    """

    def __init__(self, callback: TrainerCallback):
        self.callback = callback
        self.name = type(callback).__name__.removesuffix("Callback").lower()
        self.works = True
        self._last: Callable[[], Any] | None = None

    def end(self) -> None:
        """Let it close what it has open, once, after the last figure."""
        last, self._last = self._last, None
        if self.works and last is not None:
            self.works = attempt(self.name, f"train.report_to: {self.name}", last)

    def _call(self, event: str, *args: Any, **kwargs: Any) -> Any:
        if not self.works:
            return None
        do = functools.partial(getattr(self.callback, event), *args, **kwargs)
        if event in ("on_init_end", "on_train_begin"):
            return do()
        if event == "on_train_end":
            self._last = do
            return None
        # what it returns is the control it was given; one that only watches changes nothing there
        self.works = attempt(self.name, f"train.report_to: {self.name}", do)
        return None


def _outlasted(event: str) -> Any:
    def call(self: Outlasted, *args: Any, **kwargs: Any) -> Any:
        return self._call(event, *args, **kwargs)

    return call


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Outlasted, _event, _outlasted(_event))


def reads_checkpoints(callback: TrainerCallback) -> bool:
    """Whether a callback may read a checkpoint's folder as it hears of it: so do trackers that are to keep them."""
    inner = callback.callback if isinstance(callback, Outlasted) else callback
    if type(inner).on_save is TrainerCallback.on_save:
        return False
    asked = _KEEP_CHECKPOINTS.get(type(inner).__name__)
    return asked is None or os.environ.get(asked[0], "").lower() in asked[1]


# Callbacks of transformers 5.23 that do nothing at a checkpoint unless a variable says so, with the words that do.
_KEEP_CHECKPOINTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "WandbCallback": ("WANDB_LOG_MODEL", ("checkpoint",)),
    "MLflowCallback": ("HF_MLFLOW_LOG_ARTIFACTS", ("1", "on", "yes", "true")),
    "TrackioCallback": ("", ()),
    "SwanLabCallback": ("", ()),
}


# --------------------------------------------------------------------------------------------------------------------
# Sample answers in trackers, as text: transformers' own callbacks carry numbers only. TensorBoard has a writer of the
# run's own; for the others the run that transformers has opened is used. Trackers that take no text get none.
# --------------------------------------------------------------------------------------------------------------------


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
