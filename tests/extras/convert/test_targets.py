"""Padding is cut where it is known to be that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instructft.errors import UsageError
from instructft.extras.convert import convert as module
from tests.helpers.gpt2_kin import SIZES, NanoGPT, args, convert, gap, loaded, shaken


@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_cut_by_the_tokenizer(tmp_path: Path, save: Any, tokenizer: Any, tied: bool) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    tokens = len(tokenizer)
    rows = tokens + 46
    model = shaken(NanoGPT(vocab_size=rows, tied=tied))
    file = save({"model": model.state_dict(), "model_args": args(vocab_size=rows)})
    facts = convert(file, tmp_path / "out", tokenizer=str(tmp_path / "tok"))
    assert facts["vocabulary"]["kept"] == tokens
    assert gap(model, tmp_path / "out", tokens) < 1e-5
    made = loaded(tmp_path / "out")
    assert made.get_output_embeddings().weight.shape == (tokens, 32)
    assert made.config.eos_token_id == made.generation_config.eos_token_id == tokenizer.eos_token_id

    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("What is 2 + 2?").input_ids == tokenizer("What is 2 + 2?").input_ids
    assert again.model_max_length <= SIZES["block_size"]
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.json")]
    assert len(texts) >= 4
    assert [text for text in texts if str(tmp_path) in text] == []

    facts = convert(file, tmp_path / "kept", tokenizer=str(tmp_path / "tok"), keep_padding=True)
    assert facts["vocabulary"] == {"rows": rows, "kept": rows, "cut": None}
    assert gap(model, tmp_path / "kept", rows) < 1e-5


def test_gpt2s_own_padding_is_cut_without_a_tokenizer(
    tmp_path: Path, save: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8}
    model = shaken(NanoGPT(vocab_size=50304, **small))
    file = save({"model": model.state_dict(), "model_args": args(vocab_size=50304, **small)})
    module.convert(file, tmp_path / "out")
    said = capsys.readouterr().out
    assert "47 rows beyond GPT-2's 50257 tokens" in said
    assert "--tokenizer openai-community/gpt2" in said
    made = loaded(tmp_path / "out")
    assert made.get_input_embeddings().weight.shape[0] == made.config.vocab_size == 50257
    assert made.config.eos_token_id == 50256


def test_no_other_vocabulary_is_cut(tmp_path: Path, save: Any) -> None:
    file = save({"model": shaken(NanoGPT()).state_dict(), "model_args": args()})
    assert convert(file, tmp_path / "out")["vocabulary"]["kept"] == 96


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, save: Any, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    file = save({"model": NanoGPT().state_dict(), "model_args": args()})
    with pytest.raises(UsageError, match=f"{len(tokenizer)} tokens and the model 96 embedding rows"):
        convert(file, tmp_path / "out", tokenizer=str(tmp_path / "tok"))
    assert not (tmp_path / "out").exists()
