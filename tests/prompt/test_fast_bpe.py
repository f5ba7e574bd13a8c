"""The fast byte-level BPE: the same ids as the tokenizers library, id by id, or none of its business."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from instructft.data.sources import QUICKSTART
from instructft.prompt import fast_bpe as module
from instructft.prompt.fast_bpe import fast_bpe
from tests.conftest import BATTERY, GPT2, ROWS

# Qwen's and Llama 3's way to cut words
NEW_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again; aaaa aaa aa.",
    "Größe, naïve café; ça va? Ελληνικά, русский язык, 日本語の文章 और हिन्दी 🙂🙃",
    "def f(x):\n    return x ** 2  # 1234567890\r\n\r\n\t\tdon't they'll WE'RE\n",
] * 3
STRANGE = [
    "",
    " ",
    "\n\n  \n",
    "a\u0301 e\u0301 \u1e0b\u0323",  # letters with marks, decomposed: NFC changes them
    "\u212b \u00c5",  # the Angstrom sign, which NFC makes an A with a ring
    "x\u0085y\u00a0z\u2028w\u3000v\u200bu\ufeff",  # spaces and no spaces
    "'s 'S '\u017f don\u2019t",  # the long s, which is an s without case
    "²³½ ٣ Ⅷ ǅ ʰ ªº",
    "\U0001fae8\U0001e4d0\U00031350",  # a face of Unicode 15, a letter of 15, a Han character of 15
    "<|end|><|end|> <|en d|>",
    "aaaaaaaaaaaaa " * 20,
    "a\x01\x02b \x04\x13c\x01 \x02\n",  # no letters, no marks; two of them without a token
    "日本語のテスト・ー゛漢字123abc 4,567.89  漢  12 \n漢!A漢!é か\u3099 ゠ヿ",
    "क्\u200dष \u0301a\u0301 \u06611234٢ 1  b  ",  # a joiner, marks, digits of two kinds
]


def made(words: str | None = None, nfc: bool = False, size: int = 600, strange: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `CORPUS`, with GPT-2's words unless others are given.

    With `strange` texts too it has tokens across borders that another cut would not see.
    """
    tokenizer = Tokenizer(models.BPE())
    if words is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(words), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*CORPUS, *STRANGE * 3] if strange else CORPUS,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def real() -> Tokenizer:
    return Tokenizer.from_file(str(GPT2 / "tokenizer.json"))


def changed(change: Callable[[dict[str, Any]], None], words: str | None = None, **options: Any) -> Tokenizer:
    """`made`, with something else in its JSON."""
    spec = json.loads(made(words, **options).to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def digits(spec: dict[str, Any]) -> None:
    """SmolLM 2's way to cut words."""
    first = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, spec["pre_tokenizer"]]}


def deepseek(spec: dict[str, Any]) -> None:
    """DeepSeek V3's way to cut words."""
    *splits, last = spec["pre_tokenizer"]["pretokenizers"]
    named = [{**splits[0], "pattern": {"Regex": words}} for words in module._DEEPSEEK_SPLITS]
    spec["pre_tokenizer"]["pretokenizers"] = [*named, last]
    spec["normalizer"] = {"type": "Sequence", "normalizers": []}


def all_splits(spec: dict[str, Any]) -> None:
    """Every pair of tokens that make a token is a merge, as in what is made from tiktoken's ranks; words first."""
    vocabulary = spec["model"]["vocab"]
    merges = {
        token: [[token[:n], token[n:]] for n in range(1, len(token)) if {token[:n], token[n:]} <= vocabulary.keys()]
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
    }
    spec["model"] |= {"merges": [pair for pairs in merges.values() for pair in pairs], "ignore_merges": True}


def no_controls(spec: dict[str, Any]) -> None:
    """Bytes that its corpus never had are no tokens, as in SmolLM 2's vocabulary."""
    lost = {character for character, byte in module._alphabet().items() if byte in (0x04, 0x13, 0xF1, 0xF5)}
    spec["model"]["vocab"] = {token: i for i, token in enumerate(t for t in spec["model"]["vocab"] if t not in lost)}


KINDS: dict[str, Any] = {
    "gpt2": real,
    "words of gpt2": made,
    "words of qwen": lambda: made(NEW_WORDS),
    "words of qwen, NFC": lambda: made(NEW_WORDS, nfc=True),
    "words of smollm": lambda: changed(digits, strange=True, size=900),
    "words of deepseek": lambda: changed(deepseek, NEW_WORDS, strange=True, size=900),
    "merges of llama": lambda: changed(all_splits, NEW_WORDS),
    "bytes without a token": lambda: changed(no_controls),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def equal(tokenizer: Tokenizer, texts: list[str]) -> bool:
    fast = fast_bpe(tokenizer)
    assert fast is not None
    ids, lengths = fast.encode(texts)
    expected = [row.ids for row in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    assert lengths.tolist() == list(map(len, expected))
    return ids.tolist() == [number for row in expected for number in row]


def test_the_ids_are_the_same(tokenizer: Tokenizer) -> None:
    assert equal(tokenizer, [*CORPUS, *STRANGE])


EXAMPLES = 150 if BATTERY else 30


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
def test_the_ids_are_the_same_for_any_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert equal(tokenizer, texts)


def test_the_ids_of_real_rows_are_the_same() -> None:
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    assert equal(real(), [text for row in rows for text in (row["instruction"], row["output"] + "<|endoftext|>")])


def test_a_text_that_is_not_proved_goes_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalized text only, and only characters that both cut alike; the others come out right all the same."""
    module._made.clear()
    tokenizer = made(NEW_WORDS, nfc=True)
    fast = fast_bpe(tokenizer)
    assert fast is not None
    assert [fast._fits(text) for text in ("plain", "Größe", "e\u0301", "\u0378")] == [True, True, False, False]
    joins = type(fast)._joins
    monkeypatch.setattr(type(fast), "_joins", lambda self, pair: joins(self, pair) != ("日" in pair))
    assert not fast._fits("日本")
    assert fast._fits("本")
    assert equal(tokenizer, ["日本", "a"])
    module._made.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_beside_each_other_do_not_meet(kind: str) -> None:
    """Texts are encoded together, with a sign between them, of which they may hold a part, or the whole."""
    tokenizer, sign = KINDS[kind](), module._BETWEEN
    parts = [sign[:1], sign[:2], sign[1:], sign[2:], " ", "\n", "a", "", "<|end", "|>"]
    assert equal(tokenizer, parts)
    assert equal(tokenizer, [a + b for a in parts for b in parts])
    assert equal(tokenizer, ["a", f"b{sign}c", sign, "d", "é"])
    assert equal(tokenizer, [])
    fast = fast_bpe(tokenizer)
    assert fast is not None
    assert fast._together(["a", f"b{sign}"]) is None
    assert fast._together(parts) is not None


SPACES = sorted({chr(c) for c in range(0x3100) if chr(c).isspace()} | set("\u180e\u200b\u2060\ufeff"))


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_of_every_kind_before_everything(kind: str) -> None:
    """Runs of one, two and three, before a word, a number, a sign, a special token, the end and the next text."""
    tokenizer = KINDS[kind]()
    behind = ["b", "1", "!", "<|end|>", "<|endoftext|>", "<", "", "\x1d", "'s", "é"]
    behind += ["²", "٣", "Ⅷ", "日", "・", "\u0301", "\u200d"]
    runs = [a + b + c for a in ("", " ", "\n") for b in SPACES for c in ("", " ", "\r\n", "\t\n", "\u00a0")]
    assert equal(tokenizer, [f"a{run}{after}" for run in runs for after in behind])
    assert equal(tokenizer, [f"!{run}{after}" for run in runs for after in behind])


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.sampled_from(" \n\r\t\u00a0\u3000aA1!'s<|end>é日²٣・\u200d")), max_size=8))
def test_the_ids_are_the_same_for_any_white_space(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert equal(tokenizer, texts)


def test_a_character_between_words_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that matches ASCII only: the library keeps what lies between, tiktoken passes over it."""
    assert fast_bpe(made(r"\p{L}+")) is None
    module._made.clear()
    tokenizer = made(r"[\x00-\x7f]+")
    assert fast_bpe(tokenizer) is None  # on no list
    module._made.clear()
    monkeypatch.setattr(module, "_PROVED", (r"[\x00-\x7f]+",))
    assert equal(tokenizer, ["ab 日本 cd", "plain"])
    fast = fast_bpe(tokenizer)
    assert fast is not None
    monkeypatch.setattr(type(fast), "_fits", lambda self, text: True)  # the count of bytes alone finds it too
    assert fast._encoding.decode(fast._encoding.encode_ordinary("ab 日本")) == "ab "
    assert equal(tokenizer, ["ab 日本 cd", "plain"])
    module._made.clear()


def test_merges_that_differ_are_found() -> None:
    """`abc` is made from `ab` + `c` only, but `bc` is joined before `ab`: only tiktoken makes it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "bc", "ab", "abc"]
    bpe = models.BPE({name: i for i, name in enumerate(names)}, [("b", "c"), ("a", "b"), ("ab", "c")])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    fast = fast_bpe(tokenizer)
    assert fast is not None
    assert fast._together(["ab c", "bc"]) is not None
    assert equal(tokenizer, ["ab", "abc", "c"])
    assert fast._together(["ab"]) is None  # from then on it is the library's
    assert equal(tokenizer, ["ab", "abc", "c"])
    with pytest.MonkeyPatch.context() as patch:  # without the proof the ids would indeed be others
        patch.setattr(module._Merges, "agree", lambda *_: True)
        assert module.FastBPE(tokenizer, tokenizer.to_str()).encode(["abc"])[0].tolist() == [names.index("abc")]


def test_merges_that_differ_inside_a_token_are_found() -> None:
    """`abcd` comes out of both alone, by another way: beside an `e` the library, which has a `d` there, joins `de`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "bc", "ab", "cd", "bcd", "abc", "abcd", "de"]
    pairs = [("b", "c"), ("a", "b"), ("c", "d"), ("bc", "d"), ("ab", "c"), ("a", "bcd"), ("d", "e")]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = fast_bpe(tokenizer)
    assert fast is not None
    assert equal(tokenizer, ["bc de ab"])
    assert not fast._merges._differ
    assert equal(tokenizer, ["abcd"])
    assert fast._merges._differ
    assert "abc" in fast._merges._inside
    assert equal(tokenizer, ["abcd", "abcde", "abc"])


def test_a_token_that_is_not_made_of_its_own_text_is_found() -> None:
    """Its merge comes last, behind those that take its parts away."""
    tokenizer = changed(apart)
    assert equal(tokenizer, [*CORPUS, *STRANGE])
    fast = fast_bpe(tokenizer)
    assert fast is not None
    assert fast._merges._differ


def test_ids_in_another_order_than_the_merges() -> None:
    tokenizer = made()
    spec = json.loads(tokenizer.to_str())
    last = len(spec["model"]["vocab"]) - 1
    spec["model"]["vocab"] = {token: last - number for token, number in spec["model"]["vocab"].items()}
    turned = Tokenizer.from_str(json.dumps(spec))
    assert equal(turned, [*CORPUS, *STRANGE])


def apart(spec: dict[str, Any]) -> None:
    first, *rest = spec["model"]["merges"]
    spec["model"]["merges"] = [first, *rest, first]


def unmade(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"]["whole"] = len(spec["model"]["vocab"])
    spec["model"]["ignore_merges"] = True


def _with(**changes: Any) -> Tokenizer:
    spec = json.loads(made().to_str())
    for key, value in changes.items():
        (spec["model"] if key in spec["model"] else spec)[key] = value
    return Tokenizer.from_str(json.dumps(spec))


def _adding(*tokens: AddedToken) -> Tokenizer:
    tokenizer = made()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), id="no BPE"),
        pytest.param(lambda: changed(unmade), id="a whole word that no merge makes"),
        pytest.param(lambda: _with(dropout=0.5), id="dropout"),
        pytest.param(lambda: _with(normalizer={"type": "Lowercase"}), id="lower case"),
        pytest.param(lambda: _with(pre_tokenizer=None), id="no words"),
        pytest.param(lambda: _adding(AddedToken("<x>", lstrip=True)), id="lstrip"),
        pytest.param(lambda: _adding(AddedToken("<x>"), AddedToken("<x>y")), id="one begins another"),
        pytest.param(lambda: _adding(AddedToken(f"<{module._BETWEEN[0]}>")), id="a part of what stands between texts"),
        pytest.param(lambda: _adding(AddedToken("<\u0378>")), id="a character that is not known"),
    ],
)
def test_what_is_not_proved_stays_with_the_library(tokenizer: Any) -> None:
    assert fast_bpe(tokenizer()) is None


def test_added_tokens_are_found_in_texts() -> None:
    tokenizer = _adding(AddedToken("<|user|>", normalized=False), AddedToken("<|bot|>", normalized=False))
    assert equal(tokenizer, ["<|user|>hi<|bot|> there<|end|>", "<|user", "<|bot|><|user|>"])


def test_added_tokens_that_hold_white_space_take_it_from_what_is_around_them() -> None:
    tokenizer = _adding(AddedToken("  <x>", normalized=False), AddedToken("<y>  ", normalized=False))
    assert equal(tokenizer, ["a  <x>", "a   <x>  b", "<y>   b", "<y>     <x>", "a  <y>  ", "  <x", "b"])


def test_added_tokens_that_overlap_send_their_text_to_the_library() -> None:
    """Of `<x|` and `|y>` the one that is looked for first is found, wherever it begins."""
    tokenizer = _adding(AddedToken("<x|", normalized=True), AddedToken("|y>", normalized=False))
    assert equal(tokenizer, ["<x|y>", "<x| |y>", "<x|", "|y>"])
    fast = fast_bpe(tokenizer)
    assert fast is not None
    assert [fast._fits(text) for text in ("<x|y>", "<x|", "|y>")] == [False, True, True]


def test_what_a_text_lacks_beside_another_it_does_not_lack_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts of a batch are looked at together first: of one that does not fit, none of the others suffers."""
    tokenizer = made(NEW_WORDS, nfc=True)
    fast = fast_bpe(tokenizer)
    assert fast is not None
    alone: list[list[str]] = []
    together = fast._together
    monkeypatch.setattr(fast, "_together", lambda texts: alone.append(list(texts)) or together(texts))
    assert equal(tokenizer, ["e", "\u0301 a"])  # not normalized only where one text goes on with the other
    assert equal(tokenizer, ["Größe", "e\u0301", "", "\u0378", "plain"])
    assert alone == [["e", "\u0301 a"], ["Größe", "", "plain"]]


def test_of_many_added_tokens_those_that_occur_are_found() -> None:
    tokenizer = _adding(*(AddedToken(f"<|place {i}|>", normalized=False) for i in range(99)), AddedToken("<think>"))
    fast = fast_bpe(tokenizer)
    assert fast is not None
    assert fast._in("a<|place 7|> <|place <think>") == {"<|place 7|>", "<think>", module._BETWEEN, module._CUT}
    assert equal(tokenizer, ["<|place 7|>a<|place 77|>", "<think>b</think>", "<|place", "none"])


def test_a_byte_without_a_token_sends_its_text_to_the_library() -> None:
    fast = fast_bpe(changed(no_controls))
    assert fast is not None
    assert [fast._fits(text) for text in ("a", "a\x04", "é", "\U000e0100", "\U00040000")] == [
        True,
        False,
        True,
        True,
        False,
    ]


def test_merges_that_only_tiktoken_would_make_are_found_behind_whole_words() -> None:
    """With `ignore_merges` the token is its own text; within a longer word the library stops at two pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "bc", "ab", "abc"]
    bpe = models.BPE(
        {name: i for i, name in enumerate(names)}, [("b", "c"), ("a", "b"), ("ab", "c")], ignore_merges=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.encode("abc").tokens == ["abc"]
    assert tokenizer.encode("xabc").tokens == ["x", "a", "bc"]
    fast = fast_bpe(tokenizer)
    assert fast is not None
    assert equal(tokenizer, ["ab", "xbc"])
    assert not fast._merges._differ
    assert equal(tokenizer, ["xabc", "abc", "ab"])
    assert fast._merges._differ


@pytest.mark.parametrize("template", ["instruction", "chatml"])
def test_many_rows_are_encoded_as_few_are(bare_tokenizer: Any, template: str) -> None:
    from instructft.prompt.loss_mask import Encoder
    from instructft.prompt.templates import TEMPLATES

    tokenizer = bare_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in TEMPLATES[template].tokens])
    tokenizer.eos_token = TEMPLATES[template].stop or tokenizer.eos_token
    tokenizer.chat_template = TEMPLATES[template].text()
    encoder = Encoder(tokenizer)
    rows = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(STRANGE, reversed(CORPUS + STRANGE[:2]), strict=False)
        if question.strip()
    ]
    rows[2:2] = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "\n  code"}]]  # may merge
    few, many = encoder.encode(rows), encoder.encode(rows, many=True)
    assert encoder._fast is not None
    alone = [encoder.encode([row]) for row in rows]
    assert many.conversation.tolist() == list(range(len(rows)))
    for name in ("input_ids", "labels", "lengths"):
        assert getattr(few, name).tolist() == getattr(many, name).tolist()
        assert getattr(many, name).tolist() == [value for one in alone for value in getattr(one, name).tolist()]


@pytest.mark.parametrize(
    "pattern",
    [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",  # noqa: E501
        r"^\p{L}+|\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s+",
        r"\h+|\p{L}+|\s+|[^\s\p{L}]+",
    ],
)
def test_a_pattern_that_the_two_dialects_read_differently_is_left_to_the_library(pattern: str) -> None:
    assert fast_bpe(made(pattern)) is None


def test_a_panic_falls_back_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made()
    fast = fast_bpe(tokenizer)
    assert fast is not None

    class Panics:
        def encode_to_numpy(self, *_: object, **__: object) -> None:
            raise BaseException("a panic in Rust is no Exception")

    monkeypatch.setattr(fast, "_encoding", Panics())
    assert fast.encode(["ab cd"])[0].tolist() == tokenizer.encode("ab cd", add_special_tokens=False).ids


def test_one_that_takes_special_tokens_apart_goes_to_the_library() -> None:
    """A setting that its text does not hold."""
    core = Tokenizer.from_file(str(QUICKSTART / "tokenizer.json"))
    assert fast_bpe(core) is not None
    core.encode_special_tokens = True
    assert fast_bpe(core) is None
