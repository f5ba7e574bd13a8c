"""Rows of a JSONL file: read whatever wrote them, and what is none is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from instructft.errors import DataError, UsageError
from instructft.inference.jsonl import alone, read_rows
from tests.helpers.inference import (
    write,
)


def test_nothing_but_bad_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *["{"] * 13)
    with pytest.raises(DataError, match=r"no rows that can be asked\n  line 1, (.|\n)*\n  line 10, .*\n  and 3 more$"):
        read_rows(source)
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(write(source, "", " "))
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n' + b'{"prompt": "b", "x": ' + b"[" * 200_000)
    rows, bad = read_rows(source)
    assert len(rows) == 1
    assert str(bad[0]) == "line 2: not UTF-8 at byte 13"
    assert bad[1].line == 3


def test_windows_files_are_read(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes('\ufeff{"prompt": "a"}\r\n{"prompt": "é"}\r\n'.encode())
    assert [row.row["prompt"] for row in read_rows(source)[0]] == ["a", "é"]


def test_one_process_answers_into_a_file_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "new" / "answers.jsonl"
    code = "import sys, time\nfrom pathlib import Path\nfrom instructft.inference.jsonl import alone\n"
    code += "with alone(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(UsageError, match=rf"answers.jsonl: .* is under way there \(process {other.pid} "),
            alone(target),
        ):
            pass
    finally:
        other.kill()
        other.communicate()
    with alone(target):
        pass
    assert not list(target.parent.iterdir())
    with pytest.raises(DataError, match="cannot be written"), alone(Path("/proc/none/answers.jsonl")):
        pass


@pytest.mark.parametrize(
    ("number", "said"),
    [("9" * 6000, "not JSON: Exceeds the limit"), ("1e999", "1e999 is larger than any number"), ("-1e999", "larger")],
)
def test_numbers_that_nothing_can_write_back_are_set_aside_and_the_others_asked(
    tmp_path: Path, number: str, said: str
) -> None:
    source = write(tmp_path / "in.jsonl", '{"prompt": "a", "x": 1e3}', '{"prompt": "b", "x": ' + number + "}")
    rows, bad = read_rows(source)
    assert [row.row for row in rows] == [{"prompt": "a", "x": 1000.0}]
    assert said in str(bad[0])


def test_columns_say_where_the_question_stands(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", '{"q": "Hi", "a": "x"}', '{"prompt": "Ho"}', '{"z": "Hu"}')
    run = [{"instruction": "other"}, {"instruction": "q", "output": "a"}]  # as a run's recipe maps two data sets
    rows, bad = read_rows(source, columns=run)
    assert [row.messages[0]["content"] for row in rows] == ["Hi", "Ho"]
    assert rows[0].row == {"q": "Hi", "a": "x"}  # as it came
    assert [one.line for one in bad] == [3]
    rows, bad = read_rows(source, columns=[{"prompt": "z"}], strict=True)
    assert [row.messages[0]["content"] for row in rows] == ["Hu"]
    assert str(bad[0]) == "line 1: --columns: no column z; it has q, a"


def test_a_mapped_question_goes_by_the_names_of_its_format(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", '{"q": "Hi", "c": "there"}')
    for name in ("prompt", "instruction", "question", "query", "problem"):
        assert read_rows(source, columns=[{name: "q"}])[0][0].messages == [{"role": "user", "content": "Hi"}]
    found = read_rows(source, columns=[{"instruction": "q", "context": "c"}])[0][0].messages
    assert found == [{"role": "user", "content": "Hi", "context": "there"}]
