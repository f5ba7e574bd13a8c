"""Values of Parquet and Arrow files as JSON has them."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from instructft.data.readers import rows
from instructft.errors import DataError

DAY = datetime.date(2024, 5, 1)
CASES = {
    "date": (pa.array([DAY]), "2024-05-01"),
    "time": (pa.array([datetime.datetime(2024, 5, 1, 10)], pa.timestamp("us")), "2024-05-01T10:00:00"),
    "time of day": (pa.array([datetime.time(10, 30)]), "10:30:00"),
    "decimal": (pa.array([decimal.Decimal("1.50")]), "1.50"),
    "bytes in UTF-8": (pa.array(["é".encode()]), "é"),
    "other bytes": (pa.array([b"\x89PNG"]), "<4 bytes that are no text>"),
    "dates in a list": (pa.array([[DAY, None]]), ["2024-05-01", None]),
    "dates in a struct": (pa.array([{"a": [DAY], "b": 1}]), {"a": ["2024-05-01"], "b": 1}),
    "map": (pa.array([[("a", DAY), ("b", None)]], pa.map_(pa.string(), pa.date32())), {"a": "2024-05-01", "b": None}),
    "categories": (pa.array(["x"]).dictionary_encode(), "x"),
    "half precision": (pa.array([0.5], pa.float16()), 0.5),
    "JSON": (pa.array(['{"a": [1, "2"]}'], pa.json_()), {"a": [1, "2"]}),
    "JSON null": (pa.array(["null"], pa.json_()), None),
    "JSON in a list": (pa.ListArray.from_arrays([0, 3], pa.array(['"a"', "1", None], pa.json_())), ["a", 1, None]),
    "null": (pa.array([None], pa.null()), None),
}


@pytest.mark.parametrize("case", CASES)
def test_values(tmp_path: Path, case: str) -> None:
    column, expected = CASES[case]
    table = pa.table({"x": column})
    if case not in ("half precision",):
        parquet.write_table(table, tmp_path / "t.parquet")
        assert list(rows(tmp_path / "t.parquet", ".parquet", "t.parquet")) == [{"x": expected}]
    for kind, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with new(tmp_path / f"{kind}.arrow", table.schema) as writer:
            writer.write_table(table)
        assert list(rows(tmp_path / f"{kind}.arrow", ".arrow", kind)) == [{"x": expected}], kind


def test_json_deep_in_the_types_of_datasets(tmp_path: Path) -> None:
    """The same where only the note of `datasets` says that a text is JSON, as other writers keep it."""
    from datasets import Dataset, Features, Json, List, Value

    content = [{"messages": [{"role": "user", "more": {"a": 1}}, {"role": "tool", "more": "text"}], "plain": '"q"'}]
    features = Features({"messages": List({"role": Value("string"), "more": Json()}), "plain": Value("string")})
    Dataset.from_list(content, features=features).to_parquet(tmp_path / "a.parquet")
    assert list(rows(tmp_path / "a.parquet", ".parquet", "a.parquet")) == content

    def bare(kind: pa.DataType) -> pa.DataType:
        if isinstance(kind, pa.BaseExtensionType):
            return pa.string()
        if pa.types.is_struct(kind):
            return pa.struct([(field.name, bare(field.type)) for field in kind])
        return pa.list_(bare(kind.value_type)) if pa.types.is_list(kind) else kind

    table = parquet.read_table(tmp_path / "a.parquet")
    schema = pa.schema([(f.name, bare(f.type)) for f in table.schema], metadata=table.schema.metadata)
    texts = [{"role": "user", "more": '{"a":1}'}, {"role": "tool", "more": '"text"'}]
    parquet.write_table(pa.table({"messages": [texts], "plain": ['"q"']}, schema=schema), tmp_path / "b.parquet")
    assert list(rows(tmp_path / "b.parquet", ".parquet", "b.parquet")) == content


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_by_the_ten_thousand_are_refused(tmp_path: Path, suffix: str) -> None:
    """A few bytes each, and each is looked at by name in every row."""
    table = pa.Table.from_arrays([pa.array(["1"])] * 10_001, names=[str(i) for i in range(10_001)])
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path, use_dictionary=False, write_statistics=False)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match="rows has 10,001 columns, expected at most 10,000"):
        next(iter(rows(path, suffix, "rows")))
