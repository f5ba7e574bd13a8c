"""Known warning signs of a run, each told once with what to do, and kept in `run.json` under `warnings`.

    diverged        the loss is above that before the first step, and above that of a uniform guess
    overfitting     the validation loss rises over several evaluations while the training loss falls
    loss_at_zero    the training loss is zero: nothing carries loss, or the rows are known by heart
    template        answers continue with the template's own headings, such as `### Instruction:`
    never_stops     answers run on until they are cut off

The first three are read from the trainer's history. For the other two some held-out questions are answered twice, as
far as the run's budget allows: at the first evaluation of its second half, and at the last (at its end where there is
none). A sign that was told before a resume is not told again: `warnings.jsonl` in the run folder holds them, as
`samples.jsonl` holds samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from instructft.checkpoints.manifest import folders, kind
from instructft.errors import DivergedError, TemplateError
from instructft.inference.continuous_batching import Row
from instructft.inference.generator import Generator
from instructft.prompt.loss_mask import IGNORE_INDEX
from instructft.report.logs import append_log, keep_until, read_log, take_troubles
from instructft.training.judging.budget import Budget

FILE = "warnings.jsonl"
RISES = 3  # evaluations since the best one
RISE = 0.02  # the least that the validation loss must have risen by: this share, and as many nats
APART = 1.0  # nats above the first loss and ln(vocabulary), or a tenth of them
WORSE = 3  # logged losses in a row
ZERO = 1e-3  # nats; data that is learned well stays above
ZEROS = 3  # logged losses in a row
PROBES = 8  # questions
CANDIDATES = 64  # rows that they are chosen from
LEAST_STEPS = 20  # a run that is shorter has not had the time to learn to stop
UNENDED = 0.75  # share of answers that run on
ANSWER = 64  # tokens of an answer, where those of the rows are shorter than half of it
LONGEST = 256  # tokens of any answer
REPEATING = 0.25  # share of answers with a heading of the template


def overfits(history: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong where the validation loss has risen while the training loss fell; else "".

    >>> overfits([{"step": s, "loss": 2 - s / 10, "eval_loss": 2 + s / 10} for s in range(1, 6)])[:38]
    'the validation loss rises (2.1000 at s'
    """
    evaluations = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    if len(evaluations) <= RISES:
        return ""
    best = min(range(len(evaluations)), key=lambda i: evaluations[i][1])
    (step, lowest), (_, last) = evaluations[best], evaluations[-1]
    if len(evaluations) - 1 - best < RISES or not last - lowest >= max(RISE, RISE * lowest):
        return ""
    ends = [0, *(at for at, _ in evaluations)]

    def trained(index: int) -> float | None:
        """The mean training loss up to an evaluation, from the one before it."""
        losses = [e["loss"] for e in history if "loss" in e and ends[index] < e["step"] <= ends[index + 1]]
        return sum(losses) / len(losses) if losses else None

    then, now = trained(best), trained(len(evaluations) - 1)
    if then is None or now is None or not now < then:
        return ""
    return (
        f"the validation loss rises ({lowest:.4f} at step {step}, {last:.4f} now) while the training loss falls "
        f"({then:.4f} then, {now:.4f} now): rows are learned by heart. Train fewer epochs, or with a lower "
        f"train.learning_rate, or on more rows; train.early_stopping_patience: {RISES} keeps the best checkpoint"
    )


def diverged(history: Sequence[Mapping[str, Any]], vocabulary: int) -> str:
    """What is wrong where the model has become worse than one that guesses; else "".

    One validation loss, or several logged training losses in a row, above the loss before the first step (in runs that
    have none, the first that was logged) and above ln(vocabulary).

    >>> diverged([{"step": 1, "loss": 7.0}, {"step": 4, "eval_loss": 2634433.0}], 1490)[:38]
    'the run has diverged: the validation l'
    """
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    start = [entry["start_loss"] for entry in history if "start_loss" in entry]
    reference = max([math.log(vocabulary), *(start or losses[:1])])
    limit = reference + max(APART, APART / 10 * reference)
    if evaluations and evaluations[-1][1] > limit and evaluations[-1][0] == history[-1]["step"]:
        what = f"the validation loss is {evaluations[-1][1]:,.4f}"
    elif len(losses) > WORSE and min(losses[-WORSE:]) > limit:
        what = f"the last {WORSE} logged losses are {', '.join(f'{loss:,.4f}' for loss in losses[-WORSE:])}"
    else:
        return ""
    first = f"the first loss was {losses[0]:.4f}" if losses else "no loss was logged before"
    if start:
        first = f"before the first step it was {start[0]:.4f}"
    return (
        f"the run has diverged: {what}, {first}, and a uniform guess over {vocabulary:,} tokens has "
        f"{math.log(vocabulary):.4f}. Begin anew with a train.learning_rate of a tenth, or more train.warmup_steps"
    )


def at_zero(history: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong where the last logged losses are zero, or nearly so; else ""."""
    losses = [entry["loss"] for entry in history if "loss" in entry][-ZEROS:]
    if len(losses) < ZEROS or not all(loss < ZERO for loss in losses):
        return ""
    return (
        f"the training loss is {losses[-1]:.5f}: nearly nothing is left to learn. Either almost no token carries loss "
        "(instructft inspect RECIPE shows which do), or the rows are known by heart: train fewer epochs, or on more "
        "rows; answers that are all alike have the same effect"
    )


def headings(generator: Generator) -> list[str]:
    """The lines that the template puts around turns, as a model that repeats them would write them.

    Example::

        headings(Generator(model, tokenizer))  # with the template `instruction`
        # ['### Instruction:', '### Response:']
    """
    marks = ["\u241e1", "\u241e2", "\u241e3"]
    roles = ("user", "assistant", "user")
    turns: list[dict[str, Any]] = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    try:
        text = generator.encoder.render([turns], True)[0]
    except TemplateError:  # one that takes no second question; nothing is known of its headings then
        return []
    for mark in marks:
        text = text.replace(mark, "\n")
    for token in generator.stop_ids:  # an answer ends before it
        text = text.replace(str(generator.tokenizer.convert_ids_to_tokens(token)), "\n")
    lines = [line.strip() for line in text.splitlines()]
    return sorted({line for line in lines if len(line) > 2 and any(mark in line for mark in "#<|[:")})


class Probe(NamedTuple):
    """A question of the data, and how long its answer is."""

    prompt: list[int]
    tokens: int  # of the answer
    ends: bool  # whether the answer is there up to its end


def probes(rows: Any, stop_ids: Sequence[int]) -> list[Probe]:
    """Some questions of encoded rows (or packs, of which the first document), those with the shortest whole answers.

    None where no prompt stands apart from what carries loss (`train_on: everything`), or rows are a stream.
    """
    if rows is None or not hasattr(rows, "__len__"):
        return []
    found = []
    count = min(CANDIDATES, len(rows))
    for i in range(count):
        row = rows[i * len(rows) // count]
        length = row["seq_lengths"][0] if "seq_lengths" in row else len(row["input_ids"])
        ids, labels = row["input_ids"][:length], row["labels"][:length]
        start = next((n for n, label in enumerate(labels) if label != IGNORE_INDEX), 0)
        end = next((n for n in range(start, length) if labels[n] == IGNORE_INDEX), length)
        if start > 1:
            # a template may close the turn with a line break after the stop token
            found.append(
                Probe(list(ids[:start]), end - start, any(i in stop_ids for i in ids[max(start, end - 2) : end]))
            )
    whole = [probe for probe in found if probe.ends]
    return sorted(whole or found, key=lambda probe: probe.tokens)[:PROBES]


class RunWarnings(TrainerCallback):
    """Looks for the warning signs, tells each once and writes it down.

    Args:
        generator: of the model that is trained.
        rows: encoded rows with questions to ask: the validation rows, or the training rows.
        folder: the run folder.
        console: told in one line of each.
        budget: says when there is time for questions.
        stop_diverged: end a run that has diverged, in place of telling it alone.
    """

    def __init__(
        self, generator: Generator, rows: Any, folder: Path, console: Any, budget: Budget, stop_diverged: bool = False
    ):
        self.budget, self.stop_diverged = budget, stop_diverged
        self.vocabulary = int(generator.model.config.get_text_config().vocab_size)
        self.generator, self.folder, self.console = generator, folder, console
        self.probes = probes(rows, generator.stop_ids)
        self.headings = headings(generator)
        self.stop: Any = None  # `instructft.training.stopping.Stop`: after a signal nothing more is asked
        self.settle: Callable[[], Any] = lambda: None  # waits for a checkpoint that is being written
        self._told: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what was told up to the step that the run continues from."""
        path, first = self.folder / FILE, state.is_world_process_zero
        kept, said = keep_until(state.global_step, path, write=first)
        if first:
            if not kept:
                path.unlink(missing_ok=True)
            if said:
                self.console.print(said, markup=False, highlight=False)
        self._told = {str(record.get("kind")) for record in kept}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of a log that cannot be written; the run goes on."""
        for what, text in take_troubles().items():
            self._tell(state, what, text)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look at the training loss."""
        if logs and "loss" in logs:
            self._look_for_divergence(state)
            self._tell(state, "loss_at_zero", at_zero(state.log_history))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the validation loss, and late in the run at answers."""
        self._look_for_divergence(state)
        self._tell(state, "overfitting", overfits(state.log_history))
        late, last = 2 * state.global_step >= state.max_steps, state.global_step >= state.max_steps
        if last or (late and not self.budget.done("warnings") and self.budget.allows("warnings", args, state, control)):
            self._ask(state)

    def _look_for_divergence(self, state: Any) -> None:
        text = diverged(state.log_history, self.vocabulary)
        self._tell(state, "diverged", text)
        if text and self.stop_diverged:
            self.settle()
            sealed = [path for path in folders(self.folder) if kind(path) == "sealed"]
            kept = max(sealed, key=lambda path: path.stat().st_mtime, default=None)
            where = f"the newest checkpoint is {kept}" if kept else "no checkpoint was saved before"
            raise DivergedError(
                f"step {state.global_step}: {text}. The run ends here; {where}. (train.on_divergence: warn continues)"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask once where no evaluation has."""
        self.on_step_end(args, state, control)
        if not self.budget.done("warnings") and not (self.stop is not None and self.stop.agreed):
            self._ask(state)

    def _ask(self, state: Any) -> None:
        together = isinstance(self.generator.model, FSDPModule)  # such a model is run by all processes or by none
        open_signs = {"template", "never_stops"} - self._told
        if "diverged" in self._told:  # what such a model answers says nothing of the data
            return
        if not self.probes or not open_signs or state.global_step < LEAST_STEPS or is_deepspeed_zero3_enabled():
            return
        with self.budget.part("warnings"):
            if state.is_world_process_zero or together:
                self._judge_answers(state)

    def _judge_answers(self, state: Any) -> None:
        longest = max(len(probe.prompt) for probe in self.probes)
        expected = max(probe.tokens for probe in self.probes)
        limit = max(min(ANSWER, max(32, 4 * expected)), 2 * expected)
        limit = min(limit, LONGEST, self.generator.context - longest)
        if limit < 1:
            return
        rows = [Row(i, probe.prompt, limit) for i, probe in enumerate(self.probes)]
        self.generator.complete(rows)
        made = [row.made for row in rows]
        self._tell(state, "template", self._repeats(made))
        self._tell(state, "never_stops", self._runs_on(made, limit))

    def _repeats(self, made: Sequence[Sequence[int]]) -> str:
        found: list[str] = []
        for ids in made:
            text = self.generator.tokenizer.decode(ids, skip_special_tokens=False)
            lines = [line.strip() for line in text.splitlines()]
            found += [h for h in self.headings if any(line.startswith(h) for line in lines)][:1]
        if len(found) < max(2, REPEATING * len(made)):
            return ""
        return (
            f"{len(found)} of {len(made)} answers continue with the template's own {found[0]}: the model writes the "
            "next turn itself. Look for answers that hold it (instructft inspect RECIPE): pasted transcripts, or rows "
            "that were rendered with a template before; take it out of them"
        )

    def _runs_on(self, made: Sequence[Sequence[int]], limit: int) -> str:
        stops = self.generator.stop_ids
        unended = sum(not ids or ids[-1] not in stops for ids in made)
        if unended < UNENDED * len(made):
            return ""
        cut = sum(not probe.ends for probe in self.probes)
        why = (
            "the training rows end before their answers do, so that nothing teaches the end: raise data.max_length, or "
            "set data.on_too_long: drop"
            if cut == len(self.probes)
            else "train for longer; instructft inspect RECIPE shows whether the token that ends an answer carries loss"
        )
        return f"{unended} of {len(made)} answers ran on until they were cut off ({limit} tokens at most): {why}"

    def _tell(self, state: Any, kind: str, text: str) -> None:
        if not text or kind in self._told:
            return
        self._told.add(kind)
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "kind": kind, "text": text}
        append_log(self.folder / FILE, [record])
        self.console.print(f"warning: step {state.global_step}: {text}", style="yellow", markup=False, highlight=False)


def told(folder: Path) -> list[dict[str, Any]]:
    """The warnings of a run, in order, one that says it has diverged first: `step`, `kind`, `text`.

    Example::

        told(Path("runs/gpt2-dolly"))[0]["kind"]
        # 'overfitting'
    """
    found = read_log(folder / FILE, "kind", "text")
    return sorted(found, key=lambda warning: warning["kind"] != "diverged")  # at the top: nothing else counts then
