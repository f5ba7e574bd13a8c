"""What a server is asked: rows that the run held out, and seeded conversations of every kind its template takes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from instructft.errors import DataError, TemplateError, UsageError
from instructft.evaluation.compare import rows_of
from instructft.prompt.conversation import Conversation, Message, as_conversation
from instructft.prompt.loss_mask import Encoder
from instructft.recipe.schema import Recipe

_EXTRAS = ("input", "context")  # a message of a server has no place for them

_QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What is 17 times 23?",
    "Translate to German: The weather is fine today.",
    "  Two spaces before, one line break after.\n",
    "Größe, naïve, 東京, 🙂 and Ω: which of these is a city?",
    "def add(a, b):\n    return a + b\n\nWhat does this do?",
    "List: \n- tea\n- honey\n\n\nSort it.",
    "1 22 333 4444 55555: which is the longest?",
    "Say \"hello\" and 'goodbye' \\ slash.",
    "{{ user }} {% if x %} <b>bold</b> & co: is this HTML?",
    "I've, you're, WE'LL: expand these.",
)
_ANSWERS = (
    "Paris.",
    "Red, green and blue.",
    "It scatters light.",
    "391",
    "Tokyo (東京).",
    "It adds\ntwo numbers.",
    "Yes.",
)
_SYSTEMS = ("Be brief.", "You are a helpful assistant.", "Answer in one word.\nNever explain.")
_THOUGHTS = ("The user wants a short answer.", "First I recall it.\nThen I say it.")
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class Asked:
    """One conversation, up to where the model answers.

    Args:
        kind: `held out`, or of our own: `one turn`, `system`, `many turns`, `tools`, `thinking`.
        ids: of its prompt, as in training.
    """

    kind: str
    conversation: Conversation
    ids: list[int]


def choose(recipe: Recipe | None, encoder: Encoder, rows: int, context: int, seed: int = 0) -> tuple[list[Asked], str]:
    """`rows` conversations, and a sentence about where they come from.

    Half are rows that the run held out, where it held any out and they are here; the others are our own. What is
    longer than the model's context, or what the template refuses, is left out.
    """
    held = held_out(recipe)
    left = sum(any(key in message for message in one for key in _EXTRAS) for one in held)
    held = [one for one in held if not any(key in message for message in one for key in _EXTRAS)]
    draw = random.Random(seed)
    draw.shuffle(held)
    chosen = list(_usable([("held out", one) for one in held], encoder, context, (rows + 1) // 2))
    chosen += _usable(own(encoder, 4 * rows, draw), encoder, context, rows - len(chosen))
    kinds = [one.kind for one in chosen]
    listed = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    said = listed
    if recipe is not None and not held and not left:
        said += "; of rows that the run held out none is here: it held none out, or its data lies elsewhere"
    if left:
        said += f"; {left:,} held-out rows with input or context left out: a server's messages have no place for them"
    return chosen, said


def held_out(recipe: Recipe | None, answered: bool = False) -> list[Conversation]:
    """The conversations that a run held out, up to their last answer, or with it; none where they are not here."""
    if recipe is None:
        return []
    try:
        rows, _, _ = rows_of(recipe, None, None, None)
    except (UsageError, DataError):
        return []
    found = []
    for row in rows:
        one = as_conversation(row["messages"])
        last = max((i for i, message in enumerate(one) if message["role"] == "assistant"), default=0)
        if last:
            found.append(one[: last + answered])
    return found


def _usable(some: Sequence[tuple[str, Conversation]], encoder: Encoder, context: int, most: int) -> Iterator[Asked]:
    """Those that the template takes and the context holds, none twice."""
    seen: set[tuple[int, ...]] = set()
    for kind, conversation in some:
        if len(seen) >= most:
            return
        try:
            normal = encoder.renderer.normal(conversation)
            ids = encoder.prompts([conversation])[0]
            if kind == "tools" and "get_weather" not in encoder.render([conversation], True)[0]:
                continue
        except TemplateError:
            continue
        if len(ids) + 1 < context and tuple(ids) not in seen and normal:
            seen.add(tuple(ids))
            yield Asked(kind, conversation, ids)


def own(encoder: Encoder, count: int, draw: random.Random | None = None) -> list[tuple[str, Conversation]]:
    """Conversations of each kind that the template takes, in turn."""
    draw = draw or random.Random(0)
    kinds = ["one turn", "system", "many turns"]
    if encoder.renderer.text_or_none(Conversation([_user(draw), _call("")], [_TOOL])):
        kinds.append("tools")
    if encoder.renderer.traits.thought_key or not encoder.renderer.unread({"enable_thinking": True}):
        kinds.append("thinking")
    return [(kinds[i % len(kinds)], _one(kinds[i % len(kinds)], encoder, draw)) for i in range(count)]


def _one(kind: str, encoder: Encoder, draw: random.Random) -> Conversation:
    system: list[Message] = [{"role": "system", "content": draw.choice(_SYSTEMS)}]
    turns: list[Message] = []
    for _ in range(draw.randint(1, 4) if kind != "one turn" else 0):
        turns += [_user(draw), {"role": "assistant", "content": draw.choice(_ANSWERS)}]
    begin = system if kind == "system" or (draw.random() < 0.3 and kind != "one turn") else []
    if kind == "tools":
        city = draw.choice(("Oslo", "Tokyo", "São Paulo"))
        result: Message = {
            "role": "tool",
            "content": '{"degrees": 7}',
            "tool_call_id": "call00000",
            "name": "get_weather",
        }
        return Conversation([*begin, _user(draw), _call(city), result], [_TOOL])
    if kind == "thinking":
        for message in turns:
            if message["role"] == "assistant" and encoder.renderer.traits.thought_key:
                message["reasoning_content"] = draw.choice(_THOUGHTS)
        options = (
            {"enable_thinking": draw.random() < 0.5} if not encoder.renderer.unread({"enable_thinking": True}) else {}
        )
        return Conversation([*begin, *turns, _user(draw)], options=options)
    return Conversation([*begin, *turns, _user(draw)])


def _user(draw: random.Random) -> Message:
    number = draw.randint(1, 999)
    question = draw.choice(_QUESTIONS)
    return {"role": "user", "content": question if draw.random() < 0.5 else f"({number}) {question}"}


def _call(city: str) -> Message:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "call00000", "function": function}],
    }
