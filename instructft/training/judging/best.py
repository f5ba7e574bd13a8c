"""Which evaluation is the best by a figure of answers: one whose gain the choice of rows does not explain.

Of fifty answers one more that is right is chance as often as not, and the highest of ten such figures is mostly luck.
So an evaluation takes the place of the best one where its paired difference over the same rows lies beyond its 95%
interval, and else the earlier checkpoint stands. Checkpoints hold the scores: a resumed run comes to the same best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from instructft.evaluation.confidence import mean_of
from instructft.formatting import figure


class Best:
    """The best evaluation so far by one figure.

    Args:
        name: of the figure, without `eval_`.
        greater: the more, the better.
        say: told where a figure that looks better is none.
    """

    def __init__(self, name: str, greater: bool = True, say: Callable[[str], Any] = lambda _: None):
        self.name, self.greater, self.say = name, greater, say
        self.step: int | None = None
        self.scores: list[float | None] = []  # of each row, there

    @property
    def value(self) -> float:
        """The figure at the best step."""
        return mean_of([score for score in self.scores if score is not None]).whole()

    def take(self, step: int, scores: Sequence[float | None]) -> bool:
        """Judge the scores of all rows at a step; whether it is the best from now on."""
        if all(score is None for score in scores):
            return False
        if self.step is None or self._better(step, scores):
            self.step, self.scores = step, list(scores)
        return self.step == step

    def _better(self, step: int, scores: Sequence[float | None]) -> bool:
        # rows that have a score at both; a run that is resumed with another evaluation.rows has fewer in common
        both = [(a, b) for a, b in zip(scores, self.scores, strict=False) if a is not None and b is not None]
        if not both:
            return False
        ours, theirs = (mean_of(values) for values in zip(*both, strict=True))
        gain = ours.whole() - theirs.whole()
        if not (gain > 0 if self.greater else gain < 0):
            return False
        interval = ours.interval_over(theirs)
        if interval is not None and (interval[0] > 0 if self.greater else interval[1] < 0):
            return True
        span = "" if interval is None else f": a difference of {interval[0]:+.3f} to {interval[1]:+.3f} (95%)"
        now, before = figure(self.name, ours.whole()), figure(self.name, theirs.whole())
        self.say(
            f"step {step}: {now} is not beyond chance over {before} at step {self.step}, on {len(both)} rows{span}; "
            f"step {self.step} stands as the best"
        )
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"name": self.name, "step": self.step, "scores": self.scores}

    def restore(self, known: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds of the same figure; of another one nothing is known."""
        if known.get("name") == self.name:
            self.step, self.scores = known["step"], list(known["scores"])
