"""Metrics equal an independent computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import instructft
from instructft.errors import DataError, UsageError
from instructft.evaluation import metrics
from instructft.evaluation.metrics import evaluate, negative_log_likelihood, repeated
from instructft.inference.generator import Answer, Generator
from instructft.prompt.loss_mask import encode_conversation
from tests.helpers.evaluation import FIGURES, ROWS, conversations, plain_loss


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("train_on", ["responses", "last_response", "everything"])
def test_loss_equals_a_plain_loop(batch_size: int | None, train_on: str, tiny_model: Any, tokenizer: Any) -> None:
    rows = [encode_conversation(c, tokenizer, train_on) for c in conversations()]
    tiny_model.train()  # dropout must not be on
    got = evaluate(tiny_model, ROWS, tokenizer=tokenizer, train_on=train_on, max_new_tokens=2, batch_size=batch_size)
    assert tiny_model.training
    expected = plain_loss(tiny_model.eval(), rows)
    assert got["loss"] == pytest.approx(expected, abs=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert got["cut"] == 0


def test_the_end_of_turn_counts(tiny_model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_model.transformer.wte.weight.zero_()  # every token is as likely as any other
    got = evaluate(tiny_model, ROWS[:1], tokenizer=tokenizer, max_new_tokens=2)
    assert got["loss"] == pytest.approx(math.log(len(tokenizer)), abs=1e-5)
    scored = negative_log_likelihood(Generator(tiny_model, tokenizer), [conversations()[0]])
    assert scored.tokens == len(tokenizer("Paris", add_special_tokens=False)["input_ids"]) + 1


def test_rows_and_keys(tiny_model: Any, tokenizer: Any) -> None:
    got = instructft.evaluate(tiny_model, ROWS, tokenizer=tokenizer, max_new_tokens=5, batch_size=2)
    assert set(got) == FIGURES
    assert [row["prompt"] for row in got["rows"]] == [
        "Name the capital of France.", "Hi", "Who wrote it?\nAda wrote it in London.", "Add.\n1 2", "d",
    ]  # fmt: skip
    assert [row["reference"] for row in got["rows"]] == ["Paris", "Hello there, you.", "Ada", "1 + 2 = 3", "e f"]
    generator = Generator(tiny_model, tokenizer)
    alone = [generator.answers([c[:-1]], 5)[0].text for c in conversations()]
    assert [row["prediction"] for row in got["rows"]] == alone


def test_rouge_l_is_that_of_its_library(tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["The cat sat on the mat today.", "Paris ", "", "3 + 4 = 7"]
    references = ["The cat is on the mat today.", " Paris\n", "Oslo", "3 + 4 = 7 and more"]
    monkeypatch.setattr(metrics, "answers_to", lambda *_: [Answer(text, "stop") for text in predictions])
    rows = [{"instruction": "Say.", "output": text} for text in references]
    got = evaluate(tiny_model, rows, tokenizer=tokenizer)
    scorer = RougeScorer(["rougeL"])
    each = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    assert [row["rougeL"] for row in got["rows"]] == each
    assert got["rougeL"] == pytest.approx(sum(each) / 4, abs=1e-12)
    assert 0 < got["rougeL"] < 1


def test_rows_that_are_too_long_are_counted(tiny_model: Any, tokenizer: Any) -> None:
    long_answer = {"instruction": "Say.", "output": "1" * 200}
    long_prompt = {"instruction": "2" * 200, "output": "x"}
    got = evaluate(tiny_model, [ROWS[0], long_answer, long_prompt], tokenizer=tokenizer, max_new_tokens=2)
    assert got["cut"] == 2
    assert got["rows"][2]["prediction"] == ""
    assert got["rows"][1]["prediction"] or got["rows"][0]["prediction"]
    cut = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "1" * 200}]
    kept = [encode_conversation(c, tokenizer) for c in (conversations()[0], cut)]
    expected = plain_loss(tiny_model, [{k: v[:128] for k, v in row.items()} for row in kept])
    assert got["loss"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(DataError, match="no row has an answer within the model's context of 128"):
        evaluate(tiny_model, [long_prompt], tokenizer=tokenizer)


def test_unusable_rows_are_named(tiny_model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="there are no rows"):
        evaluate(tiny_model, [], tokenizer=tokenizer)
    with pytest.raises(DataError, match="row 2 cannot be evaluated: empty answer"):
        evaluate(tiny_model, [ROWS[0], {"instruction": "x", "output": ""}], tokenizer=tokenizer)
    with pytest.raises(UsageError, match="needs its tokenizer"):
        evaluate(tiny_model, ROWS)


def test_repeated() -> None:
    assert repeated([1, 2, 3]) == 0.0
    assert repeated([7] * 8) == 1 - 1 / 5
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_figures_of_answers_and_of_groups(tiny_model: Any, tokenizer: Any) -> None:
    rows = [{**r, "category": c, "dataset": "one"} for r, c in zip(ROWS[:4], ("x", "x", "y", None), strict=True)]
    rows[3].pop("category")
    got = evaluate(tiny_model, rows, tokenizer=tokenizer, max_new_tokens=12)
    predictions = [r["prediction"] for r in got["rows"]]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in predictions]
    assert got["answer_tokens"] == sum(lengths) / 4 > 0
    reasons = [a.finish_reason for a in Generator(tiny_model, tokenizer).answers([c[:-1] for c in conversations()], 12)]
    assert got["stopped"] == reasons[:4].count("stop") / 4
    assert set(got["groups"]) == {"category"}  # one data set only
    groups = got["groups"]["category"]
    assert {name: group["count"] for name, group in groups.items()} == {"x": 2, "y": 1}
    alone = evaluate(tiny_model, rows[:2], tokenizer=tokenizer, max_new_tokens=12)
    for name in ("loss", "perplexity", "exact_match", "rougeL", "bleu", "answer_tokens", "stopped", "repeated"):
        assert groups["x"][name] == pytest.approx(alone[name], abs=1e-5)
    tokens = sum(r["supervised_tokens"] for r in got["rows"])
    assert sum(r["nll"] for r in got["rows"]) / tokens == pytest.approx(got["loss"], rel=1e-12)
