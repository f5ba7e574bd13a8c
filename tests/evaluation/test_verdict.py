"""The verdict errs as seldom as it says: shown by simulation, with no model, at the sizes that ship."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from instructft.evaluation import confidence
from instructft.evaluation import verdict as module
from instructft.evaluation.suites import Question, further, read_suites
from instructft.evaluation.verdict import (
    DOWN,
    MARGIN,
    NOT_DOWN,
    NOT_UP,
    TOO_FEW,
    UP,
    interval,
    judge_rest,
    judge_task,
    questions_needed,
    verdict,
)
from tests.conftest import BATTERY
from tests.helpers.evaluation import row

FEWER = 1000 if BATTERY else 100  # pairs, where others were drawn in full already
FLIPS = (0.02, 0.05, 0.15, 0.2, 0.3, 0.4)  # of answers that turn from right to wrong or back
# of SmolLM2-135M-Instruct: how many facts it knew, and what it had right; a gentle LoRA changed 10% of its answers
KNOWN = 0.22
RIGHT = {"arithmetic": 0.2, "facts": 0.82, "format": 0.3, "json": 0.45, "memory": 0.2, "refusal": 0.35}


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same counts come again and again in a simulation."""
    monkeypatch.setattr(module, "tango", lru_cache(None)(module.tango))


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """How many questions of each suite that ships count."""
    questions, others = read_suites([])
    assert not others
    names = sorted({question.suite for question in questions})

    def counts(question: Question) -> float:
        return KNOWN if question.known else 1

    return {name: round(sum(counts(q) for q in questions if q.suite == name)) for name in names}


@pytest.fixture(scope="module")
def more() -> dict[str, int]:
    """How many further questions there are of each suite."""
    return Counter(question.suite for question in further([]))


def pairs(
    sizes: Mapping[str, int], count: int, flips: float, worse: float = 0.0, of: str | None = None, seed: int = 0
) -> Any:
    """Pairs of models: right answers come and go on a share of `flips` questions, `worse` of all are lost beyond that.

    Args:
        of: a suite, of which alone something is lost.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scores = {}
        for name, size in sizes.items():
            lost = worse if of in (None, name) else 0.0
            way = flips / 2  # as many come as go
            right = min(max(RIGHT[name], way + lost), 1 - way)  # so many that they can
            before, turned = rng.random(size) < right, rng.random(size)
            after = np.where(before, turned >= (way + lost) / right, turned < way / (1 - right))
            scores[name] = after.astype(float), before.astype(float)
        yield scores


def share(
    sizes: Mapping[str, int], more: Mapping[str, int] | None = None, margin: float = MARGIN, count: int = 1000,
    **how: Any,
) -> float:  # fmt: skip
    """How often a pair does not pass, where `more` questions are asked if the first cannot tell."""
    again = pairs(more or {}, count, **{**how, "seed": 1})
    failed = 0
    for scores, others in zip(pairs(sizes, count, **how), again, strict=True):
        state = judge_rest(scores, margin, first_look=bool(more))["state"]
        if more and state == TOO_FEW:
            both = {
                name: tuple(np.concatenate([one, other]) for one, other in zip(scores[name], others[name], strict=True))
                for name in others
            }
            state = judge_rest({**scores, **both}, margin)["state"]
        failed += state != NOT_DOWN
    return failed / count


def test_pairs_without_a_difference_seldom_fail(sizes: dict[str, int], more: dict[str, int]) -> None:
    assert sum(sizes.values()) > 500
    assert share(sizes, more, flips=0.1) <= 0.05
    for flips in FLIPS:
        assert share(sizes, more, flips=flips, count=FEWER) <= 0.05, flips


def test_pairs_that_are_worse_by_the_margin_fail(sizes: dict[str, int], more: dict[str, int]) -> None:
    assert share(sizes, more, flips=0.1, worse=MARGIN) >= 0.8
    for flips in FLIPS:
        assert share(sizes, more, flips=flips, worse=MARGIN, count=FEWER) >= 0.8, flips


def test_a_first_look_calls_down_only_what_is_so_for_sure() -> None:
    def found(lost: int, gained: int, first_look: bool) -> str:
        after = [0.0] * lost + [1.0] * (220 - lost)
        before = [1.0] * lost + [0.0] * gained + [1.0] * (220 - lost - gained)
        state: str = judge_rest({"facts": (after, before)}, first_look=first_look)["state"]
        return state

    assert found(60, 44, first_look=False) == DOWN
    assert found(60, 44, first_look=True) == TOO_FEW
    assert found(60, 10, first_look=True) == DOWN


def test_one_suite_that_is_lost_alone_fails(sizes: dict[str, int]) -> None:
    """All questions together would hide it: a fifth of one suite is 3% of all."""
    assert share(sizes, flips=0.02, worse=0.3, of="refusal", count=100) >= 0.8
    found = judge_rest(next(pairs(sizes, 1, flips=0.0, worse=0.3, of="refusal")))
    assert found["lost"] == ["refusal"]
    assert found["difference"] > -MARGIN
    assert "refusal" in verdict({"state": UP, "rows": 9, "metric": "rougeL"}, found)[1][0]


def test_as_many_questions_as_are_said_to_be_needed_are_enough() -> None:
    found = judge_rest({"arithmetic": ([1.0] * 9 + [0.0] * 9 + [1.0] * 42, [0.0] * 9 + [1.0] * 51)})
    assert found["state"] == TOO_FEW
    assert found["interval"][0] <= -MARGIN < 0 <= found["interval"][1]
    assert 600 < found["needed"] < 3000
    assert share({"arithmetic": found["needed"]}, flips=0.3, count=200) <= 0.1
    assert share({"arithmetic": found["needed"]}, flips=0.3, worse=MARGIN, count=200) >= 0.8
    assert questions_needed([1.0] * 50, [1.0] * 50, 0.1) < questions_needed([1.0] * 50, [1.0] * 50, 0.05)


def test_questions_that_the_base_was_seen_to_know_do_not_count_against_the_other() -> None:
    """Chosen by what it draws, not by the answers that are compared: two equal models stay equal on them."""
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(200):
        knows = 1 / (1 + np.exp(-rng.normal(0, 4, 247)))  # of each question, how likely an answer is right
        drawn = (rng.random((3, 247)) < knows).all(0)
        before, after = (rng.random((2, 247)) < knows)[:, drawn]
        differences.append(after.mean() - before.mean())
    assert abs(np.mean(differences)) < MARGIN / 10


def test_scores_that_are_no_shares_have_an_interval_too() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        before = rng.random(60)
        after = np.clip(before + rng.normal(0, 0.2, 60), 0, 1)
        low, high = interval(after, before)
        inside += low <= 0 <= high
    assert 0.8 <= inside / 200 <= 0.99
    assert interval([0.5] * 20, [0.5] * 20)[0] < 0 < interval([0.5] * 20, [0.5] * 20)[1]
    assert interval([0.1] * 50, [0.9] * 50)[1] < -0.5


def test_what_is_asked_of_the_rest() -> None:
    good, bad = [1.0] * 300, [1.0] * 200 + [0.0] * 100
    assert judge_rest({"a": (good, good)})["state"] == NOT_DOWN
    assert judge_rest({"a": (bad, good)})["state"] == DOWN
    assert judge_rest({"a": (good, bad)})["state"] == NOT_DOWN
    assert judge_rest({"a": (bad, good)}, margin=0.5)["state"] == NOT_DOWN
    nothing: Any = {"a": ([], [])}
    assert judge_rest(nothing)["state"] == TOO_FEW
    assert judge_rest(nothing)["suites"] == {}
    json.dumps(judge_rest({"a": (bad, good), "b": ([1.0] * 5, [1.0] * 5)}))


def rows_of(nll: list[float], **more: Any) -> list[dict[str, Any]]:
    return [row(nll=one, **more) for one in nll]


def test_the_task_is_up_where_a_figure_is_better_and_none_is_worse() -> None:
    rng = np.random.default_rng(0)
    base = rows_of(list(rng.normal(3.0, 0.5, 40)))
    noisy = rows_of(list(rng.normal(3.0, 0.5, 40)))
    better = rows_of([one["nll"] - 0.5 for one in base])
    wrong = [{**one, "prediction": "b"} for one in better]
    worse = rows_of([one["nll"] + 0.5 for one in base])
    assert judge_task(better, base)["state"] == UP
    assert judge_task(worse, base)["state"] == DOWN
    assert judge_task(wrong, base)["state"] == DOWN  # a lower loss with answers that are wrong
    assert judge_task(base, base)["state"] == NOT_UP
    assert judge_task(noisy, base)["state"] in (NOT_UP, TOO_FEW)
    assert judge_task(better[:5], base[:5])["state"] == TOO_FEW
    assert "loss" not in judge_task(better, base, same_tokens=False)
    slightly = rows_of([one["nll"] - shift for one, shift in zip(base, rng.normal(0.05, 0.3, 40), strict=True)])
    found = judge_task(slightly, base)
    assert found["state"] == TOO_FEW
    assert 40 < found["needed"] < 4000


def test_of_pairs_without_a_difference_few_are_called_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confidence, "METRICS", {name: confidence.METRICS[name] for name in ("loss", "exact_match")})
    rng = np.random.default_rng(2)
    up = 0
    for _ in range(60):
        base = rows_of(list(rng.normal(3.0, 0.5, 60)))
        same = rows_of([one["nll"] + shift for one, shift in zip(base, rng.normal(0, 0.3, 60), strict=True)])
        up += judge_task(same, base)["state"] == UP
    assert up / 60 <= 0.1


def test_the_verdict_and_its_reasons() -> None:
    good, bad = [1.0] * 300, [1.0] * 200 + [0.0] * 100
    fine, down, few = (judge_rest({"facts": scores}) for scores in ((good, good), (bad, good), (good[:12], good[:12])))
    up = judge_task(rows_of([1.0, 1.1] * 20), rows_of([2.0, 2.1] * 20))
    flat = judge_task(rows_of([1.0, 1.1] * 20), rows_of([1.0, 1.1] * 20))
    assert verdict(up, fine)[0] == module.PASSED
    assert verdict(up, down)[0] == verdict(flat, fine)[0] == verdict(flat, few)[0] == module.FAILED
    assert verdict(up, few)[0] == TOO_FEW
    assert len(verdict(up, fine)[1]) == len(verdict(flat, down)[1]) == 2
    (reason,) = verdict(up, down)[1]
    assert "the rest is down: -33.3%" in reason
    assert "most in facts 100% to 67%" in reason
    assert "would do" in verdict(up, few)[1][0]
