"""What would not come back from the folder of the run is found before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import ModelError
from instructft.training.rehearsal.saves import refuse_what_does_not_come_back
from tests.helpers.rehearsal import trainer_of
from tests.training.rehearsal.test_rehearse import MIXTURE


def ids(trainer: Any) -> list[int]:
    return list(trainer.train_dataset[0]["input_ids"])[:32]


def test_what_training_sets_in_the_configuration_is_taken_back(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(recipe_of(MIXTURE))
    trainer.model.config.output_router_logits = True  # as training sets it
    refuse_what_does_not_come_back(trainer, ids(trainer))
    assert trainer.model.config.output_router_logits is True
    kind = type(trainer.model.config)
    save = kind.save_pretrained

    def forgotten(self: Any, folder: Any) -> None:
        self.output_router_logits = True
        save(self, folder)

    monkeypatch.setattr(kind, "save_pretrained", forgotten)
    with pytest.raises(ModelError, match=r"config\.json.*output_router_logits: found True, expected False"):
        refuse_what_does_not_come_back(trainer, ids(trainer))


def test_a_generation_configuration_that_cannot_be_saved(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of())
    trainer.model.generation_config.early_stopping = True  # without beams
    with pytest.raises(ModelError, match=r"generation_config\.json, as this run would save it.*ValueError"):
        refuse_what_does_not_come_back(trainer, ids(trainer))


def test_a_tokenizer_that_comes_back_as_another_one(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of())
    tokenizer = trainer.processing_class
    save = tokenizer.save_pretrained

    def without_merges(folder: Any) -> Any:
        found = save(folder)
        path = Path(folder) / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["merges"] = content["model"]["merges"][:100]
        path.write_text(json.dumps(content))
        return found

    tokenizer.save_pretrained = without_merges
    try:
        with pytest.raises(ModelError, match=r"the tokenizer, as this run would save it.*the tokens of a text: found"):
            refuse_what_does_not_come_back(trainer, ids(trainer))
    finally:
        del tokenizer.save_pretrained


YOUTU = (
    "{model_type: youtu, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, "
    "intermediate_size: 48, q_lora_rank: 8, kv_lora_rank: 8, qk_rope_head_dim: 8, qk_nope_head_dim: 8, v_head_dim: 16}"
)


def test_a_row_that_loading_sets_to_zero(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of(YOUTU))
    layer = trainer.model.get_input_embeddings()
    layer.padding_idx = None
    refuse_what_does_not_come_back(trainer, ids(trainer))
    layer.padding_idx = 3
    with pytest.raises(ModelError, match=r"pad token in the embeddings.*that of token 3 to zero"):
        refuse_what_does_not_come_back(trainer, ids(trainer))
    layer.weight.requires_grad_(False)
    refuse_what_does_not_come_back(trainer, ids(trainer))


def test_a_row_that_loading_leaves_alone(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of())
    trainer.model.get_input_embeddings().padding_idx = 3
    refuse_what_does_not_come_back(trainer, ids(trainer))
