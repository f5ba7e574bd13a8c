"""Which column of a file asks and which answers, where no known format says so: a guess, and what it rests on.

A guess that another one comes near is none: both are named, and whoever knows the rows decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instructft.data.formats import ANSWERS, FORMATS, QUESTIONS, Rules, detect_format, to_conversation
from instructft.errors import DataError
from instructft.formatting import short
from instructft.prompt.layouts.messages import messages_of
from instructft.prompt.layouts.transcripts import rendered
from instructft.prompt.ledger import Ledger, Unread, Unusable, absent, refused

Row = Mapping[str, Any]
Choose = Callable[[str, list[str]], str]  # what is asked, the candidates -> one of them

LOOKED_AT, GUESSED_BY = 2000, 300  # rows: that are read, and that a guess rests on
_MARGIN = 0.9  # of two guesses nearer than this neither is taken

# Parts of names, in the languages of many data sets; a short one has to be a word of its own.
_WORDS = {
    "question": """question query prompt problem instruct request asked asks user human customer client inquiry
        utterance frage anfrage kunde aufgabe pregunta consulta usuario requête demande domanda richiesta utente
        pergunta pedido вопрос запрос soru 问题 提问 質問 指令 질문 सवाल سؤال q x input src ticket message mail body""",
    "answer": """answer response output completion solution assistant reply replies agent bot gpt chatgpt resolution
        antwort lösung loesung respuesta réponse reponse risposta soluzione resposta ответ решение yanıt cevap 答案 回答
        回复 답변 उत्तर جواب a y ans target gold expected ideal label summary""",
    "context": "context passage document article background excerpt evidence kontext contexto contexte contesto",
    "system": "system persona sysprompt",
}
_ASKS, _REPLIES, _CONTEXT, _SYSTEM = (words.split() for words in _WORDS.values())
_NOT_SHOWN = ("category",)  # read by a format, and shown to no model


@dataclass(frozen=True)
class Reading:
    """How the rows of a file are read.

    Args:
        format: a name of `instructft.data.formats.FORMATS`.
        columns: our column -> the file's, where they differ.
        ignore: columns and keys that nothing reads.
        because: what a guess rests on, a line for each mapped column; empty where the format is a known one.
        usable: rows that can be trained on, of those that were looked at.
    """

    format: str
    columns: dict[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    because: tuple[str, ...] = ()
    usable: float = 1.0

    def unread(self, names: Iterable[str]) -> list[str]:
        """The columns of a file that say nothing to a model, known by name or ignored."""
        read = {*FORMATS[self.format].known, *self.columns.values()} - set(self.ignore) - set(_NOT_SHOWN)
        return [name for name in names if name not in read]


def reading_of(
    rows: Sequence[Row], where: str, columns: Mapping[str, str] | None = None, choose: Choose | None = None
) -> Reading:
    """Find out how rows are read.

    >>> rows = [{"Frage": "Wie spät ist es?", "Antwort": "Kurz nach drei."}]
    >>> reading_of(rows, "rows.csv").columns
    {'question': 'Frage', 'answer': 'Antwort'}

    Args:
        rows: the first ones of the file.
        columns: what is known already, our column -> the file's.
        choose: asks whoever runs this; without it an ambiguous file is refused.

    Raises:
        DataError: no format fits, and no guess or more than one; with what to say.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise DataError(f"{where}: its rows have no columns")
    if columns:
        if missing := [theirs for theirs in columns.values() if theirs not in names]:
            raise DataError(f"{where}: has no column {', '.join(missing)}; its columns are {', '.join(names)}")
        return _tried(rows, detect_format(list(dict.fromkeys([*columns, *names])), where), dict(columns), where)
    try:
        known = detect_format(names, where)
    except DataError as error:
        guessed = _guessed(rows, names, where, choose)
        if guessed is None:
            raise error
        return guessed
    reading = _tried(rows, known, {}, where)
    texts = [name for name in names if _texts(rows, name)]
    rivals = [name for name in reading.ignore if name in texts and _hits(name, (*_ASKS, *_REPLIES))]
    if reading.usable < 0.5 or (known == "text" and len(texts) > 1) or rivals:
        return _guessed(rows, names, where, choose) or reading
    return reading


def _tried(rows: Sequence[Row], fmt: str, columns: dict[str, str], where: str, because: Iterable[str] = ()) -> Reading:
    """Read rows so, and see which can be used and what of them nothing reads."""
    rules = Rules(read=frozenset((*columns, *columns.values())))
    ignore: dict[str, None] = {}
    usable = 0
    for row in rows:
        mapped = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
        for _ in range(2):
            try:
                to_conversation(mapped, fmt, Rules(ignore=frozenset(ignore), read=rules.read))
            except Unread as unread:
                found = [finding.what.split("`")[1] for finding in unread.found if "`" in finding.what]
                if any(refused(name) for name in found) or not found:
                    raise DataError(f"{where}: {unread}") from unread
                ignore.update(dict.fromkeys(found))
                continue
            except Unusable:
                break
            usable += 1
            break
    return Reading(fmt, columns, tuple(ignore), tuple(because), usable / max(len(rows), 1))


# --------------------------------------------------------------------------------------------------------------------
# Guessing
# --------------------------------------------------------------------------------------------------------------------


def _guessed(rows: Sequence[Row], names: list[str], where: str, choose: Choose | None) -> Reading | None:
    """By the content of a single column, else by names and contents of two; None where nothing looks like either."""
    whole, rows = rows, rows[:GUESSED_BY]
    dialogues = [name for name in names if _is_dialogue(rows, name)]
    if dialogues:
        name = (
            dialogues[0] if len(dialogues) == 1 else _chosen("holds the conversation", dialogues, rows, where, choose)
        )
        return _tried(whole, "messages", {"messages": name}, where, [f"`{name}` holds lists of turns"])
    texts = [name for name in names if _texts(rows, name)]
    transcripts = [name for name in texts if all(_is_transcript(value) for value in _values(rows, name)[:20])]
    if len(transcripts) == 1 or len(texts) == 1:
        name = (transcripts or texts)[0]
        why = "is the one column of texts" if not transcripts else "holds conversations that are written out"
        return _tried(whole, "text", {"text": name}, where, [f"`{name}` {why}"])
    if not texts:
        return None
    question, answer = _pair(rows, texts, where, choose)
    columns, because = {"question": question, "answer": answer}, []
    for role, name in columns.items():
        because.append(f"`{name}` {_grounds(rows, name, _ASKS if role == 'question' else _REPLIES, role)}")
    for ours, words in (("context", _CONTEXT), ("system", _SYSTEM)):
        fits = [name for name in texts if name not in columns.values() and _hits(name, words)]
        if len(fits) == 1:
            columns[ours] = fits[0]
            because.append(f"`{fits[0]}` by its name")
    return _tried(whole, "question-answer", columns, where, because)


def _pair(rows: Sequence[Row], texts: list[str], where: str, choose: Choose | None) -> tuple[str, str]:
    """The column that asks and the one that answers."""
    facts = {name: _Facts.of(rows, name) for name in texts}
    pairs = [(q, a) for q in texts for a in texts if q != a]
    # a question comes first as a rule, and is rarely longer than what answers it
    order = {pair: 0.3 if texts.index(pair[0]) < texts.index(pair[1]) else 0.0 for pair in pairs}
    score = {(q, a): facts[q].asks + facts[a].replies + order[q, a] for q, a in pairs}
    ranked = sorted(pairs, key=lambda pair: -score[pair])
    best = ranked[0]
    near = [pair for pair in ranked if score[best] - score[pair] < _MARGIN]
    if len(near) == 1:
        return best
    asking = list(dict.fromkeys(q for q, _ in near))
    question = asking[0] if len(asking) == 1 else _chosen("asks", asking, rows, where, choose)
    answering = list(dict.fromkeys(a for q, a in near if a != question and q == question))
    answering = answering or [name for name in texts if name != question]
    answer = answering[0] if len(answering) == 1 else _chosen("answers", answering, rows, where, choose, question)
    return question, answer


def _chosen(
    does: str, candidates: list[str], rows: Sequence[Row], where: str, choose: Choose | None, question: str = ""
) -> str:
    if choose is not None:
        return choose(f"Which column of {where} {does}?", candidates)
    listed = "".join(f"\n  {name}: {short(str((_values(rows, name) or [''])[0]), 70)}" for name in candidates)
    example = {"holds the conversation": f"messages={candidates[0]}"}.get(does)
    if example is None:
        other = next((name for name in candidates if name != (question or candidates[0])), "NAME")
        example = f"question={question or candidates[0]} answer={other}"
    raise DataError(
        f"{where}: it is not clear which column {does}; it may be one of{listed}\nSay it: --columns {example}"
    )


@dataclass(frozen=True)
class _Facts:
    """How much a column looks like one that asks, and like one that answers."""

    asks: float
    replies: float

    @classmethod
    def of(cls, rows: Sequence[Row], name: str) -> _Facts:
        values = _values(rows, name)
        marks = _share(values, lambda text: text.rstrip().endswith(("?", "？", "؟")))
        words = _share(values, lambda text: len(text.split()) > 1 or (len(text) > 4 and not text.isascii()))
        distinct = len(set(values)) / max(len(values), 1)
        plain = _share(values, lambda text: bool(re.fullmatch(r"[\d\s.,:/TZ+-]+|https?://\S+|[0-9a-f-]{16,}", text)))
        about = -3.0 if not _named(name) and _is_about(name) else 0.0
        aside = -2.0 if _hits(name, (*_CONTEXT, *_SYSTEM)) else 0.0
        common = about + aside - 3 * plain - (1.5 if distinct < 0.2 else 0.0)
        asks = 3.0 * _hits(name, _ASKS) - 3.0 * _hits(name, _REPLIES) + 1.5 * marks + 1.5 * words
        # a label answers too, where nothing else does
        replies = 3.0 * _hits(name, _REPLIES) - 3.0 * _hits(name, _ASKS) - 1.5 * marks + 0.5 * words
        length = sum(map(len, values)) / max(len(values), 1)
        return cls(asks + common, replies + common + min(length / 1000, 0.3))


def _grounds(rows: Sequence[Row], name: str, words: Sequence[str], role: str) -> str:
    marks = _share(_values(rows, name), lambda text: text.rstrip().endswith(("?", "？", "؟")))
    grounds = ["by its name"] if _hits(name, words) else ["by what is in it"]
    if role == "question" and marks >= 0.2:
        grounds.append(f"{marks:.0%} of its texts end in a question mark")
    return ", ".join(grounds)


def _hits(name: str, words: Iterable[str]) -> bool:
    """Whether a column's name says one of these words, alone or inside a longer one."""
    lower = name.lower()
    apart = set(re.findall(r"[^\W_]+", re.sub(r"(?<=[a-zäöü])(?=[A-Z])", "_", name).lower()))
    return any(
        word in apart or (len(word) > 4 and word in lower) or (not word.isascii() and word in lower) for word in words
    )


def _named(name: str) -> bool:
    return _hits(name, (*_ASKS, *_REPLIES)) or name in (*QUESTIONS, *ANSWERS)


def _is_about(name: str) -> bool:
    """Whether a column of this name tells something about its row, and no part of it."""
    ledger = Ledger()
    ledger.rest({name: "x"}, (), "{}")
    return not ledger.found


def _values(rows: Sequence[Row], name: str) -> list[str]:
    return [row[name] for row in rows if isinstance(row.get(name), str) and not absent(row[name])]


def _texts(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds texts, in a tenth of the rows at least, and not only numbers of something."""
    values = _values(rows, name)
    return len(values) >= max(1, len(rows) // 10) and name not in FORMATS["hh"].columns


def _share(values: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, values)) / max(len(values), 1)


def _is_dialogue(rows: Sequence[Row], name: str) -> bool:
    """Whether most values are lists of turns, or the JSON text of such lists."""
    given = [row[name] for row in rows[:50] if not absent(row.get(name))]
    likely = [
        value for value in given if isinstance(value, list) or (isinstance(value, str) and value.lstrip()[:1] == "[")
    ]
    return len(likely) > len(given) // 2 and sum(map(_has_answer, likely)) > len(likely) // 2


def _has_answer(value: Any) -> bool:
    try:
        return any(message["role"] == "assistant" for message in messages_of(value, "", Ledger()))
    except (Unusable, Unread):
        return False


def _is_transcript(text: str) -> bool:
    try:
        return bool(rendered(text, "text", Ledger()))
    except (Unusable, Unread):
        return False
