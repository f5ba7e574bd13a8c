"""How sure a share of rows is, also at 0 and 1, where drawing the same rows again shows no spread at all.

Of 100 right answers in 100 rows a bootstrap says 100% to 100%; what it cannot draw is the row that was not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

TAIL = 0.025  # at each end of an interval of 95%
_HALVINGS = 40  # of the range in which a limit is sought


def clopper_pearson(hits: int, count: int) -> list[float]:
    """The exact interval of a share (Clopper and Pearson, 1934): it holds the truth in at least 95% of all samples.

    >>> [round(limit, 4) for limit in clopper_pearson(20, 20)]
    [0.8316, 1.0]
    """

    def at_least(hits: int, share: float) -> float:
        """The probability of so many hits or more."""
        many = np.arange(hits, count + 1)
        logs = _log_choose(count)[many] + many * math.log(share) + (count - many) * math.log1p(-share)
        return float(np.exp(logs).sum())

    low = _crossing(lambda share: at_least(hits, share) < TAIL, 0.0, 1.0) if hits else 0.0
    high = _crossing(lambda share: at_least(hits + 1, share) < 1 - TAIL, 0.0, 1.0) if hits < count else 1.0
    return [low, high]


def tango(gained: int, lost: int, count: int, tail: float = TAIL) -> list[float]:
    """The interval of the difference of two shares over the same rows (Tango, 1998, doi:10.1002/sim.1998.17.8.891).

    Args:
        gained: rows that count for the first model alone.
        lost: rows that count for the second one alone.
        tail: what lies beyond each end, of all samples.

    It inverts the score test: it holds 0 exactly where McNemar's test sees no difference.

    >>> [round(limit, 4) for limit in tango(1, 0, 44)]
    [-0.0594, 0.1181]
    """
    z = NormalDist().inv_cdf(1 - tail)

    def score(difference: float) -> float:
        """How many standard errors the rows lie above a difference."""
        linear = -gained - lost + (2 * count - gained + lost) * difference
        constant = -lost * difference * (1 - difference)
        only_second = (math.sqrt(max(linear**2 - 8 * count * constant, 0.0)) - linear) / (4 * count)
        spread = math.sqrt(max(count * (2 * only_second + difference * (1 - difference)), 0.0))
        above = gained - lost - count * difference
        return above / spread if spread else math.copysign(math.inf, above) if above else 0.0

    found = (gained - lost) / count
    return [
        _crossing(lambda difference: score(difference) > z, -1.0, found),
        _crossing(lambda difference: score(difference) >= -z, found, 1.0),
    ]


def unseen(count: int) -> float:
    """The largest share of rows that none of `count` rows may have shown: each missed it with a chance of 2.5% in all.

    >>> round(unseen(100), 4)
    0.0362
    """
    return float(1 - TAIL ** (1 / count))


def _log_choose(count: int) -> np.ndarray:
    """log(count over k) for k from 0 to count."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    whole: np.ndarray = factorials[-1] - factorials - factorials[::-1]
    return whole


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where something that holds at the lower end ceases to."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return (low + high) / 2
