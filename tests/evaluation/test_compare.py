"""The command compares what it says it compares."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import instructft
from instructft.errors import UsageError
from instructft.evaluation import compare as module
from instructft.evaluation.compare import compare
from instructft.inference import reference_model
from instructft.inference.generator import Generator
from instructft.inference.reference_model import ReferenceModel
from instructft.models.load_for_inference import load_for_inference
from instructft.prompt.loss_mask import encode_conversation
from tests.helpers.device import here, near
from tests.helpers.evaluation import FIGURES, ROWS, plain_loss


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure."""

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(module, "load_for_inference", refuse)
    for name in ("load_for_inference", "load_bare", "load_model"):
        monkeypatch.setattr(reference_model, name, refuse)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 12)


def test_base_start_is_the_untrained_model(moved_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "results.json"
    compare(str(moved_run), base="start", json_file=file, show=3)
    results = json.loads(file.read_text(encoding="utf-8"))
    assert list(results) == ["tuned", "base", "difference"]
    for side in (results["tuned"], results["base"]):
        assert set(side) == FIGURES
        assert all({"prompt", "prediction", "reference", "category", "dataset"} <= set(row) for row in side["rows"])
    recipe = instructft.load_recipe(moved_run / "recipe.yaml")
    model, tokenizer = load_for_inference(str(moved_run))
    start = ReferenceModel("start", recipe, Generator(model, tokenizer), None)._load().model
    same = instructft.load_model(recipe, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), same.parameters(), strict=True))
    rows = instructft.data.load.conversations(recipe, "test")
    encoded = [encode_conversation(row["messages"], tokenizer) for row in rows]
    assert results["base"]["loss"] == pytest.approx(plain_loss(same.eval(), encoded), abs=near(1e-5))
    assert results["tuned"]["loss"] == pytest.approx(plain_loss(model, encoded), abs=near(1e-5))
    assert [row["reference"] for row in results["tuned"]["rows"]] == [row["messages"][-1]["content"] for row in rows]
    out = capsys.readouterr().out
    assert "12 rows: the test split of" in out
    assert "before" in out
    assert "after" in out


def test_base_folder(moved_run: Path, tmp_path: Path) -> None:
    """The same weights on both sides give the same numbers, also where the base has no template of its own."""
    base = tmp_path / "base"
    shutil.copytree(moved_run, base)
    (base / "chat_template.jinja").unlink()
    (base / "recipe.yaml").unlink()
    compare(str(moved_run), base=str(base), json_file=tmp_path / "r.json", limit=4, show=0)
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert results["tuned"] == results["base"]
    assert len(results["tuned"]["rows"]) == 4


def test_the_recipes_own_metrics_are_judged_where_their_code_may_run(
    moved_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe that was given says so, or the flag: the one in a run folder may have come with it from elsewhere."""
    code = (
        "def score(prediction, reference, row):\n"
        "    assert row['messages'] and row['dataset']\n"
        "    return len(row['instruction'])\n"
        "def broken(prediction, reference, row): return row['nothing']\n"
        "print('the code ran')\n"
    )
    (moved_run / "mine.py").write_text(code, encoding="utf-8")
    recipe = moved_run / "recipe.yaml"
    names = f"[token_f1, {moved_run / 'mine.py'}:score, {moved_run / 'mine.py'}:broken]"
    written = re.sub(r"(?m)^evaluation:\n( .*\n)*", "", recipe.read_text(encoding="utf-8"))
    recipe.write_text(f"{written}evaluation: {{metrics: {names}}}\n", encoding="utf-8")

    def judged(**asked: Any) -> tuple[dict[str, Any], str]:
        compare(str(moved_run), limit=12, show=0, json_file=tmp_path / "r.json", **asked)
        return json.loads((tmp_path / "r.json").read_text(encoding="utf-8")), capsys.readouterr().out

    found, out = judged()
    assert set(found["tuned"]["metrics"]) == {"token_f1"}
    assert "the code ran" not in out
    assert f"not judged: {moved_run / 'mine.py'}:score" in out.replace("\n", "")
    rows = instructft.data.load.conversations(instructft.load_recipe(recipe), "test", 12)
    lengths = [len(row["_row"]["instruction"]) for row in rows]
    for given in (True, False):
        monkeypatch.setattr(module.remote_code, "allowed", lambda given=given: not given)
        found, out = judged(base="start", **({"data": str(recipe)} if given else {}))
        score, f1 = (found["tuned"]["metrics"][name] for name in ("score", "token_f1"))
        assert score["value"] == pytest.approx(sum(lengths) / 12)
        assert score["interval"][0] < score["value"] < score["interval"][1]
        assert f1["rows"] == 12
        assert [row["metrics"]["score"] for row in found["base"]["rows"]] == lengths
        assert found["difference"]["score"]["value"] == 0
        assert found["tuned"]["metrics"]["broken"]["value"] is None
        assert "mine.py:broken fails: KeyError: 'nothing'" in out.replace("\n", "")
        assert re.search(r"(?m)^score +\d", out)
        assert re.search(r"(?m)^token F1 +0\.", out)


def test_a_base_without_the_tokens_that_training_added(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = instructft.load_recipe(write_recipe())
    tokenizer = instructft.load_tokenizer(plain)
    tokenizer.chat_template = None
    instructft.load_model(plain, instructft.load_tokenizer(plain)).save_pretrained(tmp_path / "base")
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


def test_data_split_and_limit(moved_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], ROWS[3])), encoding="utf-8")

    def prompts(**options: Any) -> list[str]:
        compare(str(moved_run), json_file=tmp_path / "r.json", show=0, **options)
        rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["tuned"]["rows"]
        return [row["prompt"] for row in rows]

    assert prompts(data=str(file)) == ["Name the capital of France.", "Add.\n1 2"]
    assert prompts(data=str(file), limit=1) == ["Name the capital of France."]
    assert len(prompts(split="validation")) == 12
    assert not set(prompts(split="validation")) & set(prompts(split="train", limit=50))
    recipe = tmp_path / "tiny.yaml"
    assert prompts(data=str(recipe)) == prompts() == prompts(split="test")
    (moved_run / "recipe.yaml").unlink()
    assert prompts(data=str(recipe), limit=2) == prompts(data=str(recipe))[:2]
    assert "12 rows: the test split of tiny" in capsys.readouterr().out


@pytest.mark.usefixtures("no_model")
def test_what_is_wrong_is_said_before_weights_are_loaded(
    moved_run: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    bare = tmp_path / "bare"
    shutil.copytree(moved_run, bare)
    (bare / "recipe.yaml").unlink()
    held_out = "validation: 0.1, test: 0.1"
    text = (tmp_path / "tiny.yaml").read_text(encoding="utf-8")
    all_trained = write_recipe(text.replace(held_out, held_out.replace("0.1", "0.0")), "all.yaml")
    for model, options, message in [
        ("./none", {}, "there is no model folder ./none"),
        (tmp_path, {}, "holds no model"),
        (bare, {}, "there is no recipe.yaml beside this model; .* --data FILE or RECIPE"),
        (bare, {"base": "start", "data": file}, "--base start needs a run folder"),
        (moved_run, {"base": "./none"}, "there is no model folder ./none"),
        (moved_run, {"split": "dev"}, "--split: found dev, expected train, validation, test"),
        (moved_run, {"split": "test", "data": file}, "--split goes with a recipe"),
        (moved_run, {"limit": 0}, "--limit: found 0"),
        (moved_run, {"data": all_trained}, "all holds no rows out"),
        (moved_run, {"data": all_trained, "split": "test"}, "the test split of all is empty"),
        (moved_run, {"data": "./none.jsonl"}, "there is no file ./none.jsonl"),
        (moved_run, {"data": tmp_path / "empty.jsonl"}, "empty.jsonl"),
        (moved_run, {"data": "./none.yaml"}, "there is no such file"),
        (moved_run, {"json_file": tmp_path}, "--json: .* is a folder"),
    ]:
        options = {k: str(v) if isinstance(v, Path) and k != "json_file" else v for k, v in options.items()}
        with pytest.raises(UsageError, match=message) as raised:
            compare(str(model), **options)
        assert raised.value.exit_code == 2


def test_the_table_on_a_narrow_terminal(
    moved_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"finish_reason": "stop", "nll": 1.0, "supervised_tokens": 2, "answer_tokens": 1, "repeated": 0.0}
    rows = [
        {**known, "prompt": "Which\nword  comes [last]?", "prediction": "tea", "reference": "tea", "rougeL": 1.0},
        {**known, "prompt": "Who?", "prediction": "nobody", "reference": "Ada", "rougeL": 0.0},
    ]
    before = [{**row, "prediction": "text\n" * 200} for row in rows]
    numbers = {"loss": 1.0, "perplexity": 2.7, "exact_match": 0.5, "rougeL": 0.5, "bleu": 12.3, "cut": 1}
    numbers |= {"answer_tokens": 1.0, "stopped": 1.0, "repeated": 0.0, "intervals": {}, "groups": {}, "metrics": {}}
    answers = iter([{**numbers, "rows": rows}, {**numbers, "rows": before}])
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: next(answers))
    monkeypatch.setattr("rich.console.Console._environ", {"COLUMNS": "80"})  # what it reads its width from
    compare(str(moved_run), base="start", limit=2)
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
train: {{max_steps: 240, per_device_train_batch_size: 16, learning_rate: 1e-2, save_steps: 40, eval_strategy: "no",
        seed: {seed}, logging_steps: 80, report_to: none, lr_scheduler_type: constant, use_cpu: true}}
output_dir: {folder / f"run-{seed}"}
"""
        (folder / "two.yaml").write_text(here(text), encoding="utf-8")
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
    shutil.copytree(trained[2] / "checkpoint-40", other)
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


def test_what_rows_and_answers_hold_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "\x1b[31mred", "reference": "\x1b]0;title\x07", "prediction": "[bold]\x07"}
    module._print_rows(Console(width=120), {"tuned": {"rows": [row]}, "base": {"rows": [row]}}, 1)
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07"}
    assert "[bold]" in out


def test_a_question_mark_is_explained_once(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {**dict.fromkeys(module.FORMS, 0.5), "intervals": {}, "rows": [{}] * 4, "metrics": {}}
    found = {name: {"interval": None, "noise": None} for name in module.FORMS if name != "loss"}
    module._print_metrics(Console(width=120), {"tuned": figures, "base": figures, "difference": found})
    out = capsys.readouterr().out
    assert out.count("?: 4 rows are too few, or too much alike, to tell a difference from chance") == 1
    assert "?" not in next(line for line in out.splitlines() if line.startswith("loss"))  # not compared: no verdict
