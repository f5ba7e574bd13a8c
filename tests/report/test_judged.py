"""What `evaluate` and `gate` find joins the page of a run that has ended; what is there already stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.evaluation.compare import write_json
from instructft.report.judged import join_report, show_gate
from instructft.report.page import write_report
from tests.conftest import TINY
from tests.helpers.report import EVIL, GATE_FOUND, LINES, Read, facts_of, fill

pytestmark = pytest.mark.drawn
SIDE = {"loss": 1.0, "exact_match": 0.5, "rows": [{"prompt": EVIL, "prediction": "P", "reference": "R"}]}
GATE = {**GATE_FOUND, "against": EVIL}


@pytest.fixture
def run(write_recipe: Any, tmp_path: Path) -> Path:
    recipe = instructft.load_recipe(write_recipe(TINY))
    # a model may say what marks our parts
    folder = fill(
        tmp_path / "run", LINES[-1:], [(0, "Hi", "<!-- judged --><!-- /verdict -->"), (40, "Hi", "Hello to you")]
    )
    write_report(folder, recipe, facts_of())
    return folder


def test_an_evaluation_and_a_gate_join_the_page(run: Path) -> None:
    page = run / "report.html"
    before = Read(page.read_text(encoding="utf-8"))
    assert "Evaluation" not in before.text
    write_json(run / "evaluation.json", {"tuned": SIDE, "base": SIDE})
    (run / "gate.json").write_text(json.dumps(GATE), encoding="utf-8")
    assert join_report(run)
    text = page.read_text(encoding="utf-8")
    read = Read(text)
    said = " ".join(read.text.split())
    for part in ("Evaluation 1 rows", "50.0%", "The gate not passed, against", "-15.0% to -5.0%", "Hello to you"):
        assert part in said
    assert not set(text) & set("\x1b\u202e")
    assert not {"script", "img"} & set(read.tags)
    assert said.index("The gate is not passed: the rest is down: -10.0%.") < said.index("Validation loss")
    assert read.tags.count("svg") == before.tags.count("svg")
    (run / "gate.json").write_text(json.dumps({**GATE, "passed": True, "verdict": "passed"}), encoding="utf-8")
    assert join_report(run)  # again: what was there is replaced
    again = Read(page.read_text(encoding="utf-8")).text
    assert "not passed" not in again
    assert again.count("Evaluation") == 1


DAMAGE = ["", "[]", '{"passed": 1}', '{"passed": true, "suites": [1, {"low": "x"}], "rows": "y"}']


@pytest.mark.parametrize("text", DAMAGE)
def test_files_that_are_damaged_leave_a_page(run: Path, text: str) -> None:
    for name in ("gate.json", "evaluation.json"):
        (run / name).write_text(text, encoding="utf-8")
    assert join_report(run)
    Read((run / "report.html").read_text(encoding="utf-8"))


def test_a_page_of_another_version_stays_as_it_is(tmp_path: Path) -> None:
    assert not join_report(tmp_path)
    (tmp_path / "report.html").write_text("<p>mine</p>", encoding="utf-8")
    assert not join_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "<p>mine</p>"


def test_a_gate_stands_on_card_and_page_and_what_cannot_be_written_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gate.json").write_text(json.dumps(GATE), encoding="utf-8")
    show_gate(tmp_path)  # neither is there
    assert not (tmp_path / "README.md").exists()
    (run / "gate.json").write_text(json.dumps(GATE), encoding="utf-8")
    (run / "README.md").write_text("# Mine\n", encoding="utf-8")
    show_gate(run)
    assert "## Gate" in (run / "README.md").read_text(encoding="utf-8")
    assert "The gate is not passed" in (run / "report.html").read_text(encoding="utf-8")
    (run / "README.md").write_bytes(b"\xff\xfe")
    show_gate(run)
    assert "README.md does not show the gate" in capsys.readouterr().err
