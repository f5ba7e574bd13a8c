"""Rows of an imported recipe are those of `trl.SFTTrainer`'s own preparation, or the first difference is shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from instructft.check import against_trl
from instructft.cli import app
from instructft.recipe.load import load_recipe
from instructft.recipe.peers.imported import read
from tests.helpers.quickstart import rows

ASSETS = Path(__file__).parents[1] / "assets" / "peers"
MARKED = (  # a template that TRL can mask by itself, and what stands behind the token that ends an answer
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}### {{ m['content'] }}\n{% endif %}{% endfor %}"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Path:
    """A folder with a tokenizer, its configurations, and 220 rows in each shape."""
    monkeypatch.chdir(tmp_path)
    for path in ASSETS.glob("trl-*"):
        shutil.copy(path, path.name)
    keep(tokenizer, MARKED)
    shapes: dict[str, list[dict[str, Any]]] = {"messages": [], "pairs": [], "turns": [], "texts": []}
    for row in rows()[:220]:
        asked, said = f"{row['instruction']} {row['input']}".strip(), row["output"]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        shapes["messages"].append({"messages": [*turns, {"role": "user", "content": "Thanks."}, turns[1]]})
        shapes["pairs"].append({"prompt": f"Q: {asked}\nA:", "completion": f" {said}"})
        shapes["turns"].append({"prompt": turns[:1], "completion": turns[1:]})
        shapes["texts"].append({"body": f"{asked}\n{said}"})
    for name, found in shapes.items():
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    return tmp_path


def keep(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    tokenizer.save_pretrained("tiny")


def compared(name: str, *more: str) -> tuple[bool, str]:
    path = Path(name)
    path.write_text("\n".join([path.read_text(encoding="utf-8") if path.exists() else "", *more]), encoding="utf-8")
    found = read(path, "r")
    assert found.problems == []
    found.write(Path("r.yaml"))
    equal, lines = against_trl.compare(load_recipe("r.yaml"), found.values)
    return equal, "\n".join(lines)


CASES: dict[str, tuple[str, list[str]]] = {
    "messages, everything": ("trl-messages.yaml", []),  # rows longer than 100 tokens are cut
    "messages, answers": ("trl-messages.yaml", ["assistant_only_loss: true"]),
    "plain pairs": ("trl-pairs.yaml", []),
    "plain pairs, everything": ("trl-pairs.yaml", ["completion_only_loss: false"]),
    "turns": ("trl-assistant.yaml", []),
    "texts": (
        "texts.yaml",
        ["model_name_or_path: tiny", "datasets: [{path: texts.jsonl}]", "dataset_text_field: body", "max_length: 128"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_and_labels_of_200_rows_are_those_of_trl(here: Path, case: str) -> None:
    equal, said = compared(CASES[case][0], *CASES[case][1])
    assert equal, said
    assert said.startswith("ids and labels of the first 200 rows are those of trl.SFTTrainer")


def test_what_follows_an_answer_is_told(here: Path, tokenizer: Any) -> None:
    keep(tokenizer, MARKED.replace("{% endgeneration %}", "\n{% endgeneration %}"))
    equal, said = compared("trl-assistant.yaml")
    assert equal
    assert "but for what follows the token that ends an answer, '\\n' in 200 rows" in said


@pytest.mark.parametrize("spoiled", ["ids", "labels"])
def test_a_difference_is_shown(here: Path, spoiled: str) -> None:
    found = read(Path("trl-messages.yaml"), "r")
    found.write(Path("r.yaml"))
    text = Path("r.yaml").read_text(encoding="utf-8")
    wrong = ("template: tokenizer", "template: instruction") if spoiled == "ids" else ("everything", "responses")
    Path("r.yaml").write_text(text.replace(*wrong), encoding="utf-8")
    equal, lines = against_trl.compare(load_recipe("r.yaml"), found.values, count=20)
    assert not equal
    assert lines[0] == "20 of the first 20 rows are not those of trl.SFTTrainer. The first of them, 1:"
    assert lines[1].startswith(f"  the {'token' if spoiled == 'ids' else 'label'} at place ")
    assert [line.split()[0] for line in lines[2:]] == ["here", "TRL"]


def test_the_command_compares_where_all_is_here_and_says_why_not(here: Path, tokenizer: Any) -> None:
    result = CliRunner().invoke(app, ["import", "trl-pairs.yaml", "new/mine.yaml"])
    assert result.exit_code == 0
    assert "ids and labels of the first 200 rows are those of trl.SFTTrainer" in result.stdout
    keep(tokenizer, MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    with Path("trl-messages.yaml").open("a", encoding="utf-8") as file:
        file.write("assistant_only_loss: true\n")
    result = CliRunner().invoke(app, ["import", "trl-messages.yaml", "new/other.yaml"])
    assert (result.exit_code, "not compared: TRL does not read these rows" in result.stdout) == (0, True)
    result = CliRunner().invoke(app, ["import", "trl-messages.yaml", "new/third.yaml", "--prove"])
    assert result.exit_code == 1
