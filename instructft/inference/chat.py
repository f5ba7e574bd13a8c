"""A model by its name or path, ready to answer: prompts at once (`generate`), or a conversation (`Chat`)."""

from __future__ import annotations

import threading
from collections.abc import Generator as Generator_
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints.as_saved import require_as_saved
from instructft.errors import UsageError
from instructft.inference.generator import MAX_NEW_TOKENS, Generator, check_settings
from instructft.models.load_for_inference import load_for_inference
from instructft.prompt.conversation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model_or_path: Any,
    prompts: Sequence[str | Sequence[Message]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
) -> list[str]:
    """Answer prompts with a trained model.

    Args:
        model_or_path: a run folder, any folder or Hub id, or a loaded model (then `tokenizer` is needed).
        prompts: each a text (one user turn) or a list of messages.
        max_new_tokens: tokens at most in an answer.
        temperature: 0 is greedy; more samples, repeatably after `torch.manual_seed`.
        top_p: of the likeliest tokens that make up this share of the probability one is drawn.
        batch_size: prompts at once; None finds it.

    Example::

        instructft.generate("runs/quickstart", ["What is the capital of France?"])
        # ['The capital of France is Paris.']

    Raises:
        UsageError: no such model, or a prompt that fills the model's context.
    """
    check_settings(max_new_tokens, temperature, top_p)
    generator = as_generator(model_or_path, tokenizer)
    conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    answers = generator.answers(conversations, max_new_tokens, temperature, top_p, batch_size)
    return [answer.text for answer in answers]


def as_generator(model_or_path: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Generator:
    """A path, a loaded model with its tokenizer, or a `Generator`, as a `Generator`."""
    if isinstance(model_or_path, Generator):
        return model_or_path
    if isinstance(model_or_path, str | Path):
        require_as_saved(model_or_path, whole=False)
        model, own = load_for_inference(str(model_or_path))
        return Generator(model, tokenizer or own)
    if tokenizer is None:
        raise UsageError("a loaded model needs its tokenizer too: tokenizer=…")
    return Generator(model_or_path, tokenizer)


class Chat:
    """A conversation with a model. When the context is full the oldest turns leave first, and `left` counts them.

    Example::

        chat = Chat("runs/quickstart")
        chat.send("What is the capital of France?")
        # 'The capital of France is Paris.'
    """

    def __init__(
        self,
        model_or_path: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        check_settings(max_new_tokens, temperature, top_p)
        self.generator = as_generator(model_or_path, tokenizer)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.system = system
        self.turns: list[Message] = []  # question, answer, question, answer, …
        self.left = 0  # turns that had to leave the context
        self.gone: list[Message] = []  # those turns
        self._cut: list[Message] = []  # answers that are not whole
        self.finish_reason = ""  # of the last answer: stop, length (it was cut off), or stopped (by the reader)
        self.room = max_new_tokens  # tokens that the context had for it

    @property
    def messages(self) -> list[Message]:
        """The conversation as the model sees it."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns, self.left, self.gone, self._cut = [], 0, [], []

    def undo(self) -> str | None:
        """Take back the last question with its answer, and return it; None where there is none.

        Example::

            chat.undo()
            # 'What is the capital of France?'
        """
        if not self.turns:
            return None
        question = self.turns[-2]["content"]
        self.turns = self.turns[:-2]
        return question

    def retry(self, stopped: threading.Event | None = None) -> Iterator[str]:
        """Answer the last question again, piece by piece; without an answer the old one stays.

        Raises:
            UsageError: there is no question yet.
        """
        if not self.turns:
            raise UsageError("there is nothing to answer again")
        before, question = self.turns, self.turns[-2]
        self.turns = self.turns[:-2]
        return self._answer(question, stopped, before)

    @property
    def conversation(self) -> list[Message]:
        """All of it, also the turns that have left the context, to train on.

        An answer that was cut off carries `weight` 0: learned, it would teach to stop in the middle.
        """
        whole = [*self.messages[: len(self.messages) - len(self.turns)], *self.gone, *self.turns]
        return [{**m, "weight": 0} if any(m is cut for cut in self._cut) else m for m in whole]

    def send(self, text: str) -> str:
        """Send a user turn, return the whole answer."""
        return "".join(self.stream(text)).strip()

    def stream(self, text: str, stopped: threading.Event | None = None) -> Iterator[str]:
        """Send a user turn, yield the answer piece by piece. An answer that was stopped early stays as far as it got.

        Turns that have to leave the context leave at once, before the first piece is asked for.

        Raises:
            UsageError: this turn alone fills the model's context; the conversation stays as it was.
        """
        question: Message = {"role": "user", "content": text}
        self._make_room(question)
        return self._answer(question, stopped)

    def _answer(
        self, question: Message, stopped: threading.Event | None, before: list[Message] | None = None
    ) -> Generator_[str, None, str]:
        pieces: list[str] = []
        settings = (self.max_new_tokens, self.temperature, self.top_p)
        self.finish_reason = "stopped"  # unless the stream comes to its end
        prompt = self.generator.encoder.prompts([[*self.messages, question]])[0]
        self.room = self.generator.context - len(prompt)
        try:
            stream = self.generator.stream([*self.messages, question], *settings, stopped)
            while True:
                try:
                    piece = next(stream)
                except StopIteration as end:
                    self.finish_reason = "stopped" if stopped and stopped.is_set() else end.value or "stop"
                    break
                pieces.append(piece)
                yield piece
        finally:
            if answer := "".join(pieces).strip():
                reply: Message = {"role": "assistant", "content": answer}
                if self.finish_reason != "stop":
                    self._cut.append(reply)
                self.turns = [*self.turns, question, reply]
            elif before:
                self.turns = before
        return self.finish_reason

    def _make_room(self, question: Message) -> None:
        """Let the oldest questions and answers go until the prompt leaves room for an answer."""
        context = self.generator.context
        room = min(self.max_new_tokens, context // 4)
        system = self.messages[: len(self.messages) - len(self.turns)]
        for gone in range(0, len(self.turns) + 1, 2):
            prompt = self.generator.encoder.prompts([[*system, *self.turns[gone:], question]])[0]
            if len(prompt) + room <= context:
                self.gone, self.turns = self.gone + self.turns[:gone], self.turns[gone:]
                self.left += gone
                return
        raise UsageError(
            f"this turn makes a prompt of {len(prompt)} tokens; of the model's context of {context} that leaves "
            f"less than {room} for an answer. Shorten it"
        )
