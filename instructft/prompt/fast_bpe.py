"""Byte-level BPE by `tiktoken`, for tokenizers where it is proved to give the same ids as the tokenizers library.

It is kept beside the tokenizers library for its speed: on one core, 8,000 short texts of instruction rows, 3.7 to 4.7
million tokens/s (DeepSeek V3 2.1) where `encode_batch_fast` does 0.5 to 0.9 (tiktoken 0.14, tokenizers 0.23), so that
all of data preparation is faster than the bare tokenizer (`benchmarks/RESULTS.md`). A speed-up may not change a token,
so nothing here is taken for granted; what cannot be proved goes to the tokenizers library, text by text:

- Merges. Both join the pair of the lowest rank first, leftmost first; but tiktoken joins any two tokens whose bytes
  are a token, the tokenizers library only pairs that its list of merges holds. What stands left of x and right of y has
  not crossed their borders when x and y come to stand side by side, so the same happens when xy is encoded alone: for
  each token there is one pair at most that ever makes it, the last one in its own text. By induction on the length of
  tokens the two agree as long as no text of a token ends, in the library, at two pieces: there tiktoken would go on.
  That is tested token by token, for those that occur and all tokens inside them: whatever tiktoken joins is inside a
  token that comes out. Several merges may make one token, where they stand together in the list: then the order of
  tokens is the order of whichever of its merges is ever reached.
- Whole words. tiktoken takes a word that is a token as it stands, as the library does with `ignore_merges`; without, it
  is the same only where merges make every token from its own text. Those that merges never reach must be left in three
  pieces or more.
- Bytes without a token, which the library leaves out: a text that holds one is the library's.
- Words. Both cut a text by the same regular expression, or by one that is proved to cut as several in a row do, but
  their tables of Unicode may be of different years. Each character is tried beside letters, digits, marks and spaces in
  both before a text that holds it is trusted.
- Borders of texts. All of a batch are encoded in one call, with a special token between them that none may hold.
- Normalization (NFC) must leave text and added tokens as they are, and added tokens must have no rules of their own.
- The ids of a batch must stand for as many bytes as its texts have.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The words of GPT-2, as the tokenizers library has them built in (`ByteLevel` with `use_regex`).
_GPT2_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Llama 3 and Qwen 2: with GPT-2's, the patterns that both dialects of regular expressions read alike (possessive ones,
# `^`, `\\h`, classes inside classes they do not).
_PROVED = (
    _GPT2_WORDS,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # noqa: E501
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# SmolLM 2: each digit alone, then GPT-2's words of what lies between, where a text ends at a digit: so spaces before a
# digit stay together, and none is drawn to it.
_DIGITS_WORDS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# DeepSeek V3: numbers by three, then runs of Han and kana, then words of what lies between, one after the other. In one
# pattern numbers and Han come first, all else leaves them out, and a word ends at them as at the end of a text. Of the
# kana four are no letters; what no word of its last pattern takes stays together, as far as no letter follows.
_DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_NO_LETTERS = "\u309b\u309c\u30a0\u30fb"
_HAN = "一-龥\u3040-\u30ff"
_LETTER = rf"[\p{{L}}\p{{M}}&&[^{_HAN}]]"
_DEEPSEEK_WORDS = "|".join(
    (
        r"\p{N}{1,3}",
        rf"[{_HAN}&&[^{_NO_LETTERS}]]+",
        rf"[{_NO_LETTERS}]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+",
        rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}]?{_LETTER}+",
        rf" ?[\p{{P}}\p{{S}}&&[^{_NO_LETTERS}]]+[\r\n]*",
        r"\s*[\r\n]+",
        rf"\s+(?![^\s\p{{N}}{_HAN}])",
        r"\s+",
        rf"[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}]+(?!{_LETTER})",
    )
)
_NEIGHBOURS = "aA1!' \n"  # what a character is tried beside: one of each kind that such patterns tell apart
# Special tokens of ours: between texts that are encoded together, and in front of a last space (`_Spaces`). They end as
# they do not begin, so that no part of a text beside one can be taken for a part of it.
_BETWEEN, _CUT = "\x1d\x1e\x00", "\x1d\x1f\x00"
_LINES = r"\s*[\r\n]+"
# What takes white space but for its last character: before all else, or but before numbers (`_DIGITS_WORDS`).
_NOT_LAST, _NOT_LAST_BUT_AT_NUMBERS = r"|\s+(?!\S)", r"|\s+(?![^\s\p{N}])"
_SPACES = [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]  # \s
_FEW = 32  # added tokens that tiktoken is given whatever the text; of more, those that occur
_BEGINNING = 6  # characters by which those that cannot occur are passed over


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> the byte (from GPT-2's `encoder.py`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


class _Unproved(Exception):
    """This tokenizer stays with the tokenizers library."""


class FastBPE:
    """Encodes texts as `core.encode_batch_fast(texts, add_special_tokens=False)` does, faster. Use `fast_bpe`.

    Raises:
        _Unproved: the two libraries may differ for this tokenizer.
    """

    def __init__(self, core: Tokenizer, text: str):
        from tiktoken import Encoding

        self._text = text
        self._words, spec = core.pre_tokenizer, json.loads(text)
        pattern, self._nfc = _pattern(spec["pre_tokenizer"]), _is_nfc(spec["normalizer"])
        numbers, ranks, lost = _ranks(spec["model"])
        specials, self._clashes = _added(spec["added_tokens"], self._nfc)
        every = (*specials, _BETWEEN, _CUT)
        self._pairs = _pairs(pattern)
        self._lost = bytes(lost)
        self._same: set[str] = set()  # characters that both libraries put into the same kinds of word
        self._other: set[str] = set()
        self._alone: set[str] = set()  # those of `_same` that are a word each, whatever is beside them
        if not all(map(self._proved, map(chr, range(128)))):
            raise _Unproved("they cut ASCII differently")
        plain = _Spaces.plain(pattern, specials)
        self._spaces = plain and _Spaces(pattern, every, self._alone)
        self._encoding = Encoding(
            "proved",
            pat_str=plain or pattern,
            mergeable_ranks=ranks,
            special_tokens={text: len(ranks) + i for i, text in enumerate(every)},
        )
        self._ids = np.array([*numbers.values(), *[-1] * len(lost), *specials.values()], dtype=np.int32)
        self._bytes = np.array([*map(len, ranks), *(len(text.encode()) for text in every)], dtype=np.int64)
        self._specials = frozenset(every)
        self._merges = _Merges(core, text, bool(spec["model"].get("ignore_merges")), numbers, len(self._bytes))

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, end to end, int32, and the tokens of each, int64."""
        whole = "".join(texts)
        all_fit = whole.isascii() and self._fits(whole)  # else it takes less time to look at each
        if all_fit:
            fits = [True] * len(texts)
        elif self._clashes or self._lost:
            fits = list(map(self._fits, texts))
        else:  # of ASCII nothing is left to look at
            fits = [is_ascii or self._fits(text) for text, is_ascii in zip(texts, map(str.isascii, texts), strict=True)]
        found = self._together(texts if all_fit else [text for text, fit in zip(texts, fits, strict=True) if fit])
        if found is None:
            fits, found = [False] * len(texts), (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64))
        if all(fits):
            return found
        ids, fast = found
        rest = [text for text, fit in zip(texts, fits, strict=True) if not fit]
        encoded = [row.ids for row in self._library.encode_batch_fast(rest, add_special_tokens=False)]
        is_fast = np.array(fits)
        sizes = np.empty(len(texts), dtype=np.int64)
        sizes[is_fast], sizes[~is_fast] = fast, [*map(len, encoded)]
        of_fast = np.repeat(is_fast, sizes)
        every = np.empty(len(of_fast), dtype=np.int32)
        every[of_fast], every[~of_fast] = ids, [*chain.from_iterable(encoded)]
        return every, sizes

    def _together(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and tokens of texts, in one call: what is before a special token and what is behind it do not meet.

        None: a text cannot be encoded in this way, or holds what stands between the texts.
        """
        joined = _BETWEEN.join(texts)
        if joined.count(_BETWEEN) != max(len(texts) - 1, 0) or _CUT in joined:
            return None
        specials = self._in(joined)
        if self._spaces:
            joined = self._spaces.cut(joined)
        try:
            ranks = self._encoding.encode_to_numpy(joined, allowed_special=specials, disallowed_special=())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in Rust is no Exception: a stack that is full, a text that is too long
            return None
        if int(self._bytes[ranks].sum()) != (len(joined) if joined.isascii() else len(joined.encode())):
            return None  # the pattern passes over some character
        if not self._merges.agree(ranks):
            return None
        ranks = ranks[ranks != len(self._ids) + 1]
        borders = np.flatnonzero(ranks == len(self._ids))
        sizes = np.diff(np.concatenate(([-1], borders, [len(ranks)]))) - 1
        return self._ids[np.delete(ranks, borders)], sizes[: len(texts)]

    @cached_property
    def _library(self) -> Tokenizer:
        """The tokenizer as it was when it was proved; made where a text needs it, which takes as long as the proof."""
        from tokenizers import Tokenizer

        library = Tokenizer.from_str(self._text)
        library.no_truncation()
        library.no_padding()
        return library

    def _fits(self, text: str) -> bool:
        if self._clashes and any(a in text and b in text for a, b in self._clashes):
            return False
        if not text.isascii():
            new = set(text) - self._same
            if new and not all(map(self._proved, new)):
                return False
            if self._nfc and not unicodedata.is_normalized("NFC", text):
                return False
        return not self._lost or len(raw := text.encode()) == len(raw.translate(None, self._lost))

    def _proved(self, character: str) -> bool:
        """Whether both libraries see the same borders between a character and each kind of neighbour."""
        if character in self._same or character in self._other:
            return character in self._same
        # what this Python does not know it cannot normalize either; a lone surrogate is no text
        same = unicodedata.category(character) not in ("Cn", "Cs")
        pairs = [pair for n in _NEIGHBOURS for pair in (character + n, n + character)] if same else []
        joined = [self._joins(pair) for pair in pairs]
        same = same and joined == [len(self._words.pre_tokenize_str(pair)) == 1 for pair in pairs]
        (self._same if same else self._other).add(character)
        if not any(joined):
            self._alone.add(character)
        return same

    def _in(self, text: str) -> frozenset[str]:
        """The added tokens to look for: to hand tiktoken a thousand with a short text takes longer than the text."""
        if len(self._specials) <= _FEW:
            return self._specials
        beginnings = {special[:_BEGINNING] for special in self._specials}
        here = tuple(beginning for beginning in beginnings if beginning in text)
        found = (special for special in self._specials if special.startswith(here) and special in text)
        return frozenset((*found, _BETWEEN, _CUT))

    def _joins(self, pair: str) -> bool:
        """Whether two characters are one word to tiktoken: only within a word do their bytes meet and merge."""
        return len(self._pairs.encode_ordinary(pair)) < len(pair.encode())


class _Spaces:
    """Cuts texts so that a pattern need not look ahead: without that tiktoken's regular expressions are twice as fast.

    Of white space before a word, `\\s+(?!\\S)` takes all but the last character, which goes with the word or stands
    alone: `a···b` is `a`, `··`, `·b`. Where the text ends there (`a··` and `·b`), a plain `\\s+` takes the same. No
    border of words is lost or won: there is one in front of that last character in any case, but for line breaks that
    the pattern takes to the last one, and before numbers where the pattern leaves them out.

    Args:
        specials: texts that are tokens by themselves; white space before one is at the end of what is cut into words.
        alone: characters that nothing is drawn to; all of a text are tried before it is cut.
    """

    def __init__(self, pattern: str, specials: Sequence[str], alone: Set[str]):
        self._specials = tuple(specials)
        self._first = np.array(sorted({ord(text[0]) for text in specials}), dtype=np.uint32)
        self._is_space = np.zeros(_SPACES[-1] + 2, dtype=bool)
        self._is_space[_SPACES] = True
        self._goes = self._is_space.copy()  # what is cut off
        if _LINES in pattern:
            self._goes[[10, 13]] = False
        # the numbers: no other character is a word whatever is beside it
        self._stays_before = alone if _NOT_LAST_BUT_AT_NUMBERS in pattern else frozenset()

    @staticmethod
    def plain(pattern: str, specials: Iterable[str]) -> str | None:
        """The pattern without the look ahead; None where it has another, or white space is in a special token."""
        if any(char.isspace() for text in specials for char in text):
            return None
        for ahead in (_NOT_LAST, _NOT_LAST_BUT_AT_NUMBERS):
            plain = pattern.replace(ahead, "")
            if pattern.endswith(ahead + r"|\s+") and "(?" not in plain.replace("(?i:", ""):
                return plain
        return None

    def cut(self, text: str) -> str:
        """The text with `_CUT` in front of each last space."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        space = np.flatnonzero(self._is_space[np.minimum(codes, len(self._is_space) - 1)])
        last = np.flatnonzero(np.diff(space, append=len(codes)) > 1)  # in `space`, of runs that something follows
        at = space[last[(last > 0) & (space[last] - space[last - 1] == 1) & self._goes[codes[space[last]]]]]
        if self._stays_before:
            behind = codes[at + 1]
            at = at[~np.isin(behind, [code for code in np.unique(behind) if chr(code) in self._stays_before])]
        special = np.isin(codes[at + 1], self._first)
        for i in np.flatnonzero(special).tolist():
            special[i] = text.startswith(self._specials, int(at[i]) + 1)
        at = at[~special]
        if not len(at):
            return text
        sign = np.array([*map(ord, _CUT)], dtype=np.uint32)
        return np.insert(codes, np.repeat(at, len(sign)), np.tile(sign, len(at))).tobytes().decode("utf-32-le")


def fast_bpe(core: Tokenizer, text: str | None = None) -> FastBPE | None:
    """The fast way to encode with this tokenizer, or None where it is not proved.

    Args:
        text: `core.to_str()`, where it is at hand.

    Example::

        ids, lengths = fast_bpe(tokenizer.backend_tokenizer).encode(["Hello world"])
        ids.tolist(), lengths.tolist()
        # ([15496, 995], [2])
    """
    if core.encode_special_tokens:
        return None  # it is not in the text below
    text = text or core.to_str()
    if text not in _made:
        if len(_made) >= _KEPT:
            _made.pop(next(iter(_made)))
        try:
            _made[text] = FastBPE(core, text)
        except _Unproved:
            _made[text] = None
    return _made[text]


_KEPT = 4
_made: dict[str, FastBPE | None] = {}  # a tokenizer's whole text -> what was proved of it


# --------------------------------------------------------------------------------------------------------------------
# What must hold
# --------------------------------------------------------------------------------------------------------------------


def _pattern(pre_tokenizer: Any) -> str:
    """The regular expression by which a byte-level tokenizer cuts words."""
    if pre_tokenizer == _byte_level(pre_tokenizer, use_regex=True):
        return _GPT2_WORDS
    *steps, last = (pre_tokenizer or {}).get("pretokenizers", []) or [None]
    if steps == [{"type": "Digits", "individual_digits": True}] and last == _byte_level(last, use_regex=True):
        return _DIGITS_WORDS
    if last == _byte_level(last, use_regex=False):
        patterns = tuple(_split(step) for step in steps)
        if len(patterns) == 1 and patterns[0] in _PROVED:
            return str(patterns[0])
        if patterns == _DEEPSEEK_SPLITS:
            return _DEEPSEEK_WORDS
    raise _Unproved("another way to cut words")


def _split(step: Any) -> str | None:
    """The pattern of a step that cuts a text at its matches and keeps all of it."""
    found = step.get("pattern")
    split = {"type": "Split", "pattern": found, "behavior": "Isolated", "invert": False}
    return str(found["Regex"]) if step == split and isinstance(found, dict) and "Regex" in found else None


def _byte_level(found: Any, use_regex: bool) -> dict[str, Any]:
    """`found` as it must be; `trim_offsets` has no part in ids."""
    trim = found.get("trim_offsets") if isinstance(found, dict) else None
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim, "use_regex": use_regex}


def _is_nfc(normalizer: Any) -> bool:
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        raise _Unproved("another normalization")
    return normalizer == {"type": "NFC"}


def _ranks(model: dict[str, Any]) -> tuple[dict[str, int], dict[bytes, int], list[int]]:
    """The id of each token in the order of merging, the rank of the bytes of each, and the bytes without a token, whose
    ranks are the last. A vocabulary may be numbered in another order than it is merged."""
    affixes = [model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")]
    if model["type"] != "BPE" or any(affixes) or model.get("byte_fallback"):
        raise _Unproved("no plain BPE")
    vocabulary, alphabet = model["vocab"], _alphabet()
    merged = [merge.replace(" ", "", 1) if type(merge) is str else merge[0] + merge[1] for merge in model["merges"]]
    lost = [byte for character, byte in alphabet.items() if character not in vocabulary]
    tokens = [*(character for character in alphabet if character in vocabulary), *merged]
    try:
        numbers = dict(zip(tokens, map(vocabulary.__getitem__, tokens), strict=True))
    except KeyError:
        raise _Unproved("a token without a number") from None
    twice = len(tokens) - len(numbers)  # one after the other they may stand
    if twice and twice != sum(token == before for before, token in pairwise(tokens)):
        raise _Unproved("merges of one token are apart, and which of them counts cannot be told by the token")
    whole = "".join(numbers)
    if not numbers.keys() & alphabet.keys() >= set(whole):
        raise _Unproved("a token without its parts")
    if model.get("ignore_merges") and len(vocabulary) != len(numbers):
        raise _Unproved("whole words that no merge makes")
    byte_of = np.zeros(max(map(ord, alphabet)) + 1, dtype=np.uint8)
    byte_of[[*map(ord, alphabet)]] = [*alphabet.values()]
    raw = byte_of[np.frombuffer(whole.encode("utf-32-le"), dtype=np.uint32)].tobytes()  # a character is a byte
    ends = list(accumulate(map(len, numbers)))
    ranks = {raw[start:end]: rank for rank, (start, end) in enumerate(zip([0, *ends], ends, strict=False))}
    for byte in lost:  # tiktoken wants all of them; no text that holds one comes to it
        ranks[bytes([byte])] = len(ranks)
    return numbers, ranks, lost


class _Merges:
    """Whether both libraries make tokens by the same merges: tried for each token that occurs, when it first does.

    Args:
        whole: a word that is a token is taken as it stands.
        tokens: their ids, in the order of their ranks.
        ranks: how many there are, those included that no merge makes.
    """

    def __init__(self, core: Tokenizer, text: str, whole: bool, tokens: dict[str, int], ranks: int):
        from tokenizers import Tokenizer

        library = core.model
        if whole:  # in a copy: what merges alone make of a token
            library = Tokenizer.from_str(text).model
            library.ignore_merges = False
        self._tokenize, self._whole = library.tokenize, whole
        self._ids, self._tokens = tokens, [*tokens]
        self._tried = np.arange(ranks) >= len(tokens)
        self._inside: set[str] = set()  # tokens that were tried
        self._differ = False

    def agree(self, ranks: np.ndarray) -> bool:
        """Whether they agree on what these tokens are made of; once they do not, this tokenizer is the library's."""
        new = np.unique(ranks[~self._tried[ranks]])
        for rank in () if self._differ else new.tolist():
            self._differ = self._differ or not self._try(self._tokens[rank])
        self._tried[new] = True
        return not self._differ

    def _try(self, token: str) -> bool:
        """The token, and every one that stands in its text."""
        for start in range(len(token)):
            for end in range(start + 1, len(token) + 1):
                part = token[start:end]
                if part in self._ids and part not in self._inside:
                    self._inside.add(part)
                    found = self._tokenize(part)
                    pieces = len(found)
                    other = pieces == 1 and found[0].id != self._ids[part]
                    if pieces == 2 or (pieces > 2 and not self._whole) or other:
                        return False
        return True


def _added(tokens: Sequence[dict[str, Any]], nfc: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Text -> id of the added tokens, and those of which only one is found where both overlap: which one depends on
    how they are looked for."""
    texts = [token["content"] for token in tokens]
    plain = not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens)
    ordered = sorted(texts)  # a prefix sorts right before the texts that it begins
    plain = plain and not any(b.startswith(a) for a, b in pairwise(ordered))
    first, then = ([token["content"] for token in tokens if token["normalized"] is late] for late in (False, True))
    # one group is looked for after the other: what overlaps within a group is found from the left by both
    clashes = [(a, b) for a in first for b in then if _overlap(a, b) or _overlap(b, a)]
    plain = plain and len(clashes) <= _FEW
    plain = plain and not any(_BETWEEN[0] in text for text in texts)
    known = all(unicodedata.category(character) != "Cn" for character in set("".join(texts)))
    if not plain or not known or (nfc and not all(unicodedata.is_normalized("NFC", text) for text in texts)):
        raise _Unproved("added tokens with rules of their own")
    return {token["content"]: token["id"] for token in tokens}, clashes


def _overlap(a: str, b: str) -> bool:
    return b in a or any(a.endswith(b[:n]) for n in range(1, min(len(a), len(b))))


def _pairs(pattern: str) -> Any:
    """An encoding that shows tiktoken's words: nothing merges but a neighbour with the byte before or behind it."""
    from tiktoken import Encoding

    single = [bytes([byte]) for byte in range(256)]
    beside = [side for n in _NEIGHBOURS.encode() for b in range(256) for side in (bytes([n, b]), bytes([b, n]))]
    tokens = [*single, *dict.fromkeys(beside)]
    return Encoding("words", pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})
