"""Stand-ins for servers of chat models, by their documented protocols, on 127.0.0.1: a real tiny model answers.

`kind` is one of `llama.cpp`, `vLLM`, `TGI`, `Ollama`, `other`. What a server is to get wrong is named in `faults`:

    other template    it renders with ChatML            doubled BOS       one in front of what the template gives
    no stop           it goes on behind the end         stripped thought  thoughts are taken out of earlier turns
    no tools          tools are not rendered            no system         such messages are refused
    loading           not ready: 503 to all             slow, not JSON, redirect, trickle, error      of the connection
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from instructft.inference.continuous_batching import Row
from instructft.inference.generator import Generator
from instructft.prompt.templates import TEMPLATES


class ChatServer:
    """A server of one model, for a `with` block; `url` is where it listens, `asked` what came: path, headers, body."""

    def __init__(self, kind: str, model: Any, tokenizer: Any, *faults: str, key: str = "", names: Any = ("tiny",)):
        import copy

        self.kind, self.faults, self.key, self.names = kind, set(faults), key, list(names)
        self.tokenizer = copy.copy(tokenizer)
        if "other template" in faults:
            self.tokenizer.chat_template = TEMPLATES["chatml"].text()
        self.generator = Generator(model, tokenizer)
        self.stops = list(self.generator.stop_ids)
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"of": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # -- what it does with a conversation ------------------------------------------------------------------------

    def text(self, body: dict[str, Any]) -> str:
        messages = [dict(message) for message in body["messages"]]
        for message in messages:
            if "stripped thought" in self.faults:
                message.pop("reasoning_content", None)
            for call in message.get("tool_calls") or ():
                if isinstance(call["function"]["arguments"], str):
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        tools = None if "no tools" in self.faults else body.get("tools")
        options = body.get("chat_template_kwargs") or {}
        text: str = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **options
        )
        return text

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *found] if "doubled BOS" in self.faults else found

    def answer(self, body: dict[str, Any], most: int) -> tuple[list[int], list[int], str]:
        ids = self.ids(self.text(body))
        with self._lock:
            self.generator.stop_ids = [10**6] if "no stop" in self.faults else self.stops
            row = Row(0, ids, most)
            self.generator.complete([row])
        return ids, row.made, "stop" if row.made[-1] in self.generator.stop_ids else "length"


class _Handler(BaseHTTPRequestHandler):
    of: ChatServer

    def do_GET(self) -> None:
        server = self.of
        server.asked.append((self.path, dict(self.headers), None))
        if self._broken():
            return
        told: dict[tuple[str, str], Any] = {
            ("llama.cpp", "/props"): {
                "chat_template": server.tokenizer.chat_template,
                "build_info": "b1",
                "model_ftype": "F16",
            },
            ("vLLM", "/version"): {"version": "0.11.0"},
            ("TGI", "/info"): {"model_id": "tiny", "version": "3.3.0", "model_dtype": "float32"},
            ("Ollama", "/api/version"): {"version": "0.12.0"},
        }
        if self.path == "/v1/models":
            self._say({"object": "list", "data": [{"id": name} for name in server.names]})
        elif (server.kind, self.path) in told:
            self._say(told[server.kind, self.path])
        else:
            self._say({"error": f"File Not Found: {self.headers.get('Authorization')}"}, 404)

    def do_POST(self) -> None:
        server = self.of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, dict(self.headers), body))
        if self._broken():
            return
        if "no system" in server.faults and (body.get("messages") or [{}])[0].get("role") == "system":
            self._say({"error": "System role not supported"}, 400)
            return
        route = getattr(self, f"_{re.sub(r'[^a-z]+', '_', (server.kind + self.path).lower())}", None)
        if route is None and self.path == "/v1/chat/completions":
            self._chat(body, {})
        elif route is None:
            self._say({"error": "File Not Found"}, 404)
        else:
            route(body)

    def _llama_cpp_apply_template(self, body: Any) -> None:
        self._say({"prompt": self.of.text(body)})

    def _llama_cpp_tokenize(self, body: Any) -> None:
        assert body["add_special"]
        assert body["parse_special"]
        self._say({"tokens": self.of.ids(body["content"])})

    def _llama_cpp_v_chat_completions(self, body: Any) -> None:
        self._chat(body, {"logprobs": lambda made: {"content": [{"id": token} for token in made]}})

    def _vllm_tokenize(self, body: Any) -> None:
        ids = self.of.ids(self.of.text(body))
        self._say({"count": len(ids), "max_model_len": 128, "tokens": ids})

    def _vllm_v_chat_completions(self, body: Any) -> None:
        self._chat(body, {"token_ids": lambda made: made} if body.get("return_token_ids") else {})

    def _tgi_chat_tokenize(self, body: Any) -> None:
        text = self.of.text(body)
        tokens = [{"id": token, "text": "", "start": 0, "stop": 0} for token in self.of.ids(text)]
        self._say({"tokenize_response": tokens, "templated_text": text})

    def _ollama_api_show(self, body: Any) -> None:
        self._say({"template": "{{ .Prompt }}", "details": {"quantization_level": "F16"}})

    def _ollama_api_chat(self, body: Any) -> None:
        ids, made, finish = self.of.answer(body, body["options"]["num_predict"])
        text = self.of.tokenizer.decode(made, skip_special_tokens=True)
        message = {"role": "assistant", "content": text}
        self._say({"message": message, "done_reason": finish, "prompt_eval_count": len(ids)})

    def _chat(self, body: Any, further: dict[str, Any]) -> None:
        ids, made, finish = self.of.answer(body, body["max_tokens"])
        message = {"role": "assistant", "content": self.of.tokenizer.decode(made, skip_special_tokens=True)}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        choice |= {name: of(made) for name, of in further.items()}
        self._say({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})

    def _broken(self) -> bool:
        """Whether the connection itself is at fault, and that has been done."""
        server = self.of
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self._say({"error": "invalid key"}, 401)
            return True
        if "loading" in server.faults:
            self._say({"error": "Loading model"}, 503)
            return True
        if "slow" in server.faults:
            time.sleep(3)
            return True
        if "error" in server.faults:
            self._say({"error": f"you sent {self.headers.get('Authorization')}"}, 500)
            return True
        if "redirect" in server.faults:
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True
        if "trickle" in server.faults:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # whoever asked waits no longer
                for _ in range(40):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            return True
        if "not JSON" in server.faults:
            self._send(b"<html>hello</html>", 200)
            return True
        return False

    def _say(self, told: Any, status: int = 200) -> None:
        self._send(json.dumps(told).encode(), status)

    def _send(self, content: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""
