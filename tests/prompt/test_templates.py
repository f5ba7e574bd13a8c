"""The built-in templates, letter by letter."""

from __future__ import annotations

from typing import Any

from instructft.prompt.loss_mask import render
from tests.helpers.conversations import assistant, user, with_template


def test_exact_strings(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "instruction")
    eos = tokenizer.eos_token
    one = [user("Say hi."), assistant("Hi.")]
    assert render(one, tokenizer) == f"### Instruction:\nSay hi.\n\n### Response:\nHi.{eos}"
    dolly = [user("Who?", context="Ada wrote it."), assistant("Ada.")]
    assert render(dolly, tokenizer) == (
        f"### Instruction:\nWho?\n\n### Context:\nAda wrote it.\n\n### Response:\nAda.{eos}"
    )
    alpaca = [user("Add.", input="1 2"), assistant("3")]
    assert render(alpaca, tokenizer) == f"### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3{eos}"
