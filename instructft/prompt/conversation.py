"""What a row says, in one form: messages, the tools that may be called, and what its template is told beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, overload

# One turn of a conversation, in the field's names:
#   role               system, developer, user, assistant or tool
#   content            str; "" where an answer is nothing but calls
#   input, context     a user's extras (Alpaca, Dolly): a template with a heading for one shows it there, for all others
#                      it stands below the content
#   reasoning_content  an assistant's thoughts before the answer
#   tool_calls         an assistant's calls: {"type": "function", "id": …, "function": {"name": str, "arguments": dict}}
#   tool_call_id, name of a tool's answer
#   weight             an assistant's share of the loss: 1 where absent, 0 is read and not trained
#   train_spans        an assistant's content by characters: [(begin, end, whether it is trained), …]
Message = dict[str, Any]


class Conversation(list[Message]):
    """Messages in order; a slice of them keeps the tools and the options.

    Args:
        tools: JSON schemas of the functions that may be called, as a chat template takes them; None: there are none.
        options: further values that the template reads, such as `enable_thinking`.

    >>> Conversation([{"role": "user", "content": "Hi"}], options={"enable_thinking": False})[:1].options
    {'enable_thinking': False}
    """

    __slots__ = ("options", "tools")

    def __init__(
        self,
        messages: Iterable[Message] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__(messages)
        self.tools = list(tools) if tools else None
        self.options = dict(options) if options else {}

    @overload
    def __getitem__(self, at: SupportsIndex) -> Message: ...
    @overload
    def __getitem__(self, at: slice) -> Conversation: ...
    def __getitem__(self, at: SupportsIndex | slice) -> Message | Conversation:
        if isinstance(at, slice):
            return self.of(super().__getitem__(at))
        return super().__getitem__(at)

    def of(self, messages: Iterable[Message]) -> Conversation:
        """Other messages with the same tools and options."""
        return Conversation(messages, self.tools, self.options)


def as_conversation(messages: Sequence[Message]) -> Conversation:
    """Messages as a conversation; one that is there already stays what it is."""
    return messages if isinstance(messages, Conversation) else Conversation(messages)
