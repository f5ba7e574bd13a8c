"""What was measured since stands in the card for people, and in its head for the Hub; what is no result does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import instructft
from instructft.report.card_results import read_evaluation, read_gate
from instructft.report.model_card import card, for_the_hub
from tests.helpers.report import GATE_FOUND, facts_of

EVALUATION = {"tuned": {"loss": 1.25, "exact_match": 0.5, "rougeL": 0.75, "bleu": float("nan"), "rows": [{}, {}]}}
SUITES = [{"name": "arithmetic", "passed": True}, {"name": "<b>json</b>", "passed": False}, "memory"]
GATE = GATE_FOUND


def results(text: str) -> list[tuple[str, dict[str, float]]]:
    """Split and figures of each result, as the Hub reads them."""
    index = ModelCard(text).data.to_dict()["model-index"]
    return [(one["dataset"]["split"], {m["type"]: m["value"] for m in one["metrics"]}) for one in index[0]["results"]]


@pytest.fixture
def recipe(write_recipe: Any) -> Any:
    return instructft.load_recipe(write_recipe())


def test_an_evaluation_is_a_result_of_the_model_index(recipe: Any, tmp_path: Path) -> None:
    facts = facts_of(metrics={"eval_loss": 2.0})
    found = results(card(recipe, facts, EVALUATION))
    assert found == [("validation", {"loss": 2.0}), ("held-out", {"loss": 1.25, "exact_match": 0.5, "rougeL": 0.75})]
    # one that was made since goes along when the card leaves, once
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "gate.json").write_text(json.dumps(GATE))
    sent = for_the_hub(card(recipe, facts), "ada/support", "", tmp_path)
    assert results(sent) == found
    assert "**Not passed**, against start:" in sent
    again = for_the_hub(sent, "ada/support", "", tmp_path)
    assert results(again) == found
    assert again.count("## Gate") == again.count("## Evaluation") == 1


def test_an_evaluation_without_a_validation_is_a_result_too(recipe: Any) -> None:
    assert [split for split, _ in results(card(recipe, facts_of(metrics={}), EVALUATION))] == ["held-out"]


def test_the_verdict_of_a_gate(recipe: Any) -> None:
    text = card(recipe, facts_of(), gate=GATE)
    assert "## Gate\n\n**Not passed**, against start:\n" in text
    assert "## Gate" not in card(recipe, facts_of())


@pytest.mark.parametrize("text", ["", "[]", '{"passed": "yes"}', '{"tuned": 3}', "{"])
def test_what_is_no_result_is_passed_over(tmp_path: Path, text: str) -> None:
    for name in ("gate.json", "evaluation.json"):
        (tmp_path / name).write_text(text)
    assert read_gate(tmp_path) is None
    assert read_evaluation(tmp_path) is None


def test_a_head_that_somebody_has_changed_stays(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    for head in ("model-index: soon", "model-index: [{name: x}]", "a: [", "- a"):
        text = f"---\n{head}\n---\n# My model\n"
        assert for_the_hub(text, "ada/support", "", tmp_path) == text


def test_the_card_says_template_type_ends_warnings_and_licences(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warning = {"kind": "overfitting", "step": 1200, "text": "the validation loss *rises*"}
    facts = facts_of(
        template={"sha256": "0123456789abcdef", "of_base": None},
        stored="bfloat16",
        generation={"eos_token_id": [2, 7], "pad_token_id": 0, "do_sample": False, "left_out": {}},
        warnings=[warning],
    )
    text = card(recipe, facts)
    assert "saved as the tokenizer's chat template (sha256 `0123456789abcdef`)." in text
    assert "- Stored in bfloat16." in text
    assert "an answer ends with token 2 or 7." in text
    assert r"- Warning of the run, step 1,200: the validation loss \*rises\*" in text
    assert "- Data licence: quickstart: " in text
