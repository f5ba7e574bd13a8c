"""The best checkpoint changes where the rows say so beyond chance, and a resumed run comes to the same one."""

from __future__ import annotations

import numpy as np

from instructft.training.judging.best import Best


def shares(right: int, count: int = 50) -> list[float | None]:
    return [1.0] * right + [0.0] * (count - right)


def test_a_gain_that_chance_explains_leaves_the_earlier_one() -> None:
    said: list[str] = []
    best = Best("exact_match", say=said.append)
    assert best.take(10, shares(40))
    assert not best.take(20, shares(42))
    assert best.step == 10
    assert "step 20: exact match 84.0% is not beyond chance over exact match 80.0% at step 10, on 50 rows" in said[0]
    assert said[0].endswith("step 10 stands as the best")
    assert best.take(30, shares(48))  # eight rows more, and none less
    assert (best.step, best.value) == (30, 0.96)
    assert not best.take(40, shares(20))
    assert len(said) == 1  # one that is worse needs no word


def test_of_evaluations_that_differ_by_chance_the_first_stands() -> None:
    """A model that does not change, of whose answers 70% are right: the highest figure of ten is luck."""
    rng = np.random.default_rng(0)
    moved = 0
    for _ in range(60):
        best = Best("exact_match")
        for step in range(10):
            best.take(step, list((rng.random(40) < 0.7).astype(float)))
        moved += best.step != 0
    assert moved < 20  # at 2.5% a look, and the first one may have been unlucky; the highest would be another in 80%


def test_scores_of_any_size_and_the_lower_the_better() -> None:
    best = Best("my_error", greater=False)
    values = np.random.default_rng(1).normal(50, 5, 40)
    assert best.take(1, values.tolist())
    assert not best.take(2, (values + 1).tolist())
    assert best.take(3, (values - 1).tolist())


def test_rows_without_a_score_are_left_out_and_fewer_rows_are_compared_among_themselves() -> None:
    best = Best("score")
    assert not best.take(1, [None, None])
    assert best.step is None
    assert best.take(2, [None, *shares(10, 39)])
    assert best.take(3, [1.0, None, *shares(38, 38), 1.0])
    assert not best.take(4, [])


def test_a_checkpoint_holds_it() -> None:
    best = Best("exact_match")
    best.take(10, shares(40))
    again = Best("exact_match")
    again.restore(best.state())
    assert not again.take(20, shares(42))
    assert again.step == 10
    other = Best("token_f1")  # of another figure nothing is known
    other.restore(best.state())
    assert other.take(20, shares(10))
