"""A run ends when its validation loss falls no more, goes back to its best, and does the same after a resume."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

import instructft
from instructft.errors import RecipeError, Stopped
from instructft.training.run import train
from instructft.training.stopping import since_best
from tests.helpers.device import here
from tests.helpers.stops import SignalAt, interrupt

RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 64, initializer_range: 0.1}
  tokenizer: quickstart
data: {datasets: [{path: ROWS}], max_length: 64, template: instruction, splits: {validation: 0.2}}
train: {max_steps: 200, per_device_train_batch_size: 16, learning_rate: 1e-2, eval_steps: 10, logging_steps: 5,
        early_stopping_patience: 3, report_to: none, use_cpu: true}
output_dir: RUN
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe on answers that follow from nothing: the validation loss falls, then rises."""
    tmp_path = tmp_path_factory.mktemp("early")
    rng = random.Random(1)
    words = ["tea", "bread", "honey", "milk", "rice", "salt", "soup", "cake", "fish", "corn", "plum", "nuts"]
    lines = [
        json.dumps({"instruction": " ".join(rng.sample(words, 3)), "output": " ".join(rng.sample(words, 3))})
        for _ in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "stop.yaml"

    def load(*overrides: str, name: str = "run") -> Any:
        text = RECIPE.replace("ROWS", str(tmp_path / "rows.jsonl")).replace("RUN", str(tmp_path / name))
        path.write_text(here(text))
        return instructft.load_recipe(path, list(overrides))

    return load


def trained(recipe: Any) -> tuple[Any, str]:
    console = Console(record=True, soft_wrap=True, file=io.StringIO())
    return train(recipe, console=console), console.export_text()


@pytest.fixture(scope="module")
def whole(recipe: Any) -> tuple[Any, str]:
    """A run that nothing has stopped."""
    return trained(recipe(name="whole"))


def test_it_stops_and_goes_back_to_the_best(recipe: Any, whole: tuple[Any, str]) -> None:
    result, said = whole
    facts = result.facts["train"]
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert facts["steps"] == best + 30 < 200
    assert max(losses) == facts["steps"]
    assert facts["stopped_early"] == {"step": best + 30, "patience": 3}
    assert facts["best"] == {"step": best, "metric": "loss", "value": losses[best]}
    assert f"has not fallen below {losses[best]:.4f} (step {best}) for 3 evaluations" in said
    final = load_file(result.output_dir / "model.safetensors")
    at_best = load_file(result.output_dir / f"checkpoint-{best}" / "model.safetensors")
    last = load_file(result.output_dir / f"checkpoint-{best + 30}" / "model.safetensors")
    assert all((final[name] == at_best[name]).all() for name in final)
    assert any((final[name] != last[name]).any() for name in final)
    assert result.metrics["eval_loss"] == losses[best]  # of the model that is there, not of the last evaluation
    again, said = trained(recipe(name="whole"))
    assert "is finished" in said
    assert again.facts["train"] == json.loads(json.dumps(facts))


def test_a_resumed_run_stops_at_the_same_evaluation(
    recipe: Any, whole: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = whole
    end = expected.facts["train"]["steps"]
    # within the patience; during an evaluation that is then due; and at the very one at which training ends
    for place, step in (("step", end - 12), ("evaluation", end)):
        name = f"{place}-{step}"
        with monkeypatch.context() as patch:
            interrupt(patch, SignalAt(place, step))
            with pytest.raises(Stopped):
                trained(recipe(name=name))
        result, _ = trained(recipe(name=name))
        assert result.facts["train"]["resumed"]
        for key in ("steps", "stopped_early", "best"):
            assert result.facts["train"][key] == expected.facts["train"][key]
        assert result.metrics["eval_loss"] == expected.metrics["eval_loss"]
        ours, theirs = ((r.output_dir / "model.safetensors").read_bytes() for r in (result, expected))
        assert ours == theirs


def test_a_run_that_was_killed_after_its_end_takes_no_further_step(
    recipe: Any, whole: tuple[Any, str], tmp_path: Path
) -> None:
    """The checkpoint of the last evaluation is there, the final model is not."""
    expected, _ = whole
    run = tmp_path / "run"
    shutil.copytree(expected.output_dir, run)
    (run / "run.json").unlink()
    (run / "model.safetensors").unlink()
    result, _ = trained(recipe(f"output_dir={run}"))
    facts = result.facts["train"]
    assert facts["resumed"][0]["step"] == facts["steps"] == expected.facts["train"]["steps"]
    for key in ("stopped_early", "best"):
        assert facts[key] == expected.facts["train"][key]
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (run, expected.output_dir))
    assert ours == theirs


def test_a_run_whose_loss_falls_goes_to_its_end(recipe: Any) -> None:
    result, said = trained(recipe("train.max_steps=30", "train.learning_rate=1e-4", name="falls"))
    assert result.facts["train"]["steps"] == 30
    assert "stopped_early" not in result.facts["train"]
    assert "training ends here" not in said


# ------------------------------------------------------------------------------------------------------------ the rules


def test_since_best() -> None:
    def history(*losses: float) -> list[dict[str, Any]]:
        return [{"step": i, "loss": 1.0, **({"eval_loss": x} if x else {})} for i, x in enumerate(losses)]

    assert since_best(history(3.0, 0, 2.0, 0, 2.5, 2.0)) == (2, 2, 2.0)  # as good is not better
    assert since_best(history(3.0, 2.0, 1.0)) == (0, 2, 1.0)
    assert since_best(history(3.0, float("nan"), float("nan")))[0] == 2
    assert since_best([])[0] == 0


def test_what_comes_with_the_key(recipe: Any) -> None:
    assert recipe().train["load_best_model_at_end"]
    assert (recipe().train["save_strategy"], recipe().train["save_steps"], recipe().train["eval_steps"]) == (
        "steps", 10, 10,
    )  # fmt: skip
    epochs = recipe("train.eval_strategy=epoch").train
    assert (epochs["eval_strategy"], epochs["save_strategy"]) == ("epoch", "epoch")
    assert not recipe("train.early_stopping_patience=null").train.get("load_best_model_at_end")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.early_stopping_patience=0", "found 0, expected a whole number above 0"),
        ("train.early_stopping_patience=1.5", "found 1.5, expected a whole number above 0"),
        ("data.splits.validation=0", "there is no validation loss"),
        ("train.eval_strategy=no", "follows the evaluations; set train.eval_strategy"),
        ("train.load_best_model_at_end=false", "goes back to the best checkpoint"),
        ("train.metric_for_best_model=eval_entropy", "stops by the validation loss, .*metric_for_best_model entropy"),
        ("train.greater_is_better=true", "stops by the validation loss, .*greater_is_better"),
        ("train.save_strategy=no", "needs a checkpoint at every evaluation"),
        ("train.save_steps=20", "needs a checkpoint at every evaluation.* eval_steps 10, save_steps 20"),
        ("train.save_steps=5", "needs a checkpoint at every evaluation"),
    ],
)
def test_contradictions_are_told_with_the_key(recipe: Any, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"train.early_stopping_patience: .*{message}") as raised:
        recipe(override)
    assert raised.value.exit_code == 2
    assert "load_best_model_at_end: needs" not in str(raised.value)
