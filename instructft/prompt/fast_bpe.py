"""Byte-level BPE by `tiktoken`, for tokenizers where it is proved to give the same ids as the tokenizers library.

It is kept beside the tokenizers library for its speed: on one core, GPT-2's vocabulary and 20,000 rows of 50 tokens,
2.3 to 2.7 million tokens/s where `encode_batch_fast` does 0.4 to 0.6 (tiktoken 0.14, tokenizers 0.23), so that all of
data preparation is faster than the bare tokenizer (`benchmarks/RESULTS.md`). A speed-up may not change a token, so
nothing here is taken for granted; what cannot be proved goes to the tokenizers library, text by text:

- Merges. Both join the pair of the lowest rank first, leftmost first; but tiktoken joins any two tokens whose bytes
  are a token, the tokenizers library only pairs that its list of merges holds. The two differ somewhere only if a pair
  (x, y) outside that list comes to stand side by side while xy is a token. What stands left of x and right of y has
  not crossed their borders, so the same happens when xy is encoded alone, and there the library stops at x, y. Hence:
  if the library encodes every token's own text to that one token, they never differ. That is tested token by token.
- Words. Both cut a text by the same regular expression, but their tables of Unicode may be of different years. Each
  character is tried beside letters, digits, marks and spaces in both before a text that holds it is trusted.
- Normalization (NFC) must leave the text as it is, and added tokens must have no rules of their own.
- The ids of a batch must stand for as many bytes as its texts have.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
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
# Special tokens of ours: between texts that are encoded together, and in front of a last space (`_Spaces`). They end as
# they do not begin, so that no part of a text beside one can be taken for a part of it.
_BETWEEN, _CUT = "\x1d\x1e\x00", "\x1d\x1f\x00"
_LAST_SPACE, _LINES = r"|\s+(?!\S)", r"\s*[\r\n]+"
_SPACES = [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]  # \s
_NEIGHBOURS = "aA1!' \n"  # what a character is tried beside: one of each kind that such patterns tell apart


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
        ranks, ids = _ranks(spec["model"])  # rank -> id, since a vocabulary may be numbered in another order
        _prove_merges(core, spec["model"], ids)
        specials = _added(spec["added_tokens"])
        every = (*specials, _BETWEEN, _CUT)
        self._spaces = _Spaces(pattern, every) if _Spaces.serve(pattern, specials) else None
        self._encoding = Encoding(
            "proved",
            pat_str=pattern if self._spaces is None else pattern.replace(_LAST_SPACE, ""),
            mergeable_ranks=ranks,
            special_tokens={text: len(ranks) + i for i, text in enumerate(every)},
        )
        self._ids = np.array([*ids, *specials.values()], dtype=np.int32)
        self._bytes = np.array([*map(len, ranks), *(len(text.encode()) for text in every)], dtype=np.int64)
        self._pairs = _pairs(pattern)
        self._specials = frozenset(every)
        self._same: set[str] = set()  # characters that both libraries put into the same kinds of word
        self._other: set[str] = set()
        if not all(map(self._proved, map(chr, range(128)))):
            raise _Unproved("they cut ASCII differently")

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, end to end, int32, and the tokens of each, int64."""
        fits = [True] * len(texts) if "".join(texts).isascii() else [self._fits(text) for text in texts]
        found = self._together([text for text, fit in zip(texts, fits, strict=True) if fit])
        if found is None:
            fits, found = [False] * len(texts), (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64))
        if all(fits):
            return found
        ids, sizes = found
        rest = [text for text, fit in zip(texts, fits, strict=True) if not fit]
        encoded = self._library.encode_batch_fast(rest, add_special_tokens=False)
        slow = iter([np.array(row.ids, dtype=np.int32) for row in encoded])
        fast = iter(np.split(ids, np.cumsum(sizes)[:-1]))
        rows = [next(fast) if fit else next(slow) for fit in fits]
        return np.concatenate(rows), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))

    def _together(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and tokens of texts, in one call: what is before a special token and what is behind it do not meet.

        None: a text cannot be encoded in this way, or holds what stands between the texts.
        """
        joined = _BETWEEN.join(texts)
        if joined.count(_BETWEEN) != max(len(texts) - 1, 0) or _CUT in joined:
            return None
        if self._spaces is not None:
            joined = self._spaces.cut(joined)
        try:
            ranks = self._encoding.encode_to_numpy(joined, allowed_special=self._specials, disallowed_special=())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in Rust is no Exception: a stack that is full, a text that is too long
            return None
        if int(self._bytes[ranks].sum()) != (len(joined) if joined.isascii() else len(joined.encode())):
            return None  # the pattern passes over some character
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
        if text.isascii():
            return True
        new = set(text) - self._same
        if new and not all(map(self._proved, new)):
            return False
        return not self._nfc or unicodedata.is_normalized("NFC", text)

    def _proved(self, character: str) -> bool:
        """Whether both libraries see the same borders between a character and each kind of neighbour."""
        if character in self._same or character in self._other:
            return character in self._same
        # what this Python does not know it cannot normalize either; a lone surrogate is no text
        same = unicodedata.category(character) not in ("Cn", "Cs") and all(
            self._joins(pair) == (len(self._words.pre_tokenize_str(pair)) == 1)
            for neighbour in _NEIGHBOURS
            for pair in (character + neighbour, neighbour + character)
        )
        (self._same if same else self._other).add(character)
        return same

    def _joins(self, pair: str) -> bool:
        """Whether two characters are one word to tiktoken: only within a word do their bytes meet and merge."""
        return len(self._pairs.encode_ordinary(pair)) < len(pair.encode())


class _Spaces:
    """Cuts texts so that a pattern need not look ahead: without that tiktoken's regular expressions are twice as fast.

    Of white space before a word, `\\s+(?!\\S)` takes all but the last character, which goes with the word or stands
    alone: `a···b` is `a`, `··`, `·b`. Where the text ends there (`a··` and `·b`), a plain `\\s+` takes the same. No
    border of words is lost or won: there is one in front of that last character in any case, but for line breaks that
    the pattern takes to the last one.

    Args:
        specials: texts that are tokens by themselves; white space before one is at the end of what is cut into words.
    """

    def __init__(self, pattern: str, specials: Sequence[str]):
        self._specials = tuple(specials)
        self._first = np.array(sorted({ord(text[0]) for text in specials}), dtype=np.uint32)
        self._is_space = np.zeros(_SPACES[-1] + 2, dtype=bool)
        self._is_space[_SPACES] = True
        self._goes = self._is_space.copy()  # what is cut off
        if _LINES in pattern:
            self._goes[[10, 13]] = False

    @staticmethod
    def serve(pattern: str, specials: Iterable[str]) -> bool:
        """Whether this is the last thing that a pattern looks for, and no special token has a part in it."""
        last = pattern.endswith(_LAST_SPACE + r"|\s+") and "(?" not in pattern.replace(_LAST_SPACE, "").replace(
            "(?i:", ""
        )
        return last and not any(char.isspace() for text in specials for char in text)

    def cut(self, text: str) -> str:
        """The text with `_CUT` in front of each last space."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        space = np.flatnonzero(self._is_space[np.minimum(codes, len(self._is_space) - 1)])
        last = np.flatnonzero(np.diff(space, append=len(codes)) > 1)  # in `space`, of runs that something follows
        at = space[last[(last > 0) & (space[last] - space[last - 1] == 1) & self._goes[codes[space[last]]]]]
        special = np.isin(codes[at + 1], self._first)
        for i in np.flatnonzero(special).tolist():
            special[i] = text.startswith(self._specials, int(at[i]) + 1)
        at = at[~special]
        if not len(at):
            return text
        sign = np.array([*map(ord, _CUT)], dtype=np.uint32)
        return np.insert(codes, np.repeat(at, len(sign)), np.tile(sign, len(at))).tobytes().decode("utf-32-le")


def fast_bpe(core: Tokenizer) -> FastBPE | None:
    """The fast way to encode with this tokenizer, or None where it is not proved.

    Example::

        ids, lengths = fast_bpe(tokenizer.backend_tokenizer).encode(["Hello world"])
        ids.tolist(), lengths.tolist()
        # ([15496, 995], [2])
    """
    text = core.to_str()
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
    steps = (pre_tokenizer or {}).get("pretokenizers", [])
    if len(steps) == 2 and steps[1] == _byte_level(steps[1], use_regex=False):
        split = {"type": "Split", "pattern": steps[0].get("pattern"), "behavior": "Isolated", "invert": False}
        if steps[0] == split and isinstance(split["pattern"], dict) and "Regex" in split["pattern"]:
            pattern = str(split["pattern"]["Regex"])
            if pattern in _PROVED:
                return pattern
    raise _Unproved("another way to cut words")


def _byte_level(found: Any, use_regex: bool) -> dict[str, Any]:
    """`found` as it must be; `trim_offsets` has no part in ids."""
    trim = found.get("trim_offsets") if isinstance(found, dict) else None
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim, "use_regex": use_regex}


def _is_nfc(normalizer: Any) -> bool:
    if normalizer not in (None, {"type": "NFC"}):
        raise _Unproved("another normalization")
    return normalizer is not None


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """The bytes of each token in the order of merging -> rank, and each rank's id."""
    affixes = [model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")]
    if model["type"] != "BPE" or any(affixes) or model.get("byte_fallback") or model.get("ignore_merges"):
        raise _Unproved("no plain BPE")
    vocabulary, alphabet = model["vocab"], _alphabet()
    merged = ("".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
    tokens = [*alphabet, *merged]
    table = str.maketrans({character: chr(byte) for character, byte in alphabet.items()})
    if not vocabulary.keys() >= set(tokens) or not alphabet.keys() >= set("".join(tokens)):
        raise _Unproved("a byte without a token")
    ids = [vocabulary[token] for token in tokens]
    ranks = {token.translate(table).encode("latin-1"): rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(ids):
        raise _Unproved("two merges make one token, and which of them comes first cannot be told by the token")
    return ranks, ids


def _prove_merges(core: Tokenizer, model: dict[str, Any], ids: list[int]) -> None:
    texts = {number: token for token, number in model["vocab"].items()}
    tokenize = core.model.tokenize
    if not all(len(found := tokenize(texts[number])) == 1 and found[0].id == number for number in ids):
        raise _Unproved("a token's own text is not encoded to it")


def _added(tokens: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Text -> id of the added tokens; which of them is found where must not depend on how they are looked for."""
    texts = [token["content"] for token in tokens]
    plain = not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens)
    ordered = sorted(texts)  # a prefix sorts right before the texts that it begins
    plain = plain and not any(b.startswith(a) for a, b in pairwise(ordered))
    if len({token["normalized"] for token in tokens}) > 1:  # these are looked for one after the other
        plain = plain and not any(_overlap(a, b) for a in texts for b in texts if a is not b)
    if not plain or not all(text.isascii() and _BETWEEN[0] not in text for text in texts):
        raise _Unproved("added tokens with rules of their own")
    return {token["content"]: token["id"] for token in tokens}


def _overlap(a: str, b: str) -> bool:
    return b in a or any(a.endswith(b[:n]) for n in range(1, min(len(a), len(b))))


def _pairs(pattern: str) -> Any:
    """An encoding that shows tiktoken's words: nothing merges but a neighbour with the byte before or behind it."""
    from tiktoken import Encoding

    single = [bytes([byte]) for byte in range(256)]
    beside = [side for n in _NEIGHBOURS.encode() for b in range(256) for side in (bytes([n, b]), bytes([b, n]))]
    tokens = [*single, *dict.fromkeys(beside)]
    return Encoding("words", pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})
