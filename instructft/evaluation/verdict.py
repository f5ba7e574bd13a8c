"""The verdict of a gate: the task up and the rest not down, each by an interval of the difference over the same rows.

That nothing got worse cannot be shown by finding no difference: ten rows never find one. It is shown by an interval of
the difference whose lower end lies above minus a margin (non-inferiority; ICH E9, 1998, section 3.3.2)::

        -margin      0
           │    ├────●────┤        not down: whatever it is, it is less than the margin
      ├────●────┤    │             down: below 0 for sure, and perhaps beyond the margin
        ├──┼───●─────┼──┤          too few questions: it may be either

The lower end errs in `TAIL` of all samples, so a model that is worse by the margin passes at most so often. That one
without a difference passes asks for enough questions, and for the more of them the more answers turn from right to
wrong and back: with a share f of such answers, no test of n questions tells zero from the margin better than
margin / sqrt(f / n) standard errors. So there are two looks. Where the first cannot tell, further questions are asked,
and all of them are judged together: a model that is worse by the margin passes either look in `TAIL` of all samples,
both together in less than twice that, and one that only looks bad by chance is not called so after the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np

from instructft.evaluation.confidence import FEWEST, Row, differences, measures
from instructft.evaluation.proportions import TAIL as HALF
from instructft.evaluation.proportions import tango

MARGIN = 0.05  # of all questions: what a model may lose beside its task
TAIL = 0.1  # of all samples of a model that is worse by the margin pass
SURE = 0.02  # of all samples without a difference are called down at a first look
ALONE = 0.01  # of all samples without a difference call a suite by itself lost, all suites together
POWER = 0.95  # of all samples of a model without a difference pass, where `needed` questions are asked
SEEN = 0.8  # of all samples show a gain of the task that is as large as it looks, with as many rows as `needed` says
SHORT = 5  # words: answers to a task that are no longer are right or wrong, others more or less like the reference
MOST = 1000  # times the rows that there are: more would be needed for what is no difference
Scores: TypeAlias = Sequence[float]  # of each question, 0 to 1

UP, NOT_UP, DOWN, NOT_DOWN, TOO_FEW = "up", "not up", "down", "not down", "too few"
PASSED, FAILED = "passed", "not passed"


def interval(after: Scores, before: Scores, tail: float = TAIL) -> list[float]:
    """The interval of the difference of two means over the same questions, `tail` beyond each end.

    Right and wrong are counted (Tango, 1998). Other scores have the normal interval with two rows more, one gained and
    one lost (as Agresti and Min, 2005, have it of shares), so that few equal rows are not sure of anything.

    >>> [round(end, 3) for end in interval([1] * 60 + [0] * 40, [1] * 60 + [0] * 40)]
    [-0.016, 0.016]
    """
    ours, theirs = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all():
        return tango(int((ours > theirs).sum()), int((theirs > ours).sum()), len(ours), tail)
    gains = np.concatenate([ours - theirs, [1.0, -1.0]])
    middle = float((ours - theirs).mean())
    reach = NormalDist().inv_cdf(1 - tail) * float(gains.std()) / math.sqrt(len(ours))
    return [max(middle - reach, -1.0), min(middle + reach, 1.0)]


def questions_needed(after: Scores, before: Scores, margin: float) -> int:
    """So many questions let a model without a difference pass in `POWER` of all samples, where answers differ as here.

    >>> questions_needed([1, 0] * 30 + [1] * 40, [0, 1] * 30 + [1] * 40, 0.05)
    2083
    """
    gains = np.concatenate([np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64), [1.0, -1.0]])
    ends = NormalDist().inv_cdf(1 - TAIL) + NormalDist().inv_cdf(POWER)
    return math.ceil(float((gains**2).mean()) * (ends / margin) ** 2)


def judge_rest(
    suites: Mapping[str, tuple[Scores, Scores]], margin: float = MARGIN, first_look: bool = False
) -> dict[str, Any]:
    """Whether a model is not down on questions beside its task: all of them together, and no suite by itself.

    Args:
        suites: name -> the score of each question after and before training.
        margin: what may be lost of all questions, as a share.
        first_look: further questions can be asked where these are too few.

    A suite by itself is down where it lost more than the margin and its interval lies below 0, at a level that counts
    how many suites are looked at.

    Returns:
        `state` (`not down`, `down` or `too few`), `questions`, `before`, `after`, `difference`, `interval`, `needed`
        (questions; only with `too few`), `margin`, `lost` (names of suites that are down by themselves) and `suites`
        (name -> the same figures).
    """
    asked = {name: scores for name, scores in suites.items() if len(scores[0])}
    after = [score for ours, _ in asked.values() for score in ours]
    before = [score for _, theirs in asked.values() for score in theirs]
    alone = {name: _figures(*scores, tail=ALONE / max(1, len(asked))) for name, scores in asked.items()}
    lost = [name for name, one in alone.items() if _is_down(one, margin)]
    found: dict[str, Any] = {"margin": margin, "lost": lost, "suites": alone}
    if len(after) < FEWEST:
        return {**found, "state": TOO_FEW, "questions": len(after), "needed": FEWEST}
    found |= _figures(after, before, TAIL)
    low, high = found["interval"]
    if first_look:
        high = interval(after, before, SURE)[1]
    if lost or (low <= -margin and high < 0):
        return {**found, "state": DOWN}
    if low > -margin:
        return {**found, "state": NOT_DOWN}
    needed = max(questions_needed(after, before, margin), len(after) + 1)
    return {**found, "state": TOO_FEW, "needed": needed}


def _figures(after: Scores, before: Scores, tail: float) -> dict[str, Any]:
    ours, theirs = float(np.mean(after)), float(np.mean(before))
    ends = interval(after, before, tail)
    return {"questions": len(after), "before": theirs, "after": ours, "difference": ours - theirs, "interval": ends}


def _is_down(one: Mapping[str, Any], margin: float) -> bool:
    return bool(one["questions"] >= FEWEST and one["difference"] < -margin and one["interval"][1] < 0)


def metric_of(rows: Sequence[Row]) -> str:
    """The figure that a task's answers are judged by: `exact_match` where references are short, else `rougeL`.

    >>> metric_of([{"reference": "Paris"}]), metric_of([{"reference": "A long answer of many more words."}])
    ('exact_match', 'rougeL')
    """
    words = sorted(len(row["reference"].split()) for row in rows)
    return "exact_match" if words[len(words) // 2] <= SHORT else "rougeL"


def judge_task(tuned: Sequence[Row], base: Sequence[Row], same_tokens: bool = True) -> dict[str, Any]:
    """Whether the task is up: its loss or its metric is better beyond the interval, and neither is worse beyond it.

    Args:
        tuned: rows as `instructft.evaluate` returns them; `base` are the same rows of the other model.
        same_tokens: whether both cut text into the same tokens; else their losses do not compare.

    Returns:
        `state` (`up`, `not up`, `down` or `too few`), `rows`, `metric`, `needed` (rows; only with `too few`), and of
        `loss` and the metric `before`, `after`, `difference`, `interval` and `state` (`up`, `down` or `noise`).
    """
    metric = metric_of(tuned)
    known = {name: -1 if name == "loss" else 1 for name in (["loss"] if same_tokens else []) + [metric]}
    ours, theirs, between = measures(tuned), measures(base), differences(tuned, base)
    found: dict[str, Any] = {"rows": len(tuned), "metric": metric}
    states, needed = [], []
    for name, sign in known.items():
        ends = between[name]["interval"]
        better = 0 if ends is None else sign * (int(ends[0] > 0) - int(ends[1] < 0))
        states.append({1: UP, -1: DOWN, 0: "noise"}[better])
        figures = {"before": theirs[name].whole(), "after": ours[name].whole(), "difference": between[name]["value"]}
        found[name] = {**figures, "interval": ends, "state": states[-1]}
        needed.append(_rows_needed(sign * between[name]["value"], ends, len(tuned)))
    if DOWN in states:
        return {**found, "state": DOWN}
    if UP in states:
        return {**found, "state": UP}
    least = min((rows for rows in needed if rows), default=None)
    return {**found, "state": NOT_UP} if least is None else {**found, "state": TOO_FEW, "needed": least}


def _rows_needed(gain: float, ends: Sequence[float] | None, rows: int) -> int | None:
    """So many rows would show a gain that is as large as it looks; None where it does not look like one."""
    if ends is None:
        return FEWEST
    z = NormalDist().inv_cdf(1 - HALF)
    error = (ends[1] - ends[0]) / (2 * z)
    if gain <= 0 or not error:
        return None
    wanted = rows * ((z + NormalDist().inv_cdf(SEEN)) * error / gain) ** 2
    return max(math.ceil(wanted), rows + 1) if wanted <= MOST * rows else None


def verdict(task: Mapping[str, Any], rest: Mapping[str, Any]) -> tuple[str, list[str]]:
    """`passed`, `not passed` or `too few`, and why: a sentence for each thing that is in the way, or for what holds."""
    reasons = [_about_task(task), _about_rest(rest)]
    good = [task["state"] == UP, rest["state"] == NOT_DOWN]
    if all(good):
        return PASSED, reasons
    bad = task["state"] in (DOWN, NOT_UP) or rest["state"] == DOWN
    return FAILED if bad else TOO_FEW, [reason for reason, fine in zip(reasons, good, strict=True) if not fine]


def _about_task(task: Mapping[str, Any]) -> str:
    rows, state = task["rows"], task["state"]
    moved = [name for name in ("loss", task["metric"]) if name in task and task[name]["state"] == state]
    named = " and ".join({"rougeL": "ROUGE-L", "exact_match": "exact match"}.get(name, name) for name in moved)
    if state == UP:
        return f"the task is up: {named} better beyond the interval, over {rows} held-out rows"
    if state == DOWN:
        return f"the task is down: {named} worse beyond the interval, over {rows} held-out rows"
    if state == NOT_UP:
        return f"the task is not up: over {rows} held-out rows neither figure is better"
    return (
        f"too few held-out rows to see whether the task is up: {rows}; about {task['needed']:,} would do, if the "
        "gain is as large as it looks"
    )


def _about_rest(rest: Mapping[str, Any]) -> str:
    if "interval" not in rest:
        return f"too few questions beside the task: {rest['questions']} count; {rest['needed']} are the least"
    low, high = rest["interval"]
    spans = f"{rest['difference']:+.1%} ({low:+.1%} to {high:+.1%}) of {rest['questions']} questions"
    margin = f"the margin of {rest['margin']:.1%}"
    if rest["state"] == NOT_DOWN:
        return f"the rest is not down: {spans}, within {margin}"
    if rest["state"] == TOO_FEW:
        return (
            f"too few questions to see whether the rest is down: {spans} may be beyond {margin}; about "
            f"{rest['needed']:,} would do"
        )
    worst = sorted(rest["suites"].items(), key=lambda item: item[1]["difference"])[:3]
    most = ", ".join(
        f"{name} {one['before']:.0%} to {one['after']:.0%}" for name, one in worst if one["difference"] < 0
    )
    alone = f"; by themselves beyond {margin}: {', '.join(rest['lost'])}" if rest["lost"] else f", beyond {margin}"
    return f"the rest is down: {spans}{alone}; most in {most}"
