"""Dialogues that are written out in one text or hang in a tree: HH, Glaive, Guanaco, Llama 2, ChatML, OpenAssistant.

A reader takes a text for a dialogue only where all of it is one; then the markers, and the white space around them,
are no part of what was said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from instructft.errors import DataError
from instructft.prompt.conversation import Message
from instructft.prompt.layouts.messages import messages_of
from instructft.prompt.layouts.tool_calls import calls_of, tools_of
from instructft.prompt.ledger import Ledger, Unusable, absent, shown

_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def human_assistant(text: str, where: str, ledger: Ledger) -> list[Message] | None:
    """`\\n\\nHuman: …\\n\\nAssistant: …`, as Anthropic HH writes it; None: the text is no such dialogue.

    >>> human_assistant("\\n\\nHuman: Hi\\n\\nAssistant: Hello.", "chosen", Ledger())
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]
    """
    before, *parts = _HH_TURN.split(text)
    return None if before.strip() or not parts else _spoken(parts, where, ledger)


def _spoken(parts: list[str], where: str, ledger: Ledger) -> list[Message]:
    """Speaker, text, speaker, text, … as messages."""
    turns = [{"role": who, "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]
    return messages_of(turns, where, ledger)


# --------------------------------------------------------------------------------------------------------------------
# Glaive
# --------------------------------------------------------------------------------------------------------------------

_GLAIVE_TURN = re.compile(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*", re.DOTALL)
_GLAIVE_ARGUMENTS = re.compile(r"""("arguments":\s*)'(.*)'(\s*\}\s*)\Z""", re.DOTALL)


def divided(sample: str) -> tuple[str, str]:
    """A text of Glaive's first version as its system message, with the functions, and what was said.

    >>> divided("SYSTEM: Be brief.\\nUSER: Hi\\nASSISTANT: Hello.")
    ('SYSTEM: Be brief.', '\\nUSER: Hi\\nASSISTANT: Hello.')
    """
    found = _GLAIVE_TURN.search(sample)
    at = found.start() if found else len(sample)
    return sample[:at], sample[at:]


def glaive(system: str, chat: str, where: str, ledger: Ledger) -> list[Message]:
    """`USER:`, `ASSISTANT:`, `FUNCTION RESPONSE:` in one text, with `<functioncall>` and JSON where one is called."""
    before, *parts = _GLAIVE_TURN.split(chat)
    if before.strip() or not parts:
        raise Unusable("not_a_dialogue", f"`{where}` is {shown(chat)}, expected USER: … ASSISTANT: …")
    system, tools = _glaive_system(system, ledger)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        content = text.strip().removesuffix("<|endoftext|>").strip()
        if speaker != "ASSISTANT":
            messages.append({"role": "user" if speaker == "USER" else "tool", "content": content})
            continue
        message: Message = {"role": "assistant", "content": content}
        if found := _GLAIVE_CALL.search(content):
            call = _GLAIVE_ARGUMENTS.sub(lambda m: m[1] + m[2] + m[3], found[1])
            message["content"] = (content[: found.start()] + content[found.end() :]).strip()
            message["tool_calls"] = calls_of(call, f"a <functioncall> in `{where}`", ledger)
        messages.append(message)
    if tools and messages:
        messages[0]["tools"] = tools
    return messages


def _glaive_system(text: str, ledger: Ledger) -> tuple[str, Any]:
    """The system message without the functions that stand in it as JSON, and these."""
    text = text.strip().removeprefix("SYSTEM:").strip()
    at = text.find("\n{")
    if at < 0:
        return text, None
    tools, rest, decode = [], text[at:].strip(), json.JSONDecoder().raw_decode
    try:
        while rest:
            tool, end = decode(rest)
            tools.append(tool)
            rest = rest[end:].strip()
    except ValueError:
        return text, None
    return text[:at].strip(), tools_of(tools, "the functions in `system`", ledger)


# --------------------------------------------------------------------------------------------------------------------
# Conversations that a template has rendered already
# --------------------------------------------------------------------------------------------------------------------

_GUANACO_TURN = re.compile(r"\s*### ?(Human|User|Assistant|System): ?")
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
_LLAMA_TURN = re.compile(r"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=<s>|\[INST\])|\Z)\s*", re.DOTALL)
_LLAMA_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)


def rendered(text: str, where: str, ledger: Ledger) -> list[Message] | None:
    """A text that is a whole conversation in the markers of Guanaco, ChatML or Llama 2; None: it is another text.

    >>> rendered("### Human: Hi### Assistant: Hello.", "text", Ledger())
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]
    >>> rendered("<s>[INST] Hi [/INST] Hello. </s>", "text", Ledger())
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]
    """
    before, *parts = _GUANACO_TURN.split(text)
    if not before.strip() and "Assistant" in parts[::2]:
        return _spoken(parts, where, ledger)
    for pattern, read in ((_CHATML_TURN, _chatml), (_LLAMA_TURN, _llama)):
        turns = list(pattern.finditer(text))
        if turns and not pattern.sub("", text).strip():
            return messages_of(read(turns), where, ledger)
    return None


def _chatml(turns: list[re.Match[str]]) -> list[dict[str, str]]:
    return [{"role": turn[1], "content": turn[2]} for turn in turns]


def _llama(turns: list[re.Match[str]]) -> list[dict[str, str]]:
    found = []
    for turn in turns:
        asked = turn[1]
        if told := _LLAMA_SYSTEM.fullmatch(asked):
            found.append({"role": "system", "content": told[1].strip()})
            asked = told[2]
        found += [{"role": "user", "content": asked.strip()}, {"role": "assistant", "content": turn[2].strip()}]
    return found


# --------------------------------------------------------------------------------------------------------------------
# Trees
# --------------------------------------------------------------------------------------------------------------------

# What OpenAssistant says of a message beside its words: who judged it, and how.
_OF_A_NODE = frozenset(("text", "role", "replies", "labels", "events"))  # with what is harmless everywhere


def best_path(root: Any, where: str, ledger: Ledger) -> list[Message]:
    """A tree of messages from its root to a leaf: at each one the reply that people ranked best, of those kept.

    >>> replies = [{"text": "no", "role": "assistant", "rank": 1}, {"text": "yes", "role": "assistant", "rank": 0}]
    >>> best_path({"text": "Is it?", "role": "prompter", "replies": replies}, "prompt", Ledger())
    [{'role': 'user', 'content': 'Is it?'}, {'role': 'assistant', 'content': 'yes'}]
    """
    if not isinstance(root, Mapping) or absent(root.get("text")):
        raise Unusable("not_a_dialogue", f"`{where}` is {shown(root)}, expected a message with its replies")
    path: list[dict[str, Any]] = []
    node: Mapping[str, Any] | None = root
    while node is not None:
        path.append({"role": node.get("role"), "content": node.get("text")})
        ledger.rest(node, _OF_A_NODE, f"key `{{}}` of a message in `{where}`")
        given = node.get("replies") or ()
        replies = [r for r in given if not _is(r.get("deleted"), True) and not _is(r.get("review_result"), False)]
        node = min(replies, key=_preferred) if replies else None
    return messages_of(path, where, ledger)


def _preferred(reply: Mapping[str, Any]) -> tuple[float, bool]:
    """The best rank first, and among replies without one those that were answered."""
    rank = reply.get("rank")
    return (float("inf" if absent(rank) else str(rank)), not reply.get("replies"))


def _is(value: Any, wanted: bool) -> bool:
    """Whether a flag says so; in a CSV file it is a word."""
    return value is wanted or str(value).strip().lower() == str(wanted).lower()


_OF_A_TREE = frozenset(("message_id", "parent_id", "role", "text"))


def is_of_a_tree(columns: Iterable[str]) -> bool:
    """Whether rows of these columns are single messages that name their parents, as OpenAssistant's flat files."""
    return set(columns) >= _OF_A_TREE


def trees(messages: Iterable[Mapping[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Single messages as the trees that they are of, which stand one after the other.

    >>> asked = {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Is it?"}
    >>> [tree["prompt"]["replies"][0]["text"] for tree in trees([asked, {**asked, "message_id": "b", "parent_id": "a",
    ...     "role": "assistant", "text": "Yes."}], "flat.jsonl")]
    ['Yes.']

    Args:
        name: what the file is called in messages.

    Raises:
        DataError: a message whose parent is not in its tree, or a second one of the same id.
    """
    root: dict[str, Any] | None = None
    known: dict[Any, dict[str, Any]] = {}
    waiting: list[tuple[int, dict[str, Any]]] = []  # a reply may stand before what it answers

    def whole() -> dict[str, Any]:
        for number, node in waiting:
            parent = known.get(node["parent_id"])
            if root is None or parent is None:
                raise DataError(
                    f"{name}: row {number} answers message {shown(node['parent_id'])}, which does not stand among the "
                    "rows of its tree; sort the file by message_tree_id, or add the rows that are missing"
                )
            parent["replies"].append(node)
        waiting.clear()
        assert root is not None
        return {"message_tree_id": root["message_id"], "prompt": root}

    def begins(node: Mapping[str, Any]) -> bool:
        if root is None and not waiting:
            return False
        last = root or waiting[0][1]
        if "message_tree_id" in node:
            return bool(node["message_tree_id"] != last.get("message_tree_id"))
        return absent(node.get("parent_id"))

    for number, row in enumerate(messages, 1):
        node = {**row, "replies": []}
        if begins(node):
            yield whole()
            root, known = None, {}
        if (here := node.get("message_id")) in known or (root is not None and absent(node.get("parent_id"))):
            raise DataError(f"{name}: row {number}, message {shown(here)}, is the second of its kind in its tree")
        known[here] = node
        if absent(node.get("parent_id")):
            root = node
        else:
            waiting.append((number, node))
    if root is not None or waiting:
        yield whole()
