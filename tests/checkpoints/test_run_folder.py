"""Tests of `instructft.checkpoints.run_folder`: what no run has made is neither removed nor written over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from instructft.checkpoints import manifest
from instructft.checkpoints.run_folder import MARK, is_run, make_folder, own, refuse_used
from instructft.errors import UsageError
from instructft.recipe.load import load_recipe

WHOLE = (  # what a checkpoint needs
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress_0.json",
)  # fmt: skip
ROW = json.dumps({"instruction": "Hi.", "output": "Hello."}) + "\n"


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]):
    """A function: key=value overrides to a recipe whose run folder is `run`."""
    return lambda *overrides: load_recipe(write_recipe(), list(overrides))


THEIRS: dict[str, dict[str, str]] = {
    "rows by the name of a log": {"samples.jsonl": ROW},
    "a recipe": {"recipe.yaml": "mine"},
    "a folder by the name of a log": {"tensorboard/mine": "notes"},
    "all names of logs at once": {"metrics.jsonl": "1", "warnings.jsonl": "2", "recipe.yaml": "3", ".fetch/x": "4"},
    "a partial model of another tool": {"final.partial/model.safetensors": "weights"},
    "a checkpoint of another tool": {"checkpoint-5/model.safetensors": "weights"},
    "an empty checkpoint folder and a log": {"checkpoint-5/manifest.json.partial": "{}", "samples.jsonl": ROW},
    "a model": {"config.json": "{}", "model.safetensors": "weights"},
    "notes": {"notes.txt": "mine"},
    "a run.json of another tool": {"run.json": '{"versions": {"torch": "2"}}', "samples.jsonl": ROW},
    "a run.json that is none": {"run.json": "[", "samples.jsonl": ROW},
}


@pytest.mark.parametrize("case", THEIRS)
def test_a_folder_that_no_run_has_made_is_refused_as_it_is(case: str, recipe: Callable) -> None:
    run = Path(recipe().output_dir)
    for name, text in THEIRS[case].items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    with pytest.raises(UsageError, match=r"is not empty, and no run has made it") as refused, own(recipe()):
        pytest.fail("taken for a run")
    assert "rm " not in str(refused.value)
    assert everything(run) == THEIRS[case]


def test_a_model_that_was_copied_out_of_a_run_is_called_a_model(recipe: Callable) -> None:
    run = Path(recipe().output_dir)
    with own(recipe()):
        (run / "config.json").write_text("{}")
        (run / "model.safetensors").write_text("weights")
    with pytest.raises(UsageError, match="already holds a model; choose another folder"), own(recipe()):
        pytest.fail("taken for a run")
    (run / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="already holds a run; choose another folder"), own(recipe()):
        pytest.fail("written into")


def test_a_run_marks_its_folder_first_and_finds_the_mark_again(recipe: Callable) -> None:
    run = Path(recipe().output_dir)
    with own(recipe()):
        assert is_run(run)
        (run / "metrics.jsonl").write_text("{}")
    with own(recipe()):  # stopped before its first checkpoint: the same command begins anew
        make_folder(run, fresh=True)
        assert not (run / "metrics.jsonl").exists()
        (run / "model.safetensors").write_text("weights")
    with pytest.raises(UsageError, match="already holds a run"), own(recipe()):
        pass
    assert (run / "model.safetensors").read_text() == "weights"


def test_a_run_that_wrote_nothing_leaves_nothing(recipe: Callable, tmp_path: Path) -> None:
    with own(recipe(f"output_dir={tmp_path}/new/deep/run")):
        assert (tmp_path / "new/deep/run").is_dir()
    assert not (tmp_path / "new").exists()


def test_runs_of_versions_without_a_mark_go_on(recipe: Callable) -> None:
    run = Path(recipe().output_dir)
    folder = run / "checkpoint-5"
    manifest.begin(folder)
    for name in WHOLE:
        (folder / name).write_text("{}")
    manifest.seal(folder, {}, {})
    (run / "metrics.jsonl").write_text("{}")
    with own(recipe()):
        assert (run / MARK).is_file()
    assert manifest.verify(folder).step == 5
    with pytest.raises(UsageError, match="already holds a run"), own(recipe(), "never"):
        pass
    run.joinpath(MARK).unlink()
    folder.joinpath(manifest.MANIFEST).unlink()
    (run / "run.json").write_text('{"versions": {"instructft": "0.1"}}')
    assert is_run(run)


@pytest.mark.skipif(os.name == "nt", reason="needs a right there")
@pytest.mark.parametrize("name", ["README.md", "metrics.jsonl", "tensorboard", "checkpoint-5/model.safetensors"])
def test_a_run_folder_with_links_is_refused(recipe: Callable, tmp_path: Path, name: str) -> None:
    run = Path(recipe().output_dir)
    with own(recipe()):
        (run / "checkpoint-5").mkdir()
    (tmp_path / "theirs").write_text("precious")
    (run / name).symlink_to(tmp_path / "theirs")
    before = everything(run)
    with pytest.raises(UsageError, match=f"{name} is a symbolic link"), own(recipe()):
        pass
    assert everything(run) == before


@pytest.mark.skipif(os.name == "nt", reason="files have one name there")
@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", ".lock"])
def test_what_has_another_name_elsewhere_is_not_written_to(recipe: Callable, tmp_path: Path, name: str) -> None:
    """A hard link, as an archive can bring one; or a copy that somebody made by `cp -al`."""
    run = Path(recipe().output_dir)
    with own(recipe()):
        (run / "checkpoint-5").mkdir()
    (tmp_path / "theirs").write_text("precious")
    (run / name).hardlink_to(tmp_path / "theirs")
    with own(recipe()):
        if name != ".lock":
            assert (run / name).read_text() == "precious"
        with (run / name).open("a") as file:
            file.write("ours")
    assert (tmp_path / "theirs").read_text() == "precious"


def test_rows_that_the_run_would_replace_are_named(recipe: Callable) -> None:
    run = Path(recipe().output_dir)
    with own(recipe()):
        (run / "samples.jsonl").write_text(ROW)
    again = recipe(f"data.datasets=[{{path: {run}/samples.jsonl}}]")
    said = r"data.datasets\[0\].path: .*samples.jsonl lies in output_dir"
    with pytest.raises(UsageError, match=said), own(again):
        pass
    assert (run / "samples.jsonl").read_text() == ROW


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(recipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file/run", "is a file"), (Path("/proc/none/run"), "cannot be written")):
        with pytest.raises(UsageError, match=why), own(recipe(f"output_dir={path}")):
            pass


def test_an_output_that_is_not_empty_is_named_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"it holds notes.txt; choose another OUTPUT$"):
        refuse_used(tmp_path)
