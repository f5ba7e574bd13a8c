"""How good is a model: loss and perplexity over supervised tokens, and its answers held against the references."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instructft.encode import IGNORE_INDEX
from instructft.errors import DataError
from instructft.generate import MAX_NEW_TOKENS, Generator, _generator
from instructft.sources import Message, Unusable, detect_format, to_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Evaluate a model on conversations whose last turn is the reference answer.

    Args:
        model_or_path: a run folder, any folder or Hub id, or a loaded model (then `tokenizer` is needed).
        rows: each in any format that training reads (`messages`, Alpaca, Dolly, …).

    Returns:
        `loss` (mean over all supervised tokens, the end of turn included), `perplexity`, `exact_match`, `rougeL`,
        `bleu`, and `rows`: `prompt` (the last user turn), `prediction`, `reference`.

    >>> evaluate("runs/quickstart", [{"instruction": "Name the capital of France.", "output": "Paris"}])["exact_match"]
    1.0

    Raises:
        DataError: no rows, or one without an answer.
    """
    conversations = [_conversation(i, row) for i, row in enumerate(rows, 1)]
    if not conversations:
        raise DataError("there are no rows to evaluate on")
    generator = _generator(model_or_path, tokenizer)
    nll, tokens = negative_log_likelihood(generator, conversations, batch_size)
    answers = generator.answers([c[:-1] for c in conversations], max_new_tokens, batch_size=batch_size)
    predictions = [answer.text for answer in answers]
    references = [str(c[-1]["content"]).strip() for c in conversations]
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        **{name: metric(predictions, references) for name, metric in METRICS.items()},
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


def negative_log_likelihood(
    generator: Generator, conversations: Sequence[Sequence[Message]], batch_size: int = 16
) -> tuple[float, int]:
    """Sum of -log p over supervised tokens, and their number. Rows longer than the context are cut, as in training."""
    import torch

    from instructft.collate import CompletionOnlyCollator

    collate = CompletionOnlyCollator(generator.pad_id)
    rows = []
    for row in generator.encoder.encode(conversations):
        cut = {name: values[: generator.context] for name, values in row.items()}
        if any(label != IGNORE_INDEX for label in cut["labels"][1:]):
            rows.append(cut)
    if not rows:
        raise DataError("no row has an answer within the model's context")
    rows.sort(key=lambda row: len(row["input_ids"]))
    total, tokens = 0.0, 0
    was_training = generator.model.training
    generator.model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = {k: v.to(generator.model.device) for k, v in collate(rows[start : start + batch_size]).items()}
            labels = batch.pop("labels")[:, 1:]  # (B, T - 1): the token that position t predicts
            logits = generator.model(**batch, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
            mask = labels != IGNORE_INDEX
            loss = torch.nn.functional.cross_entropy(logits[mask].float(), labels[mask], reduction="sum")
            total += float(loss)
            tokens += int(mask.sum())
    generator.model.train(was_training)
    return total, tokens
