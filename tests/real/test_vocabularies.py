"""The fast tokenizer is the library's on real texts, and stands aside where it is not proved for a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GPT2

# Why a vocabulary stays with the tokenizers library; None: it is encoded the fast way.
UNPROVED = {
    "gpt2": None,
    "smollm2": "a byte without a token",
    "qwen2.5": "two merges make one token",
    "llama-3": "no plain BPE",
    "deepseek-v3": "another way to cut words",
}


@pytest.mark.parametrize("name", UNPROVED)
def test_fast_tokens_are_the_librarys_on_5000_texts(name: str, real: Path, smollm: Path, rows: Any, note: Any) -> None:
    from tokenizers import Tokenizer

    from instructft.prompt.fast_bpe import FastBPE, _Unproved, fast_bpe

    named = {"gpt2": GPT2 / "tokenizer.json", "smollm2": smollm / "tokenizer.json"}
    core = Tokenizer.from_file(str(named.get(name, real / "vocabularies" / f"{name}.json")))
    fast, why = fast_bpe(core), UNPROVED[name]
    if why is not None:
        with pytest.raises(_Unproved, match=why):
            FastBPE(core, core.to_str())
        assert fast is None
        note("fast tokenization", name, f"the library's own is used: {why}")
        return
    assert fast is not None
    said = [text for row in rows for text in row.values() if text]
    texts = [*said, *(a + b for a, b in zip(said, said[7:], strict=False)), *(f" {t}\n\n" for t in said)]
    texts += [f"{a}\t{b}" for a in said[:100] for b in said[100:140]]
    texts = texts[:5000]
    ids, lengths = fast.encode(texts)
    expected = [encoded.ids for encoded in core.encode_batch_fast(texts, add_special_tokens=False)]
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [i for row in expected for i in row]
    note("fast tokenization", f"{name}, {len(texts):,} texts", "equal")
