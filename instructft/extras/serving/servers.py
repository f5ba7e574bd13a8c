"""What each kind of server can tell of the tokens it reads and gives: llama.cpp, vLLM, TGI, Ollama, any other.

| server | prompt ids | answer ids | why it stopped |
| --- | --- | --- | --- |
| llama.cpp | `/apply-template`, `/tokenize` | `logprobs` | yes |
| vLLM | `/tokenize` with messages | `return_token_ids` | yes |
| TGI | `/chat_tokenize` | none: texts are compared | yes |
| Ollama | their count alone | none: texts are compared | yes |
| other | their count, where it is told | none: texts are compared | yes |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from instructft.errors import UsageError
from instructft.extras.serving.client import Client, NoAnswerError, RefusedError
from instructft.formatting import nearest
from instructft.prompt.conversation import Conversation


@dataclass(frozen=True)
class Served:
    """What a server gave to one conversation, greedily.

    Args:
        ids: of the answer, the token that ended it included where the server tells it; None: it tells texts alone.
        finish: `stop`, `length`, or what else it calls it.
        prompt_tokens: that it counts in the prompt; None: it does not say.
    """

    text: str
    ids: list[int] | None
    finish: str
    prompt_tokens: int | None


class Server:
    """Any server with `/v1/chat/completions`; the others say more.

    Args:
        client: how it is asked.
        model: the name that it has for the model.
        version: of the server, as it says it itself.
    """

    kind = "an OpenAI-compatible server"
    tells_ids = False

    def __init__(self, client: Client, model: str, version: str = ""):
        self.client, self.model, self.version = client, model, version
        self.template: str | None = None  # the chat template it says it uses
        self.weights = ""  # in what it holds them, as F16 or Q4_K_M

    def prompt_ids(self, conversation: Conversation) -> tuple[list[int], str | None]:
        """The ids that the model is given for a conversation, and the text before them where it is told."""
        raise NotImplementedError

    def answer(self, conversation: Conversation, max_tokens: int) -> Served:
        """The greedy answer.

        Raises:
            NoAnswerError: it gives none.
        """
        asked = {"model": self.model, **as_request(conversation), "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        given = self.client.post("/v1/chat/completions", {**asked, **self._further()})
        try:
            choice = given["choices"][0]
            message = choice["message"]
            text = "".join(message.get(key) or "" for key in ("reasoning_content", "content"))
            usage = (given.get("usage") or {}).get("prompt_tokens")
            return Served(text, self._ids(choice), str(choice.get("finish_reason")), usage)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise NoAnswerError(
                f"{self.client.url}/v1/chat/completions answers in another form: {str(given)[:200]}"
            ) from None

    def _further(self) -> dict[str, Any]:
        """What a server is asked beside what all of them take."""
        return {}

    def _ids(self, choice: dict[str, Any]) -> list[int] | None:
        return None


class LlamaCpp(Server):
    """llama.cpp's `llama-server` (tools/server/README.md)."""

    kind = "llama.cpp"
    tells_ids = True

    def __init__(self, client: Client, model: str, props: dict[str, Any]):
        super().__init__(client, model, str(props.get("build_info") or ""))
        self.template = props.get("chat_template")
        self.weights = str(props.get("model_ftype") or "")

    def prompt_ids(self, conversation: Conversation) -> tuple[list[int], str | None]:
        text = self.client.post("/apply-template", as_request(conversation))["prompt"]
        asked = {"content": text, "add_special": True, "parse_special": True}  # as the chat endpoint itself does it
        return self.client.post("/tokenize", asked)["tokens"], text

    def _further(self) -> dict[str, Any]:
        # without reasoning_format a thought would be cut out of the text; cache_prompt off: the same batch every time
        return {"logprobs": True, "top_logprobs": 1, "reasoning_format": "none", "cache_prompt": False}

    def _ids(self, choice: dict[str, Any]) -> list[int] | None:
        told = (choice.get("logprobs") or {}).get("content")
        return [token["id"] for token in told] if told and all("id" in token for token in told) else None


class VLLM(Server):
    """vLLM (docs: "OpenAI-Compatible Server", its Tokenizer API)."""

    kind = "vLLM"
    tells_ids = True

    def prompt_ids(self, conversation: Conversation) -> tuple[list[int], str | None]:
        asked = {"model": self.model, "add_generation_prompt": True, **as_request(conversation)}
        return self.client.post("/tokenize", asked)["tokens"], None

    def _further(self) -> dict[str, Any]:
        return {"return_token_ids": True}  # from 0.10.2 on; others pass over it

    def _ids(self, choice: dict[str, Any]) -> list[int] | None:
        ids: list[int] | None = choice.get("token_ids")
        return ids


class TGI(Server):
    """Hugging Face's text-generation-inference (its OpenAPI description: `/info`, `/chat_tokenize`)."""

    kind = "TGI"
    tells_ids = True

    def prompt_ids(self, conversation: Conversation) -> tuple[list[int], str | None]:
        told = self.client.post("/chat_tokenize", {"model": self.model, **as_request(conversation)})
        return [token["id"] for token in told["tokenize_response"]], told.get("templated_text")


class Ollama(Server):
    """Ollama (docs/api.md): it tells its template and how many tokens a prompt has, and not which."""

    kind = "Ollama"

    def answer(self, conversation: Conversation, max_tokens: int) -> Served:
        asked = as_request(conversation, own=True)
        options = {"temperature": 0, "num_predict": max_tokens, "seed": 0, "repeat_penalty": 1.0}
        given = self.client.post("/api/chat", {"model": self.model, **asked, "stream": False, "options": options})
        try:
            message = given["message"]
            text = (message.get("thinking") or "") + (message.get("content") or "")
            return Served(text, None, str(given.get("done_reason")), given.get("prompt_eval_count"))
        except (KeyError, TypeError, AttributeError):
            raise NoAnswerError(f"{self.client.url}/api/chat answers in another form: {str(given)[:200]}") from None


def as_request(conversation: Conversation, own: bool = False) -> dict[str, Any]:
    """A conversation as servers take it: arguments of calls are JSON text there.

    Args:
        own: in Ollama's own form, where they are objects and options of a template have no place.

    >>> as_request(Conversation([{"role": "user", "content": "Hi"}], options={"enable_thinking": False}))
    {'messages': [{'role': 'user', 'content': 'Hi'}], 'chat_template_kwargs': {'enable_thinking': False}}
    """
    messages = []
    for message in conversation:
        sent = {key: value for key, value in message.items() if key not in ("weight", "train_spans")}
        if calls := sent.get("tool_calls"):
            sent["tool_calls"] = [_as_sent(call, i, own) for i, call in enumerate(calls)]
        messages.append(sent)
    request: dict[str, Any] = {"messages": messages}
    if conversation.tools:
        request["tools"] = conversation.tools
    if conversation.options and not own:
        request["chat_template_kwargs"] = conversation.options
    return request


def _as_sent(call: dict[str, Any], number: int, own: bool) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if not own and not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"type": "function", "id": call.get("id") or f"call{number:05}", "function": function}


def reach(client: Client, name: str | None = None) -> Server:
    """The server at an address, by what only its kind answers.

    Args:
        name: of the model there; None: the only one it has.

    Raises:
        UsageError: no server there, no such model, or several and none is named.
    """
    props = _told(client, "/props")
    if isinstance(props, dict) and "chat_template" in props:
        return LlamaCpp(client, _model(client, name), props)
    info = _told(client, "/info")
    if isinstance(info, dict) and "model_id" in info:
        tgi = TGI(client, name or str(info["model_id"]), str(info.get("version") or ""))
        tgi.weights = str(info.get("model_dtype") or "")
        return tgi
    version = _told(client, "/api/version")
    if isinstance(version, dict) and "version" in version:
        ollama = Ollama(client, _model(client, name), str(version["version"]))
        shown = client.post("/api/show", {"model": ollama.model})
        ollama.template = shown.get("template")
        ollama.weights = str((shown.get("details") or {}).get("quantization_level") or "")
        return ollama
    version = _told(client, "/version")
    model = _model(client, name)
    if isinstance(version, dict) and "version" in version:
        return VLLM(client, model, str(version["version"]))
    return Server(client, model)


def _told(client: Client, path: str) -> Any:
    """What a path answers; None where the server does not know it."""
    try:
        return client.get(path)
    except RefusedError as refused:
        if not refused.of_this_request:  # not let in, or not ready: it says nothing of the kind of server
            raise
        return None
    except NoAnswerError as error:
        if "no JSON" in str(error):
            return None
        raise


def _model(client: Client, name: str | None) -> str:
    """The name of the model that is asked."""
    told = client.get("/v1/models")
    try:
        found = [str(model["id"]) for model in told["data"]]
    except (KeyError, TypeError):
        raise NoAnswerError(f"{client.url}/v1/models names no model: {str(told)[:200]}") from None
    if name is None and len(found) == 1:
        return found[0]
    if name in found:
        return str(name)
    listed = ", ".join(found[:8]) or "none"
    if name is None:
        raise UsageError(f"{client.url} serves {len(found)} models; choose one with --name: {listed}")
    raise UsageError(f"--name: {client.url} has no model {name}{nearest(name, found)}; it has {listed}")
