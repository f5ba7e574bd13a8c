"""How good is a model: loss and perplexity over supervised tokens, and its answers held against the references.

Every figure comes with the interval that the choice of rows leaves it (`instructft.evaluation.confidence`), and also
for each data set and each category of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from instructft.data.formats import detect_format, to_conversation
from instructft.errors import DataError, TemplateError
from instructft.evaluation.answers import Answered, FurtherFigures, Own, calls_of
from instructft.evaluation.confidence import intervals, measures
from instructft.evaluation.words import rouge_l
from instructft.inference.chat import as_generator
from instructft.inference.generator import MAX_NEW_TOKENS, Answer, Generator
from instructft.progress import Progress
from instructft.prompt.conversation import Message
from instructft.prompt.ledger import Unread, Unusable
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NGRAM = 4  # tokens; how often an answer says the same again is counted in runs of so many
TOKENS_AT_ONCE = 4096  # in one forward pass of the loss, padding included: the logits take this times the vocabulary


GROUPED = ("dataset", "category")  # columns of rows by whose values figures are told apart


def evaluate(
    model_or_path: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_on: str = "responses",
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    progress: bool = False,
    figures: Sequence[str] = (),
    own: Mapping[str, Own] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on conversations whose last turn is the reference answer.

    Args:
        model_or_path: a run folder, any folder or Hub id, or a loaded model (then `tokenizer` is needed).
        rows: each in any format that training reads (`messages`, Alpaca, Dolly, …).
        train_on: which tokens are supervised: `responses`, `last_response` or `everything`.
        max_new_tokens: tokens at most in a prediction.
        batch_size: rows at once; None finds it.
        progress: say on stderr how far it is.
        figures: more of `instructft.evaluation.answers.FIGURES`, such as `token_f1`.
        own: figures of the user's, by name.

    Returns:
        `loss` (mean over all supervised tokens, the end of turn included), `perplexity`, `exact_match`, `rougeL`,
        `bleu`; of the answers `answer_tokens` (mean length), `stopped` (share that ended by themselves) and `repeated`
        (mean share of runs of four tokens that an answer has said before: Welleck et al., 2020, arXiv:1908.04319);
        `reference_tokens`, `cut`, `intervals` (name -> [low, high], 95%), `groups` and `rows`; `metrics` holds of each
        further figure that applies to a row `value`, `interval`, `rows` (how many), and `failed` where one could not
        be judged.

        `cut` counts rows that are longer than the model's context: their loss is that of what fits, and a prompt that
        fills the context gets the prediction "". `groups` holds the same figures under `dataset` and `category`, where
        rows name more than one. A row holds `prompt` (the last user turn), `prediction`, `reference`, its own `nll`
        (summed over `supervised_tokens`), `rougeL`, `finish_reason`, `answer_tokens` and `repeated`, and `metrics` by
        name where further figures are asked for.

    Example::

        evaluate("runs/quickstart", [{"instruction": "Name the capital of France.", "output": "Paris"}])["exact_match"]
        # 1.0

    Raises:
        DataError: no rows, one without an answer, or none whose answer lies within the context.
    """
    conversations = [
        _conversation(i, {key: value for key, value in row.items() if key != "_row"}) for i, row in enumerate(rows, 1)
    ]
    if not conversations:
        raise DataError("there are no rows to evaluate on")
    generator = as_generator(model_or_path, tokenizer)
    scored = negative_log_likelihood(generator, conversations, train_on, batch_size, progress)
    answers = answers_to(generator, [c[:-1] for c in conversations], max_new_tokens, batch_size, progress)
    references = [str(c[-1]["content"]).strip() for c in conversations]
    found: list[dict[str, Any]] = []
    for row, asked, answer, reference, (nll, tokens) in zip(
        rows, conversations, answers, references, scored.rows, strict=True
    ):
        ids = _ids(generator, answer.text)
        found.append(
            {name: str(row[name]) for name in GROUPED if row.get(name) is not None}
            | {"prompt": _asked(asked), "prediction": answer.text, "reference": reference}
            | {"finish_reason": answer.finish_reason, "answer_tokens": len(ids), "repeated": repeated(ids)}
            | {"reference_tokens": len(_ids(generator, reference)), "nll": nll, "supervised_tokens": tokens}
            | {"rougeL": rouge_l(answer.text, reference)}
        )
    further: dict[str, Any] = {}
    if figures or own:
        judge = FurtherFigures(figures, own or {})
        for row, asked, one in zip(rows, conversations, found, strict=True):
            stopped = one["finish_reason"] == "stop"
            answered = Answered(one["prediction"], _expected(generator, asked), stopped, calls_of(asked))
            told = {**row.get("_row", row), "messages": asked, "dataset": row.get("dataset")}
            one["metrics"] = judge.worth(answered, told)
        further = judge.over([one["metrics"] for one in found])
    return {**_figures(found), "metrics": further, "cut": scored.cut, "groups": _groups(found), "rows": found}


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures over some rows, with their intervals."""
    return {
        **{name: measure.whole() for name, measure in measures(rows).items()},
        "reference_tokens": sum(row["reference_tokens"] for row in rows) / len(rows),
        "intervals": intervals(rows),
    }


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By data set and by category: name -> its figures and `count`. Groups whose answers lie past the context: none."""
    groups: dict[str, dict[str, Any]] = {}
    for column in GROUPED:
        names = sorted({row[column] for row in rows if column in row})
        parts = {name: [row for row in rows if row.get(column) == name] for name in names}
        parts = {name: part for name, part in parts.items() if any(row["supervised_tokens"] for row in part)}
        if len(parts) > 1:
            groups[column] = {name: {"count": len(part), **_figures(part)} for name, part in parts.items()}
    return groups


def _ids(generator: Generator, text: str) -> list[int]:
    ids: list[int] = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def repeated(ids: Sequence[int]) -> float:
    """Share of an answer's runs of `NGRAM` tokens that it has said before; 0 where it is too short for one.

    Example::

        repeated([1, 2, 3, 4, 1, 2, 3, 4])
        # 0.2
    """
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _conversation(number: int, row: Mapping[str, Any]) -> list[Message]:
    try:
        return to_conversation(row, detect_format(list(row), f"row {number}"))
    except Unusable as unusable:
        raise DataError(f"row {number} cannot be evaluated: {unusable}") from unusable
    except Unread as unread:
        raise DataError(f"row {number} cannot be evaluated: {unread}") from unread


def _expected(generator: Generator, conversation: Sequence[Message]) -> str:
    """The last answer as text; where it calls tools, as its template writes it."""
    said = str(conversation[-1]["content"] or "").strip()
    if not conversation[-1].get("tool_calls"):
        return said
    try:
        prompt = generator.encoder.render([conversation[:-1]], True)[0]
        whole = generator.encoder.render([conversation], False)[0]
    except TemplateError:
        return said
    return whole.removeprefix(prompt) if whole.startswith(prompt) else said


def _asked(conversation: Sequence[Message]) -> str:
    """The last user turn, with its input or context below it."""
    last = next((m for m in reversed(conversation[:-1]) if m["role"] == "user"), {"content": ""})
    return "\n".join(str(last[key]) for key in ("content", "context", "input") if last.get(key))


def answers_to(
    generator: Generator,
    asked: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: bool = False,
    temperature: float = 0.0,
) -> list[Answer]:
    """The answer to each conversation, greedy unless a temperature is given; "" where the prompt fills the context."""
    fits = [i for i, ids in enumerate(generator.encoder.prompts(asked)) if len(ids) < generator.context]
    with Progress("answering", len(fits), shown=progress) as told:
        wanted = [asked[i] for i in fits]
        answers = generator.answers(
            wanted, max_new_tokens, temperature, batch_size=batch_size, done=lambda *_: told.add()
        )
    given = dict(zip(fits, answers, strict=True))
    return [given.get(i, Answer("", "length")) for i in range(len(asked))]


class Scored(NamedTuple):
    """What `negative_log_likelihood` found."""

    total: float  # sum of -log p, in nats
    tokens: int  # supervised tokens
    cut: int  # rows that are longer than the model's context
    rows: list[tuple[float, int]]  # of each row, in order: its sum and its supervised tokens


def negative_log_likelihood(
    generator: Generator,
    conversations: Sequence[Sequence[Message]],
    train_on: str = "responses",
    batch_size: int | None = None,
    progress: bool = False,
) -> Scored:
    """Sum -log p over supervised tokens. Rows longer than the context are cut there, as in training, and counted.

    Raises:
        DataError: no row has an answer within the context.
    """
    import torch

    from instructft.data.collator import CompletionOnlyCollator

    collate = CompletionOnlyCollator(generator.pad_id)
    found = generator.encoder.encode(conversations, train_on)
    encoded = found.lists()  # of a template that rewrites history several a conversation
    over = {
        int(i) for i, row in zip(found.conversation, encoded, strict=True) if len(row["input_ids"]) > generator.context
    }
    rows = [{name: values[: generator.context] for name, values in row.items()} for row in encoded]
    order = [i for i, row in enumerate(rows) if any(label != IGNORE_INDEX for label in row["labels"][1:])]
    if not order:
        raise DataError(f"no row has an answer within the model's context of {generator.context} tokens")
    order.sort(key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    each = [(0.0, 0)] * len(conversations)
    start = 0
    with generator.evaluating(), Progress("scoring", len(order), shown=progress) as told:
        while start < len(order):
            size = batch_size or max(1, TOKENS_AT_ONCE // len(rows[order[start]]["input_ids"]))
            some = order[start : start + size]
            batch = {k: v.to(generator.model.device) for k, v in collate([rows[i] for i in some]).items()}
            labels = batch.pop("labels")[:, 1:]  # (B, T - 1): the token that position t predicts
            logits = generator.model(**batch, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
            mask = labels != IGNORE_INDEX
            losses = torch.zeros(labels.shape, dtype=torch.float64)
            picked = torch.nn.functional.cross_entropy(logits[mask].float(), labels[mask], reduction="none")
            losses[mask.cpu()] = picked.cpu().double()
            for i, nll, tokens in zip(some, losses.sum(1).tolist(), mask.sum(1).tolist(), strict=True):
                place = int(found.conversation[i])
                each[place] = (each[place][0] + nll, each[place][1] + tokens)
            start += size
            told.add(len(some))
    return Scored(sum(nll for nll, _ in each), sum(tokens for _, tokens in each), len(over), each)
