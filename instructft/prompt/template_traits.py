"""What a chat template reads: where it wants thoughts and calls, which roles it knows, and what ends an answer in it.

Templates differ in all of this and say nothing of it, so each is asked by rendering small conversations with marks in
them and looking for the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from instructft.prompt.conversation import Conversation, Message

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
TOOL_ROLES = ("tool", "ipython", "function", "observation")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_NAME, _VALUE, _THOUGHT, _ANSWER, _RESULT, _ORDER = "look7up", "Oslo7", "Thought7", "Answer-7", "Result7", "Order7"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_QUESTION: Message = {"role": "user", "content": "Q"}
_UNSET = object()


def split_thought(content: str) -> tuple[str, str]:
    """A think block at the beginning of an answer, and the answer without it.

    >>> split_thought("<think>\\neasy\\n</think>\\n\\n2")
    ('easy', '2')
    """
    found = _THINK.match(content) if "<think>" in content else None
    return (found[1].strip("\n"), content[found.end() :]) if found else ("", content)


def with_thought(thought: str, content: str) -> str:
    """An answer that begins with its thought, in the form that DeepSeek R1 and Qwen 3 write."""
    return f"<think>\n{thought}\n</think>\n\n{content}"


class Traits:
    """What one template reads.

    Args:
        text: renders a conversation, with or without generation prompt; None where the template refuses it.
        specials: the texts of the tokenizer's special tokens.
    """

    def __init__(self, text: Callable[[Conversation, bool], str | None], specials: Sequence[str]):
        self._text = text
        longest = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        run = self._special.pattern
        self._closing = re.compile(rf"((?:{run})+)(?:\s|{run})*\Z")

    # -- an answer and its end ------------------------------------------------------------------------------------

    @cached_property
    def prompt(self) -> str:
        """The prompt of the question that all is tried with."""
        return self._text(Conversation([_QUESTION]), True) or ""

    @cached_property
    def lead(self) -> str:
        """What a template puts between a question and its answer."""
        asked = self._text(Conversation([_QUESTION]), False) or ""
        return self.prompt[len(asked) :] if self.prompt.startswith(asked) else self.prompt

    def closing(self, text: str) -> str:
        """What ends the answer that `text` ends with: special tokens, one right after the other; "" where none does."""
        found = self._closing.search(text)
        return found[1] if found else ""

    def end(self, text: str) -> int:
        """The position in `text` where its last answer has ended, or -1 where nothing ends it."""
        for ending, closing in self._endings:
            if text.endswith(ending):
                return len(text) - len(ending) + len(closing)
        found = self._closing.search(text)
        return found.end(1) if found else -1

    @cached_property
    def _endings(self) -> list[tuple[str, str]]:
        """What stands behind a plain answer -> the part of it that ends it: a special token may be a part of an answer
        as well, so that what is known is looked for first."""
        text = self._answered
        ending = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
        found = re.match(rf"\s*(?:{self._special.pattern})+", ending)
        return [(ending, found[0])] if found else []

    @cached_property
    def _answered(self) -> str:
        return self._text(Conversation([_QUESTION, {"role": "assistant", "content": _ANSWER}]), False) or ""

    @cached_property
    def answer(self) -> tuple[str, str]:
        """What follows an answer: the part that ends it, and what stands behind that (`\\n` in ChatML)."""
        if self._endings:
            ending, closing = self._endings[0]
            return closing, ending[len(closing) :]
        return self.opener(calls=False), ""

    @property
    def shown(self) -> str:
        """What the template shows behind a plain answer."""
        return self._answered.rpartition(_ANSWER)[2] if _ANSWER in self._answered else ""

    def opener(self, calls: bool) -> str:
        """The special token that begins what follows an answer (or a call): where nothing else ends it, that does."""
        return self._openers[calls]

    @cached_property
    def _openers(self) -> dict[bool, str]:
        answered = [_QUESTION, {"role": "assistant", "content": _ANSWER}]
        called = self._call(self.arguments, self.beside_calls)
        result: Message = {"role": self.tool_role, "content": _RESULT, "tool_call_id": "call00007", "name": _NAME}
        found = {}
        for calls, before, after in ((False, answered, _QUESTION), (True, [_QUESTION, called], result)):
            tools = [_TOOL] if calls else None
            one, two = (self._text(Conversation(m, tools), False) for m in (before, [*before, after]))
            token = self._special.match(two[len(one) :]) if one and two and two.startswith(one) else None
            found[calls] = token[0] if token else ""
        return found

    @cached_property
    def stops(self) -> list[str]:
        """The tokens at which answers and calls end, that of a plain answer first."""
        call = self._text(Conversation([_QUESTION, self._call(self.arguments, self.beside_calls)], [_TOOL]), False)
        closings = [self.answer[0], self.closing(call) if call else "", *(self.opener(c) for c in (False, True))]
        if self.answer[0] and self._endings:  # what opens the next turn ends nothing where answers have an end
            closings = closings[:2]
        last = [self._special.findall(closing)[-1] for closing in closings if self._special.search(closing)]
        return list(dict.fromkeys(last))

    # -- thoughts ---------------------------------------------------------------------------------------------------

    @cached_property
    def thought_key(self) -> str | None:
        """The key of a message from which thoughts are read."""
        for key in THOUGHT_KEYS:
            if _THOUGHT in self._thinking({"content": _ANSWER, key: _THOUGHT}):
                return key
        return None

    @cached_property
    def reads_thought_inside(self) -> bool:
        """Whether a think block inside the content is taken for what the key would hold."""
        inside = self._thinking({"content": with_thought(_THOUGHT, _ANSWER)})
        return bool(inside) and inside == self._thinking({"content": _ANSWER, str(self.thought_key): _THOUGHT})

    def _thinking(self, given: Message) -> str:
        return self._text(Conversation([_QUESTION, {"role": "assistant", **given}]), False) or ""

    # -- calls and roles --------------------------------------------------------------------------------------------

    @cached_property
    def shows_tools(self) -> bool:
        """Whether a prompt lists the tools that may be called."""
        return _NAME in (self._text(Conversation([_QUESTION], [_TOOL]), True) or "")

    @cached_property
    def _calling(self) -> tuple[str, Any]:
        """How arguments are wanted, and what stands for the content beside calls."""
        for content in ("", None, _UNSET):
            for arguments in ("object", "text"):
                text = self._text(Conversation([_QUESTION, self._call(arguments, content)], [_TOOL]), False)
                found = text.rpartition(_NAME)[2] if text else ""  # behind the description of the tool
                if text and _VALUE in found and '\\"city' not in found and "'city'" not in found:
                    return arguments, content
        return "object", ""

    @property
    def arguments(self) -> str:
        """`object`, or `text` for a template that puts them in as they are."""
        return self._calling[0]

    @property
    def beside_calls(self) -> Any:
        """What the content of a message with nothing but calls has to be: "", None, or left out."""
        return self._calling[1]

    @staticmethod
    def _call(arguments: str, content: Any) -> Message:
        given: Any = {"city": _VALUE}
        function = {"name": _NAME, "arguments": given if arguments == "object" else json.dumps(given)}
        message = {"role": "assistant", "tool_calls": [{"type": "function", "id": "call00007", "function": function}]}
        return message if content is _UNSET else {**message, "content": content}

    @cached_property
    def tool_role(self) -> str:
        """The role under which the result of a call is read."""
        for role in TOOL_ROLES:
            result: Message = {"role": role, "content": _RESULT, "tool_call_id": "call00007", "name": _NAME}
            called = self._call(self.arguments, self.beside_calls)
            if _RESULT in (self._text(Conversation([_QUESTION, called, result], [_TOOL]), True) or ""):
                return role
        return "tool"

    @cached_property
    def knows_developer(self) -> bool:
        """Whether messages of the role `developer` are shown."""
        text = self._text(Conversation([{"role": "developer", "content": _ORDER}, _QUESTION]), True)
        return _ORDER in (text or "")

    # -- a message as the template reads it -------------------------------------------------------------------------

    def normal(self, message: Message) -> Message:
        """The same message in the form that the template reads."""
        role = message["role"]
        if role == "assistant":
            return self._assistant(message)
        if role == "developer" and not self.knows_developer:
            return {**message, "role": "system"}
        if role in TOOL_ROLES and role != self.tool_role:
            return {**message, "role": self.tool_role}
        return message

    def _assistant(self, message: Message) -> Message:
        thought = next((message[key] for key in THOUGHT_KEYS if message.get(key)), None)
        inside = isinstance(message.get("content"), str) and "<think>" in message["content"]
        if not thought and not inside and not message.get("tool_calls"):
            return message if message.get("content") is not None else {**message, "content": ""}
        made = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
        if thought or inside:
            self._put_thought(made, thought, inside)
        if message.get("tool_calls"):
            made["tool_calls"] = [self._as_wanted(call) for call in message["tool_calls"]]
        if not made.get("content"):
            made.pop("content", None)
            content = self.beside_calls if made.get("tool_calls") else ""
            if content is not _UNSET:
                made["content"] = content
        return made

    def _put_thought(self, made: Message, thought: str | None, inside: bool) -> None:
        within, content = split_thought(made["content"]) if inside else ("", "")
        if thought and within and thought.strip() != within.strip():
            raise ValueError("a message has one thought in a field of its own and another one inside its content")
        if inside and (not self.thought_key or self.reads_thought_inside):
            return
        if within or (inside and made["content"] != content):
            thought, made["content"] = thought or within, content
        if thought and self.thought_key:
            # as transformers does it: under both of the names that templates look for
            made |= dict.fromkeys(("reasoning_content", "thinking", self.thought_key), thought)
        elif thought:
            made["content"] = with_thought(thought, made.get("content") or "")

    def _as_wanted(self, call: dict[str, Any]) -> dict[str, Any]:
        """A call with its arguments as the template wants them, never encoded twice."""
        function = call.get("function") or call
        arguments = function.get("arguments")
        if self.arguments == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments if arguments is not None else {}, ensure_ascii=False)
        elif self.arguments == "object" and (arguments is None or isinstance(arguments, str)):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise ValueError(
                    f"the arguments of the call of {function.get('name')!r} are no JSON ({error}); found {arguments!r}"
                ) from None
        return {"type": "function", **call, "function": {**function, "arguments": arguments}}
