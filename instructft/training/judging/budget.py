"""Where the time of a run goes, and the share of it that looking at the model may take (`train.evaluation_budget`).

Evaluations, sample answers and the questions behind warnings are looking; all that they take is kept within a share of
the time that was trained so far, a tenth unless the recipe says otherwise, or within the first second. What is due and
does not fit in waits: an evaluation until a step is logged at which it fits, samples and questions for the next
evaluation. The last of a run never waits, and room for it is set aside; nor does an evaluation that decides something:
early stopping, the best checkpoint, a schedule that follows the validation loss. So the clock changes how often one
looks, and never what is trained. Answers to held-out rows have half of the share for themselves, no free second and no
last time: a run that is too short for them has none.

    steps    ████████████████████░████████████████████████████████░███████████████████████████████░░
    due                     ↑ step 10             ↑ 20              ↑ 30             ↑ 40          ↑ the last
    made                    ✓                     waits ───────────→✓               waits ────────→✓
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from instructft.training.launch.context import batches_at_once

ANSWERS = "answers"  # to held-out rows, within an evaluation (`training.judging`)
LOOKING = ("evaluation", ANSWERS, "samples", "warnings")
CLOCK = time.perf_counter  # seconds; tests set their own
FREE = 1.0  # seconds that nobody would miss; a share of 0 has none
DEFAULT = 0.1  # where no share limits anything, what held-out rows take follows from this one
ANSWERS_SHARE = 0.5  # of the share, for them alone
PASSES = 32  # of the model, one a token, that the first answers take
FORWARD = 1 / 3  # of a training step's work: without the backward pass, which is twice as much


class Budget(TrainerCallback):
    """Counts the seconds of each part of a run, and says whether what is due may be done now.

    It must hear of the end of a step before `Stop` does: what waits there is left to the resumed run.

    Args:
        share: of the time trained; None has no limit.
        needed: an evaluation decides what is trained or kept, so that none may wait.
        rows: validation rows; what the first evaluation will take is estimated from them.
        say: told once, when the first waits.
    """

    def __init__(
        self, share: float | None, needed: bool = False, rows: int = 0, say: Callable[[str], Any] = lambda _: None
    ):
        self.share, self.needed, self.rows, self.say = share, needed, rows, say
        self.seconds = dict.fromkeys(
            ("start", "steps", *LOOKING, "checkpoints"), 0.0
        )  # of this run, before a resume too
        self.waiting = False  # whether an evaluation that was due has not been made
        self.told = False
        self._costs: dict[str, float] = {}  # seconds of each kind, the last time
        self._part = "steps"
        self._mark: float | None = None  # up to when seconds are counted
        self._device = torch.device("cpu")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._device, self._mark = args.device, CLOCK()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look again at an evaluation that waits, where the step is logged: the device is waited for there anyway."""
        if self.waiting and control.should_log:
            control.should_evaluate = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what is left."""
        self._settle()

    def _settle(self) -> None:
        """Give the time since the last look at the clock to the part that is under way."""
        if self._mark is None:  # not in a training
            return
        now = CLOCK()
        self.seconds[self._part] += now - self._mark
        self._mark = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time is that of this part, and not of the one around it."""
        if self._part == "steps" and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # steps that are queued are not this part's
        self._settle()
        outer, self._part = self._part, name
        before = self.seconds[name]
        try:
            yield
            self._settle()
            self._costs[name] = self.seconds[name] - before
        finally:
            self._settle()
            self._part = outer

    def done(self, name: str) -> bool:
        """Whether a part has been done in this run, before a resume too."""
        return name in self._costs

    def evaluation_is_due(self, args: Any, state: Any, control: Any) -> bool:
        """Whether to make an evaluation that is due; if not, it waits. Every process must ask at the same place."""
        self.waiting = not (self.needed or state.global_step == 0 or self.allows("evaluation", args, state, control))
        return not self.waiting

    def allows(self, name: str, args: Any, state: Any, control: Any) -> bool:
        """Whether a part may be done now. Every process must ask at the same place; the first decides for all."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        if name != ANSWERS and (self.share is None or last):
            return True
        fits = self._answers_fit(args, state, last) if name == ANSWERS else self._fits(name, args, state)
        if args.world_size > 1:  # clocks differ
            flag = torch.tensor(int(fits and args.process_index == 0), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            fits = bool(flag)
        if not fits and not self.told and name != ANSWERS:
            self.told = True
            self.say(
                f"step {state.global_step}: {'an' if name == 'evaluation' else 'the'} {name} waits: looking at the "
                f"model has taken {self.spent:.1f} s beside {self.seconds['steps']:.1f} s trained, and may take "
                f"{self.share:.0%} (train.evaluation_budget; null: nothing waits)"
            )
        return fits

    @property
    def spent(self) -> float:
        """Seconds that looking has taken."""
        return sum(self.seconds[name] for name in LOOKING)

    def _fits(self, name: str, args: Any, state: Any) -> bool:
        """Whether a part fits into the share of the time trained, with the last of the run set aside."""
        self._settle()
        trained, steps = self.seconds["steps"], max(state.global_step, 1)
        cost = self._cost(name, trained / steps, args)
        last = sum({**self._costs, name: cost}.get(part, 0.0) for part in LOOKING)
        now, at_the_end = self._allowance(trained), self._allowance(trained / steps * state.max_steps)
        return self.spent + cost <= now and self.spent + cost + last <= at_the_end

    def _answers_fit(self, args: Any, state: Any, last: bool) -> bool:
        """Whether held-out rows may be answered now: within their own part of the share, and within the whole."""
        self._settle()
        step = self.seconds["steps"] / max(state.global_step, 1)
        cost = self._cost(ANSWERS, step, args)
        now = self.seconds["steps"] if not last else step * state.max_steps
        if self.seconds[ANSWERS] + cost > ANSWERS_SHARE * self._limit * now:
            return False
        if self.share is None:
            return True
        if not last:
            return self._fits(ANSWERS, args, state)
        to_come = sum(self._costs.get(part, 0.0) for part in ("samples", "warnings"))
        return self.spent + cost + to_come <= self._allowance(now)

    def left_for_answers(self, state: Any) -> float:
        """Seconds that answers to held-out rows may still take in this run."""
        self._settle()
        whole = self.seconds["steps"] / max(state.global_step, 1) * state.max_steps
        return max(0.0, ANSWERS_SHARE * self._limit * whole - self.seconds[ANSWERS])

    @property
    def _limit(self) -> float:
        return DEFAULT if self.share is None else self.share

    def share_of(self, seconds: float) -> float:
        """Share that looking has taken of a training that took so long."""
        self._settle()
        return self.spent / max(seconds, sum(self.seconds.values()), 1e-9)

    def _allowance(self, trained: float) -> float:
        """Seconds that looking may take in all, beside those that were trained."""
        return max(FREE, self.share * trained) if self.share else 0.0

    def _cost(self, name: str, step: float, args: Any) -> float:
        """Seconds that a part will take: as the last time; the first time by the work of a step."""
        if name in self._costs:
            return self._costs[name]
        if name == "evaluation":
            rows = args.train_batch_size * args.gradient_accumulation_steps * batches_at_once(args.world_size)
            return FORWARD * step * self.rows / rows
        if name == ANSWERS:
            return FORWARD * step / args.gradient_accumulation_steps * PASSES
        return max((self._costs.get(part, 0.0) for part in LOOKING[1:]), default=0.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        self._settle()
        return {"seconds": self.seconds, "costs": self._costs, "told": self.told}

    def restore(self, known: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds; older ones hold nothing."""
        for name, seconds in known.get("seconds", {}).items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._costs = {**known.get("costs", {}), **self._costs}
        self.told = self.told or bool(known.get("told"))


def decides(train: Mapping[str, Any]) -> bool:
    """Whether evaluations decide what is trained or kept.

    >>> decides({"early_stopping_patience": 3}), decides({"save_strategy": "steps"})
    (True, False)
    """
    return bool(
        train.get("early_stopping_patience")
        or train.get("load_best_model_at_end")
        or train.get("save_strategy") == "best"
        or train.get("metric_for_best_model")
        or train.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    )
