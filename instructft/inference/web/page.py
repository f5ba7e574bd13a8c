"""`instructft ui`: a chat page in the browser: Gradio's `ChatInterface`, and the model it is compared with beside."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError
from instructft.inference.chat import as_generator
from instructft.inference.generator import Generator, check_settings
from instructft.inference.reference_model import START, ReferenceModel, check_base, recipe_of
from instructft.inference.web.answers import (
    Settings,
    Turn,
    all_drawn,
    base_drawn,
    drawn,
    from_json,
    name_of,
    reply,
    row,
    to_json,
)
from instructft.inference.web.server import free_port, start
from instructft.models.load_for_inference import locate
from instructft.prompt.templates import TEMPLATES
from instructft.prompt.token_view import visible

if TYPE_CHECKING:
    from gradio import Blocks

# The browser keeps a conversation for its tab: over a reload, not beyond, and no other tab's
# where it is full, or forbidden, nothing is kept
_KEEP = "(text) => { try { if (text) sessionStorage.setItem(%s, text) } catch {} }"
_RECALL = "() => { try { return sessionStorage.getItem(%s) } catch { return null } }"
_DOWNLOAD = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/jsonl"}));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


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
    ) -> Iterator[tuple[Any, ...]]:
        before, question = told_apart(message, history, turns)
        chosen = _settings(system, temperature, top_p, most)
        for turn in reply(generator, before, question, chosen, reference if compare else None):
            now = [*before, turn]
            yield drawn(turn, before), now, base_drawn(now) if compare else gr.skip()

    def keep(history: list[dict[str, Any]], turns: list[Turn], *chosen: Any) -> Any:
        if not turns:  # a page that was just opened, and has not recalled anything yet
            return gr.skip()
        # the turns behind the history stay: a retry may need the exact question
        return to_json(turns[: _asked(history)], _settings(*chosen[:4]), chosen[4])

    def follow(history: list[dict[str, Any]], turns: list[Turn]) -> Any:
        asked = _asked(history)  # undo and clear are of both conversations
        return base_drawn(turns[:asked]) if asked < len(turns) else gr.skip()

    def recall(text: str | None) -> list[Any]:
        kept = from_json(text)
        if kept is None:
            return [gr.skip()] * 8
        turns, chosen, compare = kept
        compare = compare and reference is not None
        fields = (chosen.system, chosen.temperature, chosen.top_p, chosen.max_new_tokens, compare)
        shown = all_drawn(turns)
        return [shown, shown, turns, *fields]

    def save(history: list[dict[str, Any]], turns: list[Turn], system: str) -> str:
        text = row(turns[: _asked(history)], system)
        if not text:
            gr.Info("There is no conversation to save yet.")
        return text

    key = json.dumps(f"instructft {name}")
    alone = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    with gr.Blocks(title=f"{visible(name)} · instructft", fill_height=True, analytics_enabled=False) as page:
        gr.HTML(_head(name, generator))
        turns, kept, saved = gr.State([]), gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
        with gr.Accordion("Settings", open=False, elem_id="settings", render=False) as accordion:
            system = gr.Textbox(settings.system, label="System prompt", lines=2, elem_id="system")
            temperature = gr.Slider(0, 2, settings.temperature, step=0.05, label="Temperature (0 is greedy)")
            top_p = gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top p")
            most = gr.Number(settings.max_new_tokens, label="Tokens in an answer, at most", precision=0, minimum=1)
            compare = gr.Checkbox(label=_compare_label(reference), interactive=reference is not None, elem_id="compare")
        chosen = [system, temperature, top_p, most, compare]
        with gr.Row(equal_height=True, scale=1):
            with gr.Column(min_width=320):
                download = gr.Button("Save as JSONL", elem_id="save", render=False)
                base = gr.Chatbot(
                    label=name_of(reference) if reference else "",
                    elem_id="base",
                    scale=1,
                    buttons=["copy", "copy_all"],
                    render=False,
                )
                chat = gr.ChatInterface(
                    answer,
                    chatbot=gr.Chatbot(
                        label="Conversation",
                        show_label=False,
                        elem_id="chat",
                        scale=1,
                        buttons=["copy", "copy_all", download],
                    ),
                    textbox=gr.Textbox(
                        label="Message",
                        placeholder="Write a message",
                        submit_btn=True,
                        stop_btn=True,
                        autofocus=True,
                        scale=7,
                        elem_id="box",
                    ),
                    additional_inputs=[*chosen, turns],
                    additional_outputs=[turns, base],
                    examples=[[sample] for sample in samples] or None,
                    cache_examples=False,
                    flagging_mode="never",
                    analytics_enabled=False,
                    api_visibility="private",
                    concurrency_limit=1,  # one answer at a time; others wait in Gradio's queue
                )
            with gr.Column(min_width=320, visible=False, elem_id="beside") as beside:
                base.render()
        accordion.render()
        # first the column, then what is in it: Gradio draws nothing into a part that is not there yet
        compare.change(lambda on: gr.Column(visible=on), compare, beside, **alone).then(
            lambda history, turns: base_drawn(turns[: _asked(history)]), [chat.chatbot, turns], base, **alone
        )
        for shown in (chat.chatbot, base):
            shown.change(keep, [chat.chatbot, turns, *chosen], kept, **alone).then(None, kept, None, js=_KEEP % key)
        chat.chatbot.change(follow, [chat.chatbot, turns], base, **alone)
        download.click(save, [chat.chatbot, turns, system], saved, **alone).then(None, saved, None, js=_DOWNLOAD)
        page.load(recall, kept, [chat.chatbot, chat.chatbot_state, turns, *chosen], js=_RECALL % key, **alone)
    return page


def told_apart(message: str, history: list[dict[str, Any]], turns: list[Turn]) -> tuple[list[Turn], str]:
    """The turns before a question, and the question as it was written, from what the page knows.

    Retry, undo and clear shorten the history; a question that was stopped while it waited has no turn.
    """
    asked = _asked(history)
    question = message.strip()
    if len(turns) > asked and turns[asked].question.split() == question.split():
        question = turns[asked].question  # again: as it was written, not as the page shows it
    return [*turns[:asked], *[Turn()] * (asked - len(turns))], question


def _asked(history: list[dict[str, Any]]) -> int:
    return sum(one["role"] == "user" for one in history)


def _settings(system: str, temperature: float, top_p: float, most: float | None) -> Settings:
    return Settings(system or "", float(temperature), float(top_p), int(most or 0))


def _compare_label(reference: ReferenceModel | None) -> str:
    if reference is None:
        return "Nothing says what this model began from; name it with --base"
    return f"Ask {'what it began from' if reference.base == START else name_of(reference)} too"


def _head(name: str, generator: Generator) -> str:
    model, text = generator.model, str(generator.tokenizer.chat_template)
    template = next((known for known, one in TEMPLATES.items() if text.endswith(one.text())), "the model's own")
    weights = sum(weight.numel() for weight in model.parameters())
    facts = [
        f"{model.config.model_type}, {weights / 1e6:,.1f} million weights",
        f"template: {template}",
        f"{model.device}, {str(model.dtype).removeprefix('torch.')}",
    ]
    return f"<div id='head'><h1>{escape(' '.join(visible(name).split()))}</h1><p>{escape(' · '.join(facts))}</p></div>"


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
