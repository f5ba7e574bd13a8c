"""Files of data sets on the Hub: found as `datasets` finds them, read as files are, and errors that help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.data.load import load_parts
from instructft.data.streaming import prepare_stream
from instructft.errors import DataError

ROW = '{"instruction": "%s", "output": "x"}\n'
README = (
    "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: de\n  data_files: de/*.jsonl\n---\n"
)


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    def load(**entry: Any) -> Any:
        sets = [f"data.datasets={json.dumps([entry])}", "data.splits={validation: 0, test: 0}"]
        return instructft.load_recipe(write_recipe(), sets)

    return load


def asked(recipe: Any) -> list[str]:
    """The instructions of a recipe's rows."""
    (part,) = load_parts(recipe)
    return [part.row(raw)["instruction"] for raw in part.raw]


def streamed(recipe: Any) -> list[str]:
    (stream,) = prepare_stream(recipe, instructft.load_tokenizer(recipe))._streams
    return [row["instruction"] for row in stream.read()]


def test_configurations_and_splits_are_named(recipe: Any, hub: Any) -> None:
    files = {
        "README.md": README,
        "en/train.jsonl": ROW % "en",
        "de/train.jsonl": ROW % "de",
        "de/test.jsonl": ROW % "t",
    }
    hub.put("tester/two", files, type="dataset")
    hub.put("tester/only-test", {"test.jsonl": ROW % "t"}, type="dataset")
    assert asked(recipe(hub="tester/two", config="en")) == streamed(
        recipe(hub="tester/two", config="en", streaming=True)
    )
    for streaming, read in ((False, asked), (True, streamed)):
        with pytest.raises(DataError) as caught:
            read(recipe(hub="tester/two", streaming=streaming))
        assert str(caught.value) == (
            "data.datasets[0].config: tester/two has several configurations; name one of en, de, e.g. config: en"
        )
        with pytest.raises(DataError, match=r"\.config: tester/two has no configuration 'fr'; name one of en, de"):
            read(recipe(hub="tester/two", config="fr", streaming=streaming))
        with pytest.raises(DataError) as caught:
            read(recipe(hub="tester/only-test", streaming=streaming))
        assert "tester/only-test has no split 'train'; it has test." in str(caught.value)
        assert "network" not in str(caught.value)


def test_a_data_set_is_read_again_offline_and_so_is_one_brought_by_hand(
    recipe: Any, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import constants, snapshot_download

    hub.put("tester/a", {"train.jsonl": ROW % "a", "test.jsonl": ROW % "t"}, type="dataset")
    hub.put("tester/b", {"README.md": README, "en/train.jsonl": ROW % "b", "de/train.jsonl": ROW % "c"}, type="dataset")
    assert asked(recipe(hub="tester/a")) == ["a"]
    snapshot_download("tester/b", repo_type="dataset")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert asked(recipe(hub="tester/a")) == ["a"]
    assert streamed(recipe(hub="tester/b", config="de", streaming=True)) == ["c"]
    assert len(hub.requests) == before
    with pytest.raises(DataError, match="Check the network and the spelling"):
        asked(recipe(hub="tester/none"))


def test_a_name_that_is_not_there_is_told_from_a_network_that_is_not(recipe: Any, hub: Any) -> None:
    with pytest.raises(DataError) as caught:
        asked(recipe(hub="tester/none"))
    assert "doesn't exist on the Hub or cannot be accessed" in str(caught.value)
    assert "hf auth login" in str(caught.value)
    hub.put("tester/notes", {"notes.txt": "a\nb\n"}, type="dataset")
    with pytest.raises(DataError) as caught:
        asked(recipe(hub="tester/notes"))
    assert "holds text files, not rows of text (notes.txt is a plain text file" in str(caught.value)
    assert "network" not in str(caught.value)


def test_files_of_different_kinds_and_shards_are_read_in_order(recipe: Any, hub: Any) -> None:
    files = {f"data/train-{i:05d}-of-00003.jsonl": ROW % i for i in range(3)}
    hub.put("tester/shards", files, type="dataset")
    assert asked(recipe(hub="tester/shards")) == ["0", "1", "2"]
    assert asked(recipe(hub="tester/shards", split="train[1:]")) == ["1", "2"]
    assert streamed(recipe(hub="tester/shards", streaming=True)) == ["0", "1", "2"]
    (part,) = load_parts(recipe(hub="tester/shards"))
    assert part.describe(2) == "data.datasets[0]: row 1 of tester/shards/data/train-00002-of-00003.jsonl"


def test_columns_that_differ_between_files_are_named(recipe: Any, hub: Any) -> None:
    hub.put("tester/differ", {"a.jsonl": ROW % "a", "b.jsonl": '{"colour": "red"}\n'}, type="dataset")
    with pytest.raises(DataError, match=r"tester/differ/b\.jsonl: no known format has the columns colour"):
        asked(recipe(hub="tester/differ"))


def test_an_old_commit_and_another_branch(recipe: Any, hub: Any) -> None:
    first = hub.put("tester/old", {"train.jsonl": ROW % "old"}, type="dataset")
    hub.put("tester/old", {"train.jsonl": ROW % "new"}, type="dataset")
    assert asked(recipe(hub="tester/old")) == ["new"]
    assert asked(recipe(hub="tester/old", revision=first)) == ["old"]
    assert streamed(recipe(hub="tester/old", revision=first, streaming=True)) == ["old"]
