"""The verdict stands on card and report once, in place of an older one, and obeys no text of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import instructft
from instructft.report.gate_section import BEGIN, END, GATE, on_card, on_page, page_section, show_gate, tables
from instructft.report.page import page
from tests.helpers.report import EVIL, LINES, Read, facts_of, fill

FIGURES = {"before": 0.6, "after": 0.5, "difference": -0.1, "interval": [-0.15, -0.05]}
FOUND: dict[str, Any] = {
    "verdict": "not passed",
    "reasons": ["the rest is down: -10.0%"],
    "against": "start",
    "task": {
        "rows": 1200, "metric": "rougeL",
        "loss": {"before": 2.0, "after": 1.5, "difference": -0.5, "interval": [-0.6, -0.4], "state": "up"},
        "rougeL": {"before": 0.3, "after": 0.3, "difference": 0.0, "interval": None, "state": "noise"},
    },
    "rest": {"state": "down", "margin": 0.05, "lost": ["facts"], "questions": 300, **FIGURES,
             "suites": {"facts": {"questions": 100, **FIGURES}, "json": {"questions": 200, **FIGURES}}},
}  # fmt: skip


def test_the_tables() -> None:
    task, rest = tables(FOUND)
    assert task[0][0] == "1,200 held-out rows"
    assert task[1] == [
        ["loss", "2.000", "1.500", "-0.500", "-0.600 to -0.400, up"],
        ["ROUGE-L", "0.300", "0.300", "+0.000", "too few rows, noise"],
    ]
    assert rest[1][0] == ["facts", "100", "60.0%", "50.0%", "-10.0%", "-15.0% to -5.0%, down"]
    assert [row[0] for row in rest[1]] == ["facts", "json", "all"]
    few = {**FOUND, "rest": {"state": "too few", "margin": 0.05, "lost": [], "questions": 0, "suites": {}}}
    assert len(tables(few)) == 1


def test_the_card_shows_the_last_gate_alone() -> None:
    text = "---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n\n## Use\n\nhow\n\n## Recipe\n"
    once = on_card(text, FOUND)
    assert on_card(once, FOUND) == once
    assert on_card(once, {**FOUND, "verdict": "passed"}).count("## Gate") == 1
    assert "**Passed**" in on_card(once, {**FOUND, "verdict": "passed"})
    for kept in ("My own words.", "## Use\n\nhow", "## Recipe"):
        assert kept in once
    assert ModelCard(once).data.license == "mit"
    assert "## Gate" in on_card("# Bare\n", FOUND)


def test_the_report_of_a_run_has_a_place_for_it(write_recipe: Any, tmp_path: Path) -> None:
    text = page(fill(tmp_path / "run", LINES, []), instructft.load_recipe(write_recipe()), facts_of())
    assert text.count(BEGIN) == text.count(END) == 1
    once = on_page(text, FOUND)
    assert on_page(once, FOUND) == once
    read = Read(once)
    assert "not passed, against start" in read.text
    assert "-15.0% to -5.0%" in read.text
    assert once.replace(page_section(FOUND), "") == text
    assert on_page("<main>old</main>", FOUND) == "<main>old</main>"


def test_text_of_others_is_shown_and_not_obeyed() -> None:
    evil = {**FOUND, "against": EVIL, "reasons": [EVIL]}
    evil["rest"] = {**FOUND["rest"], "suites": {EVIL: FOUND["rest"]["suites"]["facts"]}}
    read = Read(f"<div>{page_section(evil)}</div>")
    assert not {"script", "img", "a"} & set(read.tags)
    assert read.links == []
    assert "<script>" not in on_card("# A\n", evil)


def test_both_are_written_and_what_cannot_be_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / GATE).write_text(json.dumps(FOUND), encoding="utf-8")
    show_gate(tmp_path)  # neither is there
    assert [path.name for path in tmp_path.iterdir()] == [GATE]
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    (tmp_path / "report.html").write_text(BEGIN + END, encoding="utf-8")
    show_gate(tmp_path)
    assert "README.md does not show the gate" in capsys.readouterr().err
    assert "<h2>Gate" in (tmp_path / "report.html").read_text(encoding="utf-8")
