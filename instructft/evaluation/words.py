"""Where words begin and end in any script: what ROUGE-L and BLEU count, in Latin as in Cyrillic, Thai or Chinese.

Text in ASCII is cut exactly as `rouge_score` and `sacrebleu` cut it. Their own rules end there: to `rouge_score` a text
of Cyrillic holds no word at all, and to `sacrebleu` a Chinese sentence is one word.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# Scripts that write without spaces between words, as their blocks: a character with its marks stands for a word.
_SPACELESS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Tibetan, Burmese
    "\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9df"  # Khmer, Tai scripts, Balinese, Javanese
    "\u2e80-\u2fff\u3000-\u30ff\u3100-\u312f\u31a0-\u33ff\u3400-\u4dbf\u4e00-\u9fff"  # Han, kana, bopomofo
    "\ua000-\ua4cf\uf900-\ufaff\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef"  # Yi, compatible and full-width forms
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"  # older kana, rare Han
)
_MARKS = "\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef"  # what joins characters or chooses their form
_UNIT = re.compile(f"[{_SPACELESS}]")


def spaced(text: str) -> str:
    """The text with spaces around each character of a script that writes none, its marks kept with it.

    >>> spaced("東京 is big"), spaced("Быть или не быть")
    (' 東  京  is big', 'Быть или не быть')
    """
    text = unicodedata.normalize("NFC", text)  # an accent is the same, within its letter or behind it
    if not _UNIT.search(text):
        return text
    parts: list[str] = []
    for character in text:
        if parts and len(parts[-1]) > 1 and parts[-1].startswith(" ") and _is_mark(character):
            parts[-1] = f"{parts[-1][:-1]}{character} "  # within the spaces of its letter
        else:
            parts.append(f" {character} " if _UNIT.match(character) else character)
    return "".join(parts)


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, digits and their marks; symbols that are not ASCII alone.

    >>> words("Ça va ?  Да, 3_4!"), words("สวัสดี 👍")
    (['ça', 'va', 'да', '3', '4'], ['ส', 'วั', 'ส', 'ดี', '👍'])
    """
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    found: list[str] = []
    run = ""
    for character in spaced(text.lower()) + " ":
        kind = unicodedata.category(character)
        if kind[0] in "LN" or (run and _is_mark(character)):
            run += character
            continue
        if run:
            found.append(run)
            run = ""
        if kind == "So" or (kind[0] == "S" and not character.isascii()):
            found.append(character)
    return found


def characters(text: str) -> list[str]:
    """All characters of a text but its spaces: the words of a text that has none, such as `!=` or `(-:`.

    >>> characters("> =")
    ['>', '=']
    """
    return [character for character in unicodedata.normalize("NFC", text) if not character.isspace()]


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004: https://aclanthology.org/W04-1013).

    >>> rouge_l("Быть или спать", "Быть или не быть")
    0.5714285714285715
    """
    tokenize = words if words(reference) else characters
    return float(_scorer(tokenize).score(reference, prediction)["rougeL"].fmeasure)


def _scorer(tokenize: Any) -> Any:
    from types import SimpleNamespace

    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokenize))


def _is_mark(character: str) -> bool:
    """Whether a character belongs to the one before it: an accent, a vowel sign, a joiner."""
    return not character.isascii() and (
        unicodedata.category(character)[0] == "M" or re.match(f"[{_MARKS}]", character) is not None
    )
