"""The fast tokenizer is the library's on real vocabularies and real texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "llama-3", "deepseek-v3"])
def test_fast_tokens_are_the_librarys_on_5000_texts(name: str, real: Path, smollm: Path, rows: Any, note: Any) -> None:
    from tokenizers import Tokenizer

    from instructft.prompt.fast_bpe import fast_bpe

    path = smollm / "tokenizer.json" if name == "smollm2" else real / "vocabularies" / f"{name}.json"
    core = Tokenizer.from_file(str(path))
    fast = fast_bpe(core)
    if fast is None:
        note("fast tokenization", name, "not proved for its pattern: the library's own is used")
        return
    said = [text for row in rows for text in row.values() if text]
    texts = [*said, *(a + b for a, b in zip(said, said[7:], strict=False)), *(f" {t}\n\n" for t in said)]
    texts += [f"{a}\t{b}" for a in said[:100] for b in said[100:140]]
    texts = texts[:5000]
    ids, lengths = fast.encode(texts)
    expected = [encoded.ids for encoded in core.encode_batch_fast(texts, add_special_tokens=False)]
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [i for row in expected for i in row]
    note("fast tokenization", f"{name}, {len(texts):,} texts", "equal")
