"""Decides which tokens carry loss: a conversation becomes `input_ids` and `labels`.

This is the one place where a prompt is made; training, evaluation, chat and generation all come here, and it alone asks
`instructft.prompt.render` for text. How a row is cut, for the template `instruction` and two turns (`^` carries loss)::

    ### Instruction:⏎Add 1 and 1.⏎⏎### Response:⏎2<eos>### Instruction:⏎And 2?⏎⏎### Response:⏎4<eos>
    └────────── prompt of turn 1 ─────────────┘^^^^^^└──── added by the prompt of turn 2 ─────┘^^^^^^

1. A template is asked, for every answer, what the prompt before it looks like (`add_generation_prompt`). That text
   must be a prefix of the whole conversation's text: otherwise the template rewrites history, the model would be
   trained on something that it never sees at inference, and `TemplateError` shows the tokens that diverge.
2. What follows the prompt, up to and including the token that ends the turn, carries loss. Nothing else does.
3. Text is tokenized piece by piece, cut at those borders, so that the ids of a prompt are a prefix of the row's ids
   by construction. `Encoder` proves on a few answers that this equals the tokenization of the whole text, which is
   what an inference server does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.errors import TemplateError
from instructft.prompt.conversation import Message
from instructft.prompt.fast_bpe import FastBPE, fast_bpe
from instructft.prompt.render import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # a label of -100 carries no loss; PyTorch's cross_entropy skips it
TRAIN_ON = ("responses", "last_response", "everything")

# Answers that a template is tried on: what they begin with decides whether a tokenizer would merge across the border.
_PROBES = ("Paris.", "42", "# Title", "(a) b", '"Yes"', "¿Qué?", "日本", "🙂 ok", "- one\n- two", "<b>", "e")


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    """Render a conversation with the tokenizer's chat template.

    With `add_generation_prompt` the text ends where the model's answer begins.

    Raises:
        TemplateError: the tokenizer has no chat template, or the template refuses these messages.
    """
    return encoder(tokenizer).render([messages], add_generation_prompt)[0]


def encode_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, train_on: str = "responses"
) -> dict[str, list[int]]:
    """Encode one conversation; the reference for what a row of training data is.

    Args:
        messages: turns with `role` (system, user, assistant) and `content`, the last one the assistant's.
        tokenizer: a tokenizer with a `chat_template`.
        train_on: `responses` (every answer), `last_response`, or `everything`.

    Returns:
        `input_ids` and `labels`, two lists of the same length T. A label is the id at its own position where that
        token carries loss, else -100 (the model shifts them by one).

    Example::

        encode_conversation([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], tokenizer)
        # {'input_ids': [21017, 46486, …, 198, 17, 50256], 'labels': [-100, -100, …, -100, 17, 50256]}

    Raises:
        TemplateError: the template rewrites history, so that no honest mask exists, or never ends an answer.
    """
    return encoder(tokenizer).encode([messages], train_on).lists()[0]


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a model is given before it answers: a prefix of what `encode_conversation` gives with the answer."""
    return encoder(tokenizer).prompts([messages])[0]


@dataclass(frozen=True)
class Rows:
    """Encoded conversations, end to end in flat arrays.

    Args:
        input_ids: (sum of lengths,) int32.
        labels: (sum of lengths,) int32; -100 = no loss.
        lengths: (rows,) int64, tokens of each row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    def lists(self) -> list[dict[str, list[int]]]:
        """Row by row, as `input_ids` and `labels`."""
        ends = np.cumsum(self.lengths).tolist()
        cuts = zip([0, *ends], ends, strict=False)
        return [{"input_ids": self.input_ids[a:b].tolist(), "labels": self.labels[a:b].tolist()} for a, b in cuts]


@dataclass(frozen=True)
class _Pieces:
    """A rendered conversation, cut at the borders of its answers."""

    texts: list[str]  # concatenated: the rendered conversation
    trained: list[bool]  # which of them carry loss


class Encoder:
    """A tokenizer with its chat template, studied once, then applied to batches of conversations.

    Use `encoder(tokenizer)`, which keeps one for each tokenizer and template.

    Raises:
        TemplateError: no chat template, an answer without a token that ends it, or two BOS tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        self._learn_ending()
        self._learn_tokenization()

    # -- what the template does ---------------------------------------------------------------------------------

    def _learn_ending(self) -> None:
        """Find what follows an answer: the stop token, and what a template adds after it (`\\n` in ChatML)."""
        question, answer = {"role": "user", "content": "Q"}, "Answer-7"
        prompt = self.render([[question]], True)[0]
        text = self.render([[question, {"role": "assistant", "content": answer}]])[0]
        ending = text.rpartition(answer)[2]
        specials = sorted(self.special_tokens, key=len, reverse=True)
        found = [(ending.find(token), token) for token in specials if token in ending]
        if answer not in text or not found:
            raise TemplateError(
                f"the chat template ends an answer with {ending!r}, which holds no special token of the tokenizer, "
                "so the model would never learn to stop. Add `{{ eos_token }}` after the answer in the template, "
                "or set data.template to a built-in one."
            )
        start, self.stop_token = min(found, key=lambda pair: pair[0])
        self.stop_token_id: int = self.tokenizer.convert_tokens_to_ids(self.stop_token)
        self.ending = ending[: start + len(self.stop_token)]  # carries loss
        self.after_ending = ending[start + len(self.stop_token) :]  # does not
        self._probe_prompt = prompt

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
        if self._core is not None:
            return [encoded.ids for encoded in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

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

    def make_fast(self) -> bool:
        """Prove ahead of `encode(..., many=True)` what it needs; whether there is a faster way."""
        return self._fast is not None

    def _learn_tokenization(self) -> None:
        """Find out whether pieces can be tokenized alone, and whether that equals tokenizing the whole.

        SentencePiece tokenizers with a prefix space (Llama 2, Mistral 7B) see a different text when it stands alone;
        for them a piece is tokenized behind the text that precedes it in every row of this template.
        """
        prompt = self._probe_prompt
        # a prefix of every answer piece: what `add_generation_prompt` adds
        asked = self.render([[{"role": "user", "content": "Q"}]])[0]
        self._lead = {True: prompt[len(asked) :] if prompt.startswith(asked) else prompt, False: self.stop_token}
        # `whole_rows`: a row's pieces give the ids of its whole text, whatever the answer starts with
        for self._alone in (True, False):
            self.whole_rows = self._pieces_equal_whole(prompt)
            if self.whole_rows:
                break
        else:
            # A prompt whose last white space merges with an answer, as in "Assistant: " (and with GPT-2's tokenizer
            # "\n\n"): right for one answer, impossible once that answer is history.
            self._alone = True
        bos = self.tokenizer.bos_token_id
        if bos is not None and self.tokenize([prompt])[0][:2] == [bos, bos]:
            raise TemplateError("the chat template begins with two BOS tokens; take one `{{ bos_token }}` out of it")

    def _pieces_equal_whole(self, prompt: str) -> bool:
        texts, rows = [], []
        for probe in _PROBES:
            conversation = [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": probe},
                {"role": "user", "content": probe},
            ]
            whole = self.render([conversation], True)[0]
            first = self.render([conversation[:2]])[0]
            answer = first[len(prompt) : len(first) - len(self.after_ending)]
            if first.startswith(prompt) and whole.startswith(prompt + answer):
                texts.append(whole)
                rows.append(_Pieces([prompt, answer, whole[len(prompt + answer) :]], [False, True, False]))
        try:
            return [row["input_ids"] for row in self._tokenize_pieces(rows).lists()] == self.tokenize(texts)
        except TemplateError:  # the lead merges with what follows it
            return False

    def _tokenize_pieces(self, rows: Sequence[_Pieces], many: bool = False) -> Rows:
        flat, leads = [], []  # every piece of the batch, and the ids of the lead before it, which are taken off again
        for row in rows:
            for position, (text, trained) in enumerate(zip(row.texts, row.trained, strict=True)):
                behind = not self._alone and position > 0
                flat.append(self._lead[trained] + text if behind else text)
                leads.append(self._lead_ids[trained] if behind else [])
        if many and self._alone and self._fast is not None:
            ids, lengths = self._fast.encode(flat)
        else:
            pieces = self.tokenize(flat)
            if not self._alone:
                for i, (piece, lead) in enumerate(zip(pieces, leads, strict=True)):
                    if piece[: len(lead)] != lead:
                        raise self._merges(flat[i], len(self._lead[True]))
                    pieces[i] = piece[len(lead) :]
            lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
            ids = np.fromiter(chain.from_iterable(pieces), dtype=np.int32, count=int(lengths.sum()))
        trained_pieces = np.fromiter((t for row in rows for t in row.trained), dtype=bool, count=len(flat))
        labels = np.where(np.repeat(trained_pieces, lengths), ids, np.int32(IGNORE_INDEX))
        of_row = np.repeat(np.arange(len(rows)), [len(row.texts) for row in rows])
        return Rows(ids, labels, np.bincount(of_row, weights=lengths, minlength=len(rows)).astype(np.int64))

    @cached_property
    def _lead_ids(self) -> dict[bool, list[int]]:
        return dict(zip((True, False), self.tokenize([self._lead[True], self._lead[False]]), strict=True))

    # -- conversations to rows ----------------------------------------------------------------------------------

    def encode(
        self, conversations: Sequence[Sequence[Message]], train_on: str = "responses", many: bool = False
    ) -> Rows:
        """Encode a batch; each row as `encode_conversation` gives it.

        Args:
            many: thousands of rows are to come, so that what `FastBPE` has to prove first pays. Same result.

        Raises:
            TemplateError: the template rewrites the history of one of them.
        """
        rows = self._tokenize_pieces(self._cut(conversations, train_on), many)
        return Rows(rows.input_ids, rows.input_ids.copy(), rows.lengths) if train_on == "everything" else rows

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The ids of each conversation up to where the model answers."""
        return self.tokenize(self.render(conversations, True))

    def _cut(self, conversations: Sequence[Sequence[Message]], train_on: str) -> list[_Pieces]:
        """Render each conversation and cut it where answers begin and end."""
        # All prefixes of all conversations are rendered in two batches: those that ask, and those that end.
        asking: list[Sequence[Message]] = []
        ending: list[Sequence[Message]] = []
        turns: list[list[int]] = []  # positions of the trained answers in each conversation
        conversations = [self.renderer.normal(messages) for messages in conversations]
        for messages in conversations:
            answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
            if train_on != "responses":
                answers = answers[-1:]
            turns.append(answers)
            asking += [messages[:i] for i in answers]
            ending += [messages[: i + 1] for i in answers if i + 1 < len(messages)]
            ending.append(messages)
        prompts, texts = iter(self.renderer.texts(asking, True)), iter(self.renderer.texts(ending))

        rows = []
        for messages, answers in zip(conversations, turns, strict=True):
            spans = []
            ended = [next(texts) for i in answers if i + 1 < len(messages)]
            whole = next(texts)
            ended += [whole] * (len(answers) - len(ended))
            for i, text in zip(answers, ended, strict=True):
                prompt = next(prompts)
                end = self._end_of_answer(text)
                if not text.startswith(prompt):
                    raise self._diverges(f"turn {i + 1}: the prompt", prompt, "the text with the answer", text)
                if not whole.startswith(text[:end]):
                    raise self._diverges(f"turn {i + 1}: at its own time", text[:end], "in the whole chat", whole)
                spans.append((len(prompt), end))
            if len(spans) > 1 and not self.whole_rows:
                raise self._merges(whole, spans[0][0])
            rows.append(_pieces(whole, spans))
        return rows

    def _end_of_answer(self, text: str) -> int:
        """The position after the stop token that closes the last answer of `text`."""
        if self.after_ending and text.endswith(self.after_ending):
            text = text[: -len(self.after_ending)]
        if text.endswith(self.stop_token):
            return len(text)
        position = text.rfind(self.stop_token)
        if position < 0:
            raise TemplateError(
                f"the chat template does not end this answer with {self.stop_token!r}, as it does others; "
                f"the text ends with {text[-60:]!r}"
            )
        return position + len(self.stop_token)

    def _diverges(self, name: str, one: str, other_name: str, other: str) -> TemplateError:
        ids, other_ids = self.tokenize([one, other])
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, other_ids, strict=False)) if a != b), min(len(ids), len(other_ids))
        )
        show = [self.tokenizer.convert_ids_to_tokens(row[max(0, same - 4) : same + 8]) for row in (ids, other_ids)]
        return TemplateError(
            "the chat template rewrites earlier turns, so no honest mask exists for this conversation.\n"
            f"  {name}: … {' '.join(map(repr, show[0]))}\n"
            f"  {other_name}: … {' '.join(map(repr, show[1]))}\n"
            f"They part at token {same}. Set data.train_on to last_response, or data.template to chatml."
        )

    def _merges(self, whole: str, border: int) -> TemplateError:
        tail, head = whole[max(0, border - 20) : border], whole[border : border + 20]
        parts = [self.tokenizer.convert_ids_to_tokens(ids) for ids in self.tokenize([tail, head, tail + head])]
        return TemplateError(
            "with this template the tokenizer merges the end of a prompt with the beginning of its answer, so the "
            "prompt's ids at inference are no prefix of the ids in training.\n"
            f"  apart: {' '.join(map(repr, parts[0]))} | {' '.join(map(repr, parts[1]))}\n"
            f"  together: {' '.join(map(repr, parts[2]))}\n"
            "Let the template's generation prompt end before that white space (and the answer begin with it), set "
            "data.train_on to last_response, or data.template to a built-in one."
        )


def _pieces(text: str, spans: list[tuple[int, int]]) -> _Pieces:
    """Cut `text` at `spans`, which carry loss.

    >>> _pieces("abcdef", [(1, 3)])
    _Pieces(texts=['a', 'bc', 'def'], trained=[False, True, False])
    """
    texts, trained, position = [], [], 0
    for start, end in spans:
        texts += [text[position:start], text[start:end]]
        trained += [False, True]
        position = end
    if position < len(text):
        texts.append(text[position:])
        trained.append(False)
    return _Pieces(texts, trained)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The `Encoder` of a tokenizer, made on first use and again when its template or special tokens change."""
    return _encoder(tokenizer, str(tokenizer.chat_template), len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase, *what_it_learned_from: object) -> Encoder:
    return Encoder(tokenizer)
