"""Why a server reads or gives other tokens than training did: the known causes, each recognized by what it leaves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from instructft.formatting import short
from instructft.prompt.conversation import Conversation
from instructft.prompt.templates import TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
AROUND = 4  # tokens shown on each side of the first that differs
UNKNOWN, QUANTIZED = "unknown", "quantized weights"


@dataclass(frozen=True)
class Cause:
    """What is known of a difference.

    Args:
        name: of the cause, such as `doubled BOS`; `unknown` where none fits.
        what_to_do: in a sentence.
    """

    name: str
    what_to_do: str = ""


STOP_REMOVED = Cause(
    "stop token removed",
    "the answer goes on behind the token that ends it; the server has to stop there (eos_token_id in "
    "generation_config.json, tokenizer.ggml.eos_token_id, stop)",
)
OTHER_EOS = Cause("other EOS", "the server ends answers at another token, or names another reason for their end")


@dataclass(frozen=True)
class Place:
    """The first token that differs: its position, and the tokens there; None where one has ended."""

    position: int
    ours: int | None
    theirs: int | None


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> Place | None:
    """Where two lists of ids part; None where they do not.

    >>> first_difference([1, 2, 3], [1, 2])
    Place(position=2, ours=3, theirs=None)
    """
    for i in range(max(len(ours), len(theirs))):
        one = ours[i] if i < len(ours) else None
        other = theirs[i] if i < len(theirs) else None
        if one != other:
            return Place(i, one, other)
    return None


def around(ids: Sequence[int], position: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokens about a position, the one there in brackets: `'user' [1: '<s>'] 'Hi'`."""
    shown = []
    for i in range(max(0, position - AROUND), min(len(ids), position + AROUND + 1)):
        text = repr(tokenizer.decode([ids[i]]))
        shown.append(f"[{ids[i]}: {text}]" if i == position else text)
    if position >= len(ids):
        shown.append("[its end]")
    return " ".join(shown)


def of_prompt(
    ours: Sequence[int],
    theirs: Sequence[int],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
) -> Cause:
    """Why a server gives a model another prompt.

    Args:
        template: the chat template that the server says it uses; None where it does not say.
    """
    bos = _bos(ours, theirs, tokenizer)
    if bos is not None:
        return bos
    expected, found = tokenizer.decode(ours), tokenizer.decode(theirs)
    if expected == found:
        return Cause(
            "cut into other tokens",
            "the text is the same: the server's tokenizer is not the trained one, or it takes special tokens for plain "
            "text; serve the tokenizer files that lie beside the model",
        )
    if _plain(expected) == _plain(found):
        return Cause("white space changed", "the server's template takes away or adds spaces or line breaks")
    if known := _other_template(theirs, conversation, tokenizer):
        return Cause("template not picked up", f"the server renders with {known}; {_GIVE_TEMPLATE}")
    if _none_said(expected, found, conversation):
        return Cause(
            "another vocabulary",
            "read by the trained tokenizer, the server's ids say nothing of the conversation: it serves another model, "
            "or tokenizer files that are not those beside this one",
        )
    if cause := _lost(expected, found, conversation):
        return cause
    if template is not None and _same_text(template) != _same_text(str(tokenizer.chat_template)):
        return Cause(
            "template not picked up",
            f"the server says its template is {short(template, 60)!r}, which is not the trained one; {_GIVE_TEMPLATE}",
        )
    return Cause(UNKNOWN, "compare the server's template with chat_template.jinja beside the model")


_GIVE_TEMPLATE = "start it with chat_template.jinja from the model's folder (llama-server, vLLM: --chat-template FILE)"


def _same_text(template: str) -> str:
    return template.strip()


def _plain(text: str) -> str:
    return "".join(text.split())


def _bos(ours: Sequence[int], theirs: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Cause | None:
    bos = tokenizer.bos_token_id
    if list(theirs[1:]) == list(ours):
        name = repr(tokenizer.decode([theirs[0]]))
        if ours and theirs[0] == ours[0]:
            return Cause(
                "doubled BOS",
                f"{name} comes from the template and once more from the tokenizer; switch off the second "
                "(tokenizer.ggml.add_bos_token, add_bos_token, add_special_tokens)",
            )
        return Cause(
            "BOS that training did not have",
            f"the server puts {name} in front; switch that off (tokenizer.ggml.add_bos_token, add_bos_token)",
        )
    if ours and list(ours[1:]) == list(theirs) and ours[0] == bos:
        return Cause("missing BOS", "training began with it; switch it on in the server's tokenizer (add_bos_token)")
    return None


def _other_template(
    theirs: Sequence[int], conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The built-in template by which a server rendered a conversation, if it is one."""
    import copy

    for name, template in TEMPLATES.items():
        if template.text() == tokenizer.chat_template:
            continue
        other = copy.copy(tokenizer)
        other.chat_template = template.text()
        try:
            rendered = other.apply_chat_template(
                list(conversation), tools=conversation.tools, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template that refuses this conversation did not render it
            continue
        plain = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if list(theirs)[-len(plain) :] == plain and len(theirs) - len(plain) <= 1:
            return f"the template {name}"
    return None


def _none_said(expected: str, found: str, conversation: Conversation) -> bool:
    """Whether a text has no content at all of those that another one has."""
    said = [text for message in conversation if (text := _plain(str(message.get("content") or ""))) in _plain(expected)]
    said = [text for text in said if text]
    return bool(said) and not any(text in _plain(found) for text in said)


def _lost(expected: str, found: str, conversation: Conversation) -> Cause | None:
    """Parts of a conversation that one of the two texts has and the other has not."""
    names = [str((tool.get("function") or tool).get("name")) for tool in conversation.tools or ()]
    if any(name in expected and name not in found for name in names):
        return Cause(
            "tools lost", "the server leaves the tools out of the prompt; llama-server wants --jinja, vLLM a template"
        )
    thoughts = [str(message["reasoning_content"]) for message in conversation if message.get("reasoning_content")]
    thoughts += [thought for thought in _THOUGHT.findall(expected) if thought not in found]
    if any(thought in expected and thought not in found for thought in thoughts):
        return Cause("stripped thought", "the server takes the reasoning out of earlier turns, which training kept")
    if any(thought not in expected and thought in found for thought in thoughts):
        return Cause("kept thought", "the server shows the reasoning of earlier turns, which training left out")
    if bool(_THOUGHT.search(found)) != bool(_THOUGHT.search(expected)):
        return Cause(
            "thinking switched otherwise", "give the server the option that the run was trained with (enable_thinking)"
        )
    said = [str(message.get("content") or "").strip() for message in conversation]
    if any(text and text in expected and text not in found for text in said):
        lost = next(text for text in said if text and text in expected and text not in found)
        return Cause("message lost", f"the server leaves out {short(lost, 60)!r}")
    if len(conversation) and conversation[0]["role"] != "system" and "system" in found and "system" not in expected:
        return Cause("system prompt added", "the server puts in a system message that training did not have")
    return None


def of_answer(
    theirs: Sequence[int], place: Place, stops: Sequence[int], ended: bool, finish: str, weights: str
) -> Cause | None:
    """Why a server answers otherwise after the same prompt; None where nothing of the two answers tells.

    Args:
        theirs: ids of the server's answer, without the token that ended it.
        stops: the tokens at which this model ends an answer.
        ended: whether our answer ended by itself.
        finish: why the server's ended, in its words.
        weights: in what the server holds them, as Q4_K_M.
    """
    behind = theirs[place.position] if place.ours is None and place.position < len(theirs) else None
    if ended and behind is not None and (behind in stops or finish == "length"):
        return STOP_REMOVED
    if place.theirs is None and finish == "stop":
        return OTHER_EOS
    if weights.upper().startswith(("Q", "IQ", "TQ")):
        return Cause(QUANTIZED, f"the server holds the weights in {weights}; the export's table shows its cost")
    return None


_BEHIND = 4  # tokens that two answers share from the place on where a third one differs


def served_by_base(theirs: Sequence[Sequence[int]], base: Sequence[Sequence[int]], places: Sequence[int]) -> bool:
    """Whether the answers that differ from the tuned model's are those of its base, all but a tenth.

    Compared up to some tokens behind the place where they differ: further on a near tie may part them once more.

    >>> served_by_base([[1, 2, 3], [4]], [[1, 2, 3], [4]], [1, 0])
    True
    """
    ends = [place + _BEHIND for place in places]
    equal = sum(list(a[:end]) == list(b[:end]) for a, b, end in zip(theirs, base, ends, strict=True))
    return bool(theirs) and equal >= 0.9 * len(theirs)
