"""Ids on both sides of a border are those of inference."""

from __future__ import annotations

from typing import Any

from instructft.prompt.loss_mask import encode_prompt, encode_turns, encoder
from tests.helpers.conversations import assistant, user, with_template


def test_an_answer_that_would_merge_with_its_prompt_stays_apart(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "instruction")
    messages = [user("a"), assistant("\n\n\ncode"), user("b"), assistant("c")]
    rows = encode_turns(messages, tokenizer)
    borders = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in rows]
    for row, border, end in zip(rows, borders, (1, 3), strict=len(rows) == 2):
        assert row["input_ids"][:border] == encode_prompt(messages[:end], tokenizer)
    kept = [token for row in rows for token in row["labels"] if token != -100]
    assert tokenizer.decode(kept) == f"\n\n\ncode{tokenizer.eos_token}c{tokenizer.eos_token}"


def test_spans_that_are_only_read_carry_no_loss(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "instruction")
    answer = {**assistant("one two three"), "train_spans": [(3, 7, False)]}
    (row,) = encode_turns([user("a"), answer], tokenizer)
    assert tokenizer.decode([t for t in row["labels"] if t != -100]) == "one three" + tokenizer.eos_token


def test_a_border_before_white_space_is_never_taken_on_trust(bare_tokenizer: Any) -> None:
    borders = encoder(with_template(bare_tokenizer(), "instruction"))._borders
    assert borders.apart(["### Response:\n", "Paris"])
    assert not borders.apart(["### Response:\n", "\nParis"])
