"""Renders conversations with a tokenizer's chat template: upstream's text, in a third less of the time where many come.

A conversation is brought into the form that the template reads first (`instructft.prompt.template_traits`); contents
stay what they are. A template that is not our own is compiled and rendered in a process of its own, within limits
(`instructft.prompt.sandbox`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from instructft.errors import TemplateError
from instructft.prompt.conversation import Conversation, Message, as_conversation
from instructft.prompt.sandbox import MIB, SECONDS, Helper
from instructft.prompt.template_traits import Traits
from instructft.prompt.templates import is_built_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN = ("system", "user", "assistant")
_ORDERS = ("system", "developer")
MANY = 100  # conversations; for fewer it does not matter how fast they are rendered


class Renderer:
    """The chat template of a tokenizer, applied to batches of conversations.

    >>> Renderer(tokenizer).texts([[{"role": "user", "content": "Hi"}]], add_generation_prompt=True)
    ['### Instruction:\\nHi\\n\\n### Response:\\n']

    Raises:
        TemplateError: the tokenizer has no chat template, or one that does not end or fills the memory.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        if not isinstance(tokenizer.chat_template, str):
            raise TemplateError(
                "the tokenizer has no chat template; set data.template to one of the built-in templates "
                "(instruction, alpaca, human-assistant, chatml) or to a .jinja file"
            )
        self._helper: Helper | None = None
        self._given: tuple[Any, ...] = ()
        self._foreign = not is_built_in(tokenizer.chat_template) and hasattr(os, "fork")
        if self._foreign:
            self._try()

    def _try(self) -> None:
        """Conversations of many kinds: what does not end should say so before anything is begun."""
        turns: list[Message] = [
            {"role": role, "content": f"{role} {n} " * n} for n in range(1, 40) for role in ("user", "assistant")
        ]
        system: Message = {"role": "system", "content": "Be brief."}
        try:
            tried = [turns[:1], turns[:2], turns[:3], [system, *turns[:2]], turns]
            found = self._ask("try", tried, False, SECONDS)
        except (TimeoutError, MemoryError) as error:
            why = f"ran for more than {SECONDS} s"
            if isinstance(error, MemoryError):
                why = f"took more than {MIB} MiB of memory"
            raise TemplateError(f"the chat template {why} on a conversation of a few turns; it is not used") from error
        if found:
            raise TemplateError(f"the chat template renders no conversation at all: {found[0]}")

    def _ask(self, what: str, conversations: Sequence[Sequence[Message]], asks: bool, seconds: float) -> Any:
        """Have the helper do it, with the template and the special tokens that the tokenizer has now."""
        if self._helper is None or self._seen() != self._given:
            self._given = self._seen()
            self._helper = Helper(functools.partial(_in_helper, _Here(self.tokenizer)))
        plain = [(list(one), one.tools, one.options) for one in map(as_conversation, conversations)]
        return self._helper((what, plain, asks), seconds)

    def _seen(self) -> tuple[Any, ...]:
        return self.tokenizer.chat_template, self.tokenizer.special_tokens_map

    @cached_property
    def traits(self) -> Traits:
        """What the template reads."""
        added = self.tokenizer.added_tokens_decoder.values()
        specials = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return Traits(self.text_or_none, sorted(specials))

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer begins every text with BOS."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def normal(self, messages: Sequence[Message]) -> Conversation:
        """The conversation in the form that the template reads; contents stay as they are.

        Raises:
            TemplateError: a message that has no such form.
        """
        conversation = as_conversation(messages)
        if unread := self.unread(conversation.options):
            raise TemplateError(
                f"`{unread[0]}`, which the row gives to the chat template, is not read there, so the model would be "
                f"trained without it; choose another data.template, or leave it out: data.ignore: [{unread[0]}]"
            )
        if all(map(_is_plain, conversation)):
            return conversation
        try:
            return conversation.of(self._extras(self.traits.normal(message)) for message in conversation)
        except ValueError as error:
            raise TemplateError(str(error)) from error

    def unread(self, options: Mapping[str, Any]) -> list[str]:
        """The options that say something, and that no word of the template asks for."""
        return [name for name, value in options.items() if value and name not in self._words]

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", str(self.tokenizer.chat_template)))

    def _extras(self, message: Message) -> Message:
        """Put `input` and `context` where the template reads them."""
        if "input" not in message and "context" not in message:
            return message
        message = dict(message)
        for key in ("context", "input"):
            if message.get(key) and not self._shows[key]:
                message["content"] = f"{message['content']}\n\n{message.pop(key)}"
        return message

    def texts(self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = False) -> list[str]:
        """Render a batch of normal conversations; with `add_generation_prompt` up to where the model answers.

        Raises:
            TemplateError: the template refuses one of them.
        """
        try:
            if not self._foreign:
                return self._here.texts(conversations, add_generation_prompt)
            found: list[str] = self._ask(
                "texts", conversations, add_generation_prompt, SECONDS + 0.1 * len(conversations)
            )
            return found
        except (TimeoutError, MemoryError) as error:
            what = "does not come to an end" if isinstance(error, TimeoutError) else "fills the memory"
            raise TemplateError(f"the chat template {what} on these messages") from error
        except Exception as error:  # a template's own words, or whatever Python raised inside it
            why, way = _why(error), ""
            if "system" in why.lower() and any(m["role"] in _ORDERS for one in conversations for m in one):
                way = "; data.template_adds: [system] puts it before the first question"
            raise TemplateError(f"the chat template does not accept these messages: {why}{way}") from error

    @cached_property
    def _here(self) -> _Here:
        return _Here(self.tokenizer)

    def text_or_none(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | None:
        """Render one normal conversation; None where the template refuses it."""
        try:
            return self.texts([messages], add_generation_prompt)[0]
        except TemplateError:
            return None

    @cached_property
    def _shows(self) -> dict[str, bool]:
        """Whether the template has a place of its own for `input` and for `context`."""
        answer = {"role": "assistant", "content": "A"}
        shown = {}
        for key in ("input", "context"):
            message = {"role": "user", "content": "Q", key: "Extra-7"}
            shown[key] = "Extra-7" in self.texts([[message, answer]])[0]
        return shown


class _Here:
    """Renders in this process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def texts(self, conversations: Sequence[Sequence[Message]], asks: bool) -> list[str]:
        """Whatever the template raises, it raises."""
        compiled = self._compiled if len(conversations) >= MANY else None
        if self._wants_parts:
            conversations = [_in_parts(as_conversation(messages)) for messages in conversations]
        return self._slow(conversations, asks) if compiled is None else self._direct(compiled, conversations, asks)

    def attempt(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Both ways of asking for each, of which a template may refuse some; why, where it refuses them all."""
        why, rendered = [], False
        for messages in conversations:
            for asks in (True, False):
                try:
                    self.texts([messages], asks)
                    rendered = True
                except MemoryError:
                    raise
                except Exception as error:
                    why.append(_why(error))
        return [] if rendered else why

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows contents only where they are lists of parts, as those of images do."""
        asked = Conversation([{"role": "user", "content": "Question-7"}])
        shown = []
        for one in (asked, _in_parts(asked)):
            try:
                shown.append("Question-7" in self._slow([one], True)[0])
            except Exception:
                shown.append(False)
        return shown == [False, True]

    @cached_property
    def _compiled(self) -> Any:
        """The compiled template, which upstream hides behind what it does for tools and images; None where its text
        is another. A third of the time of rendering is saved."""
        from transformers.utils import chat_template_utils

        compiler = getattr(chat_template_utils, "_compile_jinja_template", None)
        if compiler is None:
            return None
        compiled = compiler(self.tokenizer.chat_template)
        turns: list[Message] = [
            {"role": role, "content": f"{role} {n}"} for n in (1, 2) for role in ("user", "assistant")
        ]
        system: Message = {"role": "system", "content": "Be brief."}
        tools = [{"type": "function", "function": {"name": "f", "description": "F.", "parameters": {}}}]
        tried = [*map(Conversation, (turns[:1], turns[:2], turns, [system, *turns]))]
        for messages in (*tried, Conversation(turns, tools, {"enable_thinking": False})):
            for asks in (True, False):
                try:
                    # twice, so that what a template leaves behind would be seen
                    same = self._direct(compiled, [messages] * 2, asks) == self._slow([messages], asks) * 2
                except Exception:  # a template may refuse a system message, by either way and by whatever it raises
                    continue
                if not same:
                    return None
        return compiled

    def _direct(self, compiled: Any, conversations: Sequence[Sequence[Message]], asks: bool) -> list[str]:
        """As `compiled.render` does it, which for every text makes a new dict of all that templates may call."""
        values = {**self.tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": asks}
        given = {**compiled.globals, **values}
        render, new = compiled.root_render_func, compiled.new_context
        context = new(given, shared=True)  # of all that have no options of their own
        texts = []
        for conversation in map(as_conversation, conversations):
            given["messages"], given["tools"] = list(conversation), conversation.tools
            if conversation.options:  # upstream gives its own values first, and what the caller names beside them last
                texts.append("".join(render(new({**given, **conversation.options}, shared=True))))
                continue
            context.vars.clear()
            context.exported_vars.clear()
            texts.append("".join(render(context)))
        return texts

    def _slow(self, conversations: Sequence[Sequence[Message]], asks: bool) -> list[str]:
        render = self.tokenizer.apply_chat_template
        together = [as_conversation(messages) for messages in conversations]
        if not any(one.tools or one.options for one in together):
            texts: list[str] = render(list(map(list, together)), tokenize=False, add_generation_prompt=asks)
            return texts
        return [
            render([list(one)], tools=one.tools, tokenize=False, add_generation_prompt=asks, **one.options)[0]
            for one in together
        ]


def _in_helper(here: _Here, asked: tuple[str, list[tuple[list[Message], Any, dict[str, Any]]], bool]) -> list[str]:
    """What the helper does for `Renderer._ask`."""
    what, plain, asks = asked
    conversations = [Conversation(*one) for one in plain]
    return here.texts(conversations, asks) if what == "texts" else here.attempt(conversations)


def _why(error: Exception) -> str:
    import jinja2

    if type(error) is jinja2.TemplateError or not str(error):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _is_plain(message: Message) -> bool:
    """Whether a message is in normal form for every template."""
    content = message.get("content")
    if len(message) != 2 or not isinstance(content, str):
        return False
    return message["role"] in _PLAIN and ("<think>" not in content or message["role"] != "assistant")


def _in_parts(conversation: Conversation) -> Conversation:
    return conversation.of(
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in conversation
    )
