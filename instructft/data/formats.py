"""How a row of each shape becomes a conversation, and what becomes of every column.

A conversation is a list of `instructft.prompt.conversation.Message`s, the last one an assistant's, or one message with
the role `text`: a document without speakers. A row that can be neither is `Unusable`, for a reason; a row that says
more than is read is `Unread`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from instructft.errors import DataError, UsageError
from instructft.formatting import nearest
from instructft.prompt.conversation import Conversation, Message
from instructft.prompt.layouts.messages import (
    CONTENT,
    REASONING,
    TOOLS,
    finished,
    is_part,
    messages_of,
    tools_in_system,
    with_tools,
)
from instructft.prompt.layouts.tool_calls import calls_of, parsed
from instructft.prompt.layouts.transcripts import best_path, divided, glaive, human_assistant, rendered
from instructft.prompt.ledger import Ledger, Unusable, absent, is_switch, refused, shown

Row = Mapping[str, Any]
SYSTEM = ("system", "system_prompt", "system_message")
OPTIONS = ("chat_template_kwargs", "template_options")
QUESTIONS = ("question", "query", "prompt", "problem", "instruction", "user", "input", "inputs")
ANSWERS = ("answer", "response", "output", "completion", "solution", "assistant", "targets")


@dataclass(frozen=True)
class Rules:
    """What a recipe says of how rows are read.

    Args:
        ignore: columns and keys of messages that are known not to matter.
        strip: take outer white space off texts.
        options: what every conversation tells its template, unless its row says otherwise.
        read: columns that the recipe maps to names of ours.
    """

    ignore: frozenset[str] = frozenset()
    strip: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    read: frozenset[str] = frozenset()


AS_IT_STANDS = Rules()


# --------------------------------------------------------------------------------------------------------------------
# Shapes
# --------------------------------------------------------------------------------------------------------------------


def _turns(row: Row, ledger: Ledger, column: str) -> list[Message]:
    """A column of turns: `{"role", "content"}` (OpenAI, TRL), `{"from", "value"}` (ShareGPT), or texts (LIMA)."""
    return messages_of(row.get(column), column, ledger)


def _rounds(row: Row, ledger: Ledger) -> list[Message]:
    """`{"conversation": [{"system", "input", "output"}, …]}`, as in XTuner and MOSS; or turns."""
    rounds = parsed(row.get("conversation"))
    if not isinstance(rounds, list | tuple) or not all(isinstance(r, Mapping) and "output" in r for r in rounds):
        return _turns(row, ledger, "conversation")
    messages: list[Message] = []
    for turn in rounds:
        for role, key in (("system", "system"), ("user", "input"), ("assistant", "output")):
            if not absent(turn.get(key)) or role == "assistant":
                messages += _side(turn.get(key), f"conversation[].{key}", role, ledger)
        ledger.rest(turn, {"system", "input", "output"}, "key `{}` of a message in `conversation`")
    return messages


def _prompt_completion(row: Row, ledger: Ledger) -> list[Message]:
    """`{"prompt", "completion"}`, each a text or a list of messages; loss lies on the completion alone."""
    return [*_side(row.get("prompt"), "prompt", "user", ledger), *_answer(row, "completion", ledger)]


def _side(value: Any, where: str, role: str, ledger: Ledger) -> list[Message]:
    """A text, or one in parts, as a message of this role; messages, or their JSON text, as they are: where they stand
    in place of a question, an answer among them is read and not trained."""
    given = parsed(value)
    if role == "user" and isinstance(given, Mapping) and isinstance(given.get("messages"), list | tuple):
        ledger.rest(given, {"messages"}, f"key `{{}}` in `{where}`")
        given = given["messages"]
    turns = [given] if isinstance(given, Mapping) else given
    if isinstance(turns, list | tuple) and turns and all(isinstance(turn, Mapping) for turn in turns):
        if all(map(_speaks, turns)):
            messages = messages_of(turns, where, ledger)
            for message in messages:
                if role == "user" and message["role"] == "assistant":
                    message["weight"] = 0
            return messages
        if all(map(is_part, turns)) and not (role == "assistant" and isinstance(value, str)):  # an answer in JSON
            return messages_of([{"role": role, "content": turns}], where, ledger)
    if isinstance(turns, list | tuple) and turns and all(map(_is_dialogue, turns)):
        ledger.unread(f"column `{where}`", value, "it holds several conversations, expected one; give each its own row")
        return []
    return [finished({"role": role, "content": ledger.text(value, where)})]


def _is_dialogue(value: Any) -> bool:
    """Whether a value is a list of messages."""
    turns = parsed(value)
    return isinstance(turns, list | tuple) and bool(turns) and all(isinstance(t, Mapping) and _speaks(t) for t in turns)


def _speaks(turn: Mapping[str, Any]) -> bool:
    return ("role" in turn or "from" in turn) and any(key in turn for key in (*CONTENT, "tool_calls"))


def _answer(row: Row, column: str, ledger: Ledger) -> list[Message]:
    """The answer of a row, with the thoughts before it where they stand in a column of their own."""
    messages = _side(row.get(column), column, "assistant", ledger)
    for name in REASONING:
        if name in row and not absent(row[name]) and not is_switch(row[name]) and not ledger.ignores(name):
            if len(messages) == 1 and "reasoning_content" not in messages[0] and isinstance(row[name], str):
                messages[0]["reasoning_content"] = ledger.text(row[name], name)
            else:
                ledger.unread(f"column `{name}`", row[name], "expected the thoughts before the one answer, as text")
    return messages


def _asked(row: Row, ledger: Ledger, question: str, answer: str) -> list[Message]:
    """A question with its `input` or `context`, what was said before (`history`), and the answer."""
    asked = _side(row.get(question), question, "user", ledger)
    for extra in ("input", "context"):
        if extra in (question, answer):
            continue
        if not isinstance(row.get(extra), str) and _is_dialogue(row.get(extra)):
            why = f"it holds messages, expected a text beside `{question}`; put the question behind them, in one list"
            ledger.unread(f"column `{extra}`", row[extra], why)
        elif asked and (text := _text(row, extra, ledger)):
            asked[-1][extra] = text
    return [*_history(row, ledger), *asked, *_answer(row, answer, ledger)]


def _text(row: Row, column: str, ledger: Ledger) -> str:
    text = ledger.text(row.get(column), column)
    return "" if text.isspace() else text


def _history(row: Row, ledger: Ledger) -> list[Message]:
    """`[["question", "answer"], …]`, as in LLaMA-Factory's Alpaca format; or turns."""
    if "history" not in row or absent(history := parsed(row["history"])):
        return []
    if not isinstance(history, list | tuple):
        ledger.unread("column `history`", row["history"], "expected [[question, answer], …]")
        return []
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        return messages_of(history, "history", ledger)
    sides = [(value, role) for pair in history for value, role in zip(pair, ("user", "assistant"), strict=True)]
    return [message for value, role in sides for message in _side(value, "history", role, ledger)]


def _first(names: Iterable[str], row: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _question_answer(row: Row, ledger: Ledger) -> list[Message]:
    """`{"question", "answer"}` under any of the names that data sets have for them."""
    answer = next((name for name in ANSWERS if not absent(row.get(name))), _first(ANSWERS, row) or "answer")
    question = next((name for name in QUESTIONS if not absent(row.get(name))), _first(QUESTIONS, row) or "question")
    # the recipe may map a column, which then is there twice
    known = {question, answer, "input", *(name for name in row if row[name] in (row.get(question), row.get(answer)))}
    for name in (*QUESTIONS, *ANSWERS):
        if name not in known and not absent(row.get(name)) and not ledger.ignores(name):
            why = f"`{question}` and `{answer}` are read, and a row has one each"
            ledger.unread(f"column `{name}`", row[name], why)
    return _asked(row, ledger, question, answer)


def _xlam(row: Row, ledger: Ledger) -> list[Message]:
    """`{"query", "tools", "answers"}`, the answers being calls, as in Salesforce's xLAM."""
    calls = calls_of(row.get("answers"), "column `answers`", ledger)
    answer: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    return [*_side(row.get("query"), "query", "user", ledger), answer]


def _hh(row: Row, ledger: Ledger) -> list[Message]:
    """`{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": …}`: the preferred dialogue of Anthropic HH."""
    value = row.get("chosen")
    if (messages := human_assistant(ledger.text(value, "chosen"), "chosen", ledger)) is not None:
        return messages
    if isinstance(parsed(value), list | dict) or any(not absent(row.get(name)) for name in QUESTIONS):
        ledger.rest({name: row.get(name) for name in ("chosen", "rejected")}, (), "column `{}`")
        ledger.close()
    raise Unusable("not_a_dialogue", f"`chosen` is {shown(value)}, expected Human: … Assistant: …")


def _glaive(row: Row, ledger: Ledger) -> list[Message]:
    """Glaive's function calling: `{"system", "chat"}`, or both in one text under `sample`."""
    column = _first(("chat", "sample"), row) or "chat"
    system, chat = ledger.text(row.get("system"), "system"), ledger.text(row.get(column), column)
    if column == "sample":
        system, chat = divided(chat)
    return glaive(system, chat, column, ledger)


def _document(row: Row, ledger: Ledger) -> list[Message]:
    """`{"text"}`: a document; or a conversation, where it is written out as Guanaco, Llama 2 and ChatML write them."""
    text = ledger.text(row.get("text"), "text")
    if not text.strip():
        raise Unusable("empty_text", f"`text` is {shown(row.get('text'))}")
    return rendered(text, "text", ledger) or [{"role": "text", "content": text}]


def _tree(row: Row, ledger: Ledger) -> list[Message]:
    """`{"message_tree_id", "prompt": {"text", "role", "replies": […]}}`, a tree of OpenAssistant: its best path."""
    return best_path(parsed(row.get("prompt")), "prompt", ledger)


_DIALOGUES = ("dialogue", "dialog", "turns", "data")


def _dialogue(row: Row, ledger: Ledger) -> list[Message]:
    """Turns under a name that tells less: UltraChat's `data`, `dialogue`, `turns`."""
    return _turns(row, ledger, _first(_DIALOGUES, row) or "dialogue")


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    Args:
        columns: the columns that a row must have; they also identify the format.
        to_messages: one row to its messages; raises `Unusable`, and tells the ledger what it does not read.
        optional: further columns that are read when they are there.
        names: other names of a column that must be there.
    """

    columns: tuple[str, ...]
    to_messages: Callable[[Row, Ledger], list[Message]]
    optional: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def lacks(self, present: Iterable[str]) -> list[str]:
        """The columns that must be there and are not, under no name."""
        have = set(present)
        return [column for column in self.columns if column not in have and have.isdisjoint(self.names.get(column, ()))]

    @cached_property
    def known(self) -> frozenset[str]:
        """All columns that are read."""
        names = [name for names in self.names.values() for name in names]
        return frozenset((*self.columns, *self.optional, *names, *EVERYWHERE))


EVERYWHERE = (*SYSTEM, *TOOLS, *OPTIONS)  # columns that are read in every format but `text`
_EXTRAS = ("input", "context", "history", "category", *REASONING)

# The order is the order of detection: the first format whose columns are all there.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), partial(_turns, column="messages")),
    "sharegpt": Format(("conversations",), partial(_turns, column="conversations")),
    "conversation": Format(("conversation",), _rounds),
    "thread": Format(("thread",), partial(_turns, column="thread")),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, REASONING),
    "xlam": Format(("query", "tools", "answers"), _xlam),
    "glaive": Format(("chat",), _glaive, names={"chat": ("sample",)}),
    "tree": Format(("message_tree_id", "prompt"), _tree),
    "dolly": Format(("instruction", "response"), partial(_asked, question="instruction", answer="response"), _EXTRAS),
    "alpaca": Format(("instruction", "output"), partial(_asked, question="instruction", answer="output"), _EXTRAS),
    "question-answer": Format(
        ("question", "answer"),
        _question_answer,
        _EXTRAS,
        {"question": QUESTIONS[1:], "answer": ANSWERS[1:]},
    ),
    "hh": Format(("chosen",), _hh, ("rejected",)),
    "text": Format(("text",), _document),
    "dialogue": Format(("dialogue",), _dialogue, names={"dialogue": _DIALOGUES[1:]}),
}


def detect_format(columns: list[str], where: str) -> str:
    """Name the format whose columns are all among `columns`.

    >>> detect_format(["instruction", "input", "output"], "rows.json")
    'alpaca'

    Raises:
        DataError: no format fits; the message lists what was found and what each format needs.
    """
    if "parent_id" in columns and ("message_id" in columns or {"role", "text"} <= set(columns)):
        raise DataError(
            f"{where}: each row is one message of a tree (columns {', '.join(columns)}); trees are built of the "
            "columns message_id, parent_id, role and text, as OpenAssistant's flat files have them: give them these "
            'names, or write each conversation as one row: {"messages": [{"role": …, "content": …}, …]}'
        )
    for name, fmt in FORMATS.items():
        if not fmt.lacks(columns):
            return name
    needs = "\n".join(f"  {name}: {', '.join(fmt.columns)}" for name, fmt in FORMATS.items())
    lower = {column.strip().lower(): column for column in columns}
    fits = next((fmt for fmt in FORMATS.values() if not fmt.lacks(lower)), None)
    mapping = ", ".join(f"{ours}: {_quoted(theirs)}" for ours, theirs in lower.items() if fits and ours in fits.known)
    raise DataError(
        f"{where}: no known format has the columns {', '.join(columns) or '(none)'}.\n"
        + "".join(f"`{name}`: {refused(name)}.\n" for name in columns if refused(name))
        + f"A row needs the columns of one of these formats:\n{needs}\n"
        "If yours have other names, map them in the recipe: data.datasets[].columns: "
        + (f"{{{mapping}}}" if mapping else "{instruction: question, …}")
    )


def _quoted(name: str) -> str:
    """A name as YAML takes it inside braces."""
    return name if name.isidentifier() else json.dumps(name, ensure_ascii=False)


def columns_asked(words: Iterable[str]) -> dict[str, str]:
    """What `--columns` maps: a column that a format expects -> the column of the file.

    >>> columns_asked(["instruction=question", "output=answer"])
    {'instruction': 'question', 'output': 'answer'}

    Raises:
        UsageError: no pair, or the first of it is no column of any format.
    """
    names = sorted({name for fmt in FORMATS.values() for name in fmt.known})
    found = {}
    for word in words:
        ours, _, theirs = word.partition("=")
        if not ours or not theirs:
            raise UsageError(f"--columns: found {word}, expected OURS=THEIRS, as in instruction=question")
        if ours not in names:
            raise UsageError(f"--columns: no format expects a column {ours}{nearest(ours, names)}")
        found[ours] = theirs
    return found


# --------------------------------------------------------------------------------------------------------------------
# Rows to conversations
# --------------------------------------------------------------------------------------------------------------------


def to_conversation(row: Row, fmt: str, rules: Rules = AS_IT_STANDS) -> Conversation:
    """Turn one row into a conversation that ends with an assistant's answer.

    Texts stay as they are, and so do turns of one speaker in a row. What follows the last answer is left off, since it
    carries no loss; an empty system message is none.

    >>> to_conversation({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca")
    [{'role': 'user', 'content': 'Add.', 'input': '1 2'}, {'role': 'assistant', 'content': '3'}]

    Raises:
        Unusable: `no_assistant_turn`, `empty_answer`, `empty_prompt`, `empty_text`, `not_text`, `not_a_dialogue`.
        Unread: the row says something that nothing reads.
    """
    if (plain := _plain(row, fmt, rules)) is not None:
        return plain
    shape = FORMATS[fmt]
    ledger = Ledger(rules.ignore, rules.strip)
    present = {name for name, value in row.items() if not absent(value)}
    if lacking := shape.lacks(present):
        _refuse_lacking(row, fmt, lacking)
    messages = shape.to_messages(row, ledger)
    options = dict(rules.options)
    for name in OPTIONS:
        if name in present:
            options |= _options(row[name], name, ledger)
    given = next((row[name] for name in TOOLS if name in present), None)
    if fmt != "glaive":
        messages = _with_system(messages, row, [name for name in SYSTEM if name in present], ledger)
    if given is not None and tools_in_system(messages, given):  # Hermes: the template would list them once more
        given = None
    conversation = with_tools(messages, given, options, ledger)
    if len(row) > len(shape.columns):
        rest = {name: value for name, value in row.items() if name not in shape.known and name not in rules.read}
        repeated = [name for name, value in rest.items() if name in present and _repeats(name, value, messages)]
        ledger.rest(rest, repeated, "column `{}`")
    ledger.close()
    if messages and messages[0]["role"] == "text":
        return conversation
    while conversation and conversation[-1]["role"] != "assistant":
        conversation.pop()
    _must_teach(conversation)
    return conversation


_PLAIN = {"alpaca": ("instruction", "output", "input"), "dolly": ("instruction", "response", "context")}


def _plain(row: Row, fmt: str, rules: Rules) -> Conversation | None:
    """A row of three texts that nothing has to be found in, as most are, in a third of the time; None: another row."""
    if len(row) != 3 or (names := _PLAIN.get(fmt)) is None or rules.strip or rules.options:
        return None
    question, answer, extra = map(row.get, names)
    if type(question) is not str or type(answer) is not str or type(extra) is not str:
        return None
    if question.lstrip()[:1] in _NOT_PLAIN or answer.lstrip()[:1] in _NOT_PLAIN or "<think>" in answer:
        return None
    try:
        f"{question}{answer}{extra}".encode()
    except UnicodeEncodeError:
        return None
    asked: Message = {"role": "user", "content": question}
    if not absent(extra):
        asked[names[2]] = extra
    return Conversation([asked, {"role": "assistant", "content": answer}])


_NOT_PLAIN = ("", "[", "{")  # no text, or maybe JSON


def _refuse_lacking(row: Row, fmt: str, lacking: list[str]) -> None:
    """A row without what its format needs: no question, no answer, or of another kind altogether."""
    have = ", ".join(name for name, value in row.items() if not absent(value)) or "none"
    detail = f"nothing in `{'`, `'.join(lacking)}`, which a row of {fmt} needs; its columns with a value: {have}"
    if fmt == "text":
        raise Unusable("empty_text", detail)
    answers = ("completion", "response", "output", "answer", "answers")
    if lacking[-1] in answers:
        raise Unusable("empty_answer", detail)
    if lacking[0] in ("instruction", "query", "question", "prompt"):
        # what a question refers to may stand alone
        if fmt in ("alpaca", "dolly") and not (absent(row.get("input")) and absent(row.get("context"))):
            return
        raise Unusable("empty_prompt", detail)
    raise Unusable("no_assistant_turn" if row.get(lacking[0]) == [] else "not_a_dialogue", detail)


def _with_system(messages: list[Message], row: Row, found: list[str], ledger: Ledger) -> list[Message]:
    """The system message of the columns `found` before the others, one of the messages below it; an empty one is
    none."""
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip() or "tools" in m]
    if not found:
        return messages
    text = "\n\n".join(message["content"] for message in _side(row[found[0]], found[0], "system", ledger))
    for name in found[1:]:
        if row[name] != row[found[0]] and not ledger.ignores(name):
            ledger.unread(f"column `{name}`", row[name], f"`{found[0]}` is the system message already")
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    first = messages[0]
    if first["content"] != text:
        first = {**first, "content": f"{text}\n\n{first['content']}"}
    return [first, *messages[1:]]


def _options(value: Any, name: str, ledger: Ledger) -> dict[str, Any]:
    given = parsed(value)
    if not isinstance(given, Mapping):
        ledger.unread(f"column `{name}`", value, "expected what the template takes, as {enable_thinking: false}")
        return {}
    return {key: option for key, option in given.items() if option is not None and not ledger.ignores(key, name)}


_ALONE = 20  # characters: a shorter text may stand in a conversation by chance


def _repeats(name: str, value: Any, messages: list[Message]) -> bool:
    """Whether a column says once more what the conversation says: Alpaca's `text`, UltraChat's `prompt`, a schema."""
    if refused(name):
        return False
    contents = [m["content"].strip() for m in messages if m["content"].strip()]
    extras = [str(m[key]).strip() for m in messages for key in ("input", "context") if key in m]
    given = value if isinstance(value, str) else parsed(value)
    if isinstance(given, str):
        text = given.strip()
        stands = len(text) >= _ALONE and any(text in content for content in contents)
        return stands or text in [*contents, *extras] or (bool(contents) and all(each in text for each in contents))
    if isinstance(given, list):
        try:
            again = messages_of(given, "", Ledger())
        except Unusable:
            return False
        return bool(again) and all(m["content"].strip() in contents for m in again)
    return False


def _must_teach(conversation: Conversation) -> None:
    """Refuse a conversation that has no answer, an empty one, or nothing that is answered."""
    if not conversation:
        raise Unusable("no_assistant_turn", "expected a message of the assistant; there is none")
    for number, message in enumerate(conversation, 1):
        if message["role"] == "assistant" and absent(message["content"]) and not message.get("tool_calls"):
            raise Unusable("empty_answer", f"message {number} is an answer with nothing in it")
    if not any(_asks(message) for message in conversation):
        raise Unusable("empty_prompt", "expected a message of the user with something in it; there is none")


def _asks(message: Message) -> bool:
    return message["role"] in ("user", "tool") and any(
        key in message and str(message[key]).strip() for key in ("content", "input", "context")
    )
