"""The verdict stands on the card once, in place of an older one, and obeys no text of others."""

from __future__ import annotations

from huggingface_hub import ModelCard

from instructft.report.gate_section import gate_on_card, on_card, tables
from tests.helpers.report import EVIL
from tests.helpers.report import GATE_FOUND as FOUND


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


def test_text_of_others_is_not_obeyed() -> None:
    evil = {**FOUND, "against": EVIL, "reasons": [EVIL]}
    evil["rest"] = {**FOUND["rest"], "suites": {EVIL: FOUND["rest"]["suites"]["facts"]}}
    assert "<script>" not in on_card("# A\n", evil)


def test_one_of_another_version_is_not_on_the_card() -> None:
    assert "## Gate" in gate_on_card(FOUND)
    for other in (None, {}, {"passed": True}, {**FOUND, "task": 3}):
        assert gate_on_card(other) == ""
