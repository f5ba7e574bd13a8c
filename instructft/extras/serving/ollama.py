"""Ollama's Modelfile: a chat template in Go's text/template, its stops, and the sampling that the model was saved with.

Ollama renders no Jinja. What it can express of a template are fixed texts about the contents of each role::

    [lead] [system C system D] [first user] Q [X] A [Y] Q [X] …  [generation prompt]

The texts are learned by rendering small conversations with marks, put together again for conversations of many kinds,
and compared with what Jinja renders. A template that needs more than that is refused, with the first place where it
parts. `tests/real/test_served.py` has Go itself render what is written here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructft.errors import TemplateError
from instructft.extras.serving.asked import own
from instructft.prompt.conversation import Conversation, Message
from instructft.prompt.loss_mask import Encoder, encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Q, _A, _R, _S = "Question7", "Answer7", "Again7", "System7"
_BATTERY = 48  # conversations that a template is tried with


@dataclass(frozen=True)
class Parts:
    """The fixed texts of a template.

    Args:
        begin: before the first question, where there is no system message.
        system: before and behind a system message, up to the first question; None: the template takes none.
        question: before any later question.
        asked: behind every question.
        answer: before and behind an answer.
        generation: behind the last question, where the model answers.
    """

    begin: str
    system: tuple[str, str] | None
    question: str
    asked: str
    answer: tuple[str, str]
    generation: str

    def text(self, conversation: Conversation) -> str:
        """What the Go template renders; `messages` in turns of user and assistant, perhaps with a system message."""
        messages = list(conversation)
        system = [str(message["content"]) for message in messages if message["role"] == "system"]
        shown = [message for message in messages if message["role"] != "system"]
        if system and self.system is None:
            raise TemplateError("the template takes no system message")
        text = "".join((self.system[0], system[0], self.system[1])) if system and self.system else self.begin
        first = True
        for i, message in enumerate(shown):
            if message["role"] == "user":
                text += ("" if first else self.question) + message["content"] + self.asked
                first = False
            else:
                text += self.answer[0] + message["content"] + (self.answer[1] if i + 1 < len(shown) else "")
        return text + (self.generation if shown and shown[-1]["role"] == "user" else "")

    def go(self) -> str:
        """The same in the language of Ollama's `TEMPLATE`."""
        begin = _said(self.begin)
        if self.system is not None:
            before, behind = map(_said, self.system)
            begin = f"{{{{- if .System -}}}}{before}{{{{ .System }}}}{behind}{{{{- else -}}}}{begin}{{{{- end -}}}}"
        question = (
            f"{{{{- if $first -}}}}{{{{- $first = false -}}}}{{{{- else -}}}}{_said(self.question)}{{{{- end -}}}}"
        )
        last = "{{- $last := eq (len (slice $.Messages $i)) 1 -}}"
        return (
            "{{- $first := true -}}\n"
            f"{begin}\n"
            "{{- range $i, $message := .Messages -}}\n"
            f"{last}\n"
            f'{{{{- if eq $message.Role "user" -}}}}\n'
            f"{question}{{{{ $message.Content }}}}{_said(self.asked)}{{{{- if $last -}}}}{_said(self.generation)}"
            "{{- end -}}\n"
            f'{{{{- else if eq $message.Role "assistant" -}}}}\n'
            f"{_said(self.answer[0])}{{{{ $message.Content }}}}"
            f"{{{{- if not $last -}}}}{_said(self.answer[1])}{{{{- end -}}}}\n"
            "{{- end -}}\n"
            "{{- end -}}"
        )


def _said(text: str) -> str:
    """A fixed text as an action, so that no white space about it counts: `{{ "### Instruction:\\n" }}`.

    What JSON escapes, Go reads; it knows no pairs of surrogates, so letters stay what they are.
    """
    return "{{ " + json.dumps(text, ensure_ascii=False).replace('\\"', "\\u0022") + " }}" if text else ""


def parts_of(chat: Encoder) -> Parts:
    """The fixed texts of a tokenizer's chat template.

    Raises:
        TemplateError: it has more to it than these; says where.
    """

    def render(*messages: Message, asks: bool = False) -> str:
        return chat.renderer.texts([Conversation(messages)], asks)[0]

    question, answer, again = ({"role": r, "content": c} for r, c in (("user", _Q), ("assistant", _A), ("user", _R)))
    begin, asked = _around(render(question), _Q)
    prompt = render(question, asks=True)
    if not prompt.startswith(begin + _Q + asked):
        raise _refused("what it shows of a question depends on whether an answer follows")
    generation = prompt[len(begin + _Q + asked) :]
    whole = render(question, answer, again)
    before, behind = _around(whole, _A)
    # behind an answer stands what ends it and what begins the next question; where they part, an answer alone tells
    closing = _around(render(question, answer), _A)[1]
    if not before.startswith(begin + _Q + asked) or not behind.startswith(closing) or _R not in behind:
        raise _refused("what it shows of a turn depends on the turns behind it")
    opening = behind[len(closing) :].partition(_R)[0]
    system = None
    try:
        shown = render({"role": "system", "content": _S}, question)
    except TemplateError:
        shown = ""
    if _S in shown and _Q in shown:
        first, rest = _around(shown, _S)
        system = (first, rest.partition(_Q)[0])
    found = Parts(begin, system, opening, asked, (before[len(begin + _Q + asked) :], closing), generation)
    _prove(found, chat)
    return found


def _around(text: str, mark: str) -> tuple[str, str]:
    before, found, behind = text.partition(mark)
    if not found or mark in behind:
        raise _refused(f"it does not show a content once ({text[:60]!r})")
    return before, behind


def _prove(parts: Parts, chat: Encoder) -> None:
    """Hold what the parts give against what Jinja renders."""
    for kind, conversation in own(chat, _BATTERY):
        if kind in ("tools", "thinking"):
            continue
        expected = chat.renderer.text_or_none(conversation, True)
        if expected is None:
            continue
        text = parts.text(conversation)
        if text == expected or _plain(text) == _plain(expected):  # strips contents, which Ollama cannot: noted there
            continue
        at = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), 0)
        raise _refused(
            f"with {len(conversation)} messages it renders {expected[max(0, at - 20) : at + 40]!r}, where fixed texts "
            f"about each content give {text[max(0, at - 20) : at + 40]!r}"
        )


def _plain(text: str) -> str:
    return "".join(text.split())


def _strips(parts: Parts, chat: Encoder) -> bool:
    """Whether the template changes white space of contents."""
    asked = Conversation([{"role": "user", "content": "  a  "}])
    return chat.renderer.text_or_none(asked, True) != parts.text(asked)


def _refused(why: str) -> TemplateError:
    return TemplateError(
        f"--format ollama: Ollama's template language cannot express this chat template: {why}. Export with --format "
        "gguf and serve it with llama-server, which renders Jinja; or train with data.template=chatml"
    )


def modelfile(tokenizer: PreTrainedTokenizerBase, file: str, generation: Any) -> str:
    """The Modelfile of a GGUF file.

    Args:
        file: its path, as seen from the Modelfile.
        generation: the model's `generation_config`.

    Raises:
        TemplateError: Ollama's language cannot express the chat template.
    """
    chat = encoder(tokenizer)
    parts = parts_of(chat)
    notes = ["# Written by instructft export. Ollama renders this TEMPLATE in place of the model's Jinja template."]
    bos = tokenizer.bos_token
    if bos and parts.begin.startswith(bos) and (parts.system is None or parts.system[0].startswith(bos)):
        # Ollama's tokenizer puts it in front of every prompt
        system = None if parts.system is None else (parts.system[0].removeprefix(bos), parts.system[1])
        parts = Parts(
            parts.begin.removeprefix(bos), system, parts.question, parts.asked, parts.answer, parts.generation
        )
        if _adds_bos(tokenizer):
            notes.append(f"# {bos} is not in it: the tokenizer adds it.")
        else:
            parts = parts_of(chat)
    if _strips(parts_of(chat), chat):
        notes.append("# Training took outer white space off contents, which Ollama does not.")
    if chat.renderer.traits.prompt and _takes_tools(chat):
        notes.append("# Tools are not in it: Ollama writes them as JSON without the spaces that training saw.")
    if chat.renderer.traits.thought_key:
        notes.append("# Thoughts of earlier answers are not in it.")
    specials = chat.stop_ids
    stops = [f"PARAMETER stop {json.dumps(tokenizer.decode([stop]), ensure_ascii=False)}" for stop in specials]
    return "\n".join([*notes, f"FROM {file}", f'TEMPLATE """{parts.go()}"""', *stops, *_sampling(generation), ""])


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return list(tokenizer("a")["input_ids"][:1]) == [tokenizer.bos_token_id]


def _takes_tools(chat: Encoder) -> bool:
    tool = {"type": "function", "function": {"name": "look7up", "description": "F.", "parameters": {}}}
    asked = Conversation([{"role": "user", "content": "Q"}], [tool])
    return "look7up" in (chat.renderer.text_or_none(asked, True) or "")


def _sampling(generation: Any) -> list[str]:
    """What the model was saved with, under Ollama's names; its own defaults would change answers otherwise."""
    samples = bool(getattr(generation, "do_sample", False))
    found = {"temperature": getattr(generation, "temperature", None) if samples else 0}
    if samples:
        found |= {name: getattr(generation, name, None) for name in ("top_p", "top_k")}
    found["repeat_penalty"] = getattr(generation, "repetition_penalty", None) or 1
    return [f"PARAMETER {name} {value:g}" for name, value in found.items() if value is not None]
