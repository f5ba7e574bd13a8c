"""How far apart two models are is told in figures that are known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from instructft.merging.comparison import Seen, _losses, agreement, apart


def seen(*rows: list[float], loss: float | None = None) -> Seen:
    return Seen([torch.tensor([row]) for row in rows], [], loss)


def test_kl_top1_and_the_largest_difference() -> None:
    half, quarter = [0.0, 0.0], [0.0, math.log(3.0)]  # probabilities 1/2, 1/2 and 1/4, 3/4
    found = apart(seen(half, quarter), seen(quarter, quarter, loss=1.5))
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found["kl"] == pytest.approx(by_hand / 2)  # the mean of two positions
    assert found["top1"] == 0.5
    assert found["difference"] == pytest.approx(math.log(3.0))
    assert found["loss"] == 1.5


def test_a_logit_that_is_not_a_number_is_never_equal() -> None:
    found = apart(seen([0.0, 1.0]), seen([0.0, math.nan]))
    assert not found["difference"] <= 1e9


def test_the_loss_is_that_of_the_next_token_where_it_is_labelled() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [5.0, 0.0]])
    assert _losses(logits, [[0, 1, -100]]) == pytest.approx([-math.log(0.75)])
    assert _losses(logits, []) == []


def test_answers_are_compared_place_by_place() -> None:
    assert agreement([[1, 2, 3], []], [[1, 5, 3, 4], [7]]) == (5, 2)
