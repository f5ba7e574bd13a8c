"""Figures equal their libraries, and an interval holds the truth as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from instructft.evaluation.confidence import _draws, differences, intervals, measures
from tests.helpers.evaluation import row


def test_figures_equal_their_libraries() -> None:
    import sacrebleu

    predictions = ["The cat sat on the mat today.", "Paris ", "", "3 + 4 = 7", "a completely different thing here"]
    references = ["The cat is on the mat today.", " Paris\n", "Oslo", "3 + 4 = 7", "what was expected of it"]

    def figure(name: str, said: list[str], expected: list[str]) -> float:
        pairs = zip(said, expected, strict=True)
        return measures([row(prediction=p, reference=r) for p, r in pairs])[name].whole()

    assert figure("exact_match", predictions, references) == 2 / 5
    corpus = sacrebleu.BLEU().corpus_score(predictions, [references]).score
    assert figure("bleu", predictions, references) == corpus > 0
    long, short = "one two three four five six seven", "one two three four five"
    assert figure("bleu", [long], [short]) != figure("bleu", [short], [long])


def test_intervals_equal_a_plain_bootstrap() -> None:
    """The loss is weighted by supervised tokens; BLEU is that of the drawn texts by sacrebleu itself."""
    import sacrebleu

    rng = np.random.default_rng(3)
    words = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran"]
    texts = [" ".join(rng.choice(words, 6)) for _ in range(30)]
    rows = [
        row(float(rng.gamma(2)), int(rng.integers(1, 20)), prediction=texts[i], reference=texts[i // 2])
        for i in range(30)
    ]
    drawn = [list(np.repeat(np.arange(30), counts.astype(int))) for part in _draws(30) for counts in part]
    assert len(drawn) == 1000
    assert {len(rows) for rows in drawn} == {30}
    losses = [sum(rows[i]["nll"] for i in some) / sum(rows[i]["supervised_tokens"] for i in some) for some in drawn]
    got = intervals(rows)
    assert got["loss"] == pytest.approx(np.percentile(losses, [2.5, 97.5]), rel=1e-12)
    assert got["perplexity"] == pytest.approx(np.exp(got["loss"]), rel=1e-3)
    scores = [
        sacrebleu.corpus_bleu([rows[i]["prediction"] for i in some], [[rows[i]["reference"] for i in some]]).score
        for some in drawn[:40]
    ]
    assert scores == pytest.approx(list(measures(rows)["bleu"].drawn()[:40]), rel=1e-12)
    assert intervals(rows) == got  # seeded
    assert set(intervals(rows[:9]).values()) == {None}


@pytest.mark.parametrize("truth", [0.01, 0.3, 0.95, 0.99])
def test_an_interval_holds_the_truth_about_as_often_as_it_says(truth: float) -> None:
    rng = np.random.default_rng(0)
    held = dict.fromkeys(("exact_match", "rougeL", "stopped"), 0)
    for _ in range(200):
        hits = rng.random(60) < truth
        scores = np.where(hits, 1.0, rng.random(60))  # a ROUGE-L that is mostly 1
        rows = [
            row(prediction="a" if hit else "b", rougeL=score, finish_reason="stop" if hit else "length")
            for hit, score in zip(hits, scores, strict=True)
        ]
        known = measures(rows)
        for name, expected in {"exact_match": truth, "rougeL": (1 + truth) / 2, "stopped": truth}.items():
            low, high = known[name].interval()
            held[name] += low <= expected <= high
    assert min(held.values()) / 200 >= 0.93


def test_figures_at_their_ends_have_an_interval_with_a_width() -> None:
    right, wrong = [row() for _ in range(50)], [row(prediction="b", rougeL=0.0, finish_reason="length")] * 50
    for name in ("exact_match", "rougeL", "stopped", "bleu"):
        low, high = intervals(right)[name]
        assert low < 0.95 * high == pytest.approx(95.0 if name == "bleu" else 0.95)
        low, high = intervals(wrong)[name]
        assert 0 == low < high < (10 if name == "bleu" else 0.1)
        same, better = differences(right, right)[name], differences(right, wrong)[name]
        assert same["noise"] is True
        assert same["interval"][0] < 0 < same["interval"][1]
        assert better["noise"] is False
        assert better["interval"][0] < better["value"] <= better["interval"][1] * 1.1


def test_a_difference_is_paired_over_rows() -> None:
    """Rows differ far more than the models do: side by side nothing is seen, row by row all is."""
    rng = np.random.default_rng(1)
    hard = rng.gamma(1.0, 5.0, 50)
    base = [row(float(h), 1) for h in hard]
    tuned = [row(float(h) - 0.1, 1) for h in hard]
    found = differences(tuned, base)["loss"]
    assert found["value"] == pytest.approx(-0.1)
    assert found["interval"] == pytest.approx([-0.1, -0.1])
    assert found["noise"] is False
    apart = intervals(tuned)["loss"], intervals(base)["loss"]
    assert apart[0][1] > apart[1][0]
    shuffled = differences([tuned[i] for i in rng.permutation(50)], base)["loss"]
    assert shuffled["noise"] is True
    assert differences(base, base)["loss"] == {"value": 0.0, "interval": [0.0, 0.0], "noise": True}
    assert differences(tuned[:5], base[:5])["loss"]["noise"] is None
