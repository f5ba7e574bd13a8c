"""Answers from a model: batches (`generate`), and a conversation (`Chat`). The prompt is the one that was trained."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.encode import encoder
from instructft.errors import ModelError, UsageError
from instructft.sources import Message
from instructft.templates import TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Answer:
    """A generated answer; `finish_reason` is `stop` (the model ended it) or `length` (it was cut off)."""

    text: str
    finish_reason: str


def load_for_inference(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a run folder, a checkpoint in it, any other folder, or a Hub id `org/name[@revision]`, ready to answer.

    The device is CUDA, else MPS, else the CPU; weights keep their dtype on a GPU and are float32 on the CPU.

    Raises:
        UsageError: there is no such model.
        ModelError: it is there, but cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name).expanduser()
    location, revision = str(path), "main"
    if not path.exists():
        if name.startswith(("/", ".", "~")) or name.count("/") != 1:
            raise UsageError(f"there is no model folder {name}; give a run folder, or a Hub id such as org/name")
        location, _, given = name.partition("@")
        revision = given or "main"
    elif not (path / "config.json").is_file():
        checkpoints = sorted(p.name for p in path.glob("checkpoint-*"))
        hint = f"; its run is unfinished, but it holds {', '.join(checkpoints)}" if checkpoints else ""
        raise UsageError(f"{name} holds no model (there is no config.json in it){hint}")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
        dtype = torch.float32 if device == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(location, revision=revision, dtype=dtype)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"{name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATES["instruction"].text()
    return model.to(device).eval(), tokenizer


class Generator:
    """A model with its tokenizer, ready to answer conversations."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder(tokenizer)
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.stop_ids = sorted({self.encoder.stop_token_id, *eos})
        pad = tokenizer.pad_token_id
        self.pad_id = self.stop_ids[0] if pad is None else pad
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = positions or 1 << 30  # tokens that the model can attend to

    def options(self, max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        """Arguments of `model.generate`; a temperature of 0 is greedy."""
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        return {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.pad_id,
            **sampling,
        }

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        done: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer each conversation, in order. Prompts of like length share a batch; `done(i, answer)` as they come.

        Raises:
            UsageError: a prompt that leaves no room for an answer in the model's context.
        """
        prompts = self.encoder.prompts(conversations)
        for i, ids in enumerate(prompts):
            if len(ids) >= self.context:
                raise UsageError(
                    f"prompt {i + 1} has {len(ids)} tokens; the model's context of {self.context} leaves no room for an answer"
                )
        answers: list[Answer | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, answer in zip(
                batch, self._batch([prompts[i] for i in batch], max_new_tokens, temperature, top_p), strict=True
            ):
                answers[i] = answer
                if done:
                    done(i, answer)
        return [answer for answer in answers if answer is not None]

    def _batch(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> list[Answer]:
        import torch

        longest = max(map(len, prompts))
        # Padded on the left, so that all answers begin in the same column. (B, T)
        ids = torch.tensor([[self.pad_id] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        room = min(max_new_tokens, self.context - longest)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                out = self.model.generate(input_ids=ids, attention_mask=mask, **self.options(room, temperature, top_p))
        finally:
            self.model.train(was_training)
        return [self._answer(row[longest:].tolist()) for row in out]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text.strip(), "length" if end is None else "stop")

    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stopped: threading.Event | None = None,
    ) -> Iterator[str]:
        """Yield the answer to one conversation piece by piece; set `stopped` to end it early."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        stopped = stopped or threading.Event()

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        prompt = self.encoder.prompts([messages])[0]
        ids = torch.tensor([prompt], device=self.model.device)
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        failed: list[BaseException] = []

        def run() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Stopped()]),
                        **self.options(min(max_new_tokens, self.context - len(prompt)), temperature, top_p),
                    )
            except BaseException as error:  # handed to the reader's thread below
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        begun = False
        try:
            for piece in streamer:
                piece = piece if begun else piece.lstrip()
                if piece:
                    begun = True
                    yield piece
        finally:
            stopped.set()
            thread.join()
        if failed:
            raise failed[0]


def generate(
    model_or_path: Any,
    prompts: Sequence[str | Sequence[Message]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 16,
) -> list[str]:
    """Answer prompts with a trained model.

    Args:
        model_or_path: a run folder, any folder or Hub id, or a loaded model (then `tokenizer` is needed).
        prompts: each a text (one user turn) or a list of messages.
        max_new_tokens: tokens at most in an answer.
        temperature: 0 is greedy.

    >>> instructft.generate("runs/quickstart", ["What is the capital of France?"])
    ['The capital of France is Paris.']
    """
    generator = _generator(model_or_path, tokenizer)
    conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    answers = generator.answers(conversations, max_new_tokens, temperature, top_p, batch_size)
    return [answer.text for answer in answers]


def _generator(model_or_path: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Generator:
    if isinstance(model_or_path, Generator):
        return model_or_path
    if isinstance(model_or_path, str | Path):
        model, own = load_for_inference(str(model_or_path))
        return Generator(model, tokenizer or own)
    if tokenizer is None:
        raise UsageError("a loaded model needs its tokenizer too: tokenizer=…")
    return Generator(model_or_path, tokenizer)


class Chat:
    """A conversation with a model. When the context is full the oldest turns leave first, and `left` counts them.

    >>> chat = Chat("runs/quickstart")
    >>> chat.send("What is the capital of France?")
    'The capital of France is Paris.'
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
        self.generator = _generator(model_or_path, tokenizer)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.system = system
        self.turns: list[Message] = []
        self.left = 0  # turns that had to leave the context

    @property
    def messages(self) -> list[Message]:
        """The conversation as the model sees it."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns, self.left = [], 0

    def send(self, text: str) -> str:
        """Send a user turn, return the whole answer."""
        return "".join(self.stream(text)).strip()

    def stream(self, text: str, stopped: threading.Event | None = None) -> Iterator[str]:
        """Send a user turn, yield the answer piece by piece. An answer that was stopped early stays as far as it got.

        Raises:
            UsageError: this turn alone is longer than the model's context.
        """
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            self._make_room()
            for piece in self.generator.stream(
                self.messages, self.max_new_tokens, self.temperature, self.top_p, stopped
            ):
                pieces.append(piece)
                yield piece
        finally:
            answer = "".join(pieces).strip()
            if answer:
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns.pop()

    def _make_room(self) -> None:
        """Let the oldest question and answer go until the prompt leaves room for an answer."""
        context = self.generator.context
        room = min(self.max_new_tokens, context // 4)
        while len(self.generator.encoder.prompts([self.messages])[0]) + room > context:
            if len(self.turns) <= 1:
                raise UsageError(
                    f"this turn has more tokens than the model's context of {context} leaves room for; shorten it"
                )
            gone = 2 if self.turns[1]["role"] == "assistant" else 1
            del self.turns[:gone]
            self.left += gone
