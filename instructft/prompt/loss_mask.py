"""Decides which tokens carry loss: a conversation becomes `input_ids` and `labels`.

This is the one place where a prompt is made; training, evaluation, chat and generation all come here, and it alone asks
`instructft.prompt.render` for text. How a row is cut, for the template `instruction` and two turns (`^` carries loss)::

    ### Instruction:⏎Add 1 and 1.⏎⏎### Response:⏎2<eos>### Instruction:⏎And 2?⏎⏎### Response:⏎4<eos>
    └────────── prompt of turn 1 ─────────────┘^^^^^^└──── added by the prompt of turn 2 ─────┘^^^^^^

1. A template is asked, for every answer, what the prompt before it looks like and what it shows of the answer at that
   time (`instructft.prompt.turns`).
2. What follows the prompt, up to and including the token that ends the turn, carries loss. Nothing else does.
3. A turn joins the row of the turns before it where its prompt begins with that row, id by id. Where the template shows
   earlier answers in another way by then, it gets a row of its own, rendered as it will be served.
4. Text is tokenized piece by piece where nothing merges across the borders, else the whole of it
   (`instructft.prompt.borders`): the ids of a prompt are those that a server sends, and a prefix of the row's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.errors import DataError, ModelFileError, TemplateError, is_panic
from instructft.prompt.borders import IGNORE_INDEX, Borders, Row
from instructft.prompt.conversation import Conversation, Message
from instructft.prompt.fast_bpe import FastBPE, fast_bpe
from instructft.prompt.layouts.messages import conversation_of
from instructft.prompt.ledger import Unusable
from instructft.prompt.render import MANY, Renderer
from instructft.prompt.templates import is_built_in
from instructft.prompt.turns import Script, Shapes, scripts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    """Render a conversation with the tokenizer's chat template.

    With `add_generation_prompt` the text ends where the model's answer begins.

    Raises:
        TemplateError: the tokenizer has no chat template, or the template refuses these messages.
    """
    return encoder(tokenizer).render([messages], add_generation_prompt)[0]


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    train_on: str = "responses",
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> dict[str, list[int]]:
    """Encode one conversation; the reference for what a row of training data is.

    Args:
        messages: turns with `role` and `content` (`instructft.prompt.conversation`), with at least one answer.
        tokenizer: a tokenizer with a `chat_template`.
        train_on: `responses` (every answer), `last_response`, or `everything`.
        tools: JSON schemas of the functions that may be called.
        template_options: further values that the template reads, such as `enable_thinking`.

    Returns:
        `input_ids` and `labels`, two lists of the same length T. A label is the id at its own position where that
        token carries loss, else -100 (the model shifts them by one).

    Example::

        encode_conversation([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], tokenizer)
        # {'input_ids': [21017, 46486, …, 198, 17, 50256], 'labels': [-100, -100, …, -100, 17, 50256]}

    Raises:
        TemplateError: the template refuses the messages, never ends an answer, or shows earlier turns in another way
            once they are history, so that the turns need rows of their own (`encode_turns`).
    """
    rows = encode_turns(messages, tokenizer, train_on, tools, template_options)
    if len(rows) != 1:
        raise TemplateError(
            f"this conversation is {len(rows)} rows: once they are history, the chat template rewrites earlier turns, "
            "or the tokenizer merges their borders. Take encode_turns, which gives every turn as it is served, or "
            "train_on='last_response'"
        )
    return rows[0]


def encode_turns(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    train_on: str = "responses",
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[dict[str, list[int]]]:
    """Encode one conversation as the rows that are trained: one, or several where the template rewrites history.

    Arguments and rows are those of `encode_conversation`; every answer carries loss in one of the rows.

    Raises:
        TemplateError: the template refuses the messages, or never ends an answer.
    """
    conversation = _conversation(messages, tools, template_options)
    return encoder(tokenizer).encode([conversation], train_on).lists()


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids that a model is given before it answers: a prefix of what `encode_conversation` gives with the answer."""
    return encoder(tokenizer).prompts([_conversation(messages, tools, template_options)])[0]


def _conversation(messages: Sequence[Message], tools: Any, options: Any) -> Conversation:
    """Messages of any layout in normal form, as those of a file: both give the same ids."""
    if isinstance(messages, Conversation):
        return Conversation(messages, tools or messages.tools, {**messages.options, **(options or {})})
    try:
        return conversation_of(messages, tools=tools, options=options)
    except Unusable as unusable:
        raise DataError(f"the messages cannot be encoded: {unusable}") from unusable


@dataclass(frozen=True)
class Rows:
    """Encoded conversations, end to end in flat arrays.

    Args:
        input_ids: (sum of lengths,) int32.
        labels: (sum of lengths,) int32; -100 = no loss.
        lengths: (rows,) int64, tokens of each row.
        conversation: (rows,) int64, the place in the batch of the conversation that a row is from. One that was
            refused, or holds no answer to train on, has no row.
        left_out: (place, what) of what the template does not show of an answer: content, reasoning, arguments.
        only_read: (place, how many) answers that no server would ask for, so that they carry no loss: a greeting.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    conversation: np.ndarray
    left_out: list[tuple[int, str]] = field(default_factory=list)
    only_read: list[tuple[int, int]] = field(default_factory=list)

    def lists(self) -> list[dict[str, list[int]]]:
        """Row by row, as `input_ids` and `labels`."""
        ends = np.cumsum(self.lengths).tolist()
        cuts = zip([0, *ends], ends, strict=False)
        return [{"input_ids": self.input_ids[a:b].tolist(), "labels": self.labels[a:b].tolist()} for a, b in cuts]


class Encoder:
    """A tokenizer with its chat template, studied once, then applied to batches of conversations.

    Use `encoder(tokenizer)`, which keeps one for each tokenizer and template.

    Raises:
        TemplateError: no chat template, an answer without a token that ends it, or two BOS tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        traits = self.renderer.traits
        self.stop_token, self.after_ending = traits.answer
        if not self.stop_token:
            raise TemplateError(
                f"the chat template ends an answer with {traits.shown!r}, which holds no special token of the "
                "tokenizer, so the model would never learn to stop. Add `{{ eos_token }}` after the answer in the "
                "template, or set data.template to a built-in one."
            )
        bos = tokenizer.bos_token_id
        if bos is not None and self.tokenize([traits.prompt])[0][:2] == [bos, bos]:
            raise TemplateError("the chat template begins with two BOS tokens; take one `{{ bos_token }}` out of it")
        self._borders = Borders(self.tokenize, self._core, sorted(self.special_tokens), traits.lead)

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer or a call (gpt-oss has one for each), that of a plain answer first."""
        stops: list[int] = self.tokenizer.convert_tokens_to_ids(self.renderer.traits.stops)
        return stops

    @property
    def stop_token_id(self) -> int:
        """The token that ends a plain answer."""
        return self.stop_ids[0]

    @cached_property
    def special_tokens(self) -> set[str]:
        """The texts that the tokenizer turns into one special token, wherever they stand."""
        added = self.tokenizer.added_tokens_decoder.values()
        return {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)

    def render(self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = False) -> list[str]:
        """Render a batch of conversations to texts."""
        texts = self.renderer.texts
        return texts([self.renderer.normal(messages) for messages in conversations], add_generation_prompt)

    # -- what the tokenizer does --------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with nothing added."""
        if not texts:
            return []
        if (fast := self.__dict__.get("_fast")) is not None:  # it has been made for rows by the thousand
            ids, sizes = fast.encode(texts)
            flat, ends = ids.tolist(), np.cumsum(sizes).tolist()
            return [flat[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if self._core is not None:
            with self._panic_said():
                return [encoded.ids for encoded in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

    @contextlib.contextmanager
    def _panic_said(self) -> Iterator[None]:
        """A tokenizer that gives up over a text, such as one whose pattern takes exponential time, in our words."""
        try:
            yield
        except BaseException as error:
            if not is_panic(error):
                raise
            name = self.tokenizer.name_or_path
            raise ModelFileError(f"the tokenizer of {name} (tokenizer.json) fails on a text: {error}") from error

    @cached_property
    def _core(self) -> Any:
        """The Rust tokenizer, which without offsets and masks is half again as fast; None where there is none."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is None or not hasattr(core, "encode_batch_fast"):
            return None
        core.no_truncation()  # some models ship a tokenizer.json that cuts or pads
        core.no_padding()
        return core

    @cached_property
    def _fast(self) -> FastBPE | None:
        """The same ids at a third of the cost; None where that is not proved."""
        return fast_bpe(self._core) if self._core is not None else None

    def make_fast(self, text: str) -> bool:
        """Prove ahead of `encode(..., many=True)` what it needs; whether there is a faster way.

        Args:
            text: the whole tokenizer (`backend_tokenizer.to_str()`).
        """
        if self._core is not None:
            self._fast = fast_bpe(self._core, text)
        return self._fast is not None

    # -- conversations to rows ----------------------------------------------------------------------------------

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        train_on: str = "responses",
        many: bool = False,
        turns: str = "all",
        refused: dict[int, TemplateError] | None = None,
    ) -> Rows:
        """Encode a batch; the rows of each conversation as `encode_turns` gives them.

        Args:
            many: thousands of rows are to come, so that what `FastBPE` has to prove first pays. Same result.
            turns: `all`, or `last`: of a conversation that needs several rows, the last one alone.
            refused: takes the reason for every conversation that the template refuses, by its place in the batch.

        Raises:
            TemplateError: the template refuses one of them, and `refused` is not given.
        """
        pieces: list[list[str]] = []  # texts that are tokenized apart, every second one carries loss
        places: list[int] = []
        merging: list[tuple[int, Script]] = []  # conversations whose borders may merge
        left_out: list[tuple[int, str]] = []
        only_read: list[tuple[int, int]] = []
        errors: dict[int, TemplateError] = {}
        by_shape = self._by_shape(conversations, train_on)
        others = [messages for messages, texts in zip(conversations, by_shape, strict=True) if texts is None]
        rest = iter(scripts(self.renderer, others, train_on))
        for place, known in enumerate(by_shape):
            if known is not None:
                pieces.append(known)
                places.append(place)
                continue
            script = next(rest)
            if isinstance(script, TemplateError):
                errors[place] = script
                continue
            if (texts := self._apart(script, turns)) is None:
                merging.append((place, script))
            else:
                pieces += texts
                places += [place] * len(texts)
            left_out += [(place, what) for what in script.left_out]
            only_read += [(place, script.only_read)] if script.only_read else []
        done: dict[int, list[Row]] = {}  # place -> rows
        found = self._borders.rows([script for _, script in merging])
        for (place, _), own in zip(merging, found, strict=True):
            if isinstance(own, TemplateError):
                errors[place] = own
            else:
                done[place] = own[-1:] if turns == "last" else own
        if errors and refused is None:
            raise errors[min(errors)]
        if refused is not None:
            refused.update(errors)
            left_out = [one for one in left_out if one[0] not in errors]
            only_read = [one for one in only_read if one[0] not in errors]
        rows = self._joined(pieces, places, done, many)
        labels = rows.input_ids.copy() if train_on == "everything" else rows.labels
        return Rows(rows.input_ids, labels, rows.lengths, rows.conversation, left_out, only_read)

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The ids of each conversation up to where the model answers."""
        return self.tokenize(self.render(conversations, True))

    def _by_shape(self, conversations: Sequence[Sequence[Message]], train_on: str) -> Sequence[list[str] | None]:
        """The texts of the one row of each conversation that a built-in template makes of its shape; None elsewhere."""
        if self._shapes is None or len(conversations) < MANY:
            return [None] * len(conversations)
        found = self._shapes.texts(conversations, train_on)
        return [texts if texts is not None and self._borders.apart(texts) else None for texts in found]

    @cached_property
    def _shapes(self) -> Shapes | None:
        if not is_built_in(str(self.tokenizer.chat_template)):
            return None
        return Shapes(self.renderer, sorted(self.special_tokens), lambda script: self._apart(script, "all"))

    def _apart(self, script: Script, turns: str) -> list[list[str]] | None:
        """The rows of a conversation, each cut at the borders of its answers; None where a border may merge."""
        rows: list[list[str]] = []
        text = ""  # of the last row
        for turn in script.turns:
            if turn.unread:
                return None
            if rows and turn.prompt.startswith(text):
                rows[-1] += [turn.prompt[len(text) :], turn.answer]
            else:
                rows.append([turn.prompt, turn.answer])
            text = turn.prompt + turn.answer
        if rows and script.tail:
            rows[-1].append(script.tail)
        rows = rows[-1:] if turns == "last" else rows
        return rows if all(map(self._borders.apart, rows)) else None

    def _joined(self, pieces: list[list[str]], places: list[int], done: dict[int, list[Row]], many: bool) -> Rows:
        """Rows that are tokenized here, piece by piece, and those that are done, conversation by conversation."""
        flat = [text for row in pieces for text in row]
        if many and self._fast is not None:
            ids, sizes = self._fast.encode(flat)
        else:
            found = self.tokenize(flat)
            sizes = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
            ids = np.fromiter(chain.from_iterable(found), dtype=np.int32, count=int(sizes.sum()))
        count = np.array([len(row) for row in pieces], dtype=np.int64)
        second = np.fromiter((i % 2 == 1 for n in count for i in range(n)), dtype=bool, count=len(flat))
        labels = np.where(np.repeat(second, sizes), ids, np.int32(IGNORE_INDEX))
        of_row = np.repeat(np.arange(len(pieces)), count)
        lengths = np.bincount(of_row, weights=sizes, minlength=len(pieces)).astype(np.int64)
        if not done:
            return Rows(ids, labels, lengths, np.array(places, dtype=np.int64))
        others = [(place, row) for place, rows in done.items() for row in rows]
        at = np.array([*places, *(place for place, _ in others)], dtype=np.int64)
        order = np.argsort(at, kind="stable")
        is_here = order < len(places)
        every = np.concatenate([lengths, [len(ids) for _, (ids, _) in others]]).astype(np.int64)[order]
        of_here = np.repeat(is_here, every)  # of each token
        both = np.empty((2, len(of_here)), dtype=np.int32)
        for column, here in enumerate((ids, labels)):
            both[column, of_here] = here
            both[column, ~of_here] = [token for _, row in others for token in row[column]]
        return Rows(both[0], both[1], every, at[order])


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The `Encoder` of a tokenizer, made on first use and again when its template or special tokens change."""
    return _encoder(tokenizer, str(tokenizer.chat_template), len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase, *what_it_learned_from: object) -> Encoder:
    return Encoder(tokenizer)
