"""Text by a chat template: the short way gives what upstream gives, and what cannot be rendered says why."""

from __future__ import annotations

from typing import Any

import pytest

from instructft.errors import TemplateError
from instructft.prompt.loss_mask import Encoder, encode_conversation, render
from instructft.prompt.render import MANY, Renderer, _Here
from instructft.prompt.templates import TEMPLATES
from tests.helpers.conversations import assistant, user, with_template


@pytest.mark.parametrize("template", TEMPLATES)
def test_many_conversations_are_rendered_as_few_are(bare_tokenizer: Any, template: str) -> None:
    """The short way to the compiled template gives upstream's text, or is not taken."""
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = TEMPLATES[template].text()
    if template == "chatml":
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    encoder = Encoder(tokenizer)
    rows = [
        [{"role": "user", "content": f" {i} <b>", "input": "x" * (i % 3)}, {"role": "assistant", "content": f" a{i}\n"}]
        for i in range(MANY)
    ]
    assert encoder.renderer._here._compiled is not None
    for asks in (True, False):
        assert encoder.render(rows, asks) == [encoder.render([row], asks)[0] for row in rows]


def test_what_a_template_sets_is_gone_before_the_next_conversation(bare_tokenizer: Any) -> None:
    """Texts of a batch share what templates may call, and nothing of each other."""
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = (
        "{{ 'Again. ' if seen is defined else '' }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}"
        "{% endfor %}{% set seen = messages[0]['content'] %}"
    )
    renderer = Renderer(tokenizer)
    assert renderer._here._compiled is not None
    texts = renderer.texts([[user(f"Q{i}"), assistant("A")] for i in range(MANY)])
    eos = tokenizer.eos_token
    assert texts == [f"Q{i}{eos}A{eos}" for i in range(MANY)]


def test_another_text_by_the_short_way_is_not_taken(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(tokenizer)
    monkeypatch.setattr(_Here, "_direct", lambda *_: ["another text"])
    assert renderer._here._compiled is None


def test_a_tokenizer_without_template_says_what_to_do(bare_tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match=r"data\.template"):
        encode_conversation([user("a"), assistant("b")], bare_tokenizer())


def test_a_template_that_refuses_the_messages(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "instruction")
    with pytest.raises(TemplateError, match="not tool"):
        render([user("a"), {"role": "tool", "content": "b"}], tokenizer)
