"""Held-out rows as questions to the model in training: the prompt that was trained, the answer expected, how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from instructft.evaluation.answers import calls_of
from instructft.inference.generator import Generator
from instructft.prompt.loss_mask import IGNORE_INDEX

LEAST, MOST = 32, 256  # tokens of an answer: twice the reference's, within these
BEYOND = 16  # tokens that an answer may have more than a reference which is longer than MOST


class Question(NamedTuple):
    """A held-out row, ready to be asked.

    Args:
        prompt: token ids.
        limit: tokens of the answer, at most.
        reference: the expected answer as it would be decoded.
        calls: name and arguments of its calls.
        row: as it stands in its file, with `messages` and `dataset`.
    """

    prompt: list[int]
    limit: int
    reference: str
    calls: tuple[tuple[str, Any], ...]
    row: Mapping[str, Any]


def questions(generator: Generator, rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """The last answer of each row as a question; rows that the template refuses or the context cuts are none."""
    refused: dict[int, Any] = {}
    encoded = generator.encoder.encode([row["messages"] for row in rows], "last_response", refused=refused)
    last = dict(zip(encoded.conversation.tolist(), encoded.lists(), strict=True))  # of several rows the last
    found = []
    for place, row in enumerate(rows):
        if place not in last:
            continue
        ids, labels = last[place]["input_ids"], last[place]["labels"]
        trained = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        if not trained or not (start := trained[0]):
            continue
        answer = list(ids[start : trained[-1] + 1])
        while answer and answer[-1] in generator.stop_ids:
            answer.pop()
        wanted = len(answer) + 1
        limit = max(LEAST, min(2 * wanted, MOST), wanted + BEYOND if wanted > MOST - BEYOND else 0)
        limit = min(limit, generator.context - start)
        if limit >= wanted:
            reference = generator.decoded(answer)
            found.append(Question(list(ids[:start]), limit, reference, calls_of(row["messages"]), row))
    return found
