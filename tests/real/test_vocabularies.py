"""The fast tokenizer is the library's for real vocabularies, on real texts and on odd ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from tests.conftest import GPT2

VOCABULARIES = ["gpt2", "smollm2", "smollm2, digits", "qwen2.5", "llama-3", "deepseek-v3"]
# what data sets hold beside prose: other scripts, joiners, marks, digits of several kinds, controls, added tokens
ODD = [*"aA1 \n'!.,é漢あ・゛١\u200d\u0301\x01\x04\t😀ー०क्", "<|im_start|>", "<｜User｜>", "<｜/table>｜DSML｜"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_fast_tokens_are_the_librarys_on_5000_texts(name: str, real: Path, smollm: Path, rows: Any, note: Any) -> None:
    from tokenizers import Tokenizer

    from instructft.prompt.fast_bpe import fast_bpe

    named = {"gpt2": GPT2 / "tokenizer.json", "smollm2": smollm / "tokenizer.json"}
    own, _, digits = name.partition(", ")
    core = Tokenizer.from_file(str(named.get(own, real / "vocabularies" / f"{name}.json")))
    if digits:  # as it is published: its GGUF does not say that each digit stands alone
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), core.pre_tokenizer])
    fast = fast_bpe(core)
    assert fast is not None
    said = [text for row in rows for text in row.values() if text]
    draw = random.Random(0)
    texts = [*said, *(a + b for a, b in zip(said, said[7:], strict=False)), *(f" {t}\n\n" for t in said)]
    texts = texts[:3500] + ["".join(draw.choices(ODD, k=draw.randint(1, 30))) for _ in range(1500)]
    texts += [f"{a}\t{b}" for a in said[:100] for b in said[100:140]]
    texts = texts[:5000]
    ids, lengths = fast.encode(texts)
    expected = [encoded.ids for encoded in core.encode_batch_fast(texts, add_special_tokens=False)]
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [i for row in expected for i in row]
    alone = sum(map(fast._fits, said)) / len(said)
    assert alone > 0.99
    note("fast tokenization", f"{name}, {len(texts):,} texts", f"equal; {alone:.1%} of the rows' texts the fast way")
