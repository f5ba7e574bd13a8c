"""Turns of a conversation, and a tokenizer with a built-in template."""

from __future__ import annotations

from typing import Any

from instructft.prompt.templates import TEMPLATES


def user(content: str, **extra: str) -> dict[str, str]:
    return {"role": "user", "content": content, **extra}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def with_template(tokenizer: Any, name: str) -> Any:
    from tokenizers import AddedToken

    template = TEMPLATES[name]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in template.tokens])
    if template.stop:
        tokenizer.eos_token = template.stop
    tokenizer.chat_template = template.text()
    return tokenizer
