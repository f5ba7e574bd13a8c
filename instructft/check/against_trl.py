"""The first rows of an imported recipe beside what `trl.SFTTrainer` makes of them: ids and labels, token by token.

TRL's side is its own: its tokenizer, its trainer's preparation of the data set, of the values in its own file. A model
of one tiny layer stands in for the weights, which have no part in it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError
from instructft.formatting import first_line, short
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe

ROWS = 200
# Arguments of TRL's that shape rows; packing lays them out and leaves each as it is.
_SHAPING = (
    *("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "dataset_text_field"),
    *("chat_template_path", "eos_token", "pad_token"),
)
Row = tuple[list[int], list[int]]  # ids, labels


def compare(recipe: Recipe, values: Mapping[str, Any], count: int = ROWS) -> tuple[bool, list[str]]:
    """Whether the first rows are equal, and the account of it.

    Args:
        recipe: as it was imported, with rows and a tokenizer that are at hand.
        values: what TRL's file says.

    Raises:
        UsageError: TRL refuses its own rows.
    """
    from instructft.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe)
    raw, ours = _ours(recipe, tokenizer, count)
    theirs = _theirs(recipe, values, raw)
    count = sum(len(ids) for ids, _ in ours.values())
    pairs = [(ours.get(number), theirs.get(number)) for number in range(len(raw))]
    behind = [_behind(*pair) for pair in pairs]
    wrong = [number for number, tokens in enumerate(behind) if tokens is None]
    if wrong:
        said = f"{len(wrong)} of the first {len(raw)} rows are not those of trl.SFTTrainer. The first of them, "
        return False, [f"{said}{wrong[0] + 1}:", *_difference(*pairs[wrong[0]], tokenizer)]
    left_out = len(raw) - len(ours)
    more = f", {left_out} of them left out by both" if left_out else ""
    lines = [f"ids and labels of the first {len(raw)} rows are those of trl.SFTTrainer{more} ({count:,} tokens)"]
    if found := Counter(tuple(tokens) for tokens in behind if tokens):
        shown = short(repr(tokenizer.decode(list(found.most_common(1)[0][0]))), 30)
        lines.append(
            f"  but for what follows the token that ends an answer, {shown} in {found.total()} rows: TRL trains it, "
            "and no answer has it, since generation stops before"
        )
    return True, lines


def _ours(recipe: Recipe, tokenizer: Any, count: int) -> tuple[list[dict[str, Any]], dict[int, Row]]:
    """The raw rows, and of each that is trained its ids and labels."""
    import json

    from instructft.data.arrow.encoded import encode_part, verdicts
    from instructft.data.load import load_parts
    from instructft.data.readers import ROW

    part = load_parts(recipe)[0]
    some = part.raw.select(range(min(count, len(part.raw))))
    encoded = encode_part(dataclasses.replace(part, raw=some, rows={}, drawn=None), recipe, tokenizer)
    raw = [json.loads(row[ROW]) if ROW in row else dict(row) for row in some]
    verdict, _ = verdicts(encoded)
    length = recipe.data.max_length
    found = {}
    for number, row in enumerate(encoded):
        if not verdict[number]:
            found[number] = (list(row["input_ids"][:length]), list(row["labels"][:length]))
    return raw, found


def _theirs(recipe: Recipe, values: Mapping[str, Any], raw: list[dict[str, Any]]) -> dict[int, Row]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(str(values["model_name_or_path"]), trust_remote_code=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        try:
            shaping = {key: values[key] for key in _SHAPING if values.get(key) is not None}
            args = SFTConfig(output_dir=folder, report_to=[], use_cpu=True, bf16=False, **shaping)
            rows = Dataset.from_list([{**row, "instructft_row": n} for n, row in enumerate(raw)])
            trainer = SFTTrainer(LlamaForCausalLM(config), args, train_dataset=rows, processing_class=tokenizer)
        except Exception as error:  # what it says is its own
            raise UsageError(f"TRL does not read these rows: {first_line(error)}") from error
    prepared: Any = trainer.train_dataset
    return {row["instructft_row"]: (list(row["input_ids"]), list(row["labels"])) for row in prepared}


def _behind(ours: Row | None, theirs: Row | None) -> list[int] | None:
    """Tokens behind the end of the last answer that carry loss in TRL's row alone; None: the rows differ otherwise.

    A row's first token is predicted by nothing, so its label says nothing.
    """
    if ours is None or theirs is None:
        return [] if ours is theirs else None
    last = max((i for i, label in enumerate(ours[1]) if label != IGNORE_INDEX), default=0) + 1
    if ours[0] != theirs[0] or ours[1][1:last] != theirs[1][1:last]:
        return None
    return [label for label in theirs[1][last:] if label != IGNORE_INDEX]


def _difference(ours: Row | None, theirs: Row | None, tokenizer: Any) -> list[str]:
    if ours is None or theirs is None:
        return [f"  {'this recipe' if ours is None else 'TRL'} leaves it out"]
    places = [
        (what, next((i for i in range(part, max(map(len, both))) if both[0][i : i + 1] != both[1][i : i + 1]), -1))
        for part, what, both in ((0, "the token", (ours[0], theirs[0])), (1, "the label", (ours[1], theirs[1])))
    ]
    what, at = next(place for place in places if place[1] >= 0)
    before = short(tokenizer.decode(ours[0][max(0, at - 12) : at]), 60)
    shown = []
    for whose, row in (("here", ours), ("TRL", theirs)):
        ids = row[0][at : at + 1]
        loss = "no loss" if row[1][at : at + 1] == [IGNORE_INDEX] else "loss"
        shown.append(
            f"  {whose:5} {short(repr(tokenizer.decode(ids)), 40) + f' ({ids[0]}), {loss}' if ids else 'the row ends'}"
        )
    return [f"  {what} at place {at}, after …{before}", *shown]
