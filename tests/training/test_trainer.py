"""Names that the trainer gives to metrics; what it trains, saves and resumes is tested in whole runs."""

from __future__ import annotations

import pytest

from instructft.training.trainer import _plain


@pytest.mark.parametrize(
    ("name", "plain"),
    [("dolly-15k", "dolly-15k"), ("data/rows.jsonl", "rows"), ("org/set", "set"), ("/a/b.jsonl.gz", "b")],
)
def test_names_of_data_sets_in_metrics(name: str, plain: str) -> None:
    assert _plain(name) == plain
