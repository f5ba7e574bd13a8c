"""Which server it is, which of its models is asked, and a conversation in its form."""

from __future__ import annotations

from typing import Any

import pytest

from instructft.errors import UsageError
from instructft.extras.serving.client import Client
from instructft.extras.serving.servers import as_request, reach
from instructft.prompt.conversation import Conversation
from tests.helpers.chat_servers import ChatServer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize("kind", ["llama.cpp", "vLLM", "TGI", "Ollama"])
def test_each_kind_is_known(kind: str, tiny_model: Any, tokenizer: Any) -> None:
    with ChatServer(kind, tiny_model, tokenizer) as server:
        assert reach(Client(server.url)).kind == kind


def test_one_of_several_models_is_named(tiny_model: Any, tokenizer: Any) -> None:
    with ChatServer("vLLM", tiny_model, tokenizer, names=("base", "tuned")) as server:
        client = Client(server.url)
        with pytest.raises(UsageError, match="serves 2 models; choose one with --name: base, tuned"):
            reach(client)
        with pytest.raises(UsageError, match=r'has no model tune; did you mean "tuned"\?'):
            reach(client, "tune")
        assert reach(client, "tuned").model == "tuned"


def test_a_conversation_in_two_forms() -> None:
    one = Conversation(
        [{"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0}],
        [{"x": 1}],
        {"enable_thinking": False},
    )
    sent = as_request(one)
    assert sent["messages"][0]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    assert "weight" not in sent["messages"][0]
    assert sent["tools"] == [{"x": 1}]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    own = as_request(one, own=True)
    assert own["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert "chat_template_kwargs" not in own
