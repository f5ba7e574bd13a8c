"""Real steps in a process of its own: of the longest rows, and of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import instructft
from instructft.check.measure import in_words
from instructft.check.real_step import STEPS, _longest
from instructft.check.report import check
from instructft.data.prepare import prepare
from instructft.recipe.load import load_recipe


def test_every_batch_is_that_of_the_longest_rows(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(), ["train.gradient_accumulation_steps=2"])
    data = prepare(recipe, instructft.load_tokenizer(recipe))
    lengths = sorted((len(row["input_ids"]) for row in data.splits["train"]), reverse=True)
    chosen, tokens = _longest(recipe, data)
    assert list(chosen.splits) == ["train"]
    assert [len(row["input_ids"]) for row in chosen.for_training] == lengths[:4] * 2 * STEPS
    assert tokens == sum(lengths[:4]) * 2
    more = load_recipe(write_recipe(), ["train.per_device_train_batch_size=500"])
    assert len(_longest(more, data)[0].for_training) == 500 * STEPS  # rows come again where there are fewer


def test_real_steps_put_the_estimate_right(write_recipe: Callable[..., Path], tmp_path: Path, forked: None) -> None:
    recipe = load_recipe(write_recipe(), ["check.max_memory_gib=0.001"])
    said: list[str] = []
    report = check(recipe, measured=said.append)
    (one,) = report["measured"]["tries"]  # a step of one batch has no other division
    assert said == [in_words(one)]
    assert one["fits"]
    assert one["memory"] > 100 << 20
    assert report["estimate"]["time"]["source"] == "measured"
    assert report["estimate"]["time"]["tokens_per_second"] == one["tokens_per_second"] > 0
    (limit,) = [limit for limit in report["limits"] if limit["key"] == "check.max_memory_gib"]
    assert limit["found"] == one["memory"] / (1 << 30)
    assert not limit["kept"]
    assert not (tmp_path / "run").exists()
