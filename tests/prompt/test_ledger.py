"""The account of a row: what is empty, harmless or ignored, and what is not."""

from __future__ import annotations

import math

import pytest

from instructft.prompt.ledger import Ledger, Unread, Unusable, absent


def test_null_nan_and_nothing_are_absent_and_false_and_zero_are_not():
    assert all(map(absent, (None, math.nan, "", " \n", [], {})))
    assert not any(map(absent, (False, 0, "x", [None])))


def test_fields_are_known_harmless_ignored_or_found():
    ledger = Ledger(frozenset({"mood", "user.train"}))
    fields = {"messages": [1], "id": 1, "prompt_id": 2, "num_tokens": 3, "mood": "x", "empty": None, "image_url": "u"}
    ledger.rest(fields, {"messages"}, "column `{}`")
    ledger.rest({"train": True}, (), "key `{}`", "user")
    ledger.rest({"train": True}, (), "key `{}`", "assistant")
    assert [finding.what for finding in ledger.found] == ["column `image_url`", "key `train`"]
    with pytest.raises(Unread, match="image_url"):
        ledger.close()


def test_half_a_character_is_no_text():
    with pytest.raises(Unusable, match="U\\+D83D"):
        Ledger().text("half \ud83d", "output")
