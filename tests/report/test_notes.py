"""What a reader should know first: notes of a run."""

from __future__ import annotations

from instructft.report import page as sections
from tests.helpers.report import facts_of


def test_a_validation_loss_that_rose_is_told() -> None:
    rose = [{"step": s, "eval_loss": loss} for s, loss in ((10, 2.0), (20, 1.0), (30, 1.4))]
    assert "lowest at step 20 (1.0000) and rose to 1.4000" in " ".join(sections.notes(facts_of(), rose))
    assert sections.notes(facts_of(), rose[:2]) == []
