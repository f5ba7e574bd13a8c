"""An interval of a share holds the truth as often as it says, at the ends too, alone and of two models paired."""

from __future__ import annotations

import math

import numpy as np
import pytest

from instructft.evaluation.proportions import clopper_pearson, tango, unseen


@pytest.mark.parametrize("count", [10, 60, 300])
@pytest.mark.parametrize("truth", [0.001, 0.01, 0.05, 0.3, 0.5, 0.9, 0.99, 0.999])
def test_an_exact_interval_holds_the_truth_in_95_of_100_samples_or_more(count: int, truth: float) -> None:
    held = 0.0
    for hits in range(count + 1):  # every sample with its probability: nothing is left to chance
        low, high = clopper_pearson(hits, count)
        if low <= truth <= high:
            held += math.comb(count, hits) * truth**hits * (1 - truth) ** (count - hits)
    assert held >= 0.95 - 1e-9


def test_an_exact_interval_is_the_one_of_the_books() -> None:
    assert clopper_pearson(0, 10) == pytest.approx([0.0, 0.308497], abs=1e-6)
    assert clopper_pearson(10, 10) == pytest.approx([0.691503, 1.0], abs=1e-6)
    assert clopper_pearson(4, 10) == pytest.approx([0.121552, 0.737622], abs=1e-6)
    assert clopper_pearson(0, 10)[1] == pytest.approx(unseen(10))


@pytest.mark.parametrize("gained", [0.0, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("lost", [0.0, 0.01, 0.1, 0.3])
def test_a_paired_interval_holds_the_truth_about_as_often_as_it_says(gained: float, lost: float) -> None:
    rng = np.random.default_rng(0)
    samples = rng.multinomial(80, [gained, lost, 1 - gained - lost], size=1000)
    held = 0
    for up, down, _ in samples:
        low, high = tango(int(up), int(down), 80)
        held += low <= gained - lost <= high
    assert held / 1000 >= 0.93


@pytest.mark.parametrize(("gained", "lost", "count"), [(1, 0, 44), (10, 3, 50), (0, 7, 30), (0, 0, 20)])
def test_a_paired_interval_inverts_the_score_test(gained: int, lost: int, count: int) -> None:
    """The likelihood is searched point by point here; at both limits the score is 1.96."""
    for limit, score in zip(tango(gained, lost, count), (1.959964, -1.959964), strict=True):
        second = np.linspace(max(0.0, -limit), (1 - limit) / 2, 400_001)[1:-1]
        likelihood = gained * np.log(second + limit) + lost * np.log(second)
        likelihood += (count - gained - lost) * np.log(1 - 2 * second - limit)
        best = second[likelihood.argmax()]
        found = (gained - lost - count * limit) / math.sqrt(count * (2 * best + limit * (1 - limit)))
        assert found == pytest.approx(score, abs=1e-3)


def test_zero_lies_within_where_mcnemar_sees_no_difference() -> None:
    for gained in range(12):
        for lost in range(12):
            low, high = tango(gained, lost, 200)
            statistic = (gained - lost) ** 2 / (gained + lost) if gained + lost else 0.0
            assert (low <= 0 <= high) == (statistic <= 3.841459)
