"""Metrics equal an independent computation, and the command compares what it says it compares."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import instructft
from instructft import compare as compare_module
from instructft.encode import encode_conversation
from instructft.errors import DataError, UsageError
from instructft.evaluate import bleu, evaluate, exact_match, rouge_l
from instructft.generate import Generator, load_for_inference

compare = compare_module.compare

ROWS: list[dict[str, Any]] = [
    {"instruction": "Name the capital of France.", "output": "Paris"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello there, you. \n"}]},
    {"instruction": "Who wrote it?", "context": "Ada wrote it in London.", "response": "Ada"},
    {"instruction": "Add.", "input": "1 2", "output": "1 + 2 = 3"},
    {"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["a", "b c", "d", "e f"])]},  # noqa: B905
]


def conversations() -> list[list[dict[str, Any]]]:
    return [
        [{"role": "user", "content": "Name the capital of France."}, {"role": "assistant", "content": "Paris"}],
        ROWS[1]["messages"],
        [
            {"role": "user", "content": "Who wrote it?", "context": "Ada wrote it in London."},
            {"role": "assistant", "content": "Ada"},
        ],
        [{"role": "user", "content": "Add.", "input": "1 2"}, {"role": "assistant", "content": "1 + 2 = 3"}],
        ROWS[4]["messages"],
    ]  # fmt: skip


def plain_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """One row at a time, one token at a time, no batch and no padding."""
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        for position in range(1, len(row["input_ids"])):
            if row["labels"][position] != -100:
                total -= float(logits[position - 1].log_softmax(-1)[row["labels"][position]])
                tokens += 1
    return total / tokens


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
    from instructft.evaluate import negative_log_likelihood

    scored = negative_log_likelihood(Generator(tiny_model, tokenizer), [conversations()[0]])
    assert scored.tokens == len(tokenizer("Paris", add_special_tokens=False)["input_ids"]) + 1


def test_rows_and_keys(tiny_model: Any, tokenizer: Any) -> None:
    got = instructft.evaluate(tiny_model, ROWS, tokenizer=tokenizer, max_new_tokens=5, batch_size=2)
    assert set(got) == {"loss", "perplexity", "exact_match", "rougeL", "bleu", "cut", "rows"}
    assert [row["prompt"] for row in got["rows"]] == [
        "Name the capital of France.", "Hi", "Who wrote it?\nAda wrote it in London.", "Add.\n1 2", "d",
    ]  # fmt: skip
    assert [row["reference"] for row in got["rows"]] == ["Paris", "Hello there, you.", "Ada", "1 + 2 = 3", "e f"]
    generator = Generator(tiny_model, tokenizer)
    alone = [generator.answers([c[:-1]], 5)[0].text for c in conversations()]
    assert [row["prediction"] for row in got["rows"]] == alone


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


def test_metrics_equal_their_libraries() -> None:
    import sacrebleu
    from rouge_score import rouge_scorer

    predictions = ["The cat sat on the mat today.", "Paris ", "", "3 + 4 = 7", "a completely different thing here"]
    references = ["The cat is on the mat today.", " Paris\n", "Oslo", "3 + 4 = 7", "what was expected of it"]
    assert exact_match(predictions, references) == 2 / 5
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    each = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    assert rouge_l(predictions, references) == pytest.approx(sum(each) / 5, abs=1e-12)
    assert 0 < rouge_l(predictions, references) < 1
    assert rouge_l(["a b c d"], ["a b"]) == rouge_l(["a b"], ["a b c d"]) == pytest.approx(2 / 3)
    assert bleu(predictions, references) == sacrebleu.BLEU().corpus_score(predictions, [references]).score
    long, short = "one two three four five six seven", "one two three four five"
    assert bleu([long], [short]) != bleu([short], [long])


def test_unusable_rows_are_named(tiny_model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="there are no rows"):
        evaluate(tiny_model, [], tokenizer=tokenizer)
    with pytest.raises(DataError, match="row 2 cannot be evaluated: empty answer"):
        evaluate(tiny_model, [ROWS[0], {"instruction": "x", "output": ""}], tokenizer=tokenizer)
    with pytest.raises(UsageError, match="needs its tokenizer"):
        evaluate(tiny_model, ROWS)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(write_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A run folder with the model that its recipe starts from, a little moved."""
    recipe = instructft.load_recipe(write_recipe())
    tokenizer = instructft.load_tokenizer(recipe)
    model = instructft.load_model(recipe, tokenizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return tmp_path / "run"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure."""

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    for name in ("load_for_inference", "load_bare", "load_model"):
        monkeypatch.setattr(compare_module, name, refuse)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = compare_module.evaluate
    monkeypatch.setattr(compare_module, "evaluate", lambda *a, **k: original(*a, **k, max_new_tokens=12))


def test_base_start_is_the_untrained_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "results.json"
    compare(str(run), base="start", json_file=file, show=3)
    results = json.loads(file.read_text(encoding="utf-8"))
    assert list(results) == ["tuned", "base"]
    for side in results.values():
        assert set(side) == {"loss", "perplexity", "exact_match", "rougeL", "bleu", "cut", "rows"}
        assert {frozenset(row) for row in side["rows"]} == {frozenset({"prompt", "prediction", "reference"})}
    recipe = instructft.load_recipe(run / "recipe.yaml")
    model, tokenizer = load_for_inference(str(run))
    start = compare_module._base("start", recipe, Generator(model, tokenizer)).model
    same = instructft.load_model(recipe, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), same.parameters(), strict=True))
    rows = instructft.data.conversations(recipe, "test")
    encoded = [encode_conversation(row["messages"], tokenizer) for row in rows]
    assert results["base"]["loss"] == pytest.approx(plain_loss(same.eval(), encoded), abs=1e-5)
    assert results["tuned"]["loss"] == pytest.approx(plain_loss(model, encoded), abs=1e-5)
    assert [row["reference"] for row in results["tuned"]["rows"]] == [row["messages"][-1]["content"] for row in rows]
    out = capsys.readouterr().out
    assert "12 rows: the test split of" in out
    assert "before" in out
    assert "after" in out


def test_base_folder(run: Path, tmp_path: Path) -> None:
    """The same weights on both sides give the same numbers, also where the base has no template of its own."""
    base = tmp_path / "base"
    shutil.copytree(run, base)
    (base / "chat_template.jinja").unlink()
    (base / "recipe.yaml").unlink()
    compare(str(run), base=str(base), json_file=tmp_path / "r.json", limit=4, show=0)
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert results["tuned"] == results["base"]
    assert len(results["tuned"]["rows"]) == 4


def test_a_base_without_the_tokens_that_training_added(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = instructft.load_recipe(write_recipe())
    tokenizer = instructft.load_tokenizer(plain)
    tokenizer.chat_template = None
    instructft.load_model(plain, tokenizer_with_template(plain)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = instructft.load_recipe(
        write_recipe(
            f"model: {{name_or_path: {tmp_path / 'base'}}}\n"
            "data: {datasets: [{name: quickstart, rows: 60}], template: chatml, max_length: 128, "
            "splits: {validation: 0.1, test: 0.1}}\n",
            "chatml.yaml",
        )
    )
    chatml = instructft.load_tokenizer(recipe)
    assert len(chatml) == len(tokenizer) + 2
    run = tmp_path / "run"
    instructft.load_model(recipe, chatml).save_pretrained(run)
    chatml.save_pretrained(run)
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    compare(str(run), base=str(tmp_path / "base"), json_file=tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert results["tuned"] == results["base"]
    assert "no chat template" not in capsys.readouterr().err


def tokenizer_with_template(recipe: Any) -> Any:
    return instructft.load_tokenizer(recipe)


def test_data_split_and_limit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], ROWS[3])), encoding="utf-8")

    def prompts(**options: Any) -> list[str]:
        compare(str(run), json_file=tmp_path / "r.json", show=0, **options)
        rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["tuned"]["rows"]
        return [row["prompt"] for row in rows]

    assert prompts(data=str(file)) == ["Name the capital of France.", "Add.\n1 2"]
    assert prompts(data=str(file), limit=1) == ["Name the capital of France."]
    assert len(prompts(split="validation")) == 12
    assert not set(prompts(split="validation")) & set(prompts(split="train", limit=50))
    recipe = tmp_path / "tiny.yaml"
    assert prompts(data=str(recipe)) == prompts() == prompts(split="test")
    (run / "recipe.yaml").unlink()
    assert prompts(data=str(recipe), limit=2) == prompts(data=str(recipe))[:2]
    assert "12 rows: the test split of tiny" in capsys.readouterr().out


@pytest.mark.usefixtures("no_model")
def test_what_is_wrong_is_said_before_weights_are_loaded(
    run: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "recipe.yaml").unlink()
    held_out = "validation: 0.1, test: 0.1"
    text = (tmp_path / "tiny.yaml").read_text(encoding="utf-8")
    all_trained = write_recipe(text.replace(held_out, held_out.replace("0.1", "0.0")), "all.yaml")
    for model, options, message in [
        ("./none", {}, "there is no model folder ./none"),
        (tmp_path, {}, "holds no model"),
        (bare, {}, "there is no recipe.yaml beside this model; .* --data FILE or RECIPE"),
        (bare, {"base": "start", "data": file}, "--base start needs a run folder"),
        (run, {"base": "./none"}, "there is no model folder ./none"),
        (run, {"split": "dev"}, "--split: found dev, expected train, validation, test"),
        (run, {"split": "test", "data": file}, "--split goes with a recipe"),
        (run, {"limit": 0}, "--limit: found 0"),
        (run, {"data": all_trained}, "all holds no rows out"),
        (run, {"data": all_trained, "split": "test"}, "the test split of all is empty"),
        (run, {"data": "./none.jsonl"}, "there is no file ./none.jsonl"),
        (run, {"data": tmp_path / "empty.jsonl"}, "empty.jsonl"),
        (run, {"data": "./none.yaml"}, "there is no such file"),
        (run, {"json_file": tmp_path}, "--json: .* is a folder"),
    ]:
        options = {k: str(v) if isinstance(v, Path) and k != "json_file" else v for k, v in options.items()}
        with pytest.raises(UsageError, match=message) as raised:
            compare(str(model), **options)
        assert raised.value.exit_code == 2


def test_the_table_on_a_narrow_terminal(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "Which\nword  comes [last]?", "prediction": "tea", "reference": "tea"},
        {"prompt": "Who?", "prediction": "nobody", "reference": "Ada"},
    ]
    before = [{**row, "prediction": "text\n" * 200} for row in rows]
    numbers = {"loss": 1.0, "perplexity": 2.7, "exact_match": 0.5, "rougeL": 0.5, "bleu": 12.3, "cut": 1}
    answers = iter([{**numbers, "rows": rows}, {**numbers, "rows": before}])
    monkeypatch.setattr(compare_module, "evaluate", lambda *_, **__: next(answers))
    monkeypatch.setattr("rich.console.Console._environ", {"COLUMNS": "80"})  # what it reads its width from
    compare(str(run), base="start", limit=2)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "[last]?" in out  # not taken for markup
    assert out.count("✓") == out.count("✗") == 1
    assert 8 < out.count("text") < 30
    assert len(lines) < 30
    assert "exact match" in out
    assert "50.0%" in out
    assert "1 of 2 rows are longer than the model's context of 128 tokens" in " ".join(out.split())
