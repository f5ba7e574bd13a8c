"""`instructft runs` reads what runs left: whole ones, stopped, living, damaged; it loads no torch and dies of none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import UsageError
from instructft.report.runs import _made_from, find_runs, show_runs
from tests.helpers.report import LINES, facts_of, fill

RECIPE = """# a: the recipe as it was resolved
model:
  name_or_path: {model}
  tokenizer: null
data:
  datasets:
  - path: /home/ada/data/it's mine.jsonl
    name_or_path: no
  - hub: org/name
  template: instruction
adapter:
  type: lora
  r: 8
"""


def a_run(folder: Path, *, finished: bool = True, model: str = "org/base", **changes: Any) -> Path:
    fill(folder, LINES, [])
    (folder / "instructft.json").write_text('{"instructft": "0.1.0"}', encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model), encoding="utf-8")
    if finished:
        (folder / "run.json").write_text(json.dumps(facts_of(**changes)), encoding="utf-8")
    return folder


def by_name(folder: Path) -> dict[str, Any]:
    return {run.name: run for run in find_runs(folder)}


def test_a_finished_run_says_what_its_files_say(tmp_path: Path) -> None:
    run = a_run(tmp_path / "runs" / "one", warnings=[{"step": 1, "kind": "a", "text": "b"}])
    side = {"loss": 1.0, "exact_match": 0.5, "rougeL": 0.25, "rows": []}
    (run / "evaluation.json").write_text(json.dumps({"tuned": side}), encoding="utf-8")
    (run / "gate.json").write_text('{"passed": false, "suites": []}', encoding="utf-8")
    (found,) = find_runs(tmp_path / "runs")
    assert (found.name, found.state, found.rows, found.steps) == ("one", "finished", 96, 40)
    assert (found.model, found.data) == ("org/base + LoRA r=8", "it's mine.jsonl, org/name")
    assert (found.loss, found.eval_loss, found.warnings) == (1.25, 1.5, 1)
    assert found.figures == {"exact_match": 0.5, "rougeL": 0.25, "test_loss": 1.0, "gate": 0.0}


def test_of_runs_that_are_not_finished_the_state_is_said(tmp_path: Path) -> None:
    a_run(tmp_path / "stopped", finished=False)
    resumes = a_run(tmp_path / "project" / "resumes", finished=False)
    (resumes / "checkpoint-20").mkdir()
    (resumes / "checkpoint-20" / "manifest.json").write_text("{}", encoding="utf-8")
    alive = a_run(tmp_path / "alive", finished=False)
    (alive / ".lock").write_text(f"{os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    dead = a_run(tmp_path / "dead", finished=False)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (dead / ".lock").write_text(f"{ended.stdout.strip()} on {socket.gethostname()}\n", encoding="utf-8")
    found = by_name(tmp_path)
    assert found["stopped"].state == "stopped at step 40, without a checkpoint"
    assert found["project/resumes"].state == "stopped, resumes from step 20"
    assert found["alive"].state == f"running (process {os.getpid()} on {socket.gethostname()})"
    assert found["dead"].state == found["stopped"].state
    assert found["stopped"].loss == 2.0
    assert found["stopped"].eval_loss == 1.5


DAMAGE = [
    "",
    "{",
    "[]",
    "null",
    '{"train": 3}',
    '{"train": {"steps": "many"}, "metrics": 1, "warnings": 2}',
]


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_run_hides_no_other(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "sound")
    broken = a_run(tmp_path / "broken")
    for name in ("run.json", "evaluation.json", "gate.json", "instructft.json"):
        (broken / name).write_text(text, encoding="utf-8")
    (broken / "metrics.jsonl").write_bytes(b"\xff\n" + text.encode() + b"\n")
    (broken / "recipe.yaml").write_bytes(b"\xff\xfe model")
    found = by_name(tmp_path)
    assert set(found) == {"sound", "broken"}
    assert found["broken"].state.startswith("broken: run.json") or text == DAMAGE[-1]
    for as_json in (False, True):
        show_runs(tmp_path, as_json=as_json)
        assert "sound" in capsys.readouterr().out


def test_the_list_is_strict_json_and_sorted_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, loss in (("low", 1.0), ("high", 3.0), ("odd", float("nan"))):
        a_run(tmp_path / name, metrics={"loss": loss, "eval_f1": loss, "eval_runtime": 3.0})

    def names(sort: str) -> list[str]:
        show_runs(tmp_path, as_json=True, sort=sort)
        text = capsys.readouterr().out
        assert "NaN" not in text
        return [run["name"] for run in json.loads(text)]

    assert names("loss") == names("f1") == ["low", "high", "odd"]
    assert names("-loss") == ["high", "low", "odd"]
    with pytest.raises(UsageError, match='did you mean "eval_loss"'):
        show_runs(tmp_path, sort="eval-los")
    with pytest.raises(UsageError, match="runtime"):
        show_runs(tmp_path, sort="runtime")


def test_names_of_files_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "runs" / "a\x1b[31m[bold]", model="org/\u202eesab")
    show_runs(tmp_path / "runs")
    said = capsys.readouterr().out
    assert "a\\x1b[31m[bold]" in said
    assert not set(said) & set("\x1b\u202e")


def test_a_folder_that_is_none_and_one_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UsageError, match=r'there is no folder .*did you mean "runs"'):
        show_runs(tmp_path / "rnus")
    show_runs(tmp_path / "runs")
    assert "holds no run" in capsys.readouterr().out


def test_no_library_of_training_is_loaded(tmp_path: Path) -> None:
    a_run(tmp_path / "one")
    code = (
        "import sys; from pathlib import Path; from instructft.report.runs import show_runs\n"
        "show_runs(Path(sys.argv[1]))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'ruamel'}\n"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_a_recipe_that_names_no_model_is_listed(tmp_path: Path) -> None:
    """As somebody has edited it, or a disk has damaged it."""
    (tmp_path / "recipe.yaml").write_text("model:\n  name_or_path: null\ndata:\n  datasets:\n    - name: quickstart\n")
    assert _made_from(tmp_path) == (None, "quickstart")
