"""`init --data FILE --model ID` writes a recipe that loads, passes `check` and runs; what it cannot do it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from instructft.cli import app
from instructft.recipe.load import load_recipe
from tests.helpers.quickstart import rows

REPO = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tiny_model: Any) -> Path:
    """A folder with a tiny model, and 120 rows with columns that nobody knows."""
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("tiny")
    tokenizer.chat_template = None
    tokenizer.save_pretrained("tiny")
    write("tickets.jsonl", [(row["instruction"], row["output"]) for row in rows()[:120]])
    return tmp_path


def write(name: str, pairs: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"nr": n, "Kundenfrage": q, "Antwort": a, "Laune": "gut"}) for n, (q, a) in enumerate(pairs)]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout if result.exception is None else f"{result.stdout}{result.exception}"


INIT = ("init", "--data", "tickets.jsonl", "--model", "tiny")


def test_from_odd_columns_to_a_run(here: Path) -> None:
    code, said = run(*INIT, "new/my.yaml")
    assert code == 0, said
    assert said.startswith("reading tickets.jsonl …\n")
    assert "question is Kundenfrage, answer is Antwort" in said
    recipe = load_recipe("new/my.yaml")
    assert recipe.data.datasets[0].columns == {"question": "Kundenfrage", "answer": "Antwort"}
    assert recipe.data.ignore == ("nr", "Laune")
    assert (recipe.adapter.type, recipe.train["learning_rate"], recipe.data.max_length) == ("lora", 1e-3, 64)
    assert len(recipe.samples) == 2
    assert recipe.output_dir == "runs/my"
    lines = Path("new/my.yaml").read_text(encoding="utf-8").splitlines()
    for key in ("max_length", "packing", "splits", "template", "learning_rate", "num_train_epochs"):
        assert any(line.strip().startswith(f"{key}:") and "  # " in line for line in lines), key
    code, report = run("check", "new/my.yaml", "--json")
    assert (code, json.loads(report)["ok"]) == (0, True)
    schedule = json.loads(report)["estimate"]["schedule"]
    epochs = recipe.train["num_train_epochs"]
    assert any(f"num_train_epochs: {epochs}  # {schedule['steps']} steps" in line for line in lines)
    code, _ = run("train", "new/my.yaml", "train.max_steps=2", "train.use_cpu=true")
    assert code == 0
    assert Path("runs/my/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("goal", ["full", "qlora"])
def test_other_goals(here: Path, goal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instructft.adapters.quantization.trouble_with", lambda *_: "")
    code, said = run(*INIT, "--goal", goal)
    assert code == 0, said
    recipe = load_recipe("tickets.yaml")
    assert recipe.adapter.type == ("none" if goal == "full" else "lora")
    assert recipe.model.quantization == ("4bit" if goal == "qlora" else "none")
    assert recipe.train["learning_rate"] == 1e-3  # 32 wide


def test_rows_longer_than_the_model_and_a_context_are_counted(here: Path) -> None:
    write("tickets.jsonl", [(f"What is {n}?", "long " * 40 * n) for n in range(1, 60)])
    code, said = run(*INIT)
    assert code == 0, said
    recipe = load_recipe("tickets.yaml")
    assert recipe.data.max_length == 128  # all of the model's positions
    assert "max_length 128 of the model's 128: 5" in said  # of 59 rows; they are cut, and it says so


REFUSED: dict[str, tuple[list[str], str]] = {
    "no model": (["init", "--data", "tickets.jsonl"], "init: expected NAME, a shipped recipe"),
    "no data": (["init", "--model", "tiny"], "init: expected NAME, a shipped recipe .*--data FILE"),
    "nothing": (["init"], "--data FILE and --model ID"),
    "a file that is there": ([*INIT, "tickets.jsonl"], "tickets.jsonl exists already"),
    "two files": ([*INIT, "a.yaml", "b.yaml"], "one FILE is written"),
    "a goal": ([*INIT, "--goal", "dpo"], "--goal: found dpo, expected lora, full, qlora"),
    "no such data": (["init", "--data", "ticket.jsonl", "--model", "tiny"], "no file ticket.jsonl; did you mean"),
    "no such model": (["init", "--data", "tickets.jsonl", "--model", "./tinny"], "there is no folder ./tinny"),
    "an empty model": (["init", "--data", "tickets.jsonl", "--model", "empty"], "holds no model"),
    "no such column": ([*INIT, "--columns", "question=Frage"], "has no column Frage"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_before_torch_is_loaded_and_nothing_written(here: Path, case: str) -> None:
    Path("empty").mkdir()
    arguments, message = REFUSED[case]
    before = sorted(here.rglob("*"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    with pytest.raises(Exception, match=message):
        raise result.exception or AssertionError("no error")
    assert "loading torch" not in result.stdout
    assert sorted(here.rglob("*")) == before


def test_a_pattern_gives_a_name_and_late_columns_are_seen(here: Path) -> None:
    pairs = [(row["instruction"], row["output"]) for row in rows()[:700]]
    write("tickets.jsonl", pairs)
    lines = Path("tickets.jsonl").read_text(encoding="utf-8").splitlines()
    lines[600] = lines[600].replace('"Laune"', '"Notiz"')
    Path("tickets.jsonl").write_text("\n".join(lines), encoding="utf-8")
    code, said = run("init", "--data", "tick*.jsonl", "--model", "tiny")
    assert code == 0, said
    assert load_recipe("tick.yaml").data.ignore == ("nr", "Laune", "Notiz")


def test_a_terminal_is_asked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("two.jsonl", [])
    pairs = [{"en": row["output"], "no": row["output"][::-1]} for row in rows()[:60]]
    Path("two.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    monkeypatch.setattr("instructft.commands.asking.in_terminal", lambda: True)
    result = CliRunner().invoke(app, ["init"], input="two.jsonl\ntiny\nfull\nasked.yaml\n2\n1\n")
    assert result.exit_code == 0, result.output
    recipe = load_recipe("asked.yaml")
    assert recipe.adapter.type == "none"
    assert recipe.data.datasets[0].columns == {"question": "no", "answer": "en"}


def test_the_first_line_waits_for_nothing(here: Path) -> None:
    """What has been imported when it is printed: a clock would measure the machine."""
    code = (
        "import builtins, sys\nfrom instructft import cli\n"
        "show = builtins.print\n"
        "def first(*words, **options):\n"
        "    heavy = [n for n in ('torch', 'numpy', 'datasets', 'transformers', 'pyarrow') if n in sys.modules]\n"
        "    show(words, heavy)\n    sys.stdout.flush()\n    import os\n    os._exit(0)\n"
        "builtins.print = first\n"
        f"sys.argv[1:] = {list(INIT)}\ncli.main()"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100)
    assert ran.stdout == "('reading tickets.jsonl …',) []\n", ran.stderr
