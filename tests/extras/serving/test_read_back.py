"""How far two models are apart, and a file's ends made those of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instructft.errors import ModelError
from instructft.extras.serving.read_back import Text, compared, settle_tokenizer, texts_of


def test_a_model_beside_itself_and_another(tiny_model: Any) -> None:
    import copy

    import torch

    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.transformer.wte.weight.mul_(3)
    texts = [Text(list(range(20, 40)), list(range(10, 19)))]
    same, own = compared(tiny_model, tiny_model, texts)
    assert (same.kl, same.top1, same.tokens) == (0, 1, 9)
    assert same.perplexity == pytest.approx(own)
    apart, _ = compared(tiny_model, other, texts)
    assert apart.kl > 0.01


def test_places_are_those_before_tokens_that_carry_loss() -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [5], "labels": [5]}]
    assert list(texts_of(rows, 100)) == [Text([5, 6, 7, 8], [1, 2])]
    assert list(texts_of(rows, 3)) == [Text([5, 6, 7], [1])]


def test_the_ends_of_texts_are_those_of_training(tokenizer: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(str(file), "gpt2")
    writer.add_token_list([f"t{i}" for i in range(len(tokenizer))])
    writer.add_eos_token_id(5)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    stop = tokenizer.eos_token_id
    done = settle_tokenizer(file, tokenizer, [9, 9], [stop])
    assert len(done) == 2
    assert "adds no BOS, as in training" in done
    reader = gguf.GGUFReader(str(file))
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == stop
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is False
    assert settle_tokenizer(file, tokenizer, [9, 9], [stop]) == []
    tokenizer.add_tokens(["one more"])
    with pytest.raises(ModelError, match="and the tokenizer has"):
        settle_tokenizer(file, tokenizer, [9, 9], [stop])
