"""Rows leave a batch and join it, and every answer is as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from instructft.inference import continuous_batching
from instructft.inference.continuous_batching import Batch, Row
from instructft.inference.generator import Generator
from instructft.prompt.loss_mask import encode_prompt
from tests.helpers.inference import (
    ask,
    sharpen,
)


def test_rows_leave_and_join(tiny_model: Any, llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty prompts through a batch of eight: rows come and go, and each answer is that of one alone."""
    for model in (tiny_model, llama):
        sharpen(model)
        with torch.no_grad():  # answers end at random places
            head = model.get_output_embeddings().weight
            head[tokenizer.eos_token_id] *= 3
        generator = Generator(model, tokenizer)
        asked = [ask("7" * (i * 7 % 60) + f" {i}?") for i in range(60)]
        alone = [generator.answers([one], 24)[0] for one in asked]
        joined: list[int] = []
        original = Batch.join
        monkeypatch.setattr(
            Batch,
            "join",
            lambda self, rows, o=original, joined=joined: (joined.append(len(self.rows)), o(self, rows))[1],
        )
        assert generator.answers(asked, 24, batch_size=8) == alone
        monkeypatch.setattr(Batch, "join", original)
        assert sum(n > 0 for n in joined) > 5  # most joined others that were on their way
        assert {a.finish_reason for a in alone} == {"stop", "length"}


def test_a_cache_that_cannot_be_cut_is_left_alone(tokenizer: Any) -> None:
    """A window in the cache: its columns are no tokens' own, so a batch waits for its longest answer."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=16, **shape)
    model = sharpen(MistralForCausalLM(config).eval())
    generator = Generator(model, tokenizer)
    batch = Batch(generator, 0.0, 1.0)
    batch.join([Row(0, encode_prompt(ask("Hi"), tokenizer), 4)])
    assert not batch.rolls
    asked = [ask("7" * (i * 5 % 40)) for i in range(1, 10)]
    assert generator.answers(asked, 12, batch_size=4) == [generator.answers([one], 12)[0] for one in asked]


def test_it_is_read_once_in_eight_tokens_which_rows_have_ended(
    tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharpen(tiny_model)
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 3
    generator = Generator(tiny_model, tokenizer)
    asked = [ask("7" * (i * 7 % 60) + f" {i}?") for i in range(30)]
    found, counts, read = [], [], torch.Tensor.__int__
    for every in (1, 8):
        reads: list[int] = []
        monkeypatch.setattr(continuous_batching, "READ_EVERY", {"cpu": every})
        monkeypatch.setattr(torch.Tensor, "__int__", lambda self, reads=reads: (reads.append(1), read(self))[1])
        found.append(generator.answers(asked, 24, batch_size=8))
        counts.append(len(reads))
    assert found[0] == found[1]
    assert 0 < counts[1] <= counts[0] / 4


@pytest.mark.parametrize("kind", ["openai-gpt", "roberta"])
def test_answers_are_those_of_the_models_own_forward(kind: str, tokenizer: Any) -> None:
    """One has no cache; the other counts positions from its pad token, where `generate` would count them from 0."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, RobertaConfig, RobertaForCausalLM

    torch.manual_seed(3)
    size, end = len(tokenizer), tokenizer.eos_token_id
    if kind == "roberta":
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model: Any = RobertaForCausalLM(RobertaConfig(vocab_size=size, is_decoder=True, pad_token_id=end, **shape))
    else:
        model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=128))
    sharpen(model.eval())
    generator = Generator(model, tokenizer)
    rows = [Row(i, encode_prompt(ask("7" * (9 * i) + "?"), tokenizer), 6) for i in range(3)]
    generator.complete(rows, batch_size=3)
    for row in rows:
        ids = list(row.prompt)
        for _ in row.made:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert row.made == ids[len(row.prompt) :]
