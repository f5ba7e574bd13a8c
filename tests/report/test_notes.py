"""What a reader should know first: notes of a run."""

from __future__ import annotations

from instructft.report import page as sections
from tests.helpers.report import facts_of


def test_a_validation_loss_that_rose_is_told() -> None:
    rose = [{"step": s, "eval_loss": loss} for s, loss in ((10, 2.0), (20, 1.0), (30, 1.4))]
    assert "lowest at step 20 (1.0000) and rose to 1.4000" in " ".join(sections.notes(facts_of(), rose))
    assert sections.notes(facts_of(), rose[:2]) == []


def test_what_is_bad_comes_first() -> None:
    facts = facts_of(
        warnings=[{"step": 9, "kind": "diverged", "text": "the run has diverged"}],
        metrics={"start_loss": 2.0, "eval_loss": 2.5},
        data__dropped={"empty_answer": 95},
    )
    said = sections.notes(facts, [])
    assert said[0] == "Step 9: the run has diverged."
    assert said[1] == "Nothing was learned: the validation loss is 2.5000 at the end, and was 2.0000 before step 1."
    assert said[2] == "44% of the rows were dropped: 95 empty answer."
    assert sections.left_out(facts_of(data__cut={"rows": 24, "tokens": 99})["data"]) == {
        "dropped": 7 / 127,
        "cut": 24 / 96,
    }
