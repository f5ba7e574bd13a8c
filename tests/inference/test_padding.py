"""A model that reads its padding is asked one prompt at a time, and says so once; others are asked in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from instructft.inference.generator import Generator
from instructft.inference.padding import PADDING_TOLERANCE, padding_difference
from tests.helpers.inference import record_calls, said, sharpen

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
KINDS: dict[str, dict[str, Any]] = {
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 128},
    "llama": SIZES,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1,
               "state_size": 8, "chunk_size": 16},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 48, "max_position_embeddings": 128},
    "recurrent_gemma": SIZES | {"lru_width": 32, "intermediate_size": 96, "block_types": ["recurrent", "attention"]},
    "deepseek_v4": SIZES | {"moe_intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16,
                            "o_groups": 2, "o_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
                            "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "sliding_window": 128,
                            "mlp_layer_types": ["moe", "moe"], "layer_types": ["compressed_sparse_attention"] * 2},
    "olmoe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
}  # fmt: skip


def made(kind: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ends, **KINDS[kind])
    model = sharpen(AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.pad_token_id] = 0.0  # as it is until it is trained
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_padding_shows_where_a_model_reads_it(kind: str, tokenizer: Any) -> None:
    """Also where it does not yet: a row of zeros says nothing to RecurrentGemma. DeepSeek V4
    presses four keys into one.
    """
    difference = padding_difference(Generator(made(kind, tokenizer), tokenizer))
    assert (difference > PADDING_TOLERANCE[0]) == (kind in ("rwkv", "recurrent_gemma", "deepseek_v4"))


def test_a_model_that_reads_padding_is_asked_one_at_a_time(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("rwkv", tokenizer)
    generator = Generator(model, tokenizer)
    questions = [said("France"), said("the country that lies between France and Spain, high in the mountains")]
    alone = [generator.answers([question], 5)[0] for question in questions]
    calls = record_calls(model, monkeypatch)
    assert generator.answers(questions, 5, batch_size=2) == alone
    assert generator.answers(questions, 5) == alone
    assert all(call["input_ids"].shape[0] == 1 for call in calls[2:])
    assert capsys.readouterr().err.count("answered one at a time") == 1


def test_a_mixture_answers_while_its_router_is_trained(tokenizer: Any) -> None:
    model = made("olmoe", tokenizer)
    generator = Generator(model, tokenizer)
    questions = [said("France"), said("the country that lies between France and Spain, high in the mountains")]
    alone = [generator.answers([question], 5)[0] for question in questions]
    assert generator.answers(questions, 5, batch_size=2) == alone
    assert model.config.output_router_logits
