"""Models that answer, for the tests of inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from instructft.prompt.loss_mask import encode_conversation
from instructft.prompt.templates import TEMPLATES
from tests.helpers.device import DEVICE
from tests.helpers.inference import (
    CAPITALS,
    said,
)


@pytest.fixture(scope="session")
def trained() -> tuple[Any, Any]:
    """A GPT-2 of 64 positions that knows `CAPITALS` by heart, and its tokenizer."""
    from tests.helpers.quickstart import tokenizer as bundled

    tokenizer = bundled()
    tokenizer.chat_template = TEMPLATES["instruction"].text()
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 96}
    config = GPT2Config(vocab_size=len(tokenizer), **shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = GPT2LMHeadModel(config).to(DEVICE)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [
        encode_conversation([*said(country), {"role": "assistant", "content": city}], tokenizer)
        for country, city in CAPITALS.items()
    ]
    for _ in range(80):
        loss = sum(model(**{k: torch.tensor([v], device=DEVICE) for k, v in row.items()}).loss for row in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model.eval(), tokenizer


@pytest.fixture
def llama(tokenizer: Any) -> Any:
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape)
    return LlamaForCausalLM(config).eval().to(DEVICE)


@pytest.fixture
def folder(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> str:
    """A saved model that answers."""
    import torch

    with torch.no_grad():
        for weight in tiny_model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6)
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")
