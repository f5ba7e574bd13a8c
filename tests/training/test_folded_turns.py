"""A run with folded turns trains what one does whose turns are rows of their own, and computes far fewer tokens."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig

import instructft
from instructft.data import account
from instructft.data.batches import branches as layout
from instructft.data.prepare import prepare
from instructft.data.streaming import prepare_stream
from instructft.errors import ModelError, ResumeError, UsageError
from instructft.models import branches
from instructft.report.row_file import read_rows
from instructft.training.run import train
from tests.helpers.conversations import user

# As Qwen 3 and its kin: thoughts are shown behind the last question, and taken out once another question follows.
TEMPLATE = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{- '<A>' -}}
    {%- if m.reasoning_content and loop.index0 > ns.last -%}
      {{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- m.content + eos_token -}}
  {%- else -%}{{- '<U>' + m.content + '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<A>{%- endif -%}
"""
LLAMA = ("{model_type: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48, "
         "max_position_embeddings: 1024}")  # fmt: skip
WORDS = ["red", "blue", "green", "one", "two", "three", "sun", "moon", "rain", "snow"]


def talk(number: int, turns: int) -> dict[str, Any]:
    draw, messages = random.Random(number), []

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    for _ in range(turns):
        messages.append(user(f"What of {words(12)}?"))
        messages.append({"role": "assistant", "content": f"It is {words(2)}.", "reasoning_content": words(20)})
    return {"messages": messages}


@pytest.fixture
def recipe_of(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "thinks.jinja").write_text(TEMPLATE)
    for name, start, count in (("train", 0, 5), ("validation", 50, 3)):
        lines = [json.dumps(talk(start + n, 3 + n % 3)) + "\n" for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def made(*overrides: str, model: str = LLAMA, run: str = "run") -> Any:
        text = f"""
model: {{config: {model}, tokenizer: quickstart}}
data:
  datasets: [{{path: {tmp_path / "train.jsonl"}}}]
  validation: [{{path: {tmp_path / "validation.jsonl"}}}]
  template: {tmp_path / "thinks.jinja"}
  splits: {{validation: 0.0, test: 0.0}}
  max_length: 800
train: {{use_cpu: true, max_steps: 3, learning_rate: 0.01, lr_scheduler_type: constant, logging_steps: 1,
        eval_strategy: steps, eval_steps: 3, save_strategy: "no",
        per_device_train_batch_size: 40, per_device_eval_batch_size: 2, gradient_accumulation_steps: 1}}
output_dir: {tmp_path / run}
"""
        return instructft.load_recipe(write_recipe(text, f"{run}.yaml"), list(overrides))

    return made


def losses(result: Any, *names: str) -> list[float]:
    """Of every step, and of the evaluation: of all supervised tokens; or other figures."""
    names = names or ("loss", "grad_norm", "eval_loss")
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in names if name in line]


def run(recipe: Any) -> tuple[Any, str]:
    said = io.StringIO()
    return train(recipe, console=Console(file=said, width=400)), said.getvalue()


def test_a_run_is_the_same_with_fewer_tokens(recipe_of: Callable[..., Any]) -> None:
    """Also where it was stopped and resumed; it is not resumed with turns in rows of their own."""
    unrolled, quiet = run(recipe_of("data.fold_turns=false", run="unrolled"))
    assert "folded" not in quiet
    save = ("train.save_strategy=steps", "train.save_steps=2")
    _, said = run(recipe_of(*save, "train.max_steps=2", "train.eval_strategy=no", run="folded"))
    assert "folded turns are clean: no gradient from a branch to another in a row of" in said
    assert "5 conversations have 19 turns, each as it is served, folded into 5 rows" in said
    with pytest.raises(ResumeError, match="data"):
        train(recipe_of(*save, "data.fold_turns=false", run="folded"), console=Console(quiet=True))
    folded, _ = run(recipe_of(*save, "data.fold_turns=true", run="folded"))
    assert losses(folded)[:4] + losses(folded)[5:] == pytest.approx(losses(unrolled), abs=1e-5)
    assert len(losses(unrolled)) == 7
    one, other = (result.facts["train"] for result in (folded, unrolled))
    assert one["supervised_tokens"] == other["supervised_tokens"]
    assert one["tokens"] < 0.7 * other["tokens"]
    histories_are_the_same(folded.output_dir, unrolled.output_dir)
    saved = folded.facts["saved"]  # turns of the folder's model one by one, against the folded rows of the run
    assert (saved["rows"], saved["saved_loss"]) == (3, pytest.approx(saved["loss"], abs=1e-5))


def test_a_run_of_packs_is_the_same(recipe_of: Callable[..., Any]) -> None:
    packed = recipe_of("data.packing=true", "data.max_length=900", "train.max_steps=2", run="packed")
    unrolled = recipe_of("data.fold_turns=false", "train.max_steps=2", run="unrolled")
    one, other = (train(recipe, rehearsal=False, console=Console(quiet=True)) for recipe in (packed, unrolled))
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    assert one.facts["train"]["tokens"] < 0.7 * other.facts["train"]["tokens"]
    histories_are_the_same(one.output_dir, other.output_dir)


def histories_are_the_same(folded: Path, unrolled: Path) -> None:
    """A conversation is one row, whether its turns are rows of their own or share one; before a resume and after it."""
    one, other = (read_rows(folder).columns for folder in (folded, unrolled))
    for name in ("id", "supervised_tokens", "prompt", "answer", "step_first", "step_last"):
        assert one[name].tolist() == other[name].tolist()
    assert (one["tokens"] < other["tokens"]).all()
    assert (one["step_last"] > one["step_first"]).all()
    for name in ("loss_first", "loss_last"):
        assert one[name] == pytest.approx(other[name], abs=1e-5)


def test_folding_costs_little_more_than_the_conversation(recipe_of: Callable[..., Any], tmp_path: Path) -> None:
    """Each message once, thoughts and all: what a template that rewrites nothing makes of them."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(talk(n, 12)) + "\n" for n in range(4)))
    whole = tmp_path / "keeps.jinja"
    whole.write_text(TEMPLATE.replace(" and loop.index0 > ns.last", ""))
    asked = ["data.max_length=2000"]
    kinds = {"conversation": [f"data.template={whole}"], "unrolled": ["data.fold_turns=false"], "folded": []}
    tokens = {}
    for name, more in kinds.items():
        recipe = recipe_of(*asked, *more)
        tokens[name] = prepare(recipe, instructft.load_tokenizer(recipe), lambda: "").tokens["train"]
    assert tokens["folded"] <= 1.3 * tokens["conversation"]
    assert tokens["unrolled"] > 3 * tokens["conversation"]


def test_a_model_that_cannot_trains_the_turns_as_rows(recipe_of: Callable[..., Any]) -> None:
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, state_size=4)
    recipe = recipe_of()
    data = prepare(recipe, instructft.load_tokenizer(recipe), lambda: branches.why_not(recipe, config))
    said = dict(data.account(800))
    assert said["turns"].startswith("5 conversations are 19 rows")
    assert said["not folded"] == "mamba has layers without a mask (linear_attention)"
    assert data.rows["train"] == 19
    with pytest.raises(UsageError, match=r"data\.fold_turns: true cannot be had: mamba has layers without a mask"):
        account.folding(recipe_of("data.fold_turns=true"), lambda: branches.why_not(recipe, config))


def test_a_model_that_lets_branches_see_each_other_stops_the_run(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the small model said, what is trained is asked before step 1."""
    monkeypatch.setattr(branches, "why_not", lambda *_: "")
    monkeypatch.setattr("instructft.training.run.why_not", lambda *_: "")
    real = layout.Masks._made
    monkeypatch.setattr(layout.Masks, "_made", lambda self, seen, *rest: real(self, seen.tril() | True, *rest).tril())
    with pytest.raises(ModelError, match=r"Set data\.fold_turns=false"):
        train(recipe_of(), console=Console(quiet=True))


def test_a_stream_folds_too(recipe_of: Callable[..., Any], tmp_path: Path) -> None:
    recipe = recipe_of(f"data.datasets=[{{path: {tmp_path / 'train.jsonl'}, streaming: true}}]", "train.max_steps=1")
    tokenizer = instructft.load_tokenizer(recipe)
    streamed = prepare_stream(recipe, tokenizer, why_not=lambda: "")
    whole = prepare(recipe_of(), tokenizer, lambda: "")
    rows = sorted(streamed.splits["train"], key=lambda row: row["input_ids"])
    assert rows == sorted(whole.splits["train"], key=lambda row: row["input_ids"])
    assert streamed.folds
    assert "folded into" in dict(streamed.account(800))["turns"]
    asked = prepare_stream(recipe, tokenizer)  # nobody says that the model can
    assert not asked.folds
    found = io.StringIO()
    train(recipe, rehearsal=False, console=Console(file=found, width=400))
    assert "folded turns are clean" in found.getvalue()


def test_without_a_model_only_what_is_asked_for_is_folded(recipe_of: Callable[..., Any]) -> None:
    tokenizer = instructft.load_tokenizer(recipe_of())
    assert instructft.prepare_dataset(recipe_of(), tokenizer)["train"].column_names == ["input_ids", "labels"]
    rows = instructft.prepare_dataset(recipe_of("data.fold_turns=true"), tokenizer)["train"]
    assert rows.column_names == ["input_ids", "labels", "seq_lengths", "seq_starts"]
    assert len(rows) == 5
    assert account.folding(recipe_of("data.fold_turns=false"), lambda: pytest.fail("asked")) == (None, "")
