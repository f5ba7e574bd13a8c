"""Looks at single texts: characters that do not print, words, a template's markers, and texts that are nearly equal."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from instructft.errors import TemplateError
from instructft.prompt.loss_mask import encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = {
    "control_characters": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]"),
    "windows_line_ends": re.compile("\r"),
    # joiners stand rightly in emoji and in many scripts, behind a letter that is not ASCII
    "zero_width_characters": re.compile("[\u00ad\u180e\u200b\u2060-\u2064\ufeff]|(?<![^\x00-\x7f])[\u200c\u200d]"),
    "bidi_characters": re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"),
    "replacement_characters": re.compile("\ufffd"),
    "lone_surrogates": re.compile("[\ud800-\udfff]"),
}
ANY_CHARACTER = re.compile("|".join(f"(?:{pattern.pattern})" for pattern in CHARACTERS.values()))


class _Drop(dict[int, "str | None"]):
    """What `str.translate` makes of each character: white space, controls and bare punctuation go."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        kind = unicodedata.category(character)[0]
        kept: str | None = None if kind in "ZC" or (kind == "P" and character not in "%&#@*/\\-·") else character
        self[code] = None if character == "`" else kept
        return self[code]


_DROP = _Drop()
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[.,:](?=\d)")


def normal(text: str) -> str:
    """A text as it is compared: no case, no white space, no punctuation that carries no meaning.

    >>> normal("Hello, World!") == normal("hello world"), normal("3.5 + 1") == normal("35 + 1")
    (True, False)
    """
    folded = _BETWEEN_DIGITS.sub("·", unicodedata.normalize("NFKC", text).casefold()).translate(_DROP)
    return folded or text  # nothing but punctuation: compared as it is


_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def one_word(text: str) -> bool:
    """Whether an answer is a single word; in scripts that put no space between words: at most four characters.

    >>> one_word("Paris."), one_word("In Paris."), one_word("東京"), one_word("東京は日本の首都です。")
    (True, False, True, False)
    """
    return len(text.split()) == 1 and not (_NO_SPACES.search(text) and len(text) > 4)


def markers(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds the template's own markers in a text: special tokens, and the headings that it writes.

    A made-up conversation is rendered, and what the template adds to it is cut into lines. A piece is a heading if it
    holds more than letters and spaces; one that begins a line in the template is a marker only at the start of a line.

    >>> markers(tokenizer).search("Fine.\\n### Response:\\nMore.").group().strip()
    '### Response:'
    """
    known = encoder(tokenizer)
    specials = sorted(known.special_tokens, key=len, reverse=True)
    question, answer = {"role": "user", "content": "Zq1"}, {"role": "assistant", "content": "Zq2"}
    extra = [{"role": "user", "content": "Zq3", "input": "Zq4"}, {"role": "user", "content": "Zq5", "context": "Zq6"}]
    system = {"role": "system", "content": "Zq7"}
    texts: list[str] = []
    for opening in ([system], []):
        for turn in [question, *extra]:
            # a template may refuse a system message, or a second turn
            for messages in ([*opening, turn, answer, question, answer], [*opening, turn, answer]):
                try:
                    texts.append(known.render([messages])[0])
                    break
                except TemplateError:
                    continue
        if texts:  # without a system message some templates write one of their own, which is no marker
            break
    cut = re.compile("|".join([r"Zq\d", *map(re.escape, specials)]))
    pieces: set[tuple[bool, str]] = set()  # (begins a line, text)
    for text in texts:
        start = 0
        for end, after in [*(match.span() for match in cut.finditer(text)), (len(text), len(text))]:
            begins = start == 0 or text[start - 1] == "\n"
            for i, line in enumerate(text[start:end].split("\n")):
                if re.search(r"[^\w\s]", line.strip()) and len(line.strip()) > 1:
                    pieces.add((begins or i > 0, line.strip()))
            start = after
    found = [re.escape(token) for token in specials if token.strip()]
    found += [(r"^[ \t]*" if begins else "") + re.escape(piece) for begins, piece in sorted(pieces)]
    return re.compile("|".join(found) or r"(?!)", re.MULTILINE)
