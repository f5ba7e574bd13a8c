"""Conversations to answers with a loaded model: in batches, or one piece by piece as it is made."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Generator_
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from instructft.adapters.lora import is_peft
from instructft.errors import ModelError, UsageError
from instructft.inference.continuous_batching import Batch, Row
from instructft.inference.padding import PADDING_TOLERANCE, padding_difference
from instructft.models.load import pad_of_positions
from instructft.prompt.conversation import Message
from instructft.prompt.loss_mask import encoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256
CPU_BATCH = 32  # prompts at once where memory is not what limits them
GPU_BATCH, GPU_TOKENS = 256, 1 << 17  # prompts and tokens at once, tried first; halved as often as memory runs out
UNLIMITED = 1 << 30  # the context of a model whose configuration names no end (ALiBi, state space models)


@dataclass(frozen=True)
class Answer:
    """A generated answer; `finish_reason` is `stop` (the model ended it) or `length` (it was cut off)."""

    text: str
    finish_reason: str
    tokens: int = field(default=0, compare=False)  # generated, the stop token included


def check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise a `UsageError` for a setting under which no answer can be generated."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: found {max_new_tokens}, expected 1 or more")
    if not 0 <= temperature <= 10:
        raise UsageError(f"temperature: found {temperature}, expected 0 (greedy) to 10")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p: found {top_p}, expected more than 0 and at most 1")


class Generator:
    """A model with its tokenizer, ready to answer conversations."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder(tokenizer)
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.stop_ids = sorted({*self.encoder.stop_ids, *eos})
        pad = tokenizer.pad_token_id
        self.pad_id = self.stop_ids[0] if pad is None else pad
        counted = pad_of_positions(model) if hasattr(model, "modules") else None  # an engine has none here
        self.counts_from_pads = counted is not None  # positions itself, from its pad token on; `generate` counts from 0
        self.pad_id = self.pad_id if counted is None else counted
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        self.context = positions if positions > 0 else UNLIMITED  # tokens that the model can attend to
        self.precision: Callable[[], AbstractContextManager[Any]] = (
            nullcontext  # of the training under way: its autocast
        )
        self._fits = GPU_BATCH  # prompts at once; less after memory ran out
        self._together: bool | None = None  # whether a prompt gets the same answer in a batch; None: not yet asked

    def options(self, max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        """Arguments of `model.generate`; a temperature of 0 is greedy.

        Whatever else the model's own `generation_config` sets (a repetition penalty, beams, a minimum length, left
        there by somebody) is unset for the call: it would change the answers without a word.
        """
        check_settings(max_new_tokens, temperature, top_p)
        unset = {name: None for name in vars(self.model.generation_config) if not name.startswith("_")}
        unset.pop("transformers_version", None)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        return {
            **unset,
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "use_cache": True,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.pad_id,
            **sampling,
        }

    def room(self, prompt: Sequence[int], name: str = "the prompt") -> int:
        """Tokens that are left for an answer in the model's context; a `UsageError` when there are none."""
        if len(prompt) >= self.context:
            raise UsageError(
                f"{name} has {len(prompt)} tokens; the model's context of {self.context} leaves no room for an answer"
            )
        return self.context - len(prompt)

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int | None = None,
        done: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer each conversation, in order. Prompts of like length share a batch; `done(i, answer)` as they come.

        Args:
            batch_size: prompts at once. None: found here; less are taken whenever the memory does not suffice.

        Raises:
            UsageError: a prompt that leaves no room for an answer in the model's context.
            ModelError: `batch_size` prompts, or one alone, do not fit in memory.
        """
        check_settings(max_new_tokens, temperature, top_p)
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size: found {batch_size}, expected 1 or more")
        rows = self.rows(conversations, max_new_tokens)
        answers: dict[int, Answer] = {}

        def take(row: Row) -> None:
            answers[row.index] = self._answer(row.made)
            if done:
                done(row.index, answers[row.index])

        self.complete(rows, temperature, top_p, batch_size, take)
        return [answers[row.index] for row in rows]

    def rows(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Row]:
        """The prompt of each conversation, with the tokens that its answer may have in the model's context.

        Raises:
            UsageError: a prompt that leaves no room for an answer.
        """
        prompts = self.encoder.prompts(conversations) if conversations else []
        return [Row(i, ids, min(max_new_tokens, self.room(ids, f"prompt {i + 1}"))) for i, ids in enumerate(prompts)]

    def complete(
        self,
        rows: Sequence[Row],
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int | None = None,
        done: Callable[[Row], None] | None = None,
    ) -> None:
        """Fill in `made`, the ids of the answer, in every row; `done(row)` as they come.

        Raises:
            ModelError: `batch_size` prompts, or one alone, do not fit in memory.
        """
        most = max((row.limit for row in rows), default=1)
        # the longest first: where one batch fits in memory, so do those after it
        waiting = sorted(rows, key=lambda row: -len(row.prompt))
        if len(rows) > 1 and batch_size != 1 and not self.answers_together():
            batch_size = 1
        batch = Batch(self, temperature, top_p)
        while waiting or batch.rows:
            tokens = max(len(row.prompt) for row in [*waiting[:1], *batch.rows]) + most
            size = batch_size or self._auto_size(tokens)
            free = size - len(batch.rows) if batch.rolls or not batch.rows else 0
            joining, waiting = waiting[: max(0, free)], waiting[max(0, free) :]
            if not self._try(batch, joining):
                tried = [*batch.disperse(), *joining]
                at_once, waiting = len(tried), [*tried, *waiting]
                if batch_size or at_once == 1:
                    raise ModelError(f"{at_once} prompts at once do not fit in memory; take less, or batch size auto")
                self._fits = at_once // 2
            for row in batch.leave():
                if done:
                    done(row)

    def answers_together(self) -> bool:
        """Whether a prompt that is padded for a batch gets the answer that it gets alone; asked once, said if not."""
        if self._together is None:
            difference = padding_difference(self)
            self._together = difference <= PADDING_TOLERANCE[self.model.dtype.itemsize < 4]
            if not self._together:
                kind = self.model.config.model_type
                print(
                    f"{type(self.model).__name__} ({kind}) does not pass over padding: logits of a prompt in a batch "
                    f"differ by {difference:.1e} of the largest from those alone. Prompts are answered one at a time.",
                    file=sys.stderr,
                )
        return self._together

    def _auto_size(self, tokens: int) -> int:
        most = CPU_BATCH if self.model.device.type == "cpu" else max(1, GPU_TOKENS // tokens)
        return min(most, self._fits)

    def _try(self, batch: Batch, joining: list[Row]) -> bool:
        """Let rows join, or else let those in the batch go on; False when memory ran out."""
        import torch

        try:
            if joining:
                batch.join(joining)
            else:
                batch.step()
            return True
        except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS and the CPU raise it plain
            if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
                raise
        if torch.cuda.is_available():  # outside `except`, whose traceback holds the tensors
            torch.cuda.empty_cache()
        return False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout, no gradients; also in the middle of training, which then goes on as before."""
        import torch

        from instructft.models.kernels.varlen import plain

        was_training = self.model.training
        self.model.eval()
        # with it a mixture computes the loss of its router, for which a batch with a cache has the wrong shape
        # (transformers#29087); training leaves it switched on
        config = self.model.config.get_text_config()
        router = getattr(config, "output_router_logits", None)
        if router:
            config.output_router_logits = False
        # under FSDP2 training goes on with what is gathered here, and could not with tensors of inference mode
        mode = torch.no_grad if hasattr(self.model, "unshard") else torch.inference_mode
        try:
            # prompts are padded: no borders
            with mode(), self.precision(), plain(self.model), self._own_positions(), self._copied_for_the_head():
                yield
        finally:
            self.model.train(was_training)
            if router:
                config.output_router_logits = router

    @contextmanager
    def _copied_for_the_head(self) -> Iterator[None]:
        """Hand the head a copy of the last token's hidden state on a CPU, in place of a view into those of the prompt.

        In bfloat16 torch takes the view 30 to 60 times as long: 206 ms, and 7 for a copy, at 32,000 x 1,024 (2.13).
        """
        import torch

        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        if head is None or self.model.device.type != "cpu":
            yield
            return

        def copied(_: Any, args: Any) -> Any:
            hidden = args[0]
            view = hidden.dim() == 3 and hidden.stride(0) != hidden.shape[1] * hidden.shape[2]
            return (hidden.clone(memory_format=torch.contiguous_format), *args[1:]) if view else None

        hook = head.register_forward_pre_hook(copied)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _own_positions(self) -> Iterator[None]:
        """Let a model count positions as it does in training, where `generate` would hand it others (5.23)."""
        if not self.counts_from_pads:
            yield
            return

        def without(module: Any, args: Any, inputs: dict[str, Any]) -> Any:
            return args, {name: value for name, value in inputs.items() if name != "position_ids"}

        base: Any = self.model.get_base_model() if is_peft(self.model) else self.model
        hook = base.register_forward_pre_hook(without, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _answer(self, ids: list[int]) -> Answer:
        stopped = bool(ids) and ids[-1] in self.stop_ids
        return Answer(self.decoded(ids[:-1] if stopped else ids), "stop" if stopped else "length", len(ids))

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of an answer, without the token that ends it."""
        # a character that the limit cut in two is no part of the answer
        return self._decode(list(ids)).rstrip("\ufffd").strip()

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stopped: threading.Event | None = None,
    ) -> Generator_[str, None, str]:
        """Yield the answer to one conversation piece by piece; set `stopped` to end it early.

        What the generator returns at its end (`StopIteration.value`) is the finish reason, `stop` or `length`.
        """
        import torch

        halt = threading.Event()  # the reader has gone; `stopped` is the caller's own
        prompt = self.encoder.prompts([messages])[0]
        options = self.options(min(max_new_tokens, self.room(prompt)), temperature, top_p)
        ids = torch.tensor([prompt], device=self.model.device)
        pieces = _Pieces(self._decode, self.stop_ids)
        failed: list[BaseException] = []

        def halted(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            stop = halt.is_set() or (stopped is not None and stopped.is_set())
            return torch.full((len(input_ids),), stop, device=input_ids.device)

        def run() -> None:
            try:
                with self.evaluating():
                    self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        streamer=pieces,
                        stopping_criteria=[halted],
                        **options,
                    )
            except BaseException as error:  # handed to the reader's thread below
                failed.append(error)
                pieces.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        begun = False
        try:
            while (piece := pieces.queue.get()) is not None:
                piece = piece if begun else piece.lstrip()
                if piece:
                    begun = True
                    yield piece
        finally:
            halt.set()
            thread.join()
        if failed:
            raise failed[0]
        return "stop" if pieces.stopped else "length"


class _Pieces:
    """What `model.generate` calls a streamer: token ids come in, texts go into `queue`, None at the end.

    A character that is spread over several tokens is held back until it is whole. transformers' own streamer waits
    for spaces, which many languages do not have, and loses spaces after a line break with SentencePiece.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_ids: Sequence[int]):
        self.queue: SimpleQueue[str | None] = SimpleQueue()
        self.decode, self.stop_ids = decode, stop_ids
        self.ids: list[int] | None = None  # of the answer
        self.stopped = False  # a stop token has come
        self.before = self.shown = 0  # positions in `ids`: where decoding begins, and up to where it is shown

    def put(self, value: torch.Tensor) -> None:
        """Take one token; the first call brings the prompt."""
        if self.ids is None:
            self.ids = []
            return
        self.stopped = self.stopped or any(token in self.stop_ids for token in value.tolist())
        self.ids += [token for token in value.tolist() if token not in self.stop_ids]
        if not self._pending().endswith("\ufffd"):
            self.queue.put(self._pending())
            self.before, self.shown = self.shown, len(self.ids)

    def end(self) -> None:
        """Give out what is left."""
        self.queue.put(self._pending().rstrip("\ufffd"))
        self.queue.put(None)

    def _pending(self) -> str:
        # decoded behind the tokens before it: alone, SentencePiece would drop its leading space
        ids = self.ids or []
        return self.decode(ids[self.before :])[len(self.decode(ids[self.before : self.shown])) :]
