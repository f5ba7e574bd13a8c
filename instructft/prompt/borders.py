"""Ids on both sides of the border between a prompt and its answer, as they are at inference.

A server tokenizes the prompt; a model goes on from there. In training the two stand side by side, and a tokenizer that
sees them at once may merge across the border (`\\n\\n` and `\\n` are one token in many vocabularies). What it does is
looked at for the border at hand: cut where nothing can merge, tokenized together and compared everywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from instructft.errors import TemplateError
from instructft.prompt.turns import Script, Turn

IGNORE_INDEX = -100  # a label of -100 carries no loss; PyTorch's cross_entropy skips it
Row = tuple[list[int], list[int]]  # ids and labels
_CUTS_WORDS = ("ByteLevel", "Split", "Digits", "Punctuation", "Sequence")
_LEADS = ("\n", ")", "x", "7", "。")  # behind what an answer can be tokenized as if in the middle of a text
_WINDOW = 24  # characters of an answer that can have a part in what happens at its border


class Borders:
    """Where texts may be tokenized apart.

    Args:
        tokenize: token ids of each text, with nothing added.
        core: the Rust tokenizer; None where there is none.
        specials: the texts of its special tokens.
        lead: what the template puts before every answer.
    """

    def __init__(
        self, tokenize: Callable[[Sequence[str]], list[list[int]]], core: Any, specials: Sequence[str], lead: str
    ):
        self.tokenize, self._core = tokenize, core
        self._specials = tuple(specials)
        # white space alone may be a part of a longer run of it, which the answer goes on
        self._lead = lead if lead.strip() else ""
        self._plain = core is not None and _cuts_locally(core)
        self._known: dict[str, bool] = {}  # how an answer begins -> nothing merges across the border before it

    def apart(self, texts: Sequence[str]) -> bool:
        """Whether texts that stand one after the other have the same ids alone and together."""
        if not self._plain:
            return False
        if len(texts) == 2:  # as most rows, with less around it
            return self._nothing_merges(*texts)
        return all(map(self._nothing_merges, texts, texts[1:]))

    def _nothing_merges(self, left: str, right: str) -> bool:
        return self._behind_lead(left, right) or left.endswith(self._specials)

    def _behind_lead(self, left: str, right: str) -> bool:
        if not self._lead or not left.endswith(self._lead) or right[:1].isspace():
            return False
        begins = right[:2]
        if begins not in self._known:
            window = right[:_WINDOW]
            together, one, other = self.tokenize([self._lead + window, self._lead, window])
            self._known[begins] = together == one + other
        return self._known[begins]

    def rows(self, some: Sequence[Script]) -> list[list[Row] | TemplateError]:
        """Ids and labels of conversations: of each one row, or as many as its turns need to be what they are when
        served; or why it has none."""
        wanted = [text for script in some for turn in script.turns for text in (turn.prompt, turn.prompt + turn.answer)]
        tails = [script.turns[-1].prompt + script.turns[-1].answer + script.tail for script in some if script.tail]
        found = iter(self.tokenize([*wanted, *tails]))
        ids = [[(next(found), next(found)) for _ in script.turns] for script in some]
        whole = [next(found) if script.tail else [] for script in some]
        return [self._rows(*one) for one in zip(some, ids, whole, strict=True)]

    def _rows(
        self, script: Script, found: list[tuple[list[int], list[int]]], to_the_end: list[int]
    ) -> list[Row] | TemplateError:
        """One conversation, of whose turns the ids of prompts, and of prompts with their answers, are known."""
        if not script.turns:
            return []
        done: list[Row] = []
        ids: list[int] = []
        labels: list[int] = []
        try:
            for turn, (prompt, whole) in zip(script.turns, found, strict=True):
                answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self.behind(turn.answer)
                if ids and prompt[: len(ids)] != ids:
                    done.append((ids, labels))
                    ids, labels = [], []
                labels = labels + [IGNORE_INDEX] * (len(prompt) - len(ids)) + self._loss(turn, prompt, answer)
                ids = prompt + answer
        except TemplateError as error:
            return error
        if to_the_end[: len(ids)] == ids:
            labels = labels + [IGNORE_INDEX] * (len(to_the_end) - len(ids))
            ids = to_the_end
        return [*done, (ids, labels)]

    def behind(self, text: str) -> list[int]:
        """The ids of a text that goes on another one: SentencePiece would begin it with a space of its own."""
        if self._plain:
            return self.tokenize([text])[0]
        for lead in _LEADS:
            one, both = self.tokenize([lead, lead + text])
            if both[: len(one)] == one:
                return both[len(one) :]
        raise TemplateError(f"the tokenizer merges {text[:40]!r} with whatever stands before it")

    def _loss(self, turn: Turn, prompt: list[int], ids: list[int]) -> list[int]:
        """The labels of an answer: all of it, but for tokens that reach into a part that is only read."""
        if not turn.unread:
            return ids
        if self._core is None:
            raise TemplateError("train_spans need a tokenizer with offsets (a tokenizer.json); this one has none")
        together = self._core.encode(turn.prompt + turn.answer, add_special_tokens=False)
        if together.ids == prompt + ids:
            places = [(a - len(turn.prompt), b - len(turn.prompt)) for a, b in together.offsets[len(prompt) :]]
        else:
            places = self._core.encode(turn.answer, add_special_tokens=False).offsets
        kept = [not any(a < end and start < b for a, b in turn.unread) for start, end in places]
        return [token if keep else IGNORE_INDEX for token, keep in zip(ids, kept, strict=True)]


def _cuts_locally(core: Any) -> bool:
    """Byte-level tokenizers, whose added tokens take no white space with them."""
    # part by part, since the text of the whole tokenizer is megabytes of merges
    normalizer, pre_tokenizer = (
        part and json.loads(part.__getstate__()) for part in (core.normalizer, core.pre_tokenizer)
    )
    if normalizer not in (None, {"type": "NFC"}):
        return False
    steps = [pre_tokenizer or {}]
    steps += steps[0].get("pretokenizers", [])
    local = all(s.get("type") in _CUTS_WORDS and not s.get("add_prefix_space") for s in steps)
    rules = any(t.lstrip or t.rstrip or t.single_word for t in core.get_added_tokens_decoder().values())
    return local and not rules and any(s.get("type") == "ByteLevel" for s in steps)
