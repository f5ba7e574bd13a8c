"""Messages as data sets and servers write them, in the one normal form of `instructft.prompt.conversation`.

Every role, key and part of a content is read, known not to matter, or written down in the `Ledger`. Texts stay as they
stand: nothing is stripped or joined, unless `data.strip` asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from instructft.prompt.conversation import Conversation, Message
from instructft.prompt.layouts.tool_calls import calls_of, parsed, tools_of
from instructft.prompt.ledger import Ledger, Unusable, absent, compact, is_switch, shown

_NAMES = {
    "system": "system sys system_prompt",
    "developer": "developer",
    "user": "user human prompter instruction prompt query question input customer client",
    "assistant": "assistant gpt chatgpt bot chatbot model ai bing bard claude gemini agent output response answer "
    "completion gpt4 gpt_4",
    "tool": "tool ipython function observation tool_response tool_result tool_results tool_output function_response "
    "function_result",
    "call": "function_call tool_call tool_calls",  # an assistant's turn whose content is calls
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}

SPEAKER = ("role", "from", "speaker")
CONTENT = ("content", "value", "text")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
FLAGS = ("weight", "train", "training", "loss", "loss_weight", "loss_scale", "mask", "masked")  # 0: no loss
_INVERSE = ("mask", "masked")  # of these 1 means no loss
_NO_SHARE = (
    "an answer is trained or not (1 or 0), and each of its tokens counts as much as any other; write 0 or 1, leave the "
    "flag out with data.ignore, or give such rows a data set of their own and train that more or less often "
    "(data.datasets[].repeat)"
)
SPANS = ("train_detail", "training_detail")
TOOLS = ("tools", "functions")
_CALLS = ("tool_calls", "function_call")
_OWN_SPANS = "train_spans"  # as they are in normal form
_KNOWN = frozenset(
    (*SPEAKER, *CONTENT, *REASONING, *FLAGS, *SPANS, _OWN_SPANS, *TOOLS, *_CALLS, "tool_call_id", "name")
)

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_THINKING_PARTS = ("thinking", "reasoning")
PARTS = (*_TEXT_PARTS, *_THINKING_PARTS, "tool_use", "tool_result", "image", "image_url", "input_image", "input_audio")
_PART_KEYS = frozenset(("type", "text", "refusal"))
# The only spelling that says exactly which line breaks belong to it; what is written otherwise stays in the content.
_THINK = re.compile(r"<think>\n((?!\s).*?(?<!\s))\n</think>\n\n((?!\s).*)", re.DOTALL)


def conversation_of(
    turns: Any,
    where: str = "messages",
    ledger: Ledger | None = None,
    tools: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Conversation:
    """A conversation of any layout in normal form; without a ledger of the caller's, what is not read is an error.

    >>> conversation_of([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]

    Raises:
        Unusable: `not_a_dialogue`, `not_text`.
        Unread: something in it is read by nothing.
    """
    book = ledger or Ledger()
    conversation = with_tools(messages_of(turns, where, book), tools, options, book)
    if ledger is None:
        book.close()
    return conversation


def with_tools(messages: list[Message], tools: Any, options: Mapping[str, Any] | None, ledger: Ledger) -> Conversation:
    """Messages with the tools of their row, or those that one of them names."""
    known = tools_of(tools, "column `tools`", ledger)
    for found in [message.pop("tools") for message in messages if "tools" in message]:
        if known is not None and found != known:
            ledger.unread("key `tools` of a message", found, "the conversation has other tools already")
        known = known or found
    return Conversation(messages, known, options)


_TOOLS_IN_TEXT = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)


def tools_in_system(messages: list[Message], tools: Any) -> bool:
    """Whether the system message lists these tools already, written out in its text as Hermes has them.

    >>> told = {"role": "system", "content": "Use <tools>[{'name': 'f'}]</tools>."}
    >>> tools_in_system([told], [{"name": "f"}]), tools_in_system([told], [{"name": "g"}])
    (True, False)
    """
    if not messages or messages[0]["role"] != "system":
        return False
    wanted = tools_of(tools, "", Ledger())
    for text in _TOOLS_IN_TEXT.findall(messages[0]["content"]):
        lines = [parsed(line) for line in text.strip().splitlines()]
        given = lines if all(isinstance(line, Mapping) for line in lines) else parsed(text)
        if wanted and not isinstance(given, str) and tools_of(given, "", Ledger()) == wanted:
            return True
    return False


def messages_of(turns: Any, where: str, ledger: Ledger) -> list[Message]:
    """A list of turns, or its JSON text, as messages; one that names tools has them under `tools`."""
    given = _as_turns(parsed(turns))
    if not isinstance(given, list | tuple) or not all(isinstance(turn, Mapping | str) for turn in given):
        raise Unusable("not_a_dialogue", f"`{where}` is {shown(turns)}, expected a list of messages")
    messages: list[Message] = []
    if given and all(isinstance(turn, str) and not isinstance(parsed(turn), Mapping) for turn in given):
        for number, text in enumerate(given):  # LIMA and UltraChat: texts in turn, the user's first
            role = "assistant" if number % 2 else "user"
            messages.append(finished({"role": role, "content": ledger.text(text, where)}))
        return messages
    for turn in given:
        turn = parsed(turn)
        if not isinstance(turn, Mapping):
            raise Unusable("not_a_dialogue", f"`{where}` holds {shown(turn)} among messages, expected a message")
        name, content = turn.get("role"), turn.get("content")
        if len(turn) == 2 and name in ("system", "user", "assistant") and _is_text(content):
            messages.append(finished({"role": name, "content": ledger.text(content, f"{where}[].content")}))
        else:
            _read(_of_parts(turn, given), where, ledger, messages)
    return messages


def _is_text(content: Any) -> bool:
    """Whether a content is a text that does not look like parts written out in one."""
    return isinstance(content, str) and not content.lstrip().startswith(("[{", "[ {"))


def _of_parts(turn: Mapping[str, Any], given: Any) -> Mapping[str, Any]:
    """A turn with its content in parts, where the conversation's contents are parts written out as text.

    So CSV files and databases have them. An answer alone that looks so is an answer in JSON, as a model may be taught.
    """
    key = next((key for key in CONTENT if not absent(turn.get(key))), None)
    parts = None if key is None or _is_text(turn[key]) or _role(turn) == "tool" else _parts_in(turn[key])
    if key is None or parts is None or not any(_asks_in_parts(one) for one in map(parsed, given)):
        return turn
    return {**turn, key: parts}


def _asks_in_parts(turn: Any) -> bool:
    """Whether a turn is a user's, or the system's, and in parts."""
    if not isinstance(turn, Mapping) or _role(turn) not in ("system", "developer", "user"):
        return False
    return any(
        not isinstance(turn[key], Mapping) and _parts_in(turn[key]) for key in CONTENT if not absent(turn.get(key))
    )


def _parts_in(content: Any) -> list[Any] | None:
    """The parts of a content, also of a JSON text that spells them."""
    given = parsed(content)
    if isinstance(given, list) and given and all(isinstance(part, Mapping) and is_part(part) for part in given):
        return given
    return None


def is_part(part: Mapping[str, Any]) -> bool:
    """Whether an object is a part of a content: of a known type, and with a text where it is one of text."""
    kind = part.get("type")
    return kind in PARTS and (kind not in _TEXT_PARTS or "text" in part or "refusal" in part)


def _role(turn: Mapping[str, Any]) -> str | None:
    """The role of who speaks; None where nobody does that is known here."""
    speaker = next((turn[key] for key in SPEAKER if not absent(turn.get(key))), None)
    return ROLES.get(re.sub(r"[\s-]", "_", str(speaker).strip().rstrip(":").lower()))


def _as_turns(given: Any) -> Any:
    """Columns of turns as turns: `{"role": […], "content": […]}`, which `datasets` makes of a `Sequence` of them."""
    if not isinstance(given, Mapping) or not any(name in given for name in SPEAKER):
        return given
    if (
        not all(isinstance(column, list | tuple) for column in given.values())
        or len(set(map(len, given.values()))) != 1
    ):
        return given
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


def _read(turn: Mapping[str, Any], where: str, ledger: Ledger, messages: list[Message]) -> None:
    """One turn of any layout: a message, or several where it holds the answers of several tools."""
    speaker = next((turn[key] for key in SPEAKER if not absent(turn.get(key))), None)
    role = _role(turn)
    if role is None:
        known = "system, developer, user, assistant, tool, and names like human, gpt, observation"
        ledger.unread(f"role of a message in `{where}`", speaker, f"expected {known}")
        return
    names = (*CONTENT, "refusal") if role == "assistant" else CONTENT  # OpenAI: what is said in place of a content
    key = next((key for key in names if not absent(turn.get(key))), "content")
    value = turn.get(key, turn.get("value", turn.get("text")))
    extras = [name for name in ("input", "context") if role == "user"]
    twice = [name for name in (*CONTENT, *SPEAKER) if name in turn and _again(turn, name, key, speaker)]
    repeated = [name for name in turn if name not in _KNOWN and isinstance(value, str) and turn[name] == value]
    known_here = _KNOWN.difference(twice).union(extras, repeated, [key])
    ledger.rest(turn, known_here, f"key `{{}}` of a message in `{where}`", role)
    if role == "call":
        _add_calls(calls_of(value, f"`{where}`: a turn of {speaker}", ledger), turn, where, ledger, messages)
        return
    message: Message = {"role": role, "content": ""}
    parts = _Parts(message, where, ledger)
    message["content"] = parts.text(value)
    for extra in extras:
        if text := ledger.text(turn.get(extra), f"{where}[].{extra}"):
            message[extra] = text
    for name in TOOLS:
        if tools := tools_of(turn.get(name), f"key `{name}` of a message in `{where}`", ledger):
            message["tools"] = tools
    for name in ("name", "tool_call_id") if role == "tool" else ("name",):
        if not absent(turn.get(name)):
            message[name] = turn[name]
    if role == "assistant":
        for name in _CALLS:
            if calls := calls_of(turn.get(name), f"key `{name}` of a message in `{where}`", ledger):
                message["tool_calls"] = [*message.get("tool_calls", ()), *calls]
        for name in REASONING:
            _add_reasoning(message, turn.get(name), f"key `{name}` of a message in `{where}`", ledger)
    else:
        for name in (*REASONING, *_CALLS):
            if not absent(turn.get(name)) and not is_switch(turn[name]) and not ledger.ignores(name, role):
                ledger.unread(f"key `{name}` of a message in `{where}`", turn[name], f"a {role} has none")
    _weigh(message, turn, where, ledger)
    messages += parts.tools
    if not (parts.tools and not message["content"]):  # nothing but the answers of tools
        messages.append(finished(message))


def _again(turn: Mapping[str, Any], name: str, content: str, speaker: Any) -> bool:
    """Whether a second name for the content or the speaker says something else."""
    first = turn.get(content) if name in CONTENT else speaker
    return not absent(turn[name]) and turn[name] != first


def _add_calls(calls: list[Any], turn: Mapping[str, Any], where: str, ledger: Ledger, messages: list[Message]) -> None:
    """Calls in turns of their own belong to the assistant's words before them, or to the calls before them."""
    if not calls:
        return
    if messages and messages[-1]["role"] == "assistant":
        last = messages[-1]
        last["tool_calls"] = [*last.get("tool_calls", ()), *calls]
    else:
        last = {"role": "assistant", "content": "", "tool_calls": calls}
        messages.append(last)
    _weigh(last, turn, where, ledger)


class _Parts:
    """Reads a content that may be in parts; what is no text of it goes where it belongs."""

    def __init__(self, message: Message, where: str, ledger: Ledger):
        self.message, self.where, self.ledger = message, where, ledger
        self.tools: list[Message] = []  # answers of tools, which Anthropic puts into a user's turn

    def text(self, value: Any) -> str:
        place = f"{self.where}[].content"
        if isinstance(value, Mapping):
            if isinstance(value.get("parts"), list | tuple):  # as ChatGPT exports it
                return "".join(self._part(part) for part in value["parts"])
            return self._part(value) if "type" in value else self.ledger.text(value, place)
        if not isinstance(value, list | tuple):
            return self.ledger.text(value, place)
        in_parts = all(isinstance(p, str) or (isinstance(p, Mapping) and ("type" in p or "text" in p)) for p in value)
        if not in_parts or (self.message["role"] == "tool" and not all(self._is_text(p) for p in value)):
            return self.ledger.text(compact(value), place)
        return "".join(self._part(part) for part in value)

    @staticmethod
    def _is_text(part: Any) -> bool:
        return isinstance(part, str) or part.get("type", "text") in _TEXT_PARTS

    def _part(self, part: Any) -> str:
        ledger, kind = self.ledger, "text" if isinstance(part, str) else part.get("type", "text")
        if isinstance(part, str):
            return ledger.text(part, f"{self.where}[].content[]")
        place, role = f"part `{kind}` of a content in `{self.where}`", self.message["role"]
        if kind in _TEXT_PARTS:
            ledger.rest(part, _PART_KEYS, f"key `{{}}` in a {place}")
            text = part.get("text") or part.get("refusal")
            if isinstance(text, Mapping) and "value" in text:  # OpenAI's threads
                ledger.rest(text, {"value"}, f"key `{{}}` of a text in a {place}")
                text = text["value"]
            return ledger.text(text, f"{self.where}[].content[].text")
        if kind in _THINKING_PARTS and role == "assistant":
            key = next((k for k in ("thinking", "reasoning", "text") if not absent(part.get(k))), "text")
            ledger.rest(part, {"type", key}, f"key `{{}}` in a {place}")
            _add_reasoning(self.message, part.get(key), place, ledger)
        elif kind == "tool_use" and role == "assistant":
            ledger.rest(part, {"type", "id", "name", "input"}, f"key `{{}}` in a {place}")
            call = {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
            self.message["tool_calls"] = [*self.message.get("tool_calls", ()), *calls_of(call, place, ledger)]
        elif kind == "tool_result":
            known = {"type", "tool_use_id", "content", *(["is_error"] if not part.get("is_error") else ())}
            ledger.rest(part, known, f"key `{{}}` in a {place}")
            result: Message = {"role": "tool", "content": ""}
            result["content"] = _Parts(result, self.where, ledger).text(part.get("content"))
            if not absent(part.get("tool_use_id")):
                result["tool_call_id"] = part["tool_use_id"]
            self.tools.append(result)
        elif not ledger.ignores(kind, role):
            ledger.unread(
                place, part, "expected text, thinking, tool_use or tool_result; images and sound are not read"
            )
        return ""


def _add_reasoning(message: Message, value: Any, where: str, ledger: Ledger) -> None:
    if absent(value) or is_switch(value) or ledger.ignores(where.split("`")[1], "assistant"):
        return
    if isinstance(value, list | tuple):  # blocks of thinking
        value = "".join(str(b.get("thinking", b.get("text", ""))) if isinstance(b, Mapping) else str(b) for b in value)
    if not isinstance(value, str):
        ledger.unread(where, value, "expected the thoughts before the answer, as text")
    elif message.get("reasoning_content", value) != value and where.startswith("key"):
        ledger.unread(where, value, "the message has other thoughts under another name")
    else:
        before = "" if where.startswith("key") else message.get("reasoning_content", "")
        message["reasoning_content"] = before + ledger.text(value, where)


def finished(message: Message) -> Message:
    """An assistant's thoughts out of its content, where that loses nothing."""
    content = message["content"]
    if message["role"] == "assistant" and content.startswith("<think>") and "train_spans" not in message:
        found = _THINK.fullmatch(content)
        if found and content.count("<think>") == content.count("</think>") == 1:
            thoughts, answer = found.groups()
            if message.get("reasoning_content", thoughts) == thoughts:
                message["reasoning_content"], message["content"] = thoughts, answer
    return message


# --------------------------------------------------------------------------------------------------------------------
# Which messages carry loss
# --------------------------------------------------------------------------------------------------------------------


def _weigh(message: Message, turn: Mapping[str, Any], where: str, ledger: Ledger) -> None:
    """Read what a turn says of its loss into `weight` and `train_spans`."""
    role = message["role"]
    for name in FLAGS:
        value = turn.get(name)
        if value is None or ledger.ignores(name, role):
            continue
        place, share = f"key `{name}` of a message in `{where}`", _share(value)
        if share is None:
            ledger.unread(place, value, "expected 0 or 1, true or false")
        elif role != "assistant":
            if share != 0 and name not in _INVERSE:
                ledger.unread(
                    place.replace("of a message", f"of a {role}'s message"),
                    value,
                    f"only answers carry loss; where this does not matter: data.ignore: [{role}.{name}]",
                )
        elif share not in (0, 1):
            ledger.unread(place, value, _NO_SHARE)
        elif (share == 0) != (name in _INVERSE):
            message["weight"] = 0
    for name in SPANS:
        if not absent(turn.get(name)) and not ledger.ignores(name, role):
            _spans(message, turn[name], f"key `{name}` of a message in `{where}`", ledger)
    if not absent(own := turn.get(_OWN_SPANS)) and not ledger.ignores(_OWN_SPANS, role):
        named = ("begin_offset", "end_offset", "train")
        details: Any = own
        with suppress(TypeError, ValueError):
            details = [dict(zip(named, (begin, end - 1, train), strict=True)) for begin, end, train in details]
        _spans(message, details, f"key `{_OWN_SPANS}` of a message in `{where}`", ledger, rest=True)


def _share(value: Any) -> float | None:
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        share = float(value)
    except (TypeError, ValueError):
        return None
    return 1.0 if share != share else share  # NaN, as pandas writes null


def _spans(message: Message, value: Any, where: str, ledger: Ledger, rest: bool = False) -> None:
    """Axolotl's `[{"begin_offset": 0, "end_offset": 8, "train": false}, …]`, both ends included.

    Args:
        rest: whether characters that no span names are trained.
    """
    details = parsed(value)
    content = message["content"]
    spans: list[tuple[int, int, bool]] = []
    at = 0
    try:
        for detail in sorted(details, key=lambda d: int(d["begin_offset"])):
            begin, end = int(detail["begin_offset"]), int(detail["end_offset"]) + 1
            if not at <= begin < end <= max(len(content), at):
                raise ValueError
            spans += [(at, begin, rest)] if at < begin else []
            spans.append((begin, end, bool(detail["train"])))
            at = end
    except (TypeError, KeyError, ValueError):
        ledger.unread(
            where, value, f"expected [{{begin_offset, end_offset, train}}, …] within the {len(content)} characters"
        )
        return
    spans += [(at, len(content), rest)] if at < len(content) else []
    trained = any(train for _, _, train in spans)
    if message["role"] != "assistant":
        if trained:
            ledger.unread(where, value, "only answers carry loss")
    elif not trained:
        message["weight"] = 0
    elif not all(train for _, _, train in spans):
        message["train_spans"] = spans
