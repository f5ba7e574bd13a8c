"""Renders conversations with a tokenizer's chat template: upstream's text, in a third less of the time where many come.

A conversation is brought into one form first: answers without outer white space, `input` and `context` where the
template reads them. A template that is not our own is tried first, within limits (`instructft.prompt.sandbox`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from instructft.errors import TemplateError
from instructft.prompt.conversation import Message
from instructft.prompt.sandbox import SECONDS, at_most, breaks
from instructft.prompt.templates import is_built_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        if not is_built_in(tokenizer.chat_template) and (why := breaks(self._try)):
            raise TemplateError(f"the chat template {why} on a conversation of a few turns; it is not used")

    def _try(self) -> None:
        """Conversations of many kinds; a template may refuse some."""
        import jinja2

        turns: list[Message] = [
            {"role": role, "content": f"{role} {n} " * n} for n in range(1, 40) for role in ("user", "assistant")
        ]
        system: Message = {"role": "system", "content": "Be brief."}
        for messages in (turns[:1], turns[:2], turns[:3], [system, *turns[:2]], turns):
            for asks in (True, False):
                with contextlib.suppress(jinja2.TemplateError, TypeError):
                    self._slow([messages], asks)

    def normal(self, messages: Sequence[Message]) -> list[Message]:
        """Strip answers, so that no tokenizer merges across their borders; put extras where the template reads them."""
        normal = []
        for message in messages:
            if message["role"] == "assistant":
                content = message["content"].strip()
                if content != message["content"]:
                    message = {**message, "content": content}
            elif "input" in message or "context" in message:
                message = dict(message)
                for key in ("context", "input"):
                    if message.get(key) and not self._shows[key]:
                        message["content"] = f"{message['content']}\n\n{message.pop(key)}"
            normal.append(message)
        return normal

    def texts(self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = False) -> list[str]:
        """Render a batch of normal conversations; with `add_generation_prompt` up to where the model answers.

        Raises:
            TemplateError: the template refuses these messages.
        """
        import jinja2

        compiled = self._compiled if len(conversations) >= MANY else None
        try:
            with at_most(SECONDS + 0.1 * len(conversations)):
                if compiled is not None:
                    return self._direct(compiled, conversations, add_generation_prompt)
                return self._slow(conversations, add_generation_prompt)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not accept these messages: {error}") from error
        except (TimeoutError, MemoryError) as error:
            what = "does not come to an end" if isinstance(error, TimeoutError) else "fills the memory"
            raise TemplateError(f"the chat template {what} on these messages") from error

    @cached_property
    def _shows(self) -> dict[str, bool]:
        """Whether the template has a place of its own for `input` and for `context`."""
        answer = {"role": "assistant", "content": "A"}
        shown = {}
        for key in ("input", "context"):
            message = {"role": "user", "content": "Q", key: "Extra-7"}
            shown[key] = "Extra-7" in self.texts([[message, answer]])[0]
        return shown

    @cached_property
    def _compiled(self) -> Any:
        """The compiled template, which upstream hides behind what it does for tools and images; None where its text
        is another. A third of the time of rendering is saved."""
        import jinja2
        from transformers.utils import chat_template_utils

        compiler = getattr(chat_template_utils, "_compile_jinja_template", None)
        if compiler is None:
            return None
        compiled = compiler(self.tokenizer.chat_template)
        turns: list[Message] = [
            {"role": role, "content": f"{role} {n}"} for n in (1, 2) for role in ("user", "assistant")
        ]
        system: Message = {"role": "system", "content": "Be brief."}
        for messages in (turns[:1], turns[:2], turns, [system, *turns]):
            for asks in (True, False):
                try:
                    same = self._direct(compiled, [messages], asks) == self._slow([messages], asks)
                except (jinja2.TemplateError, TypeError):  # a template may refuse a system message, by either way
                    continue
                if not same:
                    return None
        return compiled

    def _direct(self, compiled: Any, conversations: Sequence[Sequence[Message]], asks: bool) -> list[str]:
        """As `compiled.render` does it, which for every text makes a new dict of all that templates may call."""
        values = {**self.tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": asks}
        given = {**compiled.globals, **values}
        render, context = compiled.root_render_func, compiled.new_context
        return ["".join(render(context({**given, "messages": m}, shared=True))) for m in conversations]

    def _slow(self, conversations: Sequence[Sequence[Message]], asks: bool) -> list[str]:
        texts: list[str] = self.tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=asks)
        return texts
