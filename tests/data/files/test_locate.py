"""A name that exists is taken literally; folders, patterns and saved tables are files of rows, by split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instructft.data.files.locate import located
from instructft.data.load import file_conversations, load_parts
from instructft.errors import DataError
from tests.data.test_readers import write
from tests.helpers.rows import PAIRS, SHAPES

ROWS = SHAPES["alpaca"]


def names(location: object) -> dict[str, list[str]]:
    return {
        split: [file.path.name for file in files if file.path] for split, files in located(str(location), "k").items()
    }


def write_as(folder: Path, name: str, rows: Any = ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, "." + name.split(".", 1)[1], rows).rename(folder / name)


@pytest.mark.parametrize(
    "name", ["rows[1].parquet", "many*.parquet", "many?.parquet", "a{b,c}.csv", "~x.jsonl", "%20#.csv"]
)
def test_a_name_that_exists_is_no_pattern(recipe: Any, tmp_path: Path, name: str) -> None:
    path = write_as(tmp_path / "here", name)
    for other in ("rows1.parquet", "many1.parquet"):
        write_as(tmp_path / "here", other, [{"instruction": "wrong", "output": "file"}])
    (part,) = load_parts(recipe({"path": str(path)}))
    assert [part.row(raw) for raw in part.raw] == ROWS
    assert [row["messages"][-1]["content"] for row in file_conversations(str(path))] == [answer for _, answer in PAIRS]


def test_a_pattern_gives_all_files_that_fit_it_in_order(recipe: Any, tmp_path: Path) -> None:
    write_as(tmp_path / "deep" / "b", "many2.csv", ROWS[10:])
    write_as(tmp_path / "deep" / "a", "many1.jsonl", ROWS[:10])
    (part,) = load_parts(recipe({"path": str(tmp_path / "deep" / "**" / "many?.*")}))
    assert [part.row(raw) for raw in part.raw] == ROWS
    assert part.describe(12).endswith("row 3 of " + str(tmp_path / "deep" / "b" / "many2.csv"))
    with pytest.raises(DataError, match="none fits it as a pattern"):
        located(str(tmp_path / "deep" / "*.arrow"), "k")


def test_a_pattern_is_seen_from_the_recipe_too(recipe: Any, tmp_path: Path) -> None:
    write_as(tmp_path / "beside", "one.csv")
    assert len(load_parts(recipe({"path": "beside/*.csv"}))[0].raw) == len(ROWS)


def test_a_folder_by_splits(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.csv", "README.md", "dataset_info.json", ".hidden.csv", "notes.txt"):
        (tmp_path / name).write_text("{}")
    assert names(tmp_path) == {"test": ["test.csv"], "train": ["train.jsonl"]}
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "part-1.parquet").touch()
    (tmp_path / "latest.jsonl").touch()  # a word within a word says nothing
    assert names(tmp_path) == {
        "test": ["test.csv"],
        "train": ["latest.jsonl", "train.jsonl"],
        "validation": ["part-1.parquet"],
    }


def test_a_folder_called_like_a_pattern(recipe: Any, tmp_path: Path) -> None:
    write_as(tmp_path / "rows[1]", "a.csv")
    assert len(load_parts(recipe({"path": str(tmp_path / "rows[1]")}))[0].raw) == len(ROWS)


def test_a_folder_without_rows_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "sheet.xlsx").touch()
    with pytest.raises(
        DataError, match=r"k: the folder .* holds no file of rows; sheet\.xlsx is an Excel workbook; save"
    ):
        located(str(tmp_path), "k")


def test_files_of_different_columns_are_an_error(recipe: Any, tmp_path: Path) -> None:
    write_as(tmp_path / "both", "a.jsonl")
    write_as(tmp_path / "both", "b.jsonl", SHAPES["dolly"])
    with pytest.raises(
        DataError, match=r"differ in their columns: .*a\.jsonl is read as alpaca, .*b\.jsonl is read as dolly"
    ):
        load_parts(recipe({"path": str(tmp_path / "both")}))
    write_as(tmp_path / "both", "b.jsonl", [{"colour": "red"}])
    with pytest.raises(DataError, match=r"b\.jsonl: no known format has the columns colour"):
        load_parts(recipe({"path": str(tmp_path / "both")}))


def test_what_save_to_disk_wrote(recipe: Any, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    saved = Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    DatasetDict({"train": saved, "test": saved.select(range(4))}).save_to_disk(tmp_path / "dict")
    for folder, split, expected in (("one", None, ROWS), ("dict", None, ROWS), ("dict", "test", ROWS[:4])):
        (part,) = load_parts(recipe({"path": str(tmp_path / folder), **({"split": split} if split else {})}))
        assert [part.row(raw) for raw in part.raw] == expected
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    (tmp_path / "one" / state["_data_files"][0]["filename"]).unlink()
    with pytest.raises(DataError, match="is not there"):
        located(str(tmp_path / "one"), "k")


def test_a_part_of_a_file_by_its_split(recipe: Any, tmp_path: Path) -> None:
    path = str(write(tmp_path, ".jsonl", ROWS))

    def found(split: str) -> Any:
        return load_parts(recipe({"path": path, "split": split}))[0]

    tail = found("train[75%:]")
    assert [tail.row(raw) for raw in tail.raw] == ROWS[15:]
    assert tail.describe(0).endswith("row 16 of " + path)
    mixed = found("train[:2]+train[-1:]")
    assert [mixed.row(raw) for raw in mixed.raw] == [*ROWS[:2], ROWS[-1]]
    with pytest.raises(DataError, match=r"\.split: .* has no split 'test'; it has train\. Name one of them"):
        found("test")
    with pytest.raises(DataError, match=r"\.split: found train\[x\], expected a split or a part"):
        found("train[x]")


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match=r"there is no file .*rows\.json; did you mean rows\.jsonl\?"):
        located(str(tmp_path / "rows.json"), "k")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="is a plain text file, and nothing in it says where a row ends"):
        located(str(tmp_path / "notes.txt"), "k")


def test_evaluate_reads_a_folders_test_split(tmp_path: Path) -> None:
    write_as(tmp_path, "train.jsonl")
    write_as(tmp_path, "test.jsonl", ROWS[:3])
    assert len(file_conversations(str(tmp_path))) == 3


def test_columns_of_a_recipe_go_with_a_file_that_has_them(tmp_path: Path) -> None:
    path = str(write(tmp_path, ".csv", [{"question": q, "reply": a, "output": "wrong"} for q, a in PAIRS]))
    shape = ("alpaca", {"instruction": "question", "output": "reply"})
    elsewhere = ("alpaca", {"instruction": "ask", "output": "say"})
    found = file_conversations(path, shapes=[elsewhere, shape])
    assert [row["messages"][-1]["content"] for row in found] == [answer for _, answer in PAIRS]
    with pytest.raises(DataError, match=r"column `reply` .*nothing reads it"):
        file_conversations(path, shapes=[elsewhere])
