"""The README: short, its tree against the disk, its recipe for real on a file of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

import instructft
from instructft.cli import app
from tests.helpers.markdown import Page, code
from tests.helpers.quickstart import rows as quickstart_rows

ROOT = Path(__file__).resolve().parents[2]
README = Page(ROOT / "README.md")


def test_it_is_read_in_five_minutes() -> None:
    assert len(README.text.splitlines()) <= 150


def test_the_tree_lists_the_folders_that_are_there() -> None:
    tree = README.block_with("instructft/     ").splitlines()
    inner = {line.split()[0].rstrip("/") for line in tree if line.startswith("  ")}
    outer = {line.split()[0].rstrip("/") for line in tree if not line.startswith("  ")}
    package = ROOT / "instructft"
    assert inner == {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    ours = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert outer == ours - {"runs", "site", "build", "dist"}  # which git ignores
    assert all(len(line.split()) > 2 for line in tree)


def test_every_command_has_its_place() -> None:
    listed = [name for cell in README.table("command") for name in code(cell)]
    assert sorted(listed) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_figures_of_the_quickstart() -> None:
    assert f"{len(quickstart_rows()):,} rows" in README.text.replace("\n", " ")


def own_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's recipe beside a file of rows, in the current directory."""
    (text,) = README.blocks("yaml")
    assert len(text.splitlines()) == 5
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    rows = json.loads((ROOT / "tests" / "assets" / "rows.json").read_text(encoding="utf-8"))
    lines = [json.dumps({"instruction": row["instruction"], "output": row["output"]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)


def test_the_recipe_runs_offline_on_a_file_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands under it, in order; two steps are enough to see that rows are read, trained and saved."""
    own_recipe(tmp_path, monkeypatch)
    said = README.block_with("instructft train mine.yaml")
    assert [line.split()[1] for line in said.splitlines()] == ["check", "train", "chat"]
    result = instructft.train(instructft.load_recipe("mine.yaml", ["train.max_steps=2", "train.logging_steps=1"]))
    assert result.output_dir == Path("runs/mine")
    facts: dict[str, Any] = json.loads(Path("runs/mine/run.json").read_text(encoding="utf-8"))
    assert facts["data"]["rows"]["train"] >= 40
    assert isinstance(instructft.Chat("runs/mine", max_new_tokens=4).send("Hello"), str)
