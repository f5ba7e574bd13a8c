"""Every answer as it is served: the prompt that a server would render before it, and the text that a model would give.

    messages[:k] with generation prompt   ──►  prompt of turn k
    messages[:k + 1]                      ──►  the same text, and behind it the answer, up to the token that ends it

A template may show an earlier answer in another way once it is history (Qwen 3 and its kin take thoughts out). So each
turn is rendered at its own time, and `instructft.prompt.loss_mask` puts those into one row that stay what they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from instructft.errors import TemplateError
from instructft.prompt.conversation import Conversation, Message
from instructft.prompt.render import Renderer
from instructft.prompt.template_traits import THOUGHT_KEYS, split_thought, with_thought

_ALIKE = 24  # characters before a generation prompt by which its place in another text is known


class Turn(NamedTuple):
    """One answer: what a model is given, and what it should give, the token that ends it included.

    Args:
        unread: parts of the answer, by characters, that are read and carry no loss.
    """

    prompt: str
    answer: str
    unread: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)  # frozen ones take twice as long to make, and there are as many as rows
class Script:
    """A conversation as the turns that are trained.

    Args:
        tail: what the whole conversation's text has behind the last of them.
        left_out: what the template does not show: of trained answers content, reasoning and arguments; of what stands
            before them `tools` that nobody calls, messages of a role (system, user, tool), and the `name` of a speaker.
        only_read: answers that no server would ask for, such as a greeting before the first question.
    """

    turns: list[Turn]
    tail: str = ""
    left_out: list[str] = field(default_factory=list)
    only_read: int = 0


def scripts(
    renderer: Renderer, conversations: Sequence[Sequence[Message]], train_on: str
) -> list[Script | TemplateError]:
    """The turns of each conversation, or why it has none. All texts are rendered in two batches."""
    plans = [_planned(renderer, messages, train_on) for messages in conversations]
    good = [plan for plan in plans if isinstance(plan, _Plan)]
    try:
        prompts = iter(renderer.texts([plan.before(i) for plan in good for i in plan.answers], True))
        texts = iter(renderer.texts([part for plan in good for part in plan.shown]))
        shown: list[Any] = [([next(prompts) for _ in plan.answers], [next(texts) for _ in plan.shown]) for plan in good]
    except TemplateError:  # one of them is refused: which, is told by each alone
        shown = [_alone(renderer, plan) for plan in good]
    found = iter(shown)
    return [_script(renderer, plan, next(found)) if isinstance(plan, _Plan) else plan for plan in plans]


class Shapes:
    """Texts of conversations by their shape: what a built-in template puts around contents is rendered once for each.

    A built-in template reads of a message who speaks, what it says and which extras it has, and puts these down as they
    stand. So conversations of one shape, the same roles with the same keys, differ in their contents alone. What holds
    a special token, a thought or an empty text is not taken, and neither is what no shape makes one row of.

    Args:
        specials: texts of special tokens, any of which may end an answer.
        apart: where a script is cut into the texts of rows (`instructft.prompt.loss_mask.Encoder`).
    """

    def __init__(self, renderer: Renderer, specials: Sequence[str], apart: Callable[[Script], list[list[str]] | None]):
        self._renderer, self._specials, self._apart = renderer, tuple(specials), apart
        self._known: dict[tuple[Any, ...], list[list[Any]] | None] = {}  # shape -> its texts, cut at the contents

    def texts(self, conversations: Sequence[Sequence[Message]], train_on: str) -> list[list[str] | None]:
        """The texts of the one row of each conversation, those of answers at odd places; None: not by its shape."""
        told = [_told(messages) for messages in conversations]
        every = "\n".join(text for one in told if one for text in one[1])
        specials = [special for special in self._specials if special in every]
        found: list[list[str] | None] = []
        for one in told:
            texts = None
            if one is not None and not any(special in text for special in specials for text in one[1]):
                key = (train_on, *one[0])
                if key not in self._known and len(self._known) < _SHAPES:
                    self._known[key] = self._cut(one[0], train_on)
                if (cut := self._known.get(key)) is not None:
                    said = one[1]
                    texts = ["".join([part if type(part) is str else said[part] for part in text]) for text in cut]
            found.append(texts)
        return found

    def _cut(self, shape: tuple[tuple[str, ...], ...], train_on: str) -> list[list[Any]] | None:
        """The texts of a row of this shape: strings, and between them the places of what the messages say."""
        marks = iter(range(1_000_000))
        messages = [{"role": role, **{key: _MARK.format(next(marks)) for key in keys}} for role, *keys in shape]
        (script,) = scripts(self._renderer, [messages], train_on)
        if isinstance(script, TemplateError) or script.left_out or script.only_read:
            return None
        rows = self._apart(script)
        if rows is None or len(rows) != 1:
            return None
        cut = [_MARKS.split(text) for text in rows[0]]
        if sorted(int(mark) for text in cut for mark in text[1::2]) != list(range(next(marks))):
            return None  # one is not shown, or twice
        return [[int(part) if i % 2 else part for i, part in enumerate(text) if i % 2 or part] for text in cut]


_SHAPES = 1_000  # are remembered
_MARK = "Zq7xj{}jx7qZ"  # stands for what a message says
_MARKS = re.compile(_MARK.format("([0-9]+)"))
_SPEAKERS = ("system", "user", "assistant")
# the keys of a message, as normal form has them -> those that hold what it says
_KEYS = {
    ("role", "content", *more): ("content", *more) for more in ((), ("input",), ("context",), ("input", "context"))
}


def _told(messages: Sequence[Message]) -> tuple[tuple[tuple[str, ...], ...], list[str]] | None:
    """The shape of a conversation, each message's role and keys, and what they say; None: it may say more than that."""
    if isinstance(messages, Conversation) and (messages.tools or messages.options):
        return None
    shape, said = [], []
    for message in messages:
        role = message["role"]
        known = _KEYS.get(tuple(message))
        if known is None or role not in _SPEAKERS or (len(known) > 1 and role != "user"):
            return None
        for key in known:
            value = message[key]
            if type(value) is not str or not value or value.isspace():
                return None
            said.append(value)
        if role == "assistant" and "<think>" in value:
            return None
        shape.append((role, *known))
    return tuple(shape), said


class _Plan(NamedTuple):
    messages: Conversation
    answers: list[int]  # positions of the answers that are trained
    only_read: int
    opening: Conversation | None = None  # what a server is given before a greeting that is the first message

    def before(self, i: int) -> Conversation:
        """What a server is given before answer `i`."""
        return self.messages[:i] if i or self.opening is None else self.opening

    @property
    def shown(self) -> list[Conversation]:
        """The conversation up to each answer, and the whole one."""
        before = [i + 1 for i in self.answers if i + 1 < len(self.messages)]
        return [*(self.messages[:end] for end in before), self.messages]


def _planned(renderer: Renderer, messages: Sequence[Message], train_on: str) -> _Plan | TemplateError:
    if not messages:
        return TemplateError("a conversation without messages: there is nothing to render")
    try:
        normal = renderer.normal(messages)
    except TemplateError as error:
        return error
    answers = [i for i, m in enumerate(normal) if m["role"] == "assistant" and m.get("weight") != 0]
    if train_on != "responses":
        answers = answers[-1:]
    unasked = ("system", "developer", "assistant")
    asked = next((i for i, message in enumerate(normal) if message["role"] not in unasked), len(normal))
    if not answers or answers[0] > asked:
        return _Plan(normal, answers, 0)
    # nobody has asked yet: a server takes that with some templates, others refuse it, or render another text
    given = {i: _opening(renderer, normal, i) for i in answers if i < asked}
    read = [i for i, opening in given.items() if opening is None]
    return _Plan(normal, [i for i in answers if i not in read], len(read), given.get(0))


def _opening(renderer: Renderer, messages: Conversation, i: int) -> Conversation | None:
    """What a server can be given so that answer `i` comes next, although no question stands before it; None: nothing.

    Where nothing at all stands before it, and the template does not take that, it may take an empty system message.
    """
    text = renderer.text_or_none(messages[: i + 1]) or ""
    for given in (messages[:i], *([] if i else [messages.of([{"role": "system", "content": ""}])])):
        prompt = renderer.text_or_none(given, True)
        if prompt and text.startswith(_begun(renderer, prompt, text)):  # of an empty prompt no server goes on
            return given
    return None


def _begun(renderer: Renderer, prompt: str, text: str) -> str:
    """The prompt, with the BOS that Llama 3's template puts before a first message, and the tokenizer before a text."""
    bos = renderer.tokenizer.bos_token
    return bos + prompt if bos and text.startswith(bos + prompt) and renderer.adds_bos else prompt


def _alone(renderer: Renderer, plan: _Plan) -> tuple[list[str], list[str]] | TemplateError:
    try:
        return renderer.texts([plan.before(i) for i in plan.answers], True), renderer.texts(plan.shown)
    except TemplateError as error:
        return error


def _script(renderer: Renderer, plan: _Plan, shown: Any) -> Script | TemplateError:
    if isinstance(shown, TemplateError):
        return shown
    prompts, texts = shown
    turns: list[Turn] = []
    left_out: list[str] = []
    try:
        for i, prompt, text in zip(plan.answers, prompts, texts, strict=False):
            if not i:
                prompt = _begun(renderer, prompt, text)
            answer = _answer(renderer, plan.messages, i, prompt, text)
            missing = list(_missing(plan.messages[i], answer))
            if "tool_calls" in missing:
                calls = len(plan.messages[i]["tool_calls"])
                place = "tool calls" if calls == 1 else f"all of the {calls} tool calls of this message"
                raise TemplateError(
                    f"message {i + 1}: the chat template has no place for {place}, so the call would not be "
                    "trained; set data.template_adds: [tools], or another data.template, such as chatml"
                )
            left_out += missing
            turns.append(Turn(prompt, answer, _unread(plan.messages[i], answer)))
    except TemplateError as error:
        return error
    if turns and plan.messages.tools and not _tells_tools(renderer, plan, turns[0].prompt):
        if any(message.get("tool_calls") for message in plan.messages):
            return TemplateError(
                "the chat template has no place for tools, so the model would not be told of them; set "
                "data.template_adds: [tools], or another data.template, such as chatml"
            )
        left_out.append("tools")  # nobody calls them, and a server that is given them renders this very text
    if turns:
        left_out += _unshown(plan.messages[: plan.answers[-1]], turns[-1].prompt)
    whole, end = texts[-1], turns[-1].prompt + turns[-1].answer if turns else ""
    return Script(turns, whole[len(end) :] if whole.startswith(end) else "", left_out, plan.only_read)


def _tells_tools(renderer: Renderer, plan: _Plan, prompt: str) -> bool:
    """Whether the prompt of the first answer that is trained lists the tools: behind a call it has their names from
    that, and what the template does elsewhere tells."""
    if any(message.get("tool_calls") for message in plan.messages[: plan.answers[0]]):
        return renderer.traits.shows_tools
    return any(_name(tool) in prompt for tool in plan.messages.tools or ())


def _answer(renderer: Renderer, messages: Conversation, i: int, prompt: str, text: str) -> str:
    """What a model should give as message `i` after `prompt`, where `text` shows the conversation with it."""
    traits = renderer.traits
    end = traits.end(text)
    if end < 0 or (text.startswith(prompt) and end <= len(prompt)):
        text = _closed(renderer, messages[i], text)
        end = len(text)
    text = text[:end]
    if text.startswith(prompt):
        return text[len(prompt) :]
    # the answer itself can change how the turns before it are shown (gpt-oss): what a server has put before it counts
    lead = traits.lead
    border = prompt[-len(lead) - _ALIKE :]
    if lead and prompt.endswith(lead) and (at := text.rfind(border)) >= 0:
        return text[at + len(border) :]
    return _behind_open_thought(messages[i], prompt, text)


def _closed(renderer: Renderer, answer: Message, text: str) -> str:
    """A text whose answer nothing ends (GLM): a server stops at the special token that opens what comes next."""
    opener = renderer.traits.opener(bool(answer.get("tool_calls")))
    if not opener:
        raise TemplateError(
            f"the chat template does not end this answer with a special token; the text ends with {text[-60:]!r}, so "
            "the model would never learn to stop here"
        )
    return text + opener


def _behind_open_thought(answer: Message, prompt: str, text: str) -> str:
    """The answer to a prompt that has opened a thought, which the template takes out of answers (DeepSeek R1)."""
    before, opened, after = prompt.rpartition("<think>")
    thought = split_thought(answer.get("content") or "")[0]
    thought = thought or next((answer[key] for key in THOUGHT_KEYS if answer.get(key)), "")
    if opened and after.strip() == "</think>" and not thought and text.startswith(before):
        return text[len(before) :].lstrip("\n")  # the prompt closes it too, and the template shows no empty one
    if opened and not after.strip() and text.startswith(before):
        if thought:
            whole = before + with_thought(thought, text[len(before) :].lstrip("\n"))
            if whole.startswith(prompt):
                return whole[len(prompt) :]
        raise TemplateError(
            "the generation prompt of this template opens a thought (<think>) that this answer does not have, so a "
            "server would ask for another text than the one to train on. Give the answer its thought "
            "(reasoning_content), switch thinking off (data.template_options: {enable_thinking: false}; where the "
            "template has no such switch, with data.template_adds: [thinking]), or set data.template to chatml"
        )
    raise TemplateError(
        "the prompt that a server would render is no beginning of the text with the answer: "
        f"the prompt has {_part(prompt, text)}, the text has {_part(text, prompt)}. Set data.template to chatml, or "
        "data.template_options to what the template takes (enable_thinking)"
    )


def _part(text: str, other: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(f"…{text[max(0, same - 20) : same + 40]}")


def _missing(message: Message, answer: str) -> Iterator[str]:
    """What an answer says that the template does not show."""
    content = message.get("content")
    thought, rest = split_thought(content) if isinstance(content, str) else ("", "")
    if rest.strip() not in answer:
        yield "content"
    if len(message) == 2 and not thought:  # nothing but role and content
        return
    thought = thought or next((message[key] for key in THOUGHT_KEYS if message.get(key)), "")
    if thought.strip() not in answer:
        yield "reasoning"
    calls = message.get("tool_calls") or ()
    for call in calls:
        given = (call.get("function") or call).get("arguments")
        values = [v for v in given.values() if isinstance(v, str)] if isinstance(given, dict) else []
        hidden = [v for v in values if not any(t in answer for t in (v.strip(), json.dumps(v)[1:-1]))]
        if _name(call) not in answer or (hidden and len(calls) > 1):  # gpt-oss shows the first of several alone
            yield "tool_calls"
        elif hidden:
            yield "arguments"


def _unshown(messages: Sequence[Message], prompt: str) -> Iterator[str]:
    """What stands before an answer, and the template shows to nobody: a message by its role, or who speaks."""
    for message in messages:
        content, role = message.get("content"), message["role"]
        if role != "assistant" and isinstance(content, str) and content.strip() not in prompt:
            lines = [line.strip() for line in content.splitlines()]  # a template may write them in another way
            if not any(line and (line in prompt or json.dumps(line)[1:-1] in prompt) for line in lines):
                yield role
        if len(message) > 2 and role != "tool" and str(message.get("name") or "") not in prompt:
            yield "name"


def _name(tool: Any) -> str:
    return str((tool.get("function") or tool).get("name", ""))


def _unread(message: Message, answer: str) -> tuple[tuple[int, int], ...]:
    """The parts of an answer that `train_spans` takes the loss from."""
    spans = message.get("train_spans")
    if not spans:
        return ()
    content = message.get("content") or ""
    start = answer.find(content)
    if start < 0:
        raise TemplateError("train_spans: the template changes the content, so its characters cannot be found in it")
    return tuple((start + a, start + b) for a, b, trained in spans if not trained)
