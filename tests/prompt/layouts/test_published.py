"""Rows in the layouts of published data sets: ids and mask are what one writes by hand, and no field goes unread."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.data.load import Part, rules_of, shape
from instructft.data.tokenize import Batches
from tests.helpers.layouts import LAYOUTS, Layout, written

IGNORED = ["ground_truth_solution", "test_cases"]  # of OpenThoughts' metadata, another answer and its tests


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], tuple[list[int], list[int]]]:
    """What training is given for a layout: ids and labels."""
    recipe = tmp_path_factory.mktemp("published") / "published.yaml"
    recipe.write_text(
        "model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16}, tokenizer: quickstart}\n"
        "data: {datasets: [{name: quickstart}], template: chatml, max_length: 4096, "
        f"ignore: {json.dumps(IGNORED)}}}\n",
        encoding="utf-8",
    )
    loaded = instructft.load_recipe(recipe)
    tokenizer = instructft.load_tokenizer(loaded)

    def encode(layout: Layout) -> tuple[list[int], list[int]]:
        columns = layout.entry.get("columns", {})
        fmt, columns = shape((None, columns), list(layout.row), "row", "data.datasets[0]")
        part = Part("row", None, fmt, columns, {}, "data.datasets[0]", rules=rules_of(loaded, columns))
        ids, labels, _, _, _, verdicts, notes = Batches(part, loaded.data, tokenizer).encode([layout.row], [0])
        assert verdicts == [""], notes
        return ids.tolist(), labels.tolist()

    encode.tokenizer = tokenizer
    return encode


def by_hand(layout: Layout, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of the text as one writes it, by the place of each token in it."""
    pieces = written(layout.turns, layout.tools)
    carries = [loss for text, loss in pieces for _ in text]
    found = tokenizer("".join(text for text, _ in pieces), return_offsets_mapping=True)
    ids = found["input_ids"]
    labels = [i if carries[begin] else -100 for i, (begin, _) in zip(ids, found["offset_mapping"], strict=True)]
    return ids, labels


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_and_mask(encode: Any, name: str) -> None:
    ids, labels = by_hand(LAYOUTS[name], encode.tokenizer)
    found = encode(LAYOUTS[name])
    assert encode.tokenizer.decode(found[0]) == encode.tokenizer.decode(ids)
    assert found == (ids, labels)


def test_the_table_in_the_docs_names_what_is_tried_here() -> None:
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("## Published data sets")[2].partition("\n## ")[0]
    named = re.findall(r"`([^`]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert named, "no table"
    assert set(named) == {name.partition(",")[0] for name in LAYOUTS}
