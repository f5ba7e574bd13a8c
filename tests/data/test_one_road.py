"""One road to the rows: the same odd rows give the same values from every kind of file, here, on the Hub, streamed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.data.load import file_conversations, load_parts
from instructft.data.streaming import prepare_stream
from instructft.errors import DataError
from tests.data.test_readers import write

Rows = list[dict[str, Any]]

# What a library that guesses changes: text that looks like something else.
TEXTS: Rows = [
    {"instruction": f"{number}. What is it?", "output": text}
    for number, text in enumerate(
        [
            *("NA", "N/A", "nan", "NaN", "None", "null", "NULL", "-", "true", "False", "yes", "inf", "-Infinity"),
            *("42", "007", "1e5", "1.50", "+1", "0x10", "1,000", "1_000", "99999999999999999999999", "-0"),
            *("2024-05-01", "2024-05-01T10:00:00Z", "10:30", "01/02/2024"),
            *(
                ' "quoted" ',
                "a\tb;c|d,e",
                "two\nlines",
                "win\r\ndows\r\n",
                "  indented\n    code",
                "é🙂\u2028日本\u200b",
            ),
            *('{"a": 1}', "[1, 2]", '"text"', "\\n\\u00e9", "=SUM(A1)", "'", "x" * 200_000),
        ]
    )
]
# What only files with types can say.
TYPED: Rows = [
    {"instruction": "How many?", "output": 20},
    {"instruction": "How much?", "output": 0.1},
    {"instruction": "Is it?", "output": True},
    {"instruction": "Which?", "output": ["a", "b", {"c": [1, None]}]},
    {"instruction": "What?", "output": {"a": "1", "b": 2}},
    {"instruction": "Nothing?", "output": None},
    {"instruction": "No text?", "output": ""},
    {"instruction": "A large one?", "output": 2**62},
]
ALL: Rows = [*TEXTS, *TYPED]
assert len(ALL) > 40


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    def load(entry: dict[str, Any]) -> Any:
        sets = [f"data.datasets={json.dumps([entry])}", "data.splits={validation: 0, test: 0}"]
        return instructft.load_recipe(write_recipe(), sets)

    return load


def rows_of(recipe: Any) -> Rows:
    """The rows of a recipe's data set, read whole."""
    (part,) = load_parts(recipe)
    return [part.row(raw) for raw in part.raw]


def streamed(recipe: Any) -> Rows:
    """The rows of a recipe's data set as a stream reads them."""
    (stream,) = prepare_stream(recipe, instructft.load_tokenizer(recipe))._streams
    return [stream.part.row(raw) for raw in stream.read()]


def parquet(path: Path, rows: Rows) -> Path:
    """A Parquet file whose second column holds JSON, as Arrow and `datasets` keep texts beside numbers and objects."""
    import pyarrow as pa
    from pyarrow import parquet

    texts = [json.dumps(row["output"]) for row in rows]
    columns = {"instruction": [row["instruction"] for row in rows], "output": pa.array(texts, pa.json_())}
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson.zst", ".jsonl.gz"])
def test_json_here_and_as_a_stream(recipe: Any, tmp_path: Path, suffix: str) -> None:
    entry = {"path": str(write(tmp_path, suffix, ALL))}
    assert repr(rows_of(recipe(entry))) == repr(ALL)
    if suffix != ".json":  # one list has no lines to stream
        assert repr(streamed(recipe({**entry, "streaming": True}))) == repr(ALL)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.xz", ".parquet", ".arrow"])
def test_texts_in_tables(recipe: Any, tmp_path: Path, suffix: str) -> None:
    entry = {"path": str(write(tmp_path, suffix, TEXTS))}
    assert rows_of(recipe(entry)) == TEXTS
    assert streamed(recipe({**entry, "streaming": True})) == TEXTS


def test_values_in_parquet(recipe: Any, tmp_path: Path) -> None:
    entry = {"path": str(parquet(tmp_path / "rows[1].parquet", ALL))}
    assert repr(rows_of(recipe(entry))) == repr(ALL)
    assert repr(streamed(recipe({**entry, "streaming": True}))) == repr(ALL)


def test_the_hub(recipe: Any, tmp_path: Path, hub: Any) -> None:
    hub.put("tester/json", {"train.jsonl": write(tmp_path, ".jsonl", ALL)}, type="dataset")
    hub.put("tester/csv", {"data/train.csv": write(tmp_path, ".csv", TEXTS)}, type="dataset")
    hub.put("tester/parquet", {"train-00000-of-00001.parquet": parquet(tmp_path / "p.parquet", ALL)}, type="dataset")
    for name, rows in (("json", ALL), ("csv", TEXTS), ("parquet", ALL)):
        for read, streaming in ((rows_of, False), (streamed, True)):
            assert repr(read(recipe({"hub": f"tester/{name}", "streaming": streaming}))) == repr(rows), (
                name,
                streaming,
            )


def test_evaluate_data(recipe: Any, tmp_path: Path) -> None:
    """A file as `--data` gives the conversations of the same file in a recipe."""
    from instructft.data.load import conversations

    for suffix in (".jsonl", ".csv", ".parquet"):
        path = str(write(tmp_path, suffix, TEXTS))
        of_recipe = conversations(recipe({"path": path}), "train")
        assert file_conversations(path) == of_recipe
        assert len(of_recipe) == len(TEXTS)


def test_five_roads_lead_to_the_same_conversations(recipe: Any, tmp_path: Path, hub: Any) -> None:
    """A file, the Hub, Parquet, a stream and `evaluate --data`, of all rows; right is what one writes by hand."""
    from instructft.data.load import conversations

    right = {
        *(row["output"] for row in TEXTS),
        *("20", "0.1", "true", '["a","b",{"c":[1,null]}]', '{"a":"1","b":2}', str(2**62)),
    }
    file, table = str(write(tmp_path, ".jsonl", ALL)), str(parquet(tmp_path / "all.parquet", ALL))
    hub.put("tester/all", {"train.jsonl": Path(file)}, type="dataset")
    (stream,) = prepare_stream(
        recipe({"path": file, "streaming": True}), instructft.load_tokenizer(recipe({"path": file}))
    )._streams
    streamed_rows = [stream.part.conversation(raw) for raw in stream.read() if raw["output"]]
    roads = {
        "file": conversations(recipe({"path": file}), "train"),
        "Hub": conversations(recipe({"hub": "tester/all"}), "train"),
        "Parquet": conversations(recipe({"path": table}), "train"),
        "stream": [{"messages": messages} for messages in streamed_rows],
        "evaluate": file_conversations(file),
        "evaluate on Parquet": file_conversations(table),
    }
    for road, rows in roads.items():
        answers = [row["messages"][-1]["content"] for row in rows]
        assert len(answers) == len(ALL) - 2, road  # null and "" are no answers
        assert set(answers) == right, road
        assert [row["messages"] for row in rows] == [row["messages"] for row in roads["file"]], road


def test_nan_is_read_alike_everywhere(recipe: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "score": math.nan}, {"instruction": "c", "output": "d", "score": 0.5}]
    found = []
    for suffix in (".jsonl", ".parquet", ".arrow"):
        entry = {"path": str(write(tmp_path, suffix, rows))}
        found += [repr(rows_of(recipe(entry))), repr(streamed(recipe({**entry, "streaming": True})))]
    assert set(found) == {repr(rows)}


def test_evaluate_on_the_training_file_of_a_recipe_with_columns(recipe: Any, tmp_path: Path) -> None:
    """`evaluate --data` reads it as the recipe does, also where its own columns would tell another format."""
    from instructft.data.load import conversations
    from instructft.evaluation.compare import rows_of as evaluated

    rows = [{"question": row["instruction"], "reply": row["output"], "output": "not this"} for row in TEXTS]
    for suffix in (".jsonl", ".csv", ".parquet"):
        path = str(write(tmp_path, suffix, rows))
        mapped = recipe({"path": path, "columns": {"instruction": "question", "output": "reply"}})
        found, _, _ = evaluated(mapped, path, None, None)
        assert [row["messages"] for row in found] == [row["messages"] for row in conversations(mapped, "train")]
        assert [row["messages"][-1]["content"] for row in found] == [row["output"] for row in TEXTS]


def test_columns_that_are_asked_for_win_over_those_of_the_recipe(recipe: Any, tmp_path: Path) -> None:
    from instructft.errors import UsageError
    from instructft.evaluation.compare import rows_of as evaluated

    path = str(write(tmp_path, ".jsonl", [{"q": "What?", "a": "This."}]))
    other = recipe({"path": str(write(tmp_path, ".csv", TEXTS)), "columns": {"instruction": "output"}})
    found, _, _ = evaluated(other, path, None, None, {"instruction": "q", "output": "a"})
    assert [m["content"] for m in found[0]["messages"]] == ["What?", "This."]
    with pytest.raises(DataError, match=r"--data.columns: .* has no column for instruction: question"):
        evaluated(other, path, None, None, {"instruction": "question", "output": "a"})
    with pytest.raises(UsageError, match="--columns goes with --data FILE"):
        evaluated(other, None, None, None, {"instruction": "q"})


def test_messages_of_trees_are_the_trees_on_every_road(recipe: Any, tmp_path: Path, hub: Any) -> None:
    """OpenAssistant's flat files: one message a row, which names its parent; from each the reply of the best rank."""

    def message(name: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
        tree = {"message_tree_id": name[0], "message_id": name, "parent_id": parent, "role": role, "text": text}
        return {**tree, "lang": "en", "deleted": False, "review_result": True, **more}

    flat = [
        message("a", None, "prompter", "What floats?"),
        message("a1", "a", "assistant", "Iron.", rank=1.0),
        message("a2", "a", "assistant", "Wood.", rank=0.0),
        message("a4", "a3", "assistant", "It sinks.", rank=None),  # before what it answers
        message("a3", "a2", "prompter", "And iron?", rank=None),
        message("a5", "a", "assistant", "(gone)", rank=-1.0, deleted=True),
        message("b", None, "prompter", "Hi"),
        message("b1", "b", "assistant", "(spam)", rank=0.0, review_result=False),
        message("b2", "b", "assistant", "Hello.", rank=1.0),
    ]
    said = [["What floats?", "Wood.", "And iron?", "It sinks."], ["Hi", "Hello."]]
    table = [{**row, "rank": str(row.get("rank", "") or ""), "deleted": str(row["deleted"])} for row in flat]
    texts = [{k: str(v if v is not None else "") for k, v in row.items()} for row in table]
    texts[2]["rank"] = "0.0"
    hub.put("tester/flat", {"train.jsonl": write(tmp_path, ".jsonl", flat)}, type="dataset")
    files = [{"path": str(write(tmp_path, suffix, flat))} for suffix in (".jsonl", ".json", ".jsonl.gz")]
    for entry in [*files, {"path": str(write(tmp_path, ".csv", texts))}, {"hub": "tester/flat"}]:
        (part,) = load_parts(recipe(entry))
        assert part.format == "tree"
        assert [[m["content"] for m in part.conversation(raw)] for raw in part.raw] == said, entry
        if Path(str(entry.get("path"))).suffix != ".json":  # one list has no lines to stream
            found = streamed(recipe({**entry, "streaming": True}))
            assert [tree["message_tree_id"] for tree in found] == ["a", "b"]
    path = str(write(tmp_path, ".jsonl", flat))
    assert [[m["content"] for m in one["messages"]] for one in file_conversations(path)] == said
    with pytest.raises(
        DataError, match=r"row 4 answers message \"a2\", which does not stand among the rows of its tree"
    ):
        load_parts(recipe({"path": str(write(tmp_path, ".jsonl", [*flat[:2], flat[6], flat[4]]))}))
