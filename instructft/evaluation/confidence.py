"""The figures of an evaluation as sums over rows, and how sure each is: intervals, and whether two models differ.

A bootstrap (Efron, 1979; for tests of language models Koehn, 2004: https://aclanthology.org/W04-3250) draws as many
rows as there are, with replacement, a thousand times; the middle 95% of the figures of all draws are the interval. Two
models are compared on the same draws (paired), so that a row that is hard for both counts for neither. What a row has
or has not is counted exactly instead, and no figure that has a most is sure to the last digit
(`instructft.evaluation.proportions`).
What is judged is chance in the choice of rows. That another seed of training gives another model is not in it:
`instructft evaluate` says so (`instructft.evaluation.compare.by_seed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from instructft.evaluation.proportions import clopper_pearson, tango, unseen
from instructft.evaluation.words import spaced

DRAWS = 1000
SEED = 0  # of the draws: the same rows give the same interval
LEVEL = 95  # per cent of the draws that lie within an interval
FEWEST = 10  # rows; of fewer no interval is told
_AT_ONCE = 1 << 22  # counts in memory at a time
Row: TypeAlias = Mapping[str, Any]


class Measure(NamedTuple):
    """A figure that follows from sums over rows."""

    rows: np.ndarray  # (N, K) float64: what is summed
    value: Callable[[np.ndarray], float]  # of the sums, (K,)
    most: float = math.inf  # what it can be at most; at least it is 0

    def whole(self) -> float:
        """Its value over all rows."""
        return self.value(self.rows.sum(0))

    def drawn(self) -> np.ndarray:
        """Its value in each draw: (DRAWS,)."""
        return np.array([self.value(sums) for counts in _draws(len(self.rows)) for sums in counts @ self.rows])

    def is_share(self) -> bool:
        """Whether each row has it or has it not."""
        return self.most == 1 and bool(np.isin(self.rows[:, 0], (0, 1)).all())

    def interval(self) -> list[float] | None:
        """Its 95% interval; None where there is nothing to divide by in a draw."""
        if self.is_share():
            return clopper_pearson(int(self.rows[:, 0].sum()), len(self.rows))
        middle = _middle(self.drawn())
        if middle is None or math.isinf(self.most):
            return middle
        value, share = self.whole(), unseen(len(self.rows))
        return [min(middle[0], value * (1 - share)), max(middle[1], value + (self.most - value) * share)]

    def interval_over(self, other: Measure) -> list[float] | None:
        """The 95% interval of its difference from the same figure of another model over the same rows."""
        if self.is_share() and other.is_share():
            ours, theirs = self.rows[:, 0], other.rows[:, 0]
            return tango(int((ours > theirs).sum()), int((theirs > ours).sum()), len(ours))
        middle = _middle(self.drawn() - other.drawn())
        if middle is None or math.isinf(self.most) or middle[0] != middle[1]:
            return middle
        share = unseen(len(self.rows))
        return [middle[0] * (1 - share) - self.most * share, middle[0] * (1 - share) + self.most * share]


def _draws(count: int) -> Any:
    """How often each of `count` rows is in each draw, some draws at a time: (n, count)."""
    rng = np.random.default_rng([SEED, count])
    step = max(1, min(DRAWS, _AT_ONCE // count))
    for start in range(0, DRAWS, step):
        yield rng.multinomial(count, np.full(count, 1 / count), size=min(step, DRAWS - start)).astype(np.float64)


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _perplexity(sums: np.ndarray) -> float:
    return math.exp(min(_ratio(sums), 700.0))


def _mean(of: Callable[[Row], float], most: float = 1.0) -> Callable[[Sequence[Row]], Measure]:
    return lambda rows: Measure(np.array([[of(row), 1.0] for row in rows], dtype=np.float64), _ratio, most)


def _losses(rows: Sequence[Row]) -> np.ndarray:
    return np.array([[row["nll"], row["supervised_tokens"]] for row in rows], dtype=np.float64)


def _bleu(rows: Sequence[Row]) -> Measure:
    """Corpus BLEU (Post, 2018: https://aclanthology.org/W18-6319): sacrebleu's own counts of n-grams, summed.

    Where no answer is as long as four words, runs of fewer count (sacrebleu's effective order).
    """
    from sacrebleu.metrics import BLEU

    scorer = BLEU(effective_order=True)
    predictions, references = ([spaced(row[key]) for row in rows] for key in ("prediction", "reference"))
    counts = np.array(scorer._extract_corpus_statistics(predictions, [references]), dtype=np.float64)
    return Measure(counts, lambda sums: float(scorer._compute_score_from_stats([int(x) for x in sums]).score), 100.0)


# name in the results -> the figure over rows as `instructft.evaluate` returns them
METRICS: dict[str, Callable[[Sequence[Row]], Measure]] = {
    "loss": lambda rows: Measure(_losses(rows), _ratio),  # weighted by supervised tokens
    "perplexity": lambda rows: Measure(_losses(rows), _perplexity),
    "exact_match": _mean(lambda row: row["prediction"].strip() == row["reference"].strip()),
    "rougeL": _mean(lambda row: row["rougeL"]),
    "bleu": _bleu,
    "answer_tokens": _mean(lambda row: row["answer_tokens"], math.inf),
    "stopped": _mean(lambda row: row["finish_reason"] == "stop"),
    "repeated": _mean(lambda row: row["repeated"]),
}


def mean_of(scores: Sequence[float]) -> Measure:
    """The mean of what each row is worth; what lies from 0 to 1 is at most 1.

    >>> mean_of([1.0, 0.0, 1.0, 1.0]).whole()
    0.75
    """
    most = 1.0 if all(0 <= score <= 1 for score in scores) else math.inf
    return Measure(np.array([[score, 1.0] for score in scores], dtype=np.float64), _ratio, most)


def measures(rows: Sequence[Row]) -> dict[str, Measure]:
    """Name -> figure of these rows."""
    return {name: measure(rows) for name, measure in METRICS.items()}


def intervals(rows: Sequence[Row]) -> dict[str, list[float] | None]:
    """The 95% interval of each figure; None where there are too few rows to tell, or nothing to divide by.

    Example::

        intervals(results["tuned"]["rows"])["loss"]
        # [0.0312, 0.0451]
    """
    known = measures(rows)
    if len(rows) < FEWEST:
        return dict.fromkeys(known)
    return {name: measure.interval() for name, measure in known.items()}


def differences(tuned: Sequence[Row], base: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Tuned less base in each figure, over the same rows in the same order.

    Returns name -> `value`, `interval`, and `noise`: whether zero lies within the interval, so that another choice of
    rows might turn the sign. `interval` and `noise` are None where there are too few rows to tell.

    Example::

        differences(results["tuned"]["rows"], results["base"]["rows"])["loss"]
        # {'value': -2.31, 'interval': [-2.42, -2.2], 'noise': False}
    """
    found = {}
    ours, theirs = measures(tuned), measures(base)
    for name in ours:
        a, b = ours[name], theirs[name]
        interval = a.interval_over(b) if len(tuned) >= FEWEST else None
        noise = None if interval is None else interval[0] <= 0 <= interval[1]
        found[name] = {"value": a.whole() - b.whole(), "interval": interval, "noise": noise}
    return found


def _middle(drawn: np.ndarray) -> list[float] | None:
    if not np.isfinite(drawn).all():
        return None
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return [float(low), float(high)]
