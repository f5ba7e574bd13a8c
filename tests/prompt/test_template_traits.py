"""What a template reads is found by asking it."""

from __future__ import annotations

from typing import Any

import pytest

from instructft.prompt.loss_mask import encoder
from instructft.prompt.template_traits import split_thought, with_thought
from tests.helpers.conversations import with_template


def test_a_thought_comes_apart_and_together() -> None:
    assert split_thought(with_thought("easy", "2")) == ("easy", "2")
    assert split_thought("no thought <think>") == ("", "no thought <think>")


@pytest.mark.parametrize(("shown", "wanted"), [("arguments | tojson", "object"), ("arguments + ''", "text")])
def test_arguments_as_the_template_wants_them(bare_tokenizer: Any, shown: str, wanted: str) -> None:
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ m.content }}{%- for c in m.tool_calls or [] -%}{{ c.function.name }}"
        "{{ c.function." + shown + " }}{%- endfor -%}{{ eos_token }}{%- endfor -%}"
    )
    traits = encoder(tokenizer).renderer.traits
    assert traits.arguments == wanted
    given = {"city": "Oslo"} if wanted == "text" else '{"city": "Oslo"}'
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    made = traits.normal(call)["tool_calls"][0]["function"]["arguments"]
    assert made == ('{"city": "Oslo"}' if wanted == "text" else {"city": "Oslo"})


def test_whether_tools_are_listed(bare_tokenizer: Any) -> None:
    assert encoder(with_template(bare_tokenizer(), "chatml")).renderer.traits.shows_tools
    assert not encoder(with_template(bare_tokenizer(), "instruction")).renderer.traits.shows_tools


def test_developer_is_system_where_it_is_not_known(bare_tokenizer: Any) -> None:
    assert encoder(with_template(bare_tokenizer(), "chatml")).renderer.traits.knows_developer
    assert not encoder(with_template(bare_tokenizer(), "instruction")).renderer.traits.knows_developer
