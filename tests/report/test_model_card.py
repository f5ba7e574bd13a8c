"""The model card of a run, a merged model and a bare folder says their facts, and names no folder of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import instructft
from instructft.report.model_card import bare_card, card, for_the_hub
from tests.conftest import TINY
from tests.helpers.report import facts_of

MERGE = {
    "base": "org/base",
    "dtype": "bfloat16",
    "rounding": "stochastic",
    "proof": {"texts": 8, "source": "the recipe's held-out rows", "difference": 1e-3, "exact": 2e-5, "tolerance": 2e-2,
              "kl": 2e-4, "top1": 0.99, "effect": 0.5, "effect_kl": 0.17,
              "compared": "greedy answers", "equal_tokens": 256, "tokens": 256,
              "weights": {"tensors": 4, "deviation": 1e-16, "applied": 1.0, "vanished": 0.7},
              "costs": [{"dtype": "bfloat16", "rounding": "nearest", "kl": 8e-3, "top1": 0.96, "loss": 0.89,
                         "vanished": 0.77},
                        {"dtype": "float16", "rounding": "nearest", "kl": None, "top1": None, "loss": None,
                         "vanished": None}]},
    "quantized": {"quantization": "4bit", "difference": 0.25},
}  # fmt: skip


@pytest.fixture
def lora(write_recipe: Any, tmp_path: Path) -> Any:
    """The recipe of an adapter on a base whose own card tells its licence."""
    base = tmp_path / "secret" / "base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    start = TINY.index("  config:")
    text = TINY[:start] + f"  name_or_path: {base}\n" + TINY[TINY.index("data:") :]
    return instructft.load_recipe(write_recipe(text + "adapter: {type: lora, r: 4}\n"))


def test_the_licence_of_a_base_with_a_card_is_told(lora: Any, tmp_path: Path) -> None:
    text = card(lora, facts_of())
    assert ModelCard(text).data.license == "apache-2.0"
    assert "- Licence of the base: apache-2.0." in text
    assert str(tmp_path) not in text
    assert "secret" not in text


def test_a_merged_model_has_the_card_of_its_run_and_how_it_was_merged(lora: Any) -> None:
    before, after = card(lora, facts_of()), card(lora, facts_of(), merge=MERGE)
    for said in ("| merged weights compared with PEFT's merge in float64 | 4 tensors",
                 "in bfloat16, stochastic rounding", "| bfloat16, nearest | 8.0e-03 | 96.0% | 0.8900 | 77% |",
                 "| float16, nearest | values do not fit |",
                 "| shown to both | 8 × the recipe's",
                 "on its 4bit base | 2.50e-01 |", "greedy answers, tokens equal | 256 of 256 |", 
                 "into org/base"):  # fmt: skip
        assert said in after
        assert said not in before
    for said in ("as a LoRA adapter,", "AutoPeftModelForCausalLM", "library_name: peft"):
        assert said in before
        assert said not in after
    for said in (
        "96 rows, 40 steps",
        "- Adapter: LoRA, rank 4",
        "| validation loss | 1.5000 |",
        "instructft chat PATH",
        "`instructft export PATH OUTPUT` makes the GGUF file that llama.cpp and Ollama read",
    ):
        assert said in before
        assert said in after
    assert ModelCard(after).data.tags == ["instructft", "sft", "trl", "merged"]
    assert [after.index(part) for part in ("## Merge", "## Use", "## Recipe")] == sorted(
        after.index(part) for part in ("## Merge", "## Use", "## Recipe")
    )
    assert "**not verified**" in card(lora, facts_of(), merge={"base": "org/base", "dtype": "float32"})


def test_a_bare_card_says_what_the_files_say() -> None:
    text = bare_card("support", "org/base", lora=True)
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.tags) == ("org/base", "peft", ["lora"])
    assert "A LoRA adapter, uploaded by instructft" in text
    assert "## Recipe" not in text
    assert "## Merge" in bare_card("support", None, False, MERGE)


def test_figures_of_answers_go_into_the_card_and_its_head(lora: Any) -> None:
    facts: Any = facts_of()
    judged = {"eval_exact_match": 0.875, "eval_exact_match_low": 0.75, "eval_exact_match_high": 0.95}
    facts["metrics"] |= {**judged, "eval_my_score": 2.0, "eval_answered": 56, "eval_best_step": 20}
    facts["metrics"] |= {"eval_my_score_low": 1.5, "eval_my_score_high": 2.5}
    text = card(lora, facts)
    assert "| exact match, 56 held-out rows asked | 87.5% (75.0% to 95.0%) |" in text
    assert "| my score, 56 held-out rows asked | 2.000 (1.500 to 2.500) |" in text
    measured = {one.metric_type: one.metric_value for one in ModelCard(text).data.eval_results or ()}
    assert (measured["exact_match"], measured["my_score"]) == (0.875, 2.0)
    assert not {"exact_match_low", "best_step", "answered"} & set(measured)


def test_an_evaluation_made_since_goes_into_the_card(lora: Any, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"tuned": {"loss": 2.0}, "base": {"loss": 3.5}}')
    text = card(lora, facts_of())
    sent = for_the_hub(text, "ada/support", "", tmp_path)
    assert "| loss | 3.500 | 2.000 |" in sent
    assert "`instructft chat ada/support`" in sent
    assert "`instructft export ada/support OUTPUT`" in sent
    assert "instructft chat" not in (inside := for_the_hub(text, "ada/support", "instruct", tmp_path))
    assert "instructft export" not in inside
    assert sent.count("## Evaluation") == for_the_hub(sent, "ada/support", "", tmp_path).count("## Evaluation") == 1


def test_what_others_wrote_stands_in_the_card_as_text(write_recipe: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    hostile = r"x](https://example.org) <img src='https://example.org/p.png'> \n# Trusted"
    (base / "README.md").write_text(f'---\nlicense: other\nlicense_name: "{hostile}"\n---\n# Base\n')
    text = TINY[: TINY.index("  config:")] + f"  name_or_path: {base}\n" + TINY[TINY.index("data:") :]
    recipe = instructft.load_recipe(write_recipe(text + "adapter: {type: lora, r: 4}\n"))
    body = card(recipe, facts_of()).split("\n---\n", 1)[1]
    assert "<img" not in body.replace(r"\<img", "")
    assert [line for line in body.splitlines() if line.startswith("# ")][1:] == [
        f"# {recipe.name}: what differs from the defaults of instructft {instructft.__version__}; recipe.yaml spells "
        "out the rest"  # in a block of code
    ]
    assert r"x\](https://example.org) \<img" in body
