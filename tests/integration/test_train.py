"""A whole run, small: what it leaves on disk, that it learned, and that its figures are what they say."""

from __future__ import annotations

import io
import json
import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import instructft
from instructft.checkpoints.run_folder import MARK
from instructft.data.prepare import prepare
from instructft.errors import UsageError
from instructft.prompt.loss_mask import encode_prompt
from tests.conftest import GPT2, ROWS, TINY, draw_curves
from tests.helpers.device import here, near
from tests.helpers.telling import telling


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    """(recipe, result, what was printed) of 120 steps on two dozen rows, which a tiny model learns by heart."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "tiny.yaml"
    text = TINY.replace("rows: 120", "rows: 30").replace("max_steps: 4", "max_steps: 120")
    text = text.replace("n_embd: 32", "n_embd: 64, initializer_range: 0.05, resid_pdrop: 0.0, embd_pdrop: 0.0")
    text += "  learning_rate: 5e-3\n  warmup_steps: 5\n  eval_steps: 40\n"
    path.write_text(here(f"{text}samples: [What is the capital of Norway?]\noutput_dir: {folder / 'run'}\n"))
    recipe = instructft.load_recipe(path)
    printed = io.StringIO()
    draw_curves(True)
    result = instructft.train(recipe, console=Console(file=printed, width=100))
    draw_curves(False)
    return recipe, result, printed.getvalue()


def test_the_run_folder_is_complete(run: Any) -> None:
    recipe, result, _ = run
    names = {path.name for path in result.output_dir.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "loss.png", "loss.pdf",
        "report.html", "README.md", "tensorboard",
    }  # fmt: skip
    assert "training_args.bin" not in names
    assert any((result.output_dir / "tensorboard").iterdir())
    modes = {path.stat().st_mode for path in result.output_dir.iterdir() if path.is_file()}
    assert len(modes) == 1  # who may read one file may read the others
    assert (result.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (result.output_dir / "loss.pdf").read_bytes().startswith(b"%PDF")
    assert instructft.load_recipe(result.output_dir / "recipe.yaml") == recipe


def test_run_json(run: Any) -> None:
    recipe, result, _ = run
    facts = json.loads((result.output_dir / "run.json").read_text())
    tokenizer = instructft.load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    assert facts["data"]["rows"] == {"train": 24, "validation": 3, "test": 3} == data.rows
    assert facts["data"]["fingerprint"] == data.fingerprint
    assert facts["data"]["tokens"] == sum(len(row["input_ids"]) for row in data.splits["train"])
    assert facts["data"]["supervised_tokens"] == sum(
        label != -100 for row in data.splits["train"] for label in row["labels"]
    )
    assert facts["data"]["supervised_share"] == facts["data"]["supervised_tokens"] / facts["data"]["tokens"] < 1
    assert 0 < facts["data"]["padding_share"] < 0.6
    assert facts["train"]["steps"] == 120
    assert facts["train"]["tokens"] == 20 * facts["data"]["tokens"]  # 120 steps of 4 rows are 20 times 24 rows
    assert facts["train"]["supervised_tokens"] == 20 * facts["data"]["supervised_tokens"]
    assert facts["train"]["tokens_per_second"] == pytest.approx(facts["train"]["tokens"] / facts["train"]["seconds"])
    assert set(facts["versions"]) >= {"instructft", "torch", "transformers", "trl"}
    assert facts["seed"] == 42
    assert facts["metrics"]["eval_perplexity"] == pytest.approx(math.exp(facts["metrics"]["eval_loss"]))


def test_metrics_are_strict_json_with_each_step_once(run: Any) -> None:
    _, result, _ = run

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 121))
    assert all("loss" in record and "learning_rate" in record for record in records)
    assert [record["step"] for record in records if "eval_loss" in record] == [40, 80, 120]


def test_the_loss_falls_and_the_reply_stops(run: Any) -> None:
    recipe, result, _ = run
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.2 * records[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(result.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    row = instructft.data.load.conversations(recipe, "train")[0]["messages"]
    prompt = encode_prompt(row[:-1], tokenizer)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=60)[0].tolist()
    assert out[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.decode(out[len(prompt) : -1]) == row[-1]["content"]
    trained = [r["messages"] for r in instructft.data.load.conversations(recipe, "train")]
    answers = instructft.generate(result.output_dir, [messages[:-1] for messages in trained])
    assert sum(a == m[-1]["content"] for a, m in zip(answers, trained, strict=True)) >= 20  # of 24, by heart


def test_what_is_said_before_the_first_step(run: Any, device: str) -> None:
    _, result, printed = run
    facts = result.facts["data"]
    share = facts["supervised_tokens"] / facts["tokens"]
    assert f"responses: {facts['supervised_tokens']:,} of {facts['tokens']:,} training tokens ({share:.1%})" in printed
    assert "train 24 · validation 3 · test 3 rows" in printed
    assert f"{device} × 1" in printed
    assert "float32" in printed
    assert "### Instruction:" in printed
    assert printed.index("### Instruction:") < printed.index("step 1/120")
    assert "tokens/s" in printed
    assert "What is the capital of Norway?" in printed


def test_a_date_that_the_template_puts_in_is_said(tmp_path: Path, write_recipe: Any, monkeypatch: Any) -> None:
    """Before a run, by `prepare` and by `check`: a prompt that says another day than today's surprises."""
    from typer.testing import CliRunner

    from instructft.check.report import check, show
    from instructft.cli import app
    from instructft.models.attention import Attention
    from instructft.training.run import announce

    (tmp_path / "date.jinja").write_text(
        "{{- strftime_now('%d %b %Y') -}}{%- for m in messages -%}{{- m.content + eos_token -}}{%- endfor -%}"
    )
    path = write_recipe(TINY.replace("template: instruction", f"template: {tmp_path / 'date.jinja'}"))
    recipe = instructft.load_recipe(path)
    tokenizer = instructft.load_tokenizer(recipe)
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    args: Any = SimpleNamespace(device=torch.device("cpu"), world_size=1, per_device_train_batch_size=4)
    args.gradient_accumulation_steps = 1
    model = instructft.load_model(recipe, tokenizer)
    announce(recipe, tokenizer, prepare(recipe, tokenizer), model, args, "float32", Attention("sdpa"), console)
    show(check(recipe), console)
    assert printed.getvalue().count("prompts say 2024-07-26") == 2
    assert "prompts say 2024-07-26" in CliRunner().invoke(app, ["prepare", str(path)]).output


def test_samples_are_kept(run: Any) -> None:
    _, result, _ = run
    records = [json.loads(line) for line in (result.output_dir / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 40, 80, 120]
    assert all(record["prompt"] == "What is the capital of Norway?" for record in records)
    assert all(record["finish_reason"] in ("stop", "length") for record in records)


def test_the_same_recipe_gives_the_same_weights_with_and_without_watching(write_recipe: Any) -> None:
    weights = []
    for i, overrides in enumerate(([], ["samples=[Hello]", "train.eval_steps=1", "train.logging_steps=2"])):
        recipe = instructft.load_recipe(
            write_recipe(name=f"r{i}.yaml"), [*overrides, f"output_dir={_out(write_recipe, i)}"]
        )
        result = instructft.train(recipe, console=Console(quiet=True))
        weights.append((result.output_dir / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def _out(write_recipe: Any, i: int) -> Path:
    return write_recipe(name="x.yaml").parent / f"run-{i}"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_validation_loss_is_the_mean_over_tokens_whatever_the_batch(write_recipe: Any, batch_size: int) -> None:
    recipe = instructft.load_recipe(
        write_recipe(),
        ["train.max_steps=1", "train.learning_rate=0.0", f"train.per_device_eval_batch_size={batch_size}"],
    )
    result = instructft.train(recipe, console=Console(quiet=True))
    tokenizer = instructft.load_tokenizer(recipe)
    model = instructft.load_model(recipe, tokenizer).eval()
    nll = tokens = right = 0.0
    for row in prepare(recipe, tokenizer).splits["validation"]:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        kept = labels != -100
        nll += float(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
        right += float((logits[kept].argmax(-1) == labels[kept]).sum())
        tokens += int(kept.sum())
    assert result.metrics["eval_loss"] == pytest.approx(nll / tokens, abs=near(1e-5))
    assert result.metrics["eval_mean_token_accuracy"] == pytest.approx(right / tokens)


def test_a_step_is_the_mean_over_its_tokens_whatever_the_accumulation(write_recipe: Any) -> None:
    from safetensors.torch import load_file

    runs = []
    for i, (batch, accumulation) in enumerate([(4, 1), (2, 2), (1, 4)]):
        recipe = instructft.load_recipe(
            write_recipe(),
            [
                f"train.per_device_train_batch_size={batch}", f"train.gradient_accumulation_steps={accumulation}",
                "train.max_steps=3", "train.optim=sgd", "train.learning_rate=0.5",
                f"output_dir={_out(write_recipe, i)}",
                "model.config.resid_pdrop=0.0", "model.config.embd_pdrop=0.0", "model.config.attn_pdrop=0.0",
            ],
        )  # fmt: skip
        result = instructft.train(recipe, console=Console(quiet=True))
        records = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
        runs.append(([r["loss"] for r in records], load_file(result.output_dir / "model.safetensors")))
    for losses, weights in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=2e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, runs[0][1][name], atol=2e-5, rtol=0)


def test_a_used_run_folder_is_refused_before_anything_is_loaded(write_recipe: Any, monkeypatch: Any) -> None:
    recipe = instructft.load_recipe(write_recipe())
    folder = Path(recipe.output_dir)
    folder.mkdir()
    (folder / "model.safetensors").write_text("precious")
    monkeypatch.setattr(
        import_module("instructft.training.run"), "load_tokenizer", lambda recipe: pytest.fail("loaded")
    )
    with pytest.raises(UsageError, match=r"is not empty, and no run has made it: it holds model.safetensors"):
        instructft.train(recipe)
    assert (folder / "model.safetensors").read_text() == "precious"


def test_what_a_stopped_run_left_does_not_stand_in_the_way(write_recipe: Any) -> None:
    recipe = instructft.load_recipe(write_recipe(), ["train.max_steps=1"])
    folder = Path(recipe.output_dir)
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 99}\n')
    (folder / MARK).write_text("{}")
    result = instructft.train(recipe, console=Console(quiet=True))
    assert '"step": 99' not in (folder / "metrics.jsonl").read_text()
    assert result.facts["train"]["steps"] == 1


def test_each_data_set_has_a_validation_loss_of_its_own(write_recipe: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i * 7919}.", "output": f"{i * 104729} zzz"} for i in range(40)]
    (tmp_path / "numbers.json").write_text(json.dumps(rows))
    text = TINY.replace("[{name: quickstart, rows: 120}]", f"[quickstart, {{path: {tmp_path / 'numbers.json'}}}]")
    recipe = instructft.load_recipe(write_recipe(text), ["train.max_steps=1", "data.packing=true"])
    metrics = instructft.train(recipe, console=Console(quiet=True)).metrics
    data = prepare(recipe, instructft.load_tokenizer(recipe))
    assert list(data.groups) == ["quickstart", str(tmp_path / "numbers.json")]
    assert metrics["eval_quickstart_loss"] != metrics["eval_numbers_loss"]
    counts, start = [], 0
    for n in data.groups.values():
        part = data.splits["validation"].select(range(start, start + n))
        counts.append(sum(label != -100 for row in part for label in row["labels"]))
        start += n
    mean = (metrics["eval_quickstart_loss"] * counts[0] + metrics["eval_numbers_loss"] * counts[1]) / sum(counts)
    assert metrics["eval_loss"] == pytest.approx(mean)


def test_a_run_that_fails_leaves_nothing_that_poses_as_a_model(write_recipe: Any, monkeypatch: Any) -> None:
    from instructft.training.trainer import Trainer

    recipe = instructft.load_recipe(write_recipe())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the lights went out")

    monkeypatch.setattr(Trainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="lights"):
        instructft.train(recipe, console=Console(quiet=True))
    assert not list(Path(recipe.output_dir).glob("*.safetensors"))
    assert not (Path(recipe.output_dir) / "config.json").exists()


@pytest.mark.parametrize("template", telling(["alpaca", "instruction"], "instruction"))
def test_varied_rows_and_the_real_tokenizer(tmp_path: Path, template: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "real.yaml"
    path.write_text(
        here(f"""
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 256}}, tokenizer: {GPT2}}}
data: {{datasets: [{{path: {ROWS}, rows: 50}}], template: {template}, max_length: 256, splits: {{validation: 0.1}}}}
train: {{max_steps: 12, learning_rate: 2e-2, per_device_train_batch_size: 4, logging_steps: 1, use_cpu: true}}
output_dir: {tmp_path / "run"}
""")
    )
    result = instructft.train(instructft.load_recipe(path), console=Console(quiet=True))
    records = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    facts = result.facts["data"]
    assert sum(facts["rows"].values()) + sum(facts["dropped"].values()) == 50
    model = AutoModelForCausalLM.from_pretrained(result.output_dir)
    rows = instructft.data.load.conversations(instructft.load_recipe(path), "validation")
    again = instructft.evaluate(
        model, rows, tokenizer=AutoTokenizer.from_pretrained(result.output_dir), max_new_tokens=8
    )
    # the model on disk, judged from outside, has the loss that the run reported (rows are cut at the same length)
    assert again["loss"] == pytest.approx(result.metrics["eval_loss"], abs=near(1e-4))


def test_processes_that_do_not_know_of_each_other_are_refused(write_recipe, monkeypatch):
    """accelerate counts one process in each of two, on a machine without a GPU that was not told to use the CPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refuse = import_module("instructft.training.arguments").refuse_what_cannot_run
    state = SimpleNamespace(num_processes=1, distributed_type=SimpleNamespace(value="NO"))
    with pytest.raises(UsageError, match="a launcher started 2 processes, and accelerate counts one in each"):
        refuse(instructft.load_recipe(write_recipe()), state)
