"""Dialogues in one text and in trees: what is one is read whole, what only looks like one stays a text."""

from __future__ import annotations

import doctest
import json

import pytest

from instructft.prompt.layouts import transcripts
from instructft.prompt.layouts.transcripts import best_path, glaive, human_assistant, rendered
from instructft.prompt.ledger import Ledger, Unusable


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(transcripts).failed == 0


PAIR = [("user", "Hi"), ("assistant", "Hello.")]


def turns(found: list[dict[str, str]] | None) -> list[tuple[str, str]] | None:
    return found and [(message["role"], message["content"]) for message in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("### User:\nHi\n\n### Assistant:\nHello.\n", PAIR),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>", PAIR),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.", PAIR),
        ("<s> [INST] Hi [/INST] Hello.</s>", PAIR),
        ("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello.", [("system", "Be brief."), *PAIR]),
        ("A text on ### Human: and ### Assistant: markers", None),
        ("One writes <|im_start|>user\nHi<|im_end|> so.", None),
        ("Put [INST] Hi [/INST] there.", None),
        ("### Human: Hi", None),
        ("", None),
    ],
)
def test_a_text_is_a_dialogue_where_all_of_it_is_one(text: str, expected: list[tuple[str, str]] | None) -> None:
    assert turns(rendered(text, "text", Ledger())) == expected


def test_hh_begins_with_a_speaker() -> None:
    assert human_assistant("He said: \n\nHuman: Hi\n\nAssistant: Hello.", "chosen", Ledger()) is None


def test_a_call_of_glaive_is_read_though_its_arguments_stand_in_quotes() -> None:
    chat = (
        'USER: Hi\n\n\nASSISTANT: I look. <functioncall> {"name": "f", "arguments": \'{"a": "it\'s"}\'} <|endoftext|>'
    )
    found = glaive("SYSTEM: Be brief.", chat, "chat", Ledger())
    assert found[2]["content"] == "I look."
    assert found[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": "it's"}}
    with pytest.raises(Unusable, match="expected USER"):
        glaive("", "Hi there", "chat", Ledger())


def test_what_a_tree_says_besides_words_and_ranks_is_not_thrown_away() -> None:
    ledger = Ledger()
    best_path({"text": "Hi", "role": "prompter", "image": "x.png", "replies": []}, "prompt", ledger)
    assert [finding.what for finding in ledger.found] == ["key `image` of a message in `prompt`"]
    with pytest.raises(Unusable, match="expected a message with its replies"):
        best_path(json.loads("[1]"), "prompt", Ledger())
