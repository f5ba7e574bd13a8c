"""Ill signs, each made on purpose by a real training of a tiny model, are told once; a healthy run gets no warning."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.errors import DivergedError, Stopped
from instructft.inference.generator import Generator
from instructft.prompt.templates import TEMPLATES
from instructft.training.run import train
from instructft.training.run_warnings import FILE, at_zero, diverged, headings, overfits, probes, told
from tests.helpers.device import here
from tests.helpers.stops import SignalAt, interrupt

WORDS = ["tea", "bread", "honey", "milk", "rice", "salt", "soup", "cake", "fish", "corn", "plum", "nuts"]


def echoes(count: int, after: str = "") -> list[dict[str, str]]:
    """A task that two small layers learn in seconds: every question has one of four answers."""
    rng = random.Random(0)
    answers = ["Yes.", "No.", "Maybe.", "Never."]
    return [
        {"instruction": f"Case {i % 4}: {' '.join(rng.sample(WORDS, 2))}?", "output": answers[i % 4] + after}
        for i in range(count)
    ]


def noise(count: int) -> list[dict[str, str]]:
    """Answers that follow from nothing: they can only be learned by heart."""
    rng = random.Random(1)
    return [
        {"instruction": f"{' '.join(rng.sample(WORDS, 3))}?", "output": " ".join(rng.sample(WORDS, 3))}
        for _ in range(count)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def run(rows: list[dict[str, str]], *overrides: str, name: str = "run") -> Any:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = f"""
model:
  config: {{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128, initializer_range: 0.1,
           resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}
  tokenizer: quickstart
data: {{datasets: [{{path: {tmp_path / "rows.jsonl"}}}], max_length: 96, template: instruction,
       splits: {{validation: 0.2}}}}
train: {{max_steps: 80, per_device_train_batch_size: 16, learning_rate: 1e-2, eval_steps: 20, logging_steps: 5,
        save_strategy: "no", report_to: none, use_cpu: true}}
output_dir: {tmp_path / name}
"""
        (tmp_path / "ill.yaml").write_text(here(recipe))
        console = Console(record=True, soft_wrap=True, file=io.StringIO())
        result = train(instructft.load_recipe(tmp_path / "ill.yaml", list(overrides)), console=console)
        return result, console.export_text()

    return run


def kinds(result: Any) -> list[str]:
    written = json.loads((result.output_dir / "run.json").read_text())["warnings"]
    assert written == result.facts["warnings"] == told(result.output_dir)
    assert all(set(warning) == {"step", "kind", "text"} for warning in written)
    return [warning["kind"] for warning in written]


def test_a_healthy_run_gets_no_warning(run: Any) -> None:
    result, said = run(echoes(200))
    assert result.metrics["eval_loss"] < 0.1  # it did learn
    assert kinds(result) == []
    assert "warning" not in said
    assert not (result.output_dir / "warnings.jsonl").exists()


def test_overfitting(run: Any) -> None:
    result, said = run(noise(40), "train.max_steps=120", "train.eval_steps=15")
    assert kinds(result).count("overfitting") == 1
    assert "the validation loss rises" in said
    assert "train.early_stopping_patience" in said
    losses = [json.loads(line).get("eval_loss") for line in (result.output_dir / "metrics.jsonl").open()]
    losses = [loss for loss in losses if loss]
    assert losses[-1] > min(losses) * 1.02


def test_a_model_that_repeats_the_template(run: Any) -> None:
    result, said = run(echoes(200, "\n\n### Instruction:\nAnd now?\n\n### Response:\nDone."))
    assert kinds(result) == ["template"]
    assert "8 of 8 answers continue with the template's own ### Instruction:" in said


def test_a_model_that_never_stops(run: Any) -> None:
    """Answers that are all cut at `max_length` teach no end."""
    long = [{**row, "output": row["output"] + " la" * 60} for row in echoes(200)]
    result, said = run(long, "data.max_length=40")
    assert result.facts["data"]["cut"]["rows"] == 200
    assert kinds(result) == ["never_stops"]
    assert "8 of 8 answers ran on until they were cut off" in said
    assert "raise data.max_length" in said


def test_a_loss_of_zero(run: Any) -> None:
    same = [{**row, "output": "Yes."} for row in echoes(60)]
    result, said = run(same, "data.splits.validation=0", "train.lr_scheduler_type=constant", "train.learning_rate=2e-2")
    assert kinds(result) == ["loss_at_zero"]
    assert "the training loss is 0.000" in said
    assert "instructft inspect" in said


def test_without_evaluations_questions_are_asked_at_the_end(run: Any) -> None:
    long = [{**row, "output": row["output"] + " la" * 60} for row in echoes(60)]
    result, _ = run(long, "data.max_length=40", "data.splits.validation=0", "train.max_steps=30")
    assert [(w["kind"], w["step"]) for w in result.facts["warnings"]] == [("never_stops", 30)]


def test_a_sign_is_told_once_in_a_run_that_was_stopped(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, options = noise(40), ("train.eval_steps=10", "train.save_strategy=steps", "train.save_steps=40")
    whole, _ = run(rows, *options, name="whole")
    (first,) = [w for w in whole.facts["warnings"] if w["kind"] == "overfitting"]
    assert first["step"] < 71
    with monkeypatch.context() as patch:
        interrupt(patch, SignalAt("step", 70))
        with pytest.raises(Stopped):
            run(rows, *options)
    result, said = run(rows, *options)
    assert result.facts["train"]["resumed"][0]["step"] == 71
    assert result.facts["warnings"] == whole.facts["warnings"]
    assert "the validation loss rises" not in said  # told before
    assert (result.output_dir / "model.safetensors").read_bytes() == (
        whole.output_dir / "model.safetensors"
    ).read_bytes()


# ------------------------------------------------------------------------------------------------------------ the rules


def history(train_losses: list[float], eval_losses: list[float]) -> list[dict[str, float]]:
    found = []
    for i, (loss, eval_loss) in enumerate(zip(train_losses, eval_losses, strict=True), 1):
        found += [{"step": 10 * i - 5, "loss": loss}, {"step": 10 * i, "loss": loss - 0.01}]
        found.append({"step": 10 * i, "eval_loss": eval_loss})
    return found


def test_what_overfitting_is() -> None:
    falling = [2.0, 1.5, 1.2, 1.0, 0.8]
    assert "rises (1.6000 at step 20, 1.9000 now)" in overfits(history(falling, [2.0, 1.6, 1.7, 1.8, 1.9]))
    assert overfits(history(falling, [2.0, 1.9, 1.6, 1.7, 1.9])) == ""  # two evaluations only
    assert overfits(history(falling, [2.0, 1.6, 1.61, 1.62, 1.61])) == ""  # within the noise of a level
    assert overfits(history([2.0, 1.5, 1.6, 1.8, 2.0], [2.0, 1.6, 1.7, 1.8, 1.9])) == ""  # both rise: another trouble
    assert overfits(history(falling, [2.0, 1.8, 1.7, 1.6, 1.5])) == ""
    assert overfits([]) == ""
    nan = float("nan")
    assert overfits(history(falling, [2.0, 1.6, nan, nan, nan])) == ""


def test_what_zero_is() -> None:
    assert at_zero([{"step": i, "loss": 0.0} for i in range(3)])
    assert not at_zero([{"step": i, "loss": 0.0} for i in range(2)])
    assert not at_zero([{"step": i, "loss": loss} for i, loss in enumerate([0.0, 0.0, 0.0, 0.01])])
    assert not at_zero([{"step": i, "loss": float("nan")} for i in range(5)])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("instruction", {"### Instruction:", "### Response:"}),
        ("human-assistant", {"Human:", "Assistant:"}),
        ("chatml", {"<|im_start|>user", "<|im_start|>assistant"}),
    ],
)
def test_headings(template: str, expected: set[str], tiny_model: Any, tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[template].tokens)})
    tokenizer.chat_template = TEMPLATES[template].text()
    tiny_model.resize_token_embeddings(len(tokenizer))
    assert set(headings(Generator(tiny_model, tokenizer))) == expected


def test_probes_are_whole_rows_where_there_are_any() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 0], "labels": [-100, -100, -100, 8, 9, 0]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]},  # cut: no end
        {"input_ids": [1, 2, 7, 0, 3], "labels": [-100, -100, 7, 0, 3]},  # a line break behind the stop token
        {"input_ids": [5, 6], "labels": [5, 6]},  # everything carries loss
        {"input_ids": [1, 2, 3, 0, 9, 9, 9, 0], "labels": [-100, -100, 3, 0, -100, -100, 9, 0], "seq_lengths": [4, 4]},
    ]
    assert [probe.prompt for probe in probes(rows, [0])] == [[1, 2], [5, 6, 7], [1, 2]]
    assert [(probe.prompt, probe.ends) for probe in probes(rows[1:2], [0])] == [([5, 6, 7], False)]
    assert probes(rows[3:4], [0]) == probes(None, [0]) == probes(iter(rows), [0]) == []


def test_a_loss_above_a_guess_is_a_sign_and_a_high_first_loss_is_none() -> None:
    start = {"step": 1, "loss": 7.3}
    high, began = (
        {"step": 10, "loss": 30.0},
        {"step": 0, "start_loss": 7.3},
    )  # of ten steps that have gone wrong already
    assert diverged([high, {"step": 12, "eval_loss": 25.0}], 1490) == ""
    assert "before the first step it was 7.3000" in diverged([began, high, {"step": 12, "eval_loss": 25.0}], 1490)
    assert diverged([start, {"step": 4, "loss": 7.0}, {"step": 4, "eval_loss": 7.2}], 1490) == ""
    assert diverged([start, {"step": 4, "eval_loss": 9.0}], 1490).startswith("the run has diverged: the validation")
    assert diverged([{"step": 1, "loss": 30.0}, {"step": 4, "eval_loss": 25.0}], 1490) == ""
    worse = [{"step": n, "loss": 50.0} for n in (2, 3, 4)]
    assert diverged([start, *worse[:2]], 1490) == ""  # a spike is no divergence
    assert "the last 3 logged losses" in diverged([start, *worse], 1490)


@pytest.mark.parametrize("what", ["stop", "warn"])
def test_a_learning_rate_of_100_is_no_run_that_is_done(write_recipe: Any, tmp_path: Path, what: str) -> None:
    overrides = [
        *("train.learning_rate=100", "train.loss_spike_limit=null", f"train.on_divergence={what}"),
        *(f"output_dir={tmp_path / 'run'}", "train.report_to=[]", "train.max_grad_norm=0"),
    ]
    recipe = instructft.load_recipe(write_recipe(), overrides)
    if what == "stop":
        with pytest.raises(DivergedError, match="the run has diverged: the validation loss is"):
            instructft.train(recipe, console=Console(quiet=True))
        assert not (tmp_path / "run" / "config.json").exists()
        return
    result = instructft.train(recipe, console=Console(quiet=True))
    assert result.facts["warnings"][0]["kind"] == "diverged"
    card = (result.output_dir / "README.md").read_text()
    page = (result.output_dir / "report.html").read_text()
    assert card.index("**Do not use this model**: the run has diverged") < card.index("A chat model")
    assert page.index("the run has diverged") < page.index("<h2>")
    assert "perplexity 10^" in page
    assert "validation perplexity | 10^" in card
    assert "e+" not in page[page.index("All numbers") :].split("made with")[0]


def test_a_run_that_has_diverged_is_told_first(tmp_path: Path) -> None:
    """Card and report begin with it: nothing else counts then."""
    signs = [("overfitting", 3), ("never_stops", 4), ("diverged", 5)]
    lines = [json.dumps({"step": step, "kind": kind, "text": f"{kind} was seen"}) + "\n" for kind, step in signs]
    (tmp_path / FILE).write_text("".join(lines))
    assert [sign["kind"] for sign in told(tmp_path)] == ["diverged", "overfitting", "never_stops"]
