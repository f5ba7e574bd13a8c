"""Metrics equal an independent computation, and the command compares what it says it compares."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import instructft
from instructft.errors import DataError, UsageError
from instructft.evaluation import checkpoints as compare_checkpoints_module
from instructft.evaluation import compare as compare_module
from instructft.evaluation.confidence import _draws, _middle, differences, intervals, measures
from instructft.evaluation.metrics import bleu, evaluate, exact_match, repeated, rouge_l
from instructft.extras import reading
from instructft.extras.lm_eval import run_tasks
from instructft.inference import reference_model as beside_module
from instructft.inference.chat import Generator, load_for_inference
from instructft.inference.reference_model import ReferenceModel
from instructft.prompt.loss_mask import encode_conversation

compare = compare_module.compare

ROWS: list[dict[str, Any]] = [
    {"instruction": "Name the capital of France.", "output": "Paris"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello there, you. \n"}]},
    {"instruction": "Who wrote it?", "context": "Ada wrote it in London.", "response": "Ada"},
    {"instruction": "Add.", "input": "1 2", "output": "1 + 2 = 3"},
    {"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["a", "b c", "d", "e f"])]},  # noqa: B905
]


KEYS = {"loss", "perplexity", "exact_match", "rougeL", "bleu", "cut", "rows", "answer_tokens", "reference_tokens"}
KEYS |= {"stopped", "repeated", "intervals", "groups"}


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
    from instructft.evaluation.metrics import negative_log_likelihood

    scored = negative_log_likelihood(Generator(tiny_model, tokenizer), [conversations()[0]])
    assert scored.tokens == len(tokenizer("Paris", add_special_tokens=False)["input_ids"]) + 1


def test_rows_and_keys(tiny_model: Any, tokenizer: Any) -> None:
    got = instructft.evaluate(tiny_model, ROWS, tokenizer=tokenizer, max_new_tokens=5, batch_size=2)
    assert set(got) == KEYS
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

    monkeypatch.setattr(compare_module, "load_for_inference", refuse)
    for name in ("load_for_inference", "load_bare", "load_model"):
        monkeypatch.setattr(beside_module, name, refuse)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = compare_module.evaluate
    for module in (compare_module, compare_checkpoints_module):
        monkeypatch.setattr(module, "evaluate", lambda *a, **k: original(*a, **k, max_new_tokens=12))


def test_base_start_is_the_untrained_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "results.json"
    compare(str(run), base="start", json_file=file, show=3)
    results = json.loads(file.read_text(encoding="utf-8"))
    assert list(results) == ["tuned", "base", "difference"]
    for side in (results["tuned"], results["base"]):
        assert set(side) == KEYS
        assert all({"prompt", "prediction", "reference", "category", "dataset"} <= set(row) for row in side["rows"])
    recipe = instructft.load_recipe(run / "recipe.yaml")
    model, tokenizer = load_for_inference(str(run))
    start = ReferenceModel("start", recipe, Generator(model, tokenizer), None)._load().model
    same = instructft.load_model(recipe, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), same.parameters(), strict=True))
    rows = instructft.data.prepare.conversations(recipe, "test")
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
    known = {"finish_reason": "stop", "nll": 1.0, "supervised_tokens": 2, "answer_tokens": 1, "repeated": 0.0}
    rows = [
        {**known, "prompt": "Which\nword  comes [last]?", "prediction": "tea", "reference": "tea", "rougeL": 1.0},
        {**known, "prompt": "Who?", "prediction": "nobody", "reference": "Ada", "rougeL": 0.0},
    ]
    before = [{**row, "prediction": "text\n" * 200} for row in rows]
    numbers = {"loss": 1.0, "perplexity": 2.7, "exact_match": 0.5, "rougeL": 0.5, "bleu": 12.3, "cut": 1}
    numbers |= {"answer_tokens": 1.0, "stopped": 1.0, "repeated": 0.0, "intervals": {}, "groups": {}}
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
    assert len(lines) < 34
    assert "exact match" in out
    assert "50.0%" in out
    assert "1 of 2 rows are longer than the model's context of 128 tokens" in " ".join(out.split())


# ------------------------------------------------------------------------------------------------- how sure a figure is


def row(nll: float = 1.0, tokens: int = 2, **more: Any) -> dict[str, Any]:
    known = {"prompt": "?", "prediction": "a", "reference": "a", "finish_reason": "stop", "rougeL": 1.0}
    return {**known, "nll": nll, "supervised_tokens": tokens, "answer_tokens": 1, "repeated": 0.0, **more}


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


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        hits = rng.random(60) < 0.3
        low, high = _middle(measures([row(prediction="a" if hit else "b") for hit in hits])["exact_match"].drawn())
        held += low <= 0.3 <= high
    assert 0.88 <= held / 200 <= 0.99


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
    assert sum(r["nll"] for r in got["rows"]) / sum(r["supervised_tokens"] for r in got["rows"]) == got["loss"]


# -------------------------------------------------------------------------------------------------- on trained models


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two runs that differ in `train.seed` alone, with checkpoints: a task that is learned, and rows of noise.

    A question has one of four answers, or in every third row one that nobody can know: there both models guess.
    """
    folder = tmp_path_factory.mktemp("trained")
    rng = random.Random(0)
    words = ["tea", "bread", "honey", "milk", "rice", "salt", "soup", "cake"]
    answers = ["Yes, it is so.", "No, it is not.", "It is day and night."]
    answers += ["Yes, that is right.", "It is the last word.", "No, that is not so."]
    rows = []
    for i in range(400):
        answer = f"It must be {rng.choice(words)}." if i % 3 == 0 else answers[i % 6]
        kind = "noise" if i % 3 == 0 else f"case {i % 2}"
        asked = f"Case {'x' if i % 3 == 0 else i % 6}: {' '.join(rng.sample(words, 2))}?"
        rows.append({"instruction": asked, "output": answer, "category": kind})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = {}
    for seed in (1, 2):
        text = f"""
model:
  config: {{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 64, initializer_range: 0.1,
           resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}
  tokenizer: quickstart
data: {{datasets: [{{path: {folder / "rows.jsonl"}}}], max_length: 64, template: instruction,
       splits: {{validation: 0.1, test: 0.2}}}}
train: {{max_steps: 240, per_device_train_batch_size: 16, learning_rate: 1e-2, save_steps: 80, eval_strategy: "no",
        seed: {seed}, logging_steps: 80, report_to: none, lr_scheduler_type: constant, use_cpu: true}}
output_dir: {folder / f"run-{seed}"}
"""
        (folder / "two.yaml").write_text(text, encoding="utf-8")
        instructft.train(instructft.load_recipe(folder / "two.yaml"), console=Console(quiet=True))
        made[seed] = folder / f"run-{seed}"
    return made


def test_base_and_tuned_differ_and_two_seeds_do_not(
    trained: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(str(trained[1]), base="start", json_file=tmp_path / "start.json", show=0)
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "start.json").read_text(encoding="utf-8"))
    for name in ("loss", "perplexity", "exact_match", "rougeL", "bleu", "stopped"):
        assert results["difference"][name]["noise"] is False, name
    assert results["tuned"]["stopped"] == 1.0
    assert set(results["tuned"]["groups"]["category"]) == {"case 0", "case 1", "noise"}
    assert results["tuned"]["groups"]["category"]["noise"]["exact_match"] < 0.8
    assert "noise:" not in out.replace("noise  ", "")
    compare(str(trained[1]), base=str(trained[2]), json_file=tmp_path / "seeds.json", show=0)
    seeds = json.loads((tmp_path / "seeds.json").read_text(encoding="utf-8"))["difference"]
    for name in ("loss", "perplexity", "exact_match", "rougeL", "bleu", "answer_tokens", "stopped"):
        assert seeds[name]["noise"] is True, (name, seeds[name])
    assert "noise: the interval holds 0" in " ".join(capsys.readouterr().out.split())


def test_what_lies_between_two_seeds_is_noise_however_far(
    trained: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other seed stopped early: far beyond the choice of rows, and still no gain of anything that was changed."""
    other, recipe = tmp_path / "other", (trained[2] / "recipe.yaml").read_text(encoding="utf-8")
    shutil.copytree(trained[2] / "checkpoint-80", other)
    (other / "recipe.yaml").write_text(recipe, encoding="utf-8")
    compare(str(trained[1]), base=str(other), json_file=tmp_path / "seeds.json", show=0)
    out = " ".join(capsys.readouterr().out.split())
    loss = json.loads((tmp_path / "seeds.json").read_text(encoding="utf-8"))["difference"]["loss"]
    assert loss["interval"][1] < 0
    assert (loss["noise"], loss["because"]) == (True, "seed")
    assert "noise (seed): beyond the choice of rows, but the two runs differ in their seed alone." in out
    assert "The intervals cover the choice of rows" not in out

    (other / "recipe.yaml").write_text(recipe.replace("learning_rate: 0.01", "learning_rate: 0.02"), encoding="utf-8")
    compare(str(trained[1]), base=str(other), json_file=tmp_path / "rates.json", show=0)
    out = " ".join(capsys.readouterr().out.split())
    loss = json.loads((tmp_path / "rates.json").read_text(encoding="utf-8"))["difference"]["loss"]
    assert loss["noise"] is False
    assert "because" not in loss
    assert "noise (seed)" not in out
    assert "a second run with another train.seed shows" in out


def test_checkpoints_in_one_table(trained: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    (run / "checkpoint-160" / "model.safetensors").write_bytes(b"broken")
    compare_checkpoints_module.compare_checkpoints(str(run), json_file=tmp_path / "c.json")
    results = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    found = results["checkpoints"]
    assert list(found) == ["checkpoint-80", "checkpoint-240", "final"]
    losses = {name: figures["loss"] for name, figures in found.items()}
    assert results["best"] == min(losses, key=lambda name: losses[name])
    assert losses["final"] == losses["checkpoint-240"] < losses["checkpoint-80"]
    assert results["tuned"] == found["final"]
    recipe = instructft.load_recipe(run / "recipe.yaml")
    model, tokenizer = load_for_inference(str(run / "checkpoint-80"))
    rows = instructft.data.prepare.conversations(recipe, "validation")  # test rows stay untouched by the choice
    encoded = [encode_conversation(row["messages"], tokenizer) for row in rows]
    assert losses["checkpoint-80"] == pytest.approx(plain_loss(model, encoded), abs=1e-5)
    out = capsys.readouterr().out
    assert "40 rows: the validation split" in out
    assert "passed over:" in out
    (best,) = [line for line in out.splitlines() if line.rstrip().endswith(" best")]
    assert best.startswith(results["best"])
    with pytest.raises(UsageError, match="holds no checkpoint that verifies"):
        compare_checkpoints_module.compare_checkpoints(str(tmp_path))


def test_prompts_for_reading(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    prompts = reading.reading_prompts()
    assert len(prompts) == 30
    assert len({row["prompt"] for row in prompts}) == 30
    assert len({row["kind"] for row in prompts}) >= 12
    monkeypatch.setattr(reading, "MAX_NEW_TOKENS", 3)
    reading.read_prompts(str(run), "start", tmp_path / "p.json")
    results = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in results["tuned"]["rows"]] == [row["prompt"] for row in prompts]
    generator = Generator(*load_for_inference(str(run)))
    first = generator.answers([[{"role": "user", "content": prompts[0]["prompt"]}]], 3)[0]
    assert results["tuned"]["rows"][0]["prediction"] == first.text
    assert results["tuned"]["rows"] != results["base"]["rows"]
    out = capsys.readouterr().out
    assert "[fact] What is the capital of Japan?" in out
    assert out.count("before") >= 30


# ------------------------------------------------------------------------------------- lm-evaluation-harness, stood in


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in with the names, arguments and shapes of lm_eval 0.4.9; returns the calls of `simple_evaluate`."""
    calls: list[dict[str, Any]] = []

    class HFLM:
        def __init__(self, pretrained: Any, *, tokenizer: Any = None, batch_size: Any = 1, max_length: Any = None):
            self.pretrained, self.tokenizer = pretrained, tokenizer

    class TaskManager:
        def match_tasks(self, task_list: list[str]) -> list[str]:
            return [name for name in ("arc_easy", "hellaswag") if name in task_list]

    def simple_evaluate(
        model: Any, model_args: Any = None, tasks: Any = None, *, batch_size: Any = None, limit: Any = None,
        log_samples: bool = True, apply_chat_template: bool = False, task_manager: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        assert isinstance(model, HFLM)
        calls.append({"tasks": tasks, "limit": limit, "chat": apply_chat_template, "model": model})
        weight = float(next(model.pretrained.parameters()).detach().abs().mean())
        figures = {
            "alias": "x",
            "name": "x",
            "sample_len": 73,
            "acc,none": weight,
            "acc_stderr,none": 0.25,
            "acc_norm,none": 0.5,
        }
        return {"results": {name: {**figures, "acc_norm_stderr,none": "N/A"} for name in tasks}, "versions": {}}

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.tasks")}
    hf: Any = types.ModuleType("lm_eval.models.huggingface")
    top: Any = modules["lm_eval"]
    top.simple_evaluate, top.__version__ = simple_evaluate, "0.4.9"
    top.models, top.tasks = modules["lm_eval.models"], modules["lm_eval.tasks"]
    top.models.huggingface, hf.HFLM, top.tasks.TaskManager = hf, HFLM, TaskManager
    for name, module in {**modules, "lm_eval.models.huggingface": hf}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tasks_are_handed_over(
    run: Path, tmp_path: Path, harness: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    bigger = tmp_path / "bigger"
    shutil.copytree(run, bigger)
    run_tasks(str(run), "hellaswag, arc_easy", base=str(bigger), limit=5, json_file=tmp_path / "t.json")
    assert [(call["tasks"], call["limit"], call["chat"]) for call in harness] == [
        (["hellaswag", "arc_easy"], 5, True)
    ] * 2  # fmt: skip
    assert harness[0]["model"].tokenizer.chat_template
    results = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert results["tuned"]["harness"] == "0.4.9"
    value = results["tuned"]["tasks"]["hellaswag"]["acc,none"]
    assert results["base"]["tasks"]["arc_easy"]["acc,none"] == value > 0
    out = capsys.readouterr().out
    assert f"{value:.4f} ± 0.2500" in out
    assert "acc_norm,none" in out
    assert [line.split()[1:3] for line in out.splitlines() if "acc" in line][:1] == [["73", "acc,none"]]
    assert "stderr" not in out
    with pytest.raises(UsageError, match="knows no hellaswagg"):
        run_tasks(str(run), "hellaswagg")
    with pytest.raises(UsageError, match="expected names with commas"):
        run_tasks(str(run), " , ")


def test_without_the_harness_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"not installed .*pip install 'instructft\[eval\]'"):
        run_tasks(str(run), "hellaswag")


def test_ways_to_evaluate_are_taken_one_at_a_time() -> None:
    from typer.testing import CliRunner

    from instructft.cli import app

    for options, message in [
        (["--checkpoints", "--prompts"], "--checkpoints and --prompts are different evaluations"),
        (["--prompts", "--tasks", "x"], "--prompts and --tasks are different evaluations"),
        (["--prompts", "--limit", "3"], "--limit has no effect with --prompts"),
        (["--tasks", "x", "--data", "y"], "--data has no effect with --tasks"),
        (["--checkpoints", "--base", "start"], "--base has no effect with --checkpoints"),
    ]:
        outcome = CliRunner().invoke(app, ["evaluate", "runs/none", *options])
        assert isinstance(outcome.exception, UsageError), outcome.output
        assert message in str(outcome.exception)
