"""How sure a figure is: intervals from rows drawn again and again, and whether two models differ by more than chance.

A bootstrap (Efron, 1979; for tests of language models Koehn, 2004: https://aclanthology.org/W04-3250) draws as many
rows as there are, with replacement, a thousand times, and computes the figure of each draw: the middle 95% of them are
its interval. Two models are compared on the same draws (paired), so that a row that is hard for both counts for
neither.
What is judged is chance in the choice of rows. That another seed of training gives another model is not in it:
`instructft evaluate` says so, and calls what lies between two seeds of one recipe noise
(`instructft.evaluation.compare.by_seed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS = 1000
SEED = 0  # of the draws: the same rows give the same interval
LEVEL = 95  # per cent of the draws that lie within an interval
FEWEST = 10  # rows; of fewer no interval is told
_AT_ONCE = 1 << 22  # counts in memory at a time


class Measure(NamedTuple):
    """A figure that follows from sums over rows."""

    rows: np.ndarray  # (N, K) float64: what is summed
    value: Callable[[np.ndarray], float]  # of the sums, (K,)

    def sums(self) -> np.ndarray:
        """Its sums over all draws: (DRAWS, K)."""
        return np.concatenate([counts @ self.rows for counts in _draws(len(self.rows))])

    def drawn(self) -> np.ndarray:
        """Its value in each draw: (DRAWS,)."""
        return np.array([self.value(sums) for sums in self.sums()])


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


def measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
    """Name -> figure of rows as `instructft.evaluate` returns them. Loss is weighted by supervised tokens."""
    ones = np.ones(len(rows))

    def mean(values: Sequence[float]) -> Measure:
        return Measure(np.stack([np.asarray(values, dtype=np.float64), ones], 1), _ratio)

    loss = np.array([[row["nll"], row["supervised_tokens"]] for row in rows], dtype=np.float64)
    return {
        "loss": Measure(loss, _ratio),
        "perplexity": Measure(loss, _perplexity),
        "exact_match": mean([row["prediction"].strip() == row["reference"].strip() for row in rows]),
        "rougeL": mean([row["rougeL"] for row in rows]),
        "bleu": _bleu([row["prediction"] for row in rows], [row["reference"] for row in rows]),
        "answer_tokens": mean([row["answer_tokens"] for row in rows]),
        "stopped": mean([row["finish_reason"] == "stop" for row in rows]),
        "repeated": mean([row["repeated"] for row in rows]),
    }


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> Measure:
    """Corpus BLEU: its counts of n-grams are summed over rows, as sacrebleu's own bootstrap does."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU()
    counts = np.array(scorer._extract_corpus_statistics(list(predictions), [list(references)]), dtype=np.float64)
    return Measure(counts, lambda sums: float(scorer._compute_score_from_stats([int(x) for x in sums]).score))


def intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float] | None]:
    """The 95% interval of each figure; None where there are too few rows to tell, or nothing to divide by.

    >>> intervals(results["tuned"]["rows"])["loss"]
    [0.0312, 0.0451]
    """
    known = measures(rows)
    if len(rows) < FEWEST:
        return dict.fromkeys(known)
    return {name: _middle(measure.drawn()) for name, measure in known.items()}


def differences(tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tuned less base in each figure, over the same rows in the same order.

    Returns name -> `value`, `interval`, and `noise`: whether zero lies within the interval, so that another choice of
    rows might turn the sign. `interval` and `noise` are None where there are too few rows to tell.

    >>> differences(results["tuned"]["rows"], results["base"]["rows"])["loss"]
    {'value': -2.31, 'interval': [-2.42, -2.2], 'noise': False}
    """
    found = {}
    ours, theirs = measures(tuned), measures(base)
    for name in ours:
        a, b = ours[name], theirs[name]
        value = a.value(a.rows.sum(0)) - b.value(b.rows.sum(0))
        interval = _middle(a.drawn() - b.drawn()) if len(tuned) >= FEWEST else None
        noise = None if interval is None else interval[0] <= 0 <= interval[1]
        found[name] = {"value": value, "interval": interval, "noise": noise}
    return found


def _middle(drawn: np.ndarray) -> list[float] | None:
    if not np.isfinite(drawn).all():
        return None
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return [float(low), float(high)]
