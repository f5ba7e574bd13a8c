"""Each known cause, by two prompts or two answers that it leaves."""

from __future__ import annotations

from typing import Any

import pytest

from instructft.extras.serving.causes import Place, first_difference, of_answer, of_prompt
from instructft.prompt.conversation import Conversation
from instructft.prompt.templates import TEMPLATES
from tests.helpers.quickstart import tokenizer as bundled

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "W.", "parameters": {}}}
ASKED = Conversation(
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Cold.", "reasoning_content": "It is winter."},
        {"role": "user", "content": " And\n\nnow?"},
    ],
    [TOOL],
)


@pytest.fixture(scope="module")
def chatml() -> Any:
    made = bundled()
    made.chat_template = TEMPLATES["chatml"].text()
    made.add_special_tokens({"additional_special_tokens": list(TEMPLATES["chatml"].tokens)})
    return made


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def text(tokenizer: Any, conversation: Conversation = ASKED, tools: bool = True) -> str:
    given = conversation.tools if tools else None
    found: str = tokenizer.apply_chat_template(
        list(conversation), tools=given, tokenize=False, add_generation_prompt=True
    )
    return found


def cause(tokenizer: Any, theirs: list[int], ours: list[int] | None = None, template: str | None = None) -> str:
    ours = ours if ours is not None else ids(tokenizer, text(tokenizer))
    return of_prompt(ours, theirs, ASKED, tokenizer, template).name


def test_causes_of_another_prompt(chatml: Any) -> None:
    whole = text(chatml)
    right = ids(chatml, whole)
    bos = chatml.bos_token_id
    assert cause(chatml, [bos, *right]) == "BOS that training did not have"
    assert cause(chatml, [bos, bos, *right], [bos, *right]) == "doubled BOS"
    assert cause(chatml, right, [bos, *right]) == "missing BOS"
    assert cause(chatml, ids(chatml, text(chatml, tools=False))) == "tools lost"
    thoughtless = whole.replace("<think>\nIt is winter.\n</think>\n\n", "")
    assert cause(chatml, ids(chatml, thoughtless)) == "stripped thought"
    assert cause(chatml, right, ids(chatml, thoughtless)) == "kept thought"
    assert cause(chatml, ids(chatml, whole.replace(" And\n\nnow?", "And now?"))) == "white space changed"
    assert cause(chatml, ids(chatml, whole.replace("Cold.", ""))) == "message lost"
    assert cause(chatml, [*right[:-1], *right[-2:]]) == "unknown"
    assert cause(chatml, [*right[:-1], *right[-2:]], template="{{ messages }}") == "template not picked up"


def test_special_tokens_as_plain_text_are_the_same_text_cut_otherwise(chatml: Any) -> None:
    plain = bundled()  # does not know the two tokens
    found = ids(plain, text(chatml))
    assert cause(chatml, found) == "cut into other tokens"


def test_ids_of_another_models_tokenizer_are_told_from_a_message_that_is_left_out(chatml: Any) -> None:
    right = ids(chatml, text(chatml))
    assert cause(chatml, [(token * 7 + 11) % len(chatml) for token in right]) == "another vocabulary"


def test_causes_of_another_answer() -> None:
    stop = [7]
    assert first_difference([1, 2], [1, 2]) is None
    over = of_answer([1, 2, 7, 9], Place(2, None, 7), stop, True, "length", "F16")
    assert over
    assert over.name == "stop token removed"
    early = of_answer([1], Place(1, 2, None), stop, True, "stop", "F16")
    assert early
    assert early.name == "other EOS"
    few = of_answer([1, 3], Place(1, 2, 3), stop, True, "stop", "Q4_K_M")
    assert few
    assert few.name == "quantized weights"
    assert of_answer([1, 3], Place(1, 2, 3), stop, True, "stop", "F16") is None
    assert of_answer([1, 3, 4], Place(2, None, 4), stop, False, "length", "F16") is None  # ours was cut off too
