"""What counts as the same text, as one word, and as a marker of the template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructft.check.text_checks import markers, normal, one_word
from instructft.prompt.templates import TEMPLATES


@given(st.text(), st.text(alphabet=" \t\n.,;!?\"'()[]"))
def test_case_space_and_punctuation_do_not_count(text: str, noise: str) -> None:
    letters = "".join(c for c in text if c.isascii() and c.isalpha())
    assert normal(noise + letters.upper() + noise) == normal(letters.lower()) or not letters


@pytest.mark.parametrize(
    ("one", "other"),
    [("3.5", "35"), ("1 + 1", "1 - 1"), ("a < b", "a > b"), ("कि", "का"), ("5%", "5"), ("12:30", "1230"), ("!", "?")],
)
def test_what_carries_meaning_counts(one: str, other: str) -> None:
    assert normal(one) != normal(other)


def test_one_word() -> None:
    assert [one_word(text) for text in ("42", "Yes!", "well-known", "two words", "東京", "東京は首都です")] == [
        True, True, True, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "hits", "misses"),
    [
        ("instruction", ["### Response:", "x\n### Instruction:", "<|endoftext|>"], ["see ### Response:", "Response:"]),
        ("alpaca", ["### Response:", "a\n  ### Input:"], ["Input: 5"]),
        ("human-assistant", ["Human:", "a\nAssistant: b"], ["The human: a species", "so Assistant: no"]),
        ("chatml", ["<|im_start|>", "a <|im_end|> b"], ["user", "assistant", "system"]),
    ],
)
def test_markers_come_from_the_template(tokenizer: Any, template: str, hits: list[str], misses: list[str]) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[template].tokens)})
    if TEMPLATES[template].stop:
        tokenizer.eos_token = TEMPLATES[template].stop
    tokenizer.chat_template = TEMPLATES[template].text()
    pattern = markers(tokenizer)
    assert [bool(pattern.search(text)) for text in hits] == [True] * len(hits)
    assert [text for text in misses if pattern.search(text)] == []


def test_a_template_of_ones_own(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% elif m.role == 'user' %}[ASK] {{ m.content }} [/ASK]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    pattern = markers(tokenizer)
    assert pattern.search("he said [/ASK] twice")
    assert not pattern.search("ASK me")
