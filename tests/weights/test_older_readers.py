"""A saved model says what transformers 4 looks for, and is the same model to transformers 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from instructft.weights.older_readers import add_older_names, for_older_readers


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}]
)
def test_a_base_of_rotary_positions_stands_where_every_version_reads_it(rope: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes, rope_parameters={**rope, "rope_theta": 500000.0}))
    model.save_pretrained(tmp_path)
    for_older_readers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config.get("rope_scaling") == (None if rope["rope_type"] == "default" else rope)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters
    ids = torch.arange(5, 45)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_tokenizer_of_no_class_of_its_own_has_a_name_that_every_version_knows(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    assert json.loads(path.read_text(encoding="utf-8"))["tokenizer_class"] == "TokenizersBackend"
    for_older_readers(tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert again("Two words, 2.").input_ids == tokenizer("Two words, 2.").input_ids


def test_experts_are_counted_under_both_names_and_what_is_there_stays() -> None:
    config: dict[str, Any] = {"num_local_experts": 4, "text_config": {"num_local_experts": 8, "num_experts": 2}}
    add_older_names(config)
    assert config == {
        "num_local_experts": 4,
        "num_experts": 4,
        "text_config": {"num_local_experts": 8, "num_experts": 2},
    }
