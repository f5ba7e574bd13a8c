"""What the proof of a merge shows to both models: rows that the recipe held out, else fixed texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructft.errors import InstructftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe

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


def choose_texts(
    recipe: Recipe | None, tokenizer: PreTrainedTokenizerBase | None, context: int, vocabulary: int
) -> Texts:
    """Rows that the recipe holds out, where it holds any out and its data is here; else fixed texts, or token ids.

    Args:
        tokenizer: that of the merged model; None when it has none.
        context: tokens that the model takes at most.
        vocabulary: rows of its embedding.
    """
    from instructft.prompt.loss_mask import encode_conversation, encoder

    limit = min(LENGTH, context)
    room = max(1, limit - ANSWER)
    if tokenizer is None:
        import torch

        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(vocabulary, (len(FIXED), min(32, room)), generator=draw).tolist()
        return Texts(rows, rows, "random token ids", [], 0, ANSWER)
    if not isinstance(tokenizer.chat_template, str):
        rows = prompts = [tokenizer(text)["input_ids"] for text in FIXED]
        source, stop = "fixed texts", tokenizer.eos_token_id
    else:
        stop = encoder(tokenizer).stop_token_id
        if conversations := _held_out(recipe):
            prompts = encoder(tokenizer).prompts([messages[:-1] for messages in conversations])
            rows = [encode_conversation(messages, tokenizer)["input_ids"] for messages in conversations]
            source = "the recipe's held-out rows"
        else:
            rows = prompts = encoder(tokenizer).prompts([[{"role": "user", "content": text}] for text in FIXED])
            source = "fixed texts"
    return Texts(
        rows=[ids[:limit] for ids in rows if ids],
        prompts=[ids[-room:] for ids in prompts if ids],
        source=source,
        stop_ids=[] if stop is None else [stop],
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop or 0,
        answer=ANSWER,
    )


def _held_out(recipe: Recipe | None) -> list[Any]:
    from instructft.data.load import conversations

    if recipe is None or any(entry.streaming for entry in recipe.data.datasets):
        return []
    for split in ("test", "validation"):
        if getattr(recipe.data.splits, split):
            try:
                return [row["messages"] for row in conversations(recipe, split, ROWS)]
            except (InstructftError, OSError, ValueError):  # the data has moved: another text proves as much
                return []
    return []
