"""One row as a person can read it: tokens that carry loss in colour, the others dim, special tokens marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from instructft.encode import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS, NO_LOSS, SPECIAL = "bold green", "bright_black", "reverse"


def spans(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool, bool]]:
    """A row as runs of text: `(text, carries loss, is one special token)`.

    Neighbours of one kind are decoded together, since a character may be spread over several tokens.
    """
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    runs: list[tuple[list[int], bool, bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        kind = (label != IGNORE_INDEX, token in special)
        if runs and runs[-1][1:] == kind and not kind[1]:
            runs[-1][0].append(token)
        else:
            runs.append(([token], *kind))
    return [(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), *kind) for ids, *kind in runs]  # type: ignore[misc]


def coloured(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> Text:
    """The row for a terminal: what carries loss is bold green, the rest is dim."""
    text = Text()
    for piece, loss, special in spans(row, tokenizer):
        style = LOSS if loss else NO_LOSS
        text.append(piece, style=f"{style} {SPECIAL}" if special else style)
    return text
