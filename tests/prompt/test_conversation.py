"""A conversation is its messages, and keeps what its template is told when it is cut."""

from __future__ import annotations

import pickle

from instructft.prompt.conversation import Conversation, as_conversation

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
ASKED = {"role": "user", "content": "What time is it?"}
ANSWER = {"role": "assistant", "content": "Noon."}


def test_a_slice_keeps_tools_and_options():
    cut = Conversation([ASKED, ANSWER], TOOLS, {"enable_thinking": False})[:-1]
    assert cut == [ASKED]
    assert cut.tools == TOOLS
    assert cut.options == {"enable_thinking": False}


def test_other_processes_get_it_whole():
    sent = pickle.loads(pickle.dumps(Conversation([ASKED], TOOLS, {"date": "1 May"})))
    assert (sent, sent.tools, sent.options) == ([ASKED], TOOLS, {"date": "1 May"})


def test_plain_messages_become_one_and_one_stays_itself():
    conversation = as_conversation([ASKED])
    assert (conversation.tools, conversation.options) == (None, {})
    assert as_conversation(conversation) is conversation
