"""Figures, durations, sizes and long texts as people read them: the same in the terminal, on the card, in reports."""

from __future__ import annotations

# figure of an evaluation -> how it is written, in the order of a table
FORMS = {
    "loss": "{:,.3f}",
    "perplexity": "{:,.3f}",
    "exact_match": "{:.1%}",
    "rougeL": "{:.3f}",
    "bleu": "{:.1f}",
    "answer_tokens": "{:.1f}",
    "stopped": "{:.1%}",
    "repeated": "{:.1%}",
}
_NAMES = {
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "answer_tokens": "tokens in an answer",
    "stopped": "stops by itself",
    "repeated": "repeated 4-grams",
}


def name_of(figure: str) -> str:
    """A figure's name for people.

    >>> name_of("exact_match"), name_of("rougeL")
    ('exact match', 'ROUGE-L')
    """
    return _NAMES.get(figure, figure.replace("_", " "))


def clock(seconds: float) -> str:
    """A duration.

    >>> clock(78.9), clock(4), clock(7400)
    ('1 min 19 s', '4 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def size(count: int) -> str:
    """Bytes, as disks are sold.

    >>> size(2_638_848), size(14_483_464_192)
    ('2.6 MB', '14.5 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def short(text: str, limit: int) -> str:
    """One line of at most `limit` characters.

    >>> short("one\\n  two three", 9)
    'one two …'
    """
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
