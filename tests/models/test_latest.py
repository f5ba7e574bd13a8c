"""`subfolder: latest`: which folder is taken, from the Hub and from here, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.errors import UsageError
from instructft.models.latest import checkpoint_name, forget_newest, newest_checkpoint, progress, resolve_latest
from instructft.training.run import train
from tests.helpers.device import here
from tests.helpers.stops import SignalAt, interrupt

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def another_process() -> None:
    """Forgets what was found: a process asks once."""
    forget_newest()


@pytest.mark.parametrize(
    ("tokens", "loss", "name"),
    [
        (500_000, 1.23451, "checkpoint_tokens_500k_loss_1.2345"),
        (999, None, "checkpoint_tokens_999"),
        (1_000, 0.0, "checkpoint_tokens_1k_loss_0.0000"),
        (1_234_567, 2.0, "checkpoint_tokens_1.234567M_loss_2.0000"),
        (2_000_000_000, 12.5, "checkpoint_tokens_2B_loss_12.5000"),
        (0, None, "checkpoint_tokens_0"),
    ],
)
def test_a_name_tells_exactly_how_far_a_checkpoint_is(tokens: int, loss: float | None, name: str) -> None:
    assert checkpoint_name(tokens, loss) == name
    assert progress(name) == ("tokens", float(tokens))


@pytest.mark.parametrize(
    ("name", "how_far"),
    [
        ("checkpoint-1200", ("step", 1200)),
        ("step_1000", ("step", 1000)),
        ("global_step143000", ("step", 143000)),
        ("step-71000-tokens-2B", ("tokens", 2e9)),
        ("iter_0005000", ("step", 5000)),
        ("ckpt-7", ("step", 7)),
        ("epoch_3", ("epoch", 3)),
        ("Checkpoint_Tokens_1.5M_loss_3.0", ("tokens", 1.5e6)),
        ("tokenizer", None),
        ("checkpoint", None),
        ("model-2", None),
    ],
)
def test_names_of_others(name: str, how_far: Any) -> None:
    assert progress(name) == how_far


def files(*folders: str) -> list[str]:
    return [f"{folder}/{name}" for folder in folders for name in ("config.json", "model.safetensors")]


def test_the_newest_is_told_by_its_number_and_not_by_its_letters() -> None:
    found = newest_checkpoint(files("checkpoint_tokens_900k_loss_1.0", "checkpoint_tokens_1.1M_loss_1.2"))
    assert found is not None
    assert (found.folder, found.why) == (
        "checkpoint_tokens_1.1M_loss_1.2",
        "1,100,000 tokens, the most of 2 checkpoints",
    )


def test_folders_without_weights_are_passed_over_and_named() -> None:
    found = newest_checkpoint([*files("checkpoint-80"), "checkpoint-120/config.json", "checkpoint-200/optimizer.pt"])
    assert found is not None
    assert found.folder == "checkpoint-80"
    assert "without weights: checkpoint-120, checkpoint-200" in found.why


def test_inside_a_folder_only_what_is_in_it_counts() -> None:
    both = files("checkpoint-900", "instruct/checkpoint-20", "instruct/checkpoint-100")
    inside, all_of_it = newest_checkpoint(both, "instruct"), newest_checkpoint(both)
    assert inside is not None
    assert all_of_it is not None
    assert (inside.folder, all_of_it.folder) == ("instruct/checkpoint-100", "checkpoint-900")
    assert newest_checkpoint(files("model")) is None


def test_steps_and_epochs_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"different things \(step, epoch\): checkpoint-10, epoch-3"):
        newest_checkpoint(files("checkpoint-10", "epoch-3"))


RECIPE = """
model: {{name_or_path: {name}, subfolder: {subfolder}}}
data: {{datasets: [{{name: quickstart, rows: 60}}], template: instruction, max_length: 64, splits: {{validation: 0}}}}
train: {{max_steps: 4, per_device_train_batch_size: 4, use_cpu: true, report_to: none, save_steps: 2, logging_steps: 1}}
output_dir: {out}
"""


@pytest.fixture
def model(tokenizer: Any, tiny_model: Any, tmp_path: Path) -> Any:
    """The files of a tiny model that says how far it is, by a weight."""

    def make(number: int) -> dict[str, bytes]:
        folder = tmp_path / f"model-{number}"
        tiny_model.transformer.ln_f.bias.data.fill_(number / 100)
        tiny_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return make


def recipe(tmp_path: Path, name: str, subfolder: str = "latest", out: str = "run") -> Any:
    path = tmp_path / "further.yaml"
    path.write_text(here(RECIPE.format(name=name, subfolder=subfolder, out=tmp_path / out)))
    return instructft.load_recipe(path)


def test_from_the_hub_and_pinned_to_the_commit(
    hub: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begins from the newest folder; gone on with, it keeps its base though a newer one has come."""
    for number in (10, 9):
        folder = f"checkpoint_tokens_{number}k_loss_1.0"
        commit = hub.put("org/pre", {f"{folder}/{name}": content for name, content in model(number).items()})
    asked = recipe(tmp_path, "org/pre")
    with monkeypatch.context() as patch:
        interrupt(patch, SignalAt("step", 1))
        with pytest.raises(instructft.errors.Stopped):
            train(asked, console=QUIET)
    written = instructft.recipe.load.load_run_recipe(tmp_path / "run")
    assert written.model.subfolder == "checkpoint_tokens_10k_loss_1.0"
    assert written.model.revision == commit
    hub.put("org/pre", {f"checkpoint_tokens_11k_loss_0.9/{name}": content for name, content in model(11).items()})
    result = train(asked, console=QUIET)
    assert result.facts["train"]["resumed"][0]["step"] == 2
    assert instructft.recipe.load.load_run_recipe(tmp_path / "run").model.subfolder == "checkpoint_tokens_10k_loss_1.0"
    fresh, why = resolve_latest(recipe(tmp_path, "org/pre", out="other"))
    assert (fresh.model.subfolder, why) == (
        "checkpoint_tokens_11k_loss_0.9",
        "11,000 tokens, the most of 3 checkpoints",
    )
    loaded = instructft.load_model(fresh, instructft.load_tokenizer(fresh))
    assert loaded.transformer.ln_f.bias[0].item() == pytest.approx(0.11)


def test_from_a_folder_here(model: Any, tmp_path: Path) -> None:
    for number in (9, 10):
        place = tmp_path / "mine" / "instruct" / f"checkpoint-{number}"
        place.mkdir(parents=True)
        for name, content in model(number).items():
            (place / name).write_bytes(content)
    found, why = resolve_latest(recipe(tmp_path, str(tmp_path / "mine"), "instruct/latest"))
    assert found.model.subfolder == "instruct/checkpoint-10"
    assert "10 steps, the most of 2" in why
    loaded = instructft.load_model(found, instructft.load_tokenizer(found))
    assert loaded.transformer.ln_f.bias[0].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"config.json": "{}"}, "org/some holds no folder with a checkpoint"),
        (dict.fromkeys(files("step-4", "epoch-2"), "x"), "which of the checkpoints in org/some is the newest?"),
    ],
)
def test_what_cannot_be_told_is_an_error(hub: Any, tmp_path: Path, content: Any, said: str) -> None:
    hub.create("org/some")
    hub.put("org/some", content)
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        resolve_latest(recipe(tmp_path, "org/some"))


def test_a_repository_that_is_not_there(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the files of org/none could not be listed"):
        resolve_latest(recipe(tmp_path, "org/none"))


def test_without_a_network_the_cache_serves(
    hub: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.put("org/pre", {f"checkpoint-5/{name}": content for name, content in model(5).items()})
    online, _ = resolve_latest(recipe(tmp_path, "org/pre"))
    instructft.load_model(online, instructft.load_tokenizer(online))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_newest()
    offline, _ = resolve_latest(recipe(tmp_path, "org/pre").model_copy())
    assert offline.model.subfolder == "checkpoint-5"
