"""`instructft ui`: a chat page in the browser, on this machine only, that asks nobody else for anything.

The page is Gradio's `ChatInterface`. Its telemetry, its fonts from elsewhere and its record of past calls are off, and
the browser is told to load nothing from other places, whatever a model writes. The model never reads what the page
shows: the exact turns stay on the server, and the page's history only says how many of them still count.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from instructft.errors import InstructftError, UsageError
from instructft.inference.chat import Chat, as_generator
from instructft.inference.generator import MAX_NEW_TOKENS, Generator, check_settings
from instructft.inference.reference_model import START, ReferenceModel, check_base, recipe_of
from instructft.models.load_for_inference import locate
from instructft.prompt.templates import TEMPLATES
from instructft.prompt.token_view import visible

if TYPE_CHECKING:
    from gradio import Blocks

ADDRESS = "127.0.0.1"
_BODY = 1 << 20  # bytes of a request at most: a conversation
FIRST_PORT, PORTS = 7860, 100  # tried one after the other where none is named
PACE = 0.05  # seconds between two looks at an answer: a page cannot draw more
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; frame-src 'none'; base-uri 'self'; form-action 'self'"
)
_STYLE = """
#head { padding: .25rem 0; overflow-wrap: anywhere; }
#head h1 { font-size: 1.25rem; margin: 0; }
#head p { margin: 0; font-size: .9rem; opacity: .75; }
footer { display: none !important; }
"""
_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`))", re.DOTALL)

# --------------------------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to answer; the defaults are those of `instructft chat`."""

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class Turn:
    """A question and its answer as the model reads them; one without an answer is no part of the conversation."""

    question: str = ""
    answer: str = ""
    left: int = 0  # messages that did not fit into the context with it


def reply(
    generator: Generator,
    turns: Sequence[Turn],
    question: str,
    settings: Settings,
    reference: ReferenceModel | None = None,
) -> Iterator[tuple[list[dict[str, Any]], Turn]]:
    """Answer a question, and with `reference` ask that model the same: what the page shows, and the turn, as they grow.

    What goes wrong is shown in place of the answer; the conversation goes on without it.
    """
    shown: list[dict[str, Any]] = []
    turn = Turn(question)
    try:
        limits = (settings.max_new_tokens, settings.temperature, settings.top_p)
        chat = Chat(
            generator,
            system=settings.system.strip() or None,
            max_new_tokens=limits[0],
            temperature=limits[1],
            top_p=limits[2],
        )
        for earlier in turns:
            if earlier.answer:
                chat.turns.append({"role": "user", "content": earlier.question})
                chat.turns.append({"role": "assistant", "content": earlier.answer})
        pieces = chat.stream(question)
        asked = [*chat.messages, {"role": "user", "content": question}]
        turn = replace(turn, left=chat.left)
        if chat.left > max((earlier.left for earlier in turns), default=0):
            shown.append(_note(f"The context is full: the oldest {chat.left} turns have left it."))
        for text in _growing(pieces):
            turn = replace(turn, answer=text.strip())
            yield [*shown, _message(text)], turn
        shown.append(_message(turn.answer) if turn.answer else _note("No answer: it is no part of the conversation."))
        if chat.finish_reason == "length":
            shown.append(_note("Cut off: the settings allow more tokens."))
        if reference is not None:
            name = "What it began from" if reference.base == START else visible(reference.base)
            yield [*shown, _note(f"{name} is asked …")], turn  # it may have to be loaded
            with reference.answering() as base:
                for text in _growing(base.stream(asked, *limits)):
                    yield [*shown, _message(text.strip() or "(no answer)", f"{name} answers")], turn
            return
    except InstructftError as error:
        shown.append(_note(f"{error}."))
    yield shown, turn


def _growing(pieces: Iterator[str]) -> Iterator[str]:
    text, shown = "", 0.0
    with closing(pieces):  # type: ignore[type-var]  # a generator: left early, it ends the model's work
        for piece in pieces:
            text += piece
            if time.monotonic() - shown >= PACE:
                shown = time.monotonic()
                yield text
    yield text


def _message(text: str, title: str = "") -> dict[str, Any]:
    # as a text part: Gradio takes the indentation off a plain string
    content = [{"type": "text", "text": markdown(text)}]
    return {"role": "assistant", "content": content} | ({"metadata": {"title": title}} if title else {})


def _note(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "metadata": {"title": visible(text)}}


def markdown(text: str) -> str:
    r"""Markdown that draws no HTML and no picture; what stands in code is left as it is, so that it can be copied.

    >>> markdown("**<b>** `<b>` ![x](http://y)")
    '**&lt;b>** `<b>` !\\[x](http://y)'
    """
    parts = _CODE.split(visible(text))
    for i in range(0, len(parts), 3):
        parts[i] = parts[i].replace("&", "&amp;").replace("<", "&lt;").replace("![", "!\\[")
    return "".join(part for i, part in enumerate(parts) if i % 3 < 2 and part)


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def build(
    generator: Generator,
    name: str,
    settings: Settings,
    reference: ReferenceModel | None = None,
    samples: Sequence[str] = (),
) -> Blocks:
    """The page, not served yet.

    Args:
        samples: prompts that an empty page offers.
    """
    import gradio as gr

    def answer(
        message: str,
        history: list[dict[str, Any]],
        system: str,
        temperature: float,
        top_p: float,
        most: float | None,
        compare: bool,
        turns: list[Turn],
    ) -> Iterator[tuple[list[dict[str, Any]], list[Turn]]]:
        # retry, undo and clear shorten the history; a question that was stopped while it waited has no turn
        asked = sum(one["role"] == "user" for one in history)
        question = message.strip()
        if len(turns) > asked and turns[asked].question.split() == question.split():
            question = turns[asked].question  # again: as it was written, not as the page shows it
        before = [*turns[:asked], *[Turn()] * (asked - len(turns))]
        chosen = Settings(system or "", float(temperature), float(top_p), int(most or 0))
        for shown, turn in reply(generator, before, question, chosen, reference if compare else None):
            yield shown, [*before, turn]

    label = "what it began from" if reference and reference.base == START else reference and visible(reference.base)
    turns = gr.State([])
    page = gr.ChatInterface(
        answer,
        description=_head(name, generator),
        chatbot=gr.Chatbot(show_label=False, elem_id="chat", scale=1, buttons=["copy", "copy_all"]),
        textbox=gr.Textbox(
            placeholder="Write a message",
            submit_btn=True,
            stop_btn=True,
            autofocus=True,
            scale=7,
            elem_id="box",
        ),
        additional_inputs=[
            gr.Textbox(settings.system, label="System prompt", lines=2, elem_id="system"),
            gr.Slider(0, 2, settings.temperature, step=0.05, label="Temperature (0 is greedy)"),
            gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top p"),
            gr.Number(settings.max_new_tokens, label="Tokens in an answer, at most", precision=0, minimum=1),
            gr.Checkbox(
                label=f"Ask {label} too"
                if reference
                else "Nothing says what this model began from; name it with --base",
                interactive=reference is not None,
                elem_id="compare",
            ),
            turns,
        ],
        additional_inputs_accordion=gr.Accordion("Settings", open=False, elem_id="settings", render=False),
        additional_outputs=[turns],
        examples=[[sample] for sample in samples] or None,
        cache_examples=False,
        flagging_mode="never",
        analytics_enabled=False,
        api_visibility="private",
        concurrency_limit=1,  # one answer at a time; others wait in Gradio's queue
    )
    page.title = f"{visible(name)} · instructft"
    return page


def _head(name: str, generator: Generator) -> str:
    model, text = generator.model, str(generator.tokenizer.chat_template)
    template = next((known for known, one in TEMPLATES.items() if text.endswith(one.text())), "the model's own")
    facts = f"template: {template} · {model.device}, {str(model.dtype).removeprefix('torch.')}"
    # without an empty line in it Markdown leaves HTML as it is
    return f"<div id='head'><h1>{escape(' '.join(visible(name).split()))}</h1><p>{escape(facts)}</p></div>"


# --------------------------------------------------------------------------------------------------------------------
# The server
# --------------------------------------------------------------------------------------------------------------------


def serve(
    model: str, *, port: int | None = None, share: bool = False, base: str | None = None, settings: Settings
) -> None:
    """Load a model and serve the page until Ctrl-C.

    Args:
        port: on 127.0.0.1; None takes the first free one from 7860.
        share: also make a public link through Gradio's servers, for whoever knows it.
        base: the model it is compared with; None: what the model began from, where that is known.
        settings: what the page begins with.

    Raises:
        UsageError: gradio is not installed, no such model, or the port is taken; before any weight is loaded.
    """
    _require_gradio()
    check_settings(settings.max_new_tokens, settings.temperature, settings.top_p)
    locate(model)
    port = free_port(port)
    if base is not None:
        check_base(model, base)
    generator, recipe = as_generator(model), recipe_of(model)
    page = build(generator, model, settings, _reference(model, base, generator), recipe.samples if recipe else ())
    url = start(page, port, share)
    print(f"{model} answers at {url} (Ctrl-C ends it)", flush=True)
    if share:
        print(f"Whoever knows this link can talk to it: {page.share_url}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        page.close(verbose=False)


def start(page: Blocks, port: int, share: bool = False) -> str:
    """Serve a page that was built, in the background; its address. `page.close()` ends it."""
    import gradio as gr
    from starlette.middleware import Middleware

    hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
    fonts, mono = ("system-ui", "-apple-system", "Segoe UI", "sans-serif"), ("ui-monospace", "Menlo", "monospace")
    _, url, _ = page.launch(
        server_name=ADDRESS,
        server_port=port,
        share=share,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,  # byte: there is nothing to upload a file for
        app_kwargs={"middleware": [Middleware(Guard, hosts=hosts)]},
        theme=gr.themes.Default(primary_hue="blue", font=fonts, font_mono=mono),
        css=_STYLE,
    )
    if share and page.share_url:
        hosts.add(_host(page.share_url))
    return url


def free_port(port: int | None) -> int:
    """A port of 127.0.0.1 that is free: the one that is named, or the first one from 7860.

    Raises:
        UsageError: it is taken, or all are.
    """
    for number in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((ADDRESS, number))
            except OSError:
                continue
            return number
    if port is not None:
        raise UsageError(f"--port: {port} cannot be used, another program holds it; choose another, or leave it out")
    raise UsageError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are all taken; name a free one with --port")


def _reference(model: str, base: str | None, generator: Generator) -> ReferenceModel | None:
    """The model it is compared with; None where none was named and nothing says what it began from."""
    try:
        return ReferenceModel.of(model, base or START, generator)
    except UsageError:
        if base is not None:
            raise
        return None


def _require_gradio() -> None:
    # said before gradio is imported: it reads them then
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UsageError(
            f"instructft ui needs gradio, which is not installed ({error}). Install it: pip install 'instructft[ui]'"
        ) from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise UsageError(
            f"instructft ui needs gradio 6.31 or later, found {gradio.__version__}: pip install 'instructft[ui]'"
        )


class Guard:
    """Answers this machine's own page, and nobody else's; tells the browser to load from this server only.

    Plain ASGI, so that streams stay streams. A page of another site that is open in the same browser can send requests
    here too: under a name that its owner lets point to 127.0.0.1 (`Host` tells), or as a form (`Origin` tells).

    Args:
        hosts: names with ports under which the page is asked for, such as `127.0.0.1:7860`; more may be added.
    """

    def __init__(self, app: Any, hosts: set[str]):
        self.app, self.hosts = app, hosts

    def refusal(self, scope: Any) -> tuple[int, str]:
        """Why a request is not answered, with its status; (0, "") where it is."""
        said = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        if said.get("host", "") not in self.hosts:
            return 421, "this page is asked for by another name than its own"
        origin = said.get("origin")
        if scope.get("method", "GET") not in ("GET", "HEAD") and origin and _host(origin) not in self.hosts:
            return 403, "another page sent this"
        if scope["path"].rstrip("/").endswith("/upload"):
            return 403, "there is nothing here to upload a file for"
        length = said.get("content-length", "0")
        if not length.isdigit() or int(length) > _BODY:
            return 413, f"more than {_BODY} bytes"
        return 0, ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY.encode())]}
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # there is no socket to be had here
            return
        status, why = self.refusal(scope)
        if not status:
            await self.app(scope, receive, with_policy)
            return
        headers = [(b"content-type", b"text/plain")]
        await with_policy({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": why.encode()})


def _host(url: str) -> str:
    return url.partition("://")[2].rstrip("/")
