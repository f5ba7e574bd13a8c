"""Held-out rows answered by the model in training, at its evaluations: figures with intervals, and the best of them.

    held-out rows ──► drawn by data.seed ──► prompts ──► the batched generator ──► answers beside references
                                                                                    │
                     metrics.jsonl, trackers, report ◄── eval_exact_match, …_low, …_high ──► the best checkpoint

Answering draws no random number, and leaves the model as it was. Several processes share the rows among them. How many
rows: as the recipe says; else what takes at most half of the share of time that looking at the model may take, by the
seconds that the first batch took. Where a figure of answers decides which checkpoint is the best, the clock has no say:
as many rows are asked as there are, `DECIDING` at most, at every evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.integrations import is_deepspeed_zero3_enabled

from instructft.errors import DataError, ModelError, UsageError
from instructft.evaluation.answers import FIGURES, Answered, own_figures
from instructft.evaluation.confidence import FEWEST, mean_of
from instructft.inference.continuous_batching import Row
from instructft.inference.generator import Generator
from instructft.training.judging import budget as clock
from instructft.training.judging.best import Best
from instructft.training.judging.budget import ANSWERS, Budget
from instructft.training.judging.questions import Question, questions
from instructft.training.stopping import BEST_STEP, EvaluationLeft

FIRST = 32  # rows, of which the time is taken
DECIDING = 128  # rows at most, where answers decide
AUTO = 256  # rows at most, of what the time allows


class Judge:
    """Asks held-out rows of the model in training.

    Args:
        generator: of the model that is trained.
        load: gives so many held-out rows at most, in the order in which they are drawn (`instructft.data.load.drawn`).
        budget: says when there is time.
        wanted: rows to ask at every evaluation; None: as the time allows.
        figures: names of ours.
        functions: the user's own, name -> file and function.
        named: somebody has named figures, which are wanted at every evaluation then, however short the run is.
        deciding: the figure that the best checkpoint is judged by, if it is one of answers.
        greater: the more of it, the better.
        say: told in one line what a person should know.

    Raises:
        UsageError: a function of the user's fails, or no row has the deciding figure.
    """

    def __init__(
        self, generator: Generator, load: Callable[[int], Sequence[Mapping[str, Any]]], budget: Budget,
        wanted: int | None = None, figures: Sequence[str] = tuple(FIGURES),
        functions: Mapping[str, tuple[str, str]] | None = None, named: bool = False,
        deciding: str | None = None, greater: bool = True, say: Callable[[str], Any] = print,
    ):  # fmt: skip
        self.generator, self.load, self.budget, self.say = generator, load, budget, say
        self.own = dict(own_figures(functions or {}))
        self.figures = list(figures)
        self.best = Best(deciding, greater, say) if deciding else None
        self.fixed = wanted is not None or deciding is not None
        self.count = DECIDING if wanted is None and deciding else wanted  # rows; None: the first batch will tell
        self.always = self.fixed or named
        self.why_not = ""  # the model in training cannot be asked, for this reason
        self._asked: list[Question] | None = None
        self._failed: set[str] = set()  # figures of the user's own that are told to fail
        for name, own in self.own.items():
            say(f"{own.place} is code that runs here (sha256 {own.digest}): eval_{name}")
        if self.always and self.count != 0:
            self._look()

    def _look(self) -> None:
        """Read the rows, and try the user's functions on one of them: what fails, fails before a step is trained."""
        self._asked = questions(self.generator, self.load(AUTO if self.count is None else self.count))
        for own in self.own.values():
            for question in self._asked[:1]:
                try:
                    own(question.reference, question.reference, question.row)
                except ValueError as error:
                    raise UsageError(f"{error} (tried with a right answer to the first held-out row)") from error
        answers = [Answered(q.reference, q.reference, True, q.calls) for q in self._asked]
        lacking = [name for name in self.figures if all(FIGURES[name](answer) is None for answer in answers)]
        self.figures = [name for name in self.figures if name not in lacking]
        deciding = self.best.name if self.best else None
        if deciding and (deciding in lacking or not self._asked):
            there = ", ".join((*self.figures, *self.own)) if self._asked else "a loss"
            raise UsageError(
                f"train.metric_for_best_model: none of the {len(self._asked)} held-out rows that can be asked has "
                f"{deciding}; expected one of {there}"
            )

    def measure(self, trainer: Any) -> dict[str, float]:
        """The figures of the answers at this evaluation, by the trainer's names; none where there is no time for it.

        Every process must ask at the same place.

        Raises:
            EvaluationLeft: a signal has come.
        """
        args, state = trainer.args, trainer.state
        if self.why_not or self.count == 0:
            return {}
        if not self.always and not self.budget.allows(ANSWERS, args, state, trainer.control):
            return {}
        try:
            if self._asked is None:
                with self.budget.part(ANSWERS):
                    self._look()
            with self.budget.part(ANSWERS):  # what it takes from now on each time
                return self._measured(self._asked or [], trainer)
        except (DataError, ModelError) as error:  # rows that are gone, or no room in memory: no reason to end a run
            if self.best is not None:
                raise
            self.why_not = str(error)
            self.say(f"step {state.global_step}: held-out rows are not answered any more: {error}")
            return {}

    def _measured(self, asked: Sequence[Question], trainer: Any) -> dict[str, float]:
        args, state = trainer.args, trainer.state
        began = clock.CLOCK()
        answered = self._answer(asked[: FIRST if self.count is None else self.count], trainer)
        if self.count is None:
            self.count = self._affordable(args, state, len(answered), clock.CLOCK() - began)
            answered += self._answer(asked[len(answered) : self.count], trainer)
        return self._figures(answered, state.global_step)

    def _affordable(self, args: Any, state: Any, first: int, seconds: float) -> int:
        """How many rows to ask from now on, by the time that the first of them took: the same on every process."""
        every = state.eval_steps or args.eval_steps or 1
        evaluations = 1 + max(0, state.max_steps - state.global_step) // max(1, int(every))
        left = self.budget.left_for_answers(state) + seconds
        count = int(left * first / (evaluations * seconds)) if seconds > 0 else AUTO
        count = min(max(count, FIRST), AUTO)
        if args.world_size > 1:  # clocks differ
            agreed = torch.tensor(count if args.process_index == 0 else 0, device=args.device)
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            count = int(agreed)
        return count

    def _answer(self, asked: Sequence[Question], trainer: Any) -> list[dict[str, float | None]]:
        """What the answer to each question is worth, by name. Processes, each with the model, share the questions."""
        args = trainer.args
        alone = args.world_size == 1

        def leave(row: Row) -> None:
            if alone and trainer.stop.agree(args):
                raise EvaluationLeft

        mine = asked if alone else asked[args.process_index :: args.world_size]
        rows = [Row(i, question.prompt, question.limit) for i, question in enumerate(mine)]
        failed = ""
        try:
            if rows:
                self.generator.complete(rows, done=leave)
        except ModelError as error:
            if alone:
                raise
            failed = str(error)
        found = [] if failed else [self._worth(question, row.made) for question, row in zip(mine, rows, strict=True)]
        if alone:
            return found
        of_all = gather_object([(found, failed)])  # one a process: none waits for another that has failed
        for _, why in of_all:
            if why:
                raise ModelError(why)
        return [of_all[i % args.world_size][0][i // args.world_size] for i in range(len(asked))]

    def _worth(self, question: Question, made: Sequence[int]) -> dict[str, float | None]:
        stopped = bool(made) and made[-1] in self.generator.stop_ids
        text = self.generator.decoded(made[:-1] if stopped else made)
        answer = Answered(text, question.reference, stopped, question.calls)
        found = {name: FIGURES[name](answer) for name in self.figures}
        for name, own in self.own.items():
            try:
                found[name] = own(text, question.reference, question.row)
            except ValueError as error:
                found[name] = None
                if name not in self._failed:
                    self._failed.add(name)
                    self.say(f"{error}; such rows are left out of eval_{name}")
        return found

    def _figures(self, answered: Sequence[Mapping[str, float | None]], step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in (*self.figures, *self.own):
            scores = [score for row in answered if (score := row[name]) is not None]
            if not scores:
                continue
            measure = mean_of(scores)
            found[f"eval_{name}"] = measure.whole()
            if len(scores) >= FEWEST and (interval := measure.interval()) is not None:
                found |= {f"eval_{name}_low": interval[0], f"eval_{name}_high": interval[1]}
        if self.best is not None:
            self.best.take(step, [row[self.best.name] for row in answered])
            found |= {BEST_STEP: self.best.step} if self.best.step is not None else {}
        return {**found, "eval_answered": len(answered)} if answered else {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"rows": None if self.fixed else self.count, "best": self.best.state() if self.best else None}

    def restore(self, known: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds; older ones hold nothing."""
        if not self.fixed:
            self.count = known.get("rows")
        if self.best is not None:
            self.best.restore(known.get("best") or {})


def unanswerable(trainer: Any) -> str:
    """Why the model of a trainer cannot be asked by each process alone while it trains; or ""."""
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 divides the weights among the processes"
    if trainer.is_fsdp_enabled:
        return (
            "FSDP divides the weights among the processes; instructft evaluate RUN --checkpoints judges them afterwards"
        )
    return ""
