"""How good is a model: loss and perplexity over supervised tokens, and its answers held against the references."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from instructft.encode import IGNORE_INDEX, encode_conversation
from instructft.errors import DataError
from instructft.generate import MAX_NEW_TOKENS, Generator, as_generator
from instructft.sources import Message, Unusable, detect_format, to_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_AT_ONCE = 4096  # in one forward pass of the loss, padding included: the logits take this times the vocabulary


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference, outer white space aside.

    >>> exact_match(["Paris ", "Rome"], ["Paris", "Oslo"])
    0.5
    """
    return sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)) / len(references)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 as `rouge-score` computes it (Lin, 2004: https://aclanthology.org/W04-1013)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, as `sacrebleu` computes it (Post, 2018: https://aclanthology.org/W18-6319)."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


# name in the results -> what it computes from predictions and references
METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "rougeL": rouge_l,
    "bleu": bleu,
}


def evaluate(
    model_or_path: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_on: str = "responses",
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on conversations whose last turn is the reference answer.

    Args:
        model_or_path: a run folder, any folder or Hub id, or a loaded model (then `tokenizer` is needed).
        rows: each in any format that training reads (`messages`, Alpaca, Dolly, …).
        train_on: which tokens are supervised: `responses`, `last_response` or `everything`.
        max_new_tokens: tokens at most in a prediction.
        batch_size: rows at once; None finds it.

    Returns:
        `loss` (mean over all supervised tokens, the end of turn included), `perplexity`, `exact_match`, `rougeL`,
        `bleu`, `cut`, and `rows`: `prompt` (the last user turn), `prediction`, `reference`. `cut` counts rows that
        are longer than the model's context: their loss is that of what fits, and a prompt that fills the context
        gets the prediction "".

    >>> evaluate("runs/quickstart", [{"instruction": "Name the capital of France.", "output": "Paris"}])["exact_match"]
    1.0

    Raises:
        DataError: no rows, one without an answer, or none whose answer lies within the context.
    """
    conversations = [_conversation(i, row) for i, row in enumerate(rows, 1)]
    if not conversations:
        raise DataError("there are no rows to evaluate on")
    generator = as_generator(model_or_path, tokenizer)
    scored = negative_log_likelihood(generator, conversations, train_on, batch_size)
    predictions = _predictions(generator, conversations, max_new_tokens, batch_size)
    references = [str(c[-1]["content"]).strip() for c in conversations]
    loss = scored.total / scored.tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        **{name: metric(predictions, references) for name, metric in METRICS.items()},
        "cut": scored.cut,
        "rows": [
            {"prompt": _asked(c), "prediction": p, "reference": r}
            for c, p, r in zip(conversations, predictions, references, strict=True)
        ],
    }


def _conversation(number: int, row: Mapping[str, Any]) -> list[Message]:
    try:
        return to_conversation(row, detect_format(list(row), f"row {number}"))
    except Unusable as unusable:
        raise DataError(f"row {number} cannot be evaluated: {unusable.reason.replace('_', ' ')}") from unusable


def _asked(conversation: Sequence[Message]) -> str:
    """The last user turn, with its input or context below it."""
    last = next((m for m in reversed(conversation[:-1]) if m["role"] == "user"), {"content": ""})
    return "\n".join(str(last[key]) for key in ("content", "context", "input") if last.get(key))


def _predictions(
    generator: Generator, conversations: Sequence[Sequence[Message]], max_new_tokens: int, batch_size: int | None
) -> list[str]:
    """The greedy answer to each conversation without its last turn; "" where the prompt fills the context."""
    asked = [c[:-1] for c in conversations]
    lengths = map(len, generator.encoder.prompts(asked))
    fits = [i for i, length in enumerate(lengths) if length < generator.context]
    answers = generator.answers([asked[i] for i in fits], max_new_tokens, batch_size=batch_size)
    texts = {i: answer.text for i, answer in zip(fits, answers, strict=True)}
    return [texts.get(i, "") for i in range(len(asked))]


class Scored(NamedTuple):
    """What `negative_log_likelihood` found."""

    total: float  # sum of -log p, in nats
    tokens: int  # supervised tokens
    cut: int  # rows that are longer than the model's context


def negative_log_likelihood(
    generator: Generator,
    conversations: Sequence[Sequence[Message]],
    train_on: str = "responses",
    batch_size: int | None = None,
) -> Scored:
    """Sum -log p over supervised tokens. Rows longer than the context are cut there, as in training, and counted.

    Raises:
        DataError: no row has an answer within the context.
    """
    import torch

    from instructft.collate import CompletionOnlyCollator

    collate = CompletionOnlyCollator(generator.pad_id)
    encoded = [encode_conversation(messages, generator.tokenizer, train_on) for messages in conversations]
    cut = sum(len(row["input_ids"]) > generator.context for row in encoded)
    rows = [{name: values[: generator.context] for name, values in row.items()} for row in encoded]
    rows = [row for row in rows if any(label != IGNORE_INDEX for label in row["labels"][1:])]
    if not rows:
        raise DataError(f"no row has an answer within the model's context of {generator.context} tokens")
    rows.sort(key=lambda row: len(row["input_ids"]), reverse=True)
    total, tokens, start = 0.0, 0, 0
    with generator.evaluating():
        while start < len(rows):
            size = batch_size or max(1, TOKENS_AT_ONCE // len(rows[start]["input_ids"]))
            batch = {k: v.to(generator.model.device) for k, v in collate(rows[start : start + size]).items()}
            labels = batch.pop("labels")[:, 1:]  # (B, T - 1): the token that position t predicts
            logits = generator.model(**batch, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
            mask = labels != IGNORE_INDEX
            losses = torch.nn.functional.cross_entropy(logits[mask].float(), labels[mask], reduction="none")
            total += float(losses.cpu().double().sum())
            tokens += len(losses)
            start += size
    return Scored(total, tokens, cut)
