"""What the shell completes: names that are there, cheaply, and nothing that a file name could run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from instructft.commands.options import page_names, recipe_names, run_names

COMPLETE = """
import sys
from instructft.cli import app
try:
    app(prog_name="instructft")
finally:
    print({"torch", "transformers", "ruamel", "numpy", "datasets"} & set(sys.modules), file=sys.stderr)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "runs/one/run.json",
        "runs/other/instructft.json",
        "mine.yaml",
        "notes.md",
        "sub/a.yml",
        ".hidden.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "runs" / "no-run").mkdir()
    return tmp_path


def test_recipes_are_shipped_ones_and_files(here: Path) -> None:
    assert recipe_names("quick") == ["quickstart"]
    assert recipe_names("m") == ["mistral-7b-qlora", "mine.yaml"]
    assert recipe_names("sub/") == ["sub/a.yml"]
    assert recipe_names("./s") == ["./sub/"]
    assert ".hidden.yaml" not in recipe_names("")
    assert recipe_names("nowhere/") == []


def test_models_are_runs_and_the_way_to_others(here: Path) -> None:
    assert run_names("") == ["runs/one", "runs/other", "runs/", "sub/"]
    assert run_names("runs/o") == ["runs/one", "runs/other"]
    assert run_names("runs/n") == ["runs/no-run/"]


def test_pages() -> None:
    assert "resume" in page_names("re")


def test_the_shell_asks_and_no_library_is_loaded(here: Path) -> None:
    def completed(typed: str) -> tuple[list[str], str]:
        words = {"_INSTRUCTFT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", COMPLETE], env={**os.environ, **words}, capture_output=True, text=True, check=False
        )
        return done.stdout.split("\n")[:-1], done.stderr

    assert completed("instructft train qui") == (["quickstart"], "set()\n")
    assert completed("instructft chat runs/o") == (["runs/one", "runs/other"], "set()\n")
    assert "doctor" in completed("instructft do")[0]
