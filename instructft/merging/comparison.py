"""What two models are shown, what each makes of it, and how far apart they are.

Every text goes through alone, so that no padding takes part; a model that is mapped from its files takes all of them in
one batch, since each look reads every weight from the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any

from instructft.errors import InstructftError, TemplateError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe

LOGITS = 128 << 20  # bytes of logits that are kept for one model
ROWS = 8  # texts
LENGTH = 256  # tokens of a text
ANSWER = 32  # tokens of an answer, at most

FIXED = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
    "Translate to German: The weather is fine today.",
    "Give three tips for staying healthy.",
    "What is 17 times 23?",
    "Summarize: A fox saw grapes on a high vine, could not reach them, and said that they were sour.",
    "def fibonacci(n):",
)


@dataclass(frozen=True)
class Texts:
    """What both models are shown."""

    rows: list[list[int]]  # token ids, for the logits
    prompts: list[list[int]]  # token ids that are answered
    source: str  # where they come from, in words
    stop_ids: list[int]
    pad_id: int
    answer: int  # tokens of an answer, at most
    labels: list[list[int]] = field(default_factory=list)  # of `rows`, -100 = no loss; none where they are no rows


@dataclass(frozen=True)
class Seen:
    """What one model made of them."""

    logits: list[torch.Tensor]  # a text each, (positions kept, V), float32 on the CPU
    answers: list[list[int]]
    loss: float | None  # mean over the labels, in nats; None where there are none


def apart(one: Seen, other: Seen) -> dict[str, Any]:
    """How far another model is from the first: `kl` in nats a token, `top1` (share of equal most likely tokens),
    `difference` (the largest of a logit) and the other's `loss`."""
    import torch

    total, equal, count, largest = 0.0, 0, 0, 0.0
    for a, b in zip(one.logits, other.logits, strict=True):
        p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
        total += float((p.exp() * (p - q)).sum())
        equal += int((a.argmax(-1) == b.argmax(-1)).sum())
        off = float((a - b).abs().max())
        largest = off if math.isnan(off) else max(largest, off)
        count += len(a)
    return {"kl": max(0.0, total / count), "top1": equal / count, "difference": largest, "loss": other.loss}


def choose_texts(
    recipe: Recipe | None, tokenizer: PreTrainedTokenizerBase | None, context: int, vocabulary: int
) -> Texts:
    """Rows that the recipe holds out, where it holds any out and its data is here; else fixed texts, or token ids.

    Args:
        tokenizer: that of the merged model; None when it has none.
        context: tokens that the model takes at most.
        vocabulary: rows of its embedding; a text with a token beyond them is left out.
    """
    from instructft.prompt.loss_mask import encoder

    limit = min(LENGTH, context)
    labels: list[list[int]] = []
    room = max(1, limit - ANSWER)
    if tokenizer is None:
        import torch

        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(vocabulary, (len(FIXED), min(32, room)), generator=draw).tolist()
        return Texts(rows, rows, "random token ids", [], 0, ANSWER)
    source = "fixed texts"
    try:
        if not isinstance(tokenizer.chat_template, str):
            raise TemplateError("there is none")
        chat = encoder(tokenizer)
        stop = chat.stop_token_id
        if conversations := _held_out(recipe):
            prompts = chat.prompts([messages[:-1] for messages in conversations])
            encoded = chat.encode(conversations).lists()
            rows, labels = ([row[key] for row in encoded] for key in ("input_ids", "labels"))
            source = "the recipe's held-out rows"
        else:
            rows = prompts = chat.prompts([[{"role": "user", "content": text}] for text in FIXED])
    except TemplateError:  # somebody else's, which no run here would train; texts without it prove as much
        rows = prompts = [tokenizer(text)["input_ids"] for text in FIXED]
        stop = tokenizer.eos_token_id

    def known(texts: Sequence[list[int]]) -> list[bool]:
        return [bool(ids) and max(ids) < vocabulary for ids in texts]

    kept = known(rows)
    rows, prompts = list(compress(rows, kept)), list(compress(prompts, known(prompts)))
    labels = list(compress(labels, kept))
    if not rows or not prompts:  # the tokenizer is not this model's, or of no use
        return choose_texts(recipe, None, context, vocabulary)
    return Texts(
        rows=[ids[:limit] for ids in rows],
        prompts=[ids[-room:] for ids in prompts],
        source=source,
        stop_ids=[] if stop is None else [stop],
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop or 0,
        answer=ANSWER,
        labels=[ids[:limit] for ids in labels],
    )


def _held_out(recipe: Recipe | None) -> list[Any]:
    from instructft.data.load import conversations

    if recipe is None:
        return []
    for split in ("test", "validation"):
        if recipe.data.holds_out(split):
            try:
                return [row["messages"] for row in conversations(recipe, split, ROWS)]
            except (InstructftError, OSError, ValueError):  # the data has moved: another text proves as much
                return []
    return []


def look(model: Any, texts: Texts, answers: bool = True) -> Seen:
    """Logits and greedy answers of a model, one text at a time."""
    import torch
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=texts.answer, eos_token_id=texts.stop_ids or None, pad_token_id=texts.pad_id
    )
    logits, made, losses = [], [], []
    with torch.inference_mode():
        for i, ids in enumerate(texts.rows):
            batch = torch.tensor([ids], device=model.device)  # (1, T)
            found = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits[0]  # (T, V)
            logits.append(_kept(found, len(ids), len(texts.rows)))
            losses += _losses(found, texts.labels[i : i + 1])
        for ids in texts.prompts if answers else []:
            batch = torch.tensor([ids], device=model.device)
            out = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=greedy)
            made.append(out[0, len(ids) :].tolist())
    return Seen(logits, made, _mean(losses))


def look_once(model: Any, texts: Texts, answers: bool = True) -> Seen:
    """As `look`, with every weight used once: all texts in one batch; for answers the most likely next tokens."""
    import torch

    lengths = [len(ids) for ids in texts.rows]
    batch = torch.full((len(lengths), max(lengths)), texts.pad_id)  # (B, T)
    mask = torch.zeros_like(batch)
    for i, ids in enumerate(texts.rows):
        batch[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
    with torch.inference_mode():
        found = model(input_ids=batch, attention_mask=mask, use_cache=False).logits  # (B, T, V)
    logits = [_kept(row, length, len(lengths)) for row, length in zip(found, lengths, strict=True)]
    losses = [loss for i, row in enumerate(found) for loss in _losses(row, texts.labels[i : i + 1])]
    made = [row[:n].argmax(-1).tolist() for row, n in zip(found, lengths, strict=True)] if answers else []
    return Seen(logits, made, _mean(losses))


def _losses(logits: torch.Tensor, labels: Sequence[Sequence[int]]) -> list[float]:
    """The loss of each label of one text, where it has any; (T, V) and at most one row of T labels."""
    import torch

    if not labels:
        return []
    wanted = torch.tensor(labels[0][1:], device=logits.device)
    losses = torch.nn.functional.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="none")
    found: list[float] = losses[wanted != -100].tolist()
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _kept(logits: torch.Tensor, length: int, texts: int) -> torch.Tensor:
    """Logits of some positions, evenly over a text of `length` tokens: (positions, V), float32 on the CPU."""
    import torch

    keep = max(1, LOGITS // (texts * logits.shape[-1] * 4))
    places = torch.linspace(0, length - 1, min(keep, length), device=logits.device).round().long()
    return logits[places].float().cpu()


def agreement(one: Iterable[list[int]], other: Iterable[list[int]]) -> tuple[int, int]:
    """Tokens of all answers, and how many of them are equal at their place.

    >>> agreement([[5, 6, 7]], [[5, 6, 8, 9]])
    (4, 2)
    """
    pairs = list(zip(one, other, strict=True))
    total = sum(max(len(a), len(b)) for a, b in pairs)
    return total, sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
