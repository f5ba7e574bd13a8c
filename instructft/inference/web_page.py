"""The chat page as Gradio draws it: what is where, and which button asks what of a `talk.Desk`."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from instructft.inference.reference_model import START
from instructft.inference.web_sessions import Desk, Seen, Settings
from instructft.prompt.token_view import visible

STYLE = """
.gradio-container { width: 100% !important; max-width: 76rem !important; margin: 0 auto !important; }
#title h1 { font-size: 1.25rem; margin: .2rem 0 0; overflow-wrap: anywhere; }
#notice { min-height: 1.5rem; color: var(--body-text-color-subdued); font-size: .9rem; overflow-wrap: anywhere; }
#notice p { margin: 0; white-space: pre-wrap; }
footer { display: none !important; }
"""


def build(desk: Desk, name: str, settings: Settings) -> gr.Blocks:
    """The page, not served yet."""
    beside = desk.beside and ("what it began from" if desk.beside.base == START else desk.beside.base)
    with gr.Blocks(title=f"{name} · instructft", analytics_enabled=False) as page:
        gr.HTML(f"<h1>{_html(name)}</h1>", elem_id="title")
        with gr.Row():
            tuned = _chatbot("Answers", "tuned")
            base = _chatbot(
                "What it began from" if beside == "what it began from" else str(beside or ""), "base", visible=False
            )
        notice = gr.HTML("", elem_id="notice")
        with gr.Row():
            box = gr.Textbox(
                placeholder="Write a message",
                show_label=False,
                container=False,
                autofocus=True,
                scale=8,
                min_width=120,
                elem_id="box",
            )
            send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop", visible=False)
        with gr.Row():
            retry = gr.Button("Answer again", size="sm", min_width=80, elem_id="retry")
            undo = gr.Button("Take back", size="sm", min_width=80, elem_id="undo")
            reset = gr.Button("New chat", size="sm", min_width=80, elem_id="reset")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            compare = gr.Checkbox(
                label=f"Ask {beside} too" if beside else "Nothing says what this model began from; name it with --base",
                interactive=desk.beside is not None,
                elem_id="compare",
            )
            system = gr.Textbox(settings.system, label="System prompt", lines=2, elem_id="system")
            with gr.Row():
                temperature = gr.Slider(0, 2, settings.temperature, step=0.05, label="Temperature (0 is greedy)")
                top_p = gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top p")
                most = gr.Number(settings.max_new_tokens, label="Tokens in an answer, at most", precision=0, minimum=1)
        asked = gr.State("")  # a question on its way from the box to the model
        knobs = [system, temperature, top_p, most, compare]
        view = [tuned, base, notice, box, send, stop]

        def take(text: str) -> tuple[str, Any]:
            return text, gr.update(value="")

        def take_last(request: gr.Request) -> str:
            talk = desk.talk(_tab(request))
            return "" if talk.busy.locked() else talk.undo()

        def answer(
            text: str, system: str, temperature: float, top_p: float, most: float, compare: bool, request: gr.Request
        ) -> Iterator[list[Any]]:
            chosen = Settings(system or "", float(temperature), float(top_p), int(most or 0))
            for seen in desk.answer(_tab(request), text, chosen, compare):
                yield _drawn(seen, going=True)
            yield _drawn(seen, going=desk.talk(_tab(request)).busy.locked())

        def taken_back(text: str, request: gr.Request) -> list[Any]:
            talk = desk.talk(_tab(request))
            if talk.busy.locked():
                return _drawn(talk.seen("Stop the answer first."), going=True)
            return _drawn(talk.seen(back=talk.undo() or text), going=False)

        def begin_anew(request: gr.Request) -> list[Any]:
            talk = desk.talk(_tab(request))
            talk.reset()
            return _drawn(talk.seen(), going=False)

        def end(request: gr.Request) -> None:
            desk.stop(_tab(request))

        def show(compared: bool) -> Any:
            return gr.update(visible=compared)

        def closed(request: gr.Request) -> None:
            desk.forget(_tab(request))

        # what needs no model is answered at once, also while it is busy
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        ask: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for event in (send.click, box.submit):
            event(take, [box], [asked, box], **at_once).then(answer, [asked, *knobs], view, **ask)
        retry.click(take_last, None, [asked], **at_once).then(answer, [asked, *knobs], view, **ask)
        stop.click(end, None, None, **at_once)
        undo.click(taken_back, [box], view, **at_once)
        for event in (reset.click, tuned.clear, base.clear):
            event(begin_anew, None, view, **at_once)
        compare.change(show, [compare], [base], **at_once)
        page.unload(closed)
    return page


def _chatbot(label: str, name: str, visible: bool = True) -> Any:
    # What a model writes is shown as it is: as Markdown, signs would vanish, and pictures would be loaded.
    return gr.Chatbot(
        label=label,
        elem_id=name,
        visible=visible,
        height="60vh",
        render_markdown=False,
        buttons=[],  # what "copy" would give has `<` written as `&lt;`, see `_messages`
        feedback_options=None,
        reasoning_tags=[],
        group_consecutive_messages=False,
        scale=1,
        min_width=280,
    )


def _drawn(seen: Seen, going: bool) -> list[Any]:
    """Values for the page: both conversations, the notice, the box and its buttons."""
    box = gr.update(value=seen.back) if seen.back else gr.update()
    buttons = [gr.update(visible=not going), gr.update(visible=going)]
    notice = f"<p role='status'>{_html(seen.notice)}</p>" if seen.notice else ""
    return [_messages(seen.tuned), _messages(seen.base), notice, box, *buttons]


def _messages(turns: list[Any]) -> list[dict[str, Any]]:
    """Turns as the page draws them; a note stands apart."""
    drawn = []
    for turn in turns:
        if turn["role"] == "note":
            drawn.append({"role": "assistant", "content": "", "metadata": {"title": turn["content"]}})
        else:
            # gradio 6.31 draws HTML even where it is told to draw no Markdown
            drawn.append({"role": turn["role"], "content": _html(str(turn["content"]))})
    return drawn


def _tab(request: gr.Request) -> str:
    return str(request.session_hash)


def _html(text: str) -> str:
    return escape(visible(text))
