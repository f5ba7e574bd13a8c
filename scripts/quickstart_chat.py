"""The conversations of the quickstart: questions that lean on what was said before, beside `quickstart_data.py`'s rows.

    python -m scripts.quickstart_chat    # the same file on every machine

A row is one conversation of two to six questions, and no two are alike. It goes on with the subject ("And of Italy?"),
asks for what an earlier turn told ("What is my name?"), or changes the subject and comes back to what was told first.

No question here is one of the single rows: facts are asked for in wordings of their own, and combinations of names,
things and days are others. So a single row that is held out is in no conversation that is trained.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from scripts import quickstart_data as single

SEED = 2025  # of all that is drawn here; a change makes another data set
Turn = tuple[str, str]  # question and answer


class Subject(NamedTuple):
    """How a fact is asked for, how the conversation goes on with another one, and the answer: whole, and in short."""

    asked: list[str]
    goes_on: list[str]
    answer: str
    short: str


FACTS = {
    "capitals": Subject(
        ["What is the capital city of {country}?", "The capital of {country}, please."],
        ["And of {country}?", "What about {country}?", "And the capital of {country}?"],
        "The capital of {country} is {city}.", "{city}"),
    "opposites": Subject(
        ["What is the antonym of {word}?", "The opposite of {word}, please."],
        ["And of {word}?", "What about {word}?", "And the opposite of {word}?"],
        "The opposite of {word} is {answer}.", "{answer}"),
    "past_tense": Subject(
        ["What is the past tense of the verb {verb}?", "The past tense of {verb}, please."],
        ["And of {verb}?", "What about {verb}?", "And the past tense of {verb}?"],
        "The past tense of {verb} is {past}.", "{past}"),
    "young_animals": Subject(
        ["What do we call a baby {animal}?", "The word for a baby {animal}, please."],
        ["And a baby {animal}?", "What about a baby {animal}?"],
        "A baby {animal} is called {a_young}.", "{young}"),
    "sums": Subject(
        ["Please add {a} + {b}.", "The sum of {a} + {b}, please."],
        ["And {a} + {b}?", "What about {a} + {b}?"],
        "{a} + {b} = {sum}", "{sum}"),
}  # fmt: skip
SHORTER = ["Say it in one word.", "Only the answer, please."]

# kind -> turns that tell something, and turns that ask for it in any order
TOLD: dict[str, tuple[list[Turn], list[Turn]]] = {
    "people": (
        [("{name} is {a_job} and lives in {city}. Where does {name} live?", "{name} lives in {city}."),
         ("{name} is {a_job} and lives in {city}. What does {name} do?", "{name} works as {a_job}.")],
        [("Where does {name} live?", "{name} lives in {city}."), ("What does {name} do?", "{name} works as {a_job}."),
         ("Who are we talking about?", "The text is about {name}.")]),
    "notes": (
        [("Hi, I am {name}. I am going to {event} on {day}.", "Hello {name}! Enjoy {event} on {day}.")],
        [("What is my name?", "Your name is {name}."), ("On which day is it?", "It is on {day}."),
         ("Where am I going?", "You are going to {event}.")]),
    "lists": (
        [("Make a numbered list of {a}, {b} and {c}.", "1. {a}\n2. {b}\n3. {c}"),
         ("Make a list of {a}, {b} and {c} with dashes.", "- {a}\n- {b}\n- {c}")],
        [("Which word comes first?", "The first word is {a}."), ("Which word comes last?", "The last word is {c}."),
         ("Write the list as a sentence.", "We need {a}, {b} and {c}.")]),
}  # fmt: skip


def rows() -> list[dict[str, object]]:
    """The conversations, the same list at every call and on every machine, in a mixed order.

    >>> [message["role"] for message in rows()[0]["messages"]][:2]
    ['user', 'assistant']
    """
    made = []
    for turns in _generate():
        messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append({"messages": messages, "category": f"turn {len(turns)}"})
    return made


@lru_cache(maxsize=1)
def _generate() -> list[tuple[Turn, ...]]:
    rng = random.Random(SEED)
    made: dict[tuple[Turn, ...], None] = {}
    for count, draw in PLAN:
        wanted = len(made) + count
        while len(made) < wanted:
            made[tuple(draw(rng))] = None
    turns = list(made)
    rng.shuffle(turns)
    return turns


@cache
def _entities(kind: str) -> list[dict[str, str]]:
    """The fields of all that a kind may be about; of combinations only those that no single row is about."""
    taken = {origin.entity for _, origin in single._generate().values() if origin.kind == kind}
    return [fields for parts, fields in single._entities(kind) if kind in FACTS or parts not in taken]


def _filled(rng: random.Random, turn: Turn, fields: dict[str, str]) -> Turn:
    return turn[0].format(**fields), turn[1].format(**fields)


def _one(rng: random.Random) -> Turn:
    """A question that stands for itself."""
    kind = rng.choice([*FACTS, *FACTS, *TOLD])
    fields = rng.choice(_entities(kind))
    if kind in FACTS:
        return _filled(rng, (rng.choice(FACTS[kind].asked), FACTS[kind].answer), fields)
    return _filled(rng, rng.choice(TOLD[kind][0]), fields)


def _going_on(rng: random.Random, turns: int) -> list[Turn]:
    kind, subject = rng.choice(list(FACTS.items()))
    entities = rng.sample(_entities(kind), turns)
    said = [_filled(rng, (rng.choice(subject.asked), subject.answer), entities[0])]
    said += [_filled(rng, (rng.choice(subject.goes_on), subject.answer), fields) for fields in entities[1:]]
    if rng.random() < 0.35:
        said[-1] = _filled(rng, (rng.choice(SHORTER), subject.short), entities[-2])
    return said


def _telling(rng: random.Random, turns: int, between: int = 0) -> list[Turn]:
    """What the first turn told is asked for, after `between` others."""
    kind = rng.choice(["people", "notes"] if between else list(TOLD))
    told, asked = TOLD[kind]
    fields = rng.choice(_entities(kind))
    first = rng.choice(told)
    later = rng.sample([turn for turn in asked if turn[1] != first[1]], turns - 1)
    said = [_filled(rng, turn, fields) for turn in (first, *later)]
    return [said[0], *(_one(rng) for _ in range(between)), *said[1:]]


PLAN: list[tuple[int, Callable[[random.Random], list[Turn]]]] = [  # how many conversations of each make
    (300, lambda rng: _going_on(rng, 2)),
    (170, lambda rng: _going_on(rng, 3)),
    (220, lambda rng: _telling(rng, 2)),
    (200, lambda rng: _telling(rng, 3)),
    (60, lambda rng: [_one(rng) for _ in range(3)]),
    (60, lambda rng: _telling(rng, 2, 1)),
    (60, lambda rng: _telling(rng, 3, 3)),
    (120, lambda rng: [_one(rng) for _ in range(6)]),
]


def write(folder: Path) -> None:
    """Write `chat.jsonl`."""
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")


if __name__ == "__main__":
    write(single.TARGET)
