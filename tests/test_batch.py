"""`instructft generate`: rows stay whole and in order, bad ones are named, a killed run is continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from instructft import batch
from instructft.batch import generate_file, read_rows
from instructft.errors import DataError, UsageError
from instructft.generate import Generator


@pytest.fixture
def folder(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> str:
    """A saved model that answers."""
    import torch

    with torch.no_grad():
        for weight in tiny_model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6)
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure."""

    def refuse(name: str) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(batch, "load_for_inference", refuse)


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


ROWS: list[dict[str, Any]] = [
    {"prompt": "Hi", "id": 7, "nested": {"a": [1, 2.5, None, True]}},
    {"instruction": "Add.", "input": "3 and 4"},
    {"instruction": "Who?", "context": "Ada wrote it.", "category": "qa"},
    {"prompt": "日本の首都は？ 🗼\u2028 next line\u0085"},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "prompt": 3},
    {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
    {"instruction": "Name a city. " * 4, "input": "", "output": "Paris"},
]  # fmt: skip
ASKED: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Add.", "input": "3 and 4"}],
    [{"role": "user", "content": "Who?", "context": "Ada wrote it."}],
    [{"role": "user", "content": ROWS[3]["prompt"]}],
    ROWS[4]["messages"],
    ROWS[5]["messages"],
    [{"role": "user", "content": ROWS[6]["instruction"]}],
]


@pytest.mark.parametrize("batch_size", ["auto", "1", "3"])
def test_rows_in_order_and_whole(batch_size: str, folder: str, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "new" / "folder" / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=8, batch_size=batch_size)
    made = read(target)
    assert [{k: v for k, v in row.items() if k not in ("response", "finish_reason")} for row in made] == ROWS
    assert [list(row)[-2:] for row in made] == [["response", "finish_reason"]] * len(ROWS)
    from instructft.generate import load_for_inference

    generator = Generator(*load_for_inference(folder))
    alone = [generator.answers([asked], max_new_tokens=8)[0] for asked in ASKED]
    assert [(row["response"], row["finish_reason"]) for row in made] == [(a.text, a.finish_reason) for a in alone]
    assert "日本" in target.read_text(encoding="utf-8")  # not \\u escapes


def test_chunks_keep_the_order(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "CHUNK", 2)
    rows = [{"prompt": "7" * (1 + i * 5 % 17), "i": i} for i in range(23)]
    generate_file(folder, write(tmp_path / "in.jsonl", *rows), tmp_path / "out", max_new_tokens=4, batch_size="2")
    assert [row["i"] for row in read(tmp_path / "out")] == list(range(23))


def test_what_came_in_is_never_written_over(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dolly's rows hold a `response`, and so does every output of this command."""
    rows = [
        {"instruction": "Hi", "context": "", "response": "Hello", "category": "x"},
        {"prompt": "Ho", "response": "a", "input_response": "b", "finish_reason": "stop"},
    ]
    source, target = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=4)
    first, second = read(target)
    assert list(first) == ["instruction", "context", "input_response", "category", "response", "finish_reason"]
    assert first["input_response"] == "Hello"
    assert (second["input_input_response"], second["input_response"]) == ("a", "b")
    assert second["input_finish_reason"] == "stop"
    assert "keep it as input_response" in capsys.readouterr().err
    before = target.read_bytes()
    generate_file("./none", source, target, max_new_tokens=4)  # and the second call knows its own rows
    assert target.read_bytes() == before


# ------------------------------------------------------------------------------------------------------------ bad input


BAD = [
    ("{'prompt': 1}", "column 2: not JSON"),
    ("[1]", "expected an object with messages, prompt or instruction"),
    ({"text": "x"}, "found no prompt"),
    ({"prompt": "  "}, "found no prompt"),
    ({"prompt": 3}, "found no prompt"),
    ({"messages": []}, "found no prompt"),
    ({"messages": "Hi"}, "found no prompt"),
    ({"messages": [{"role": "user"}]}, "a message needs a role and a content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool' is unknown"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "nothing to answer"),
    ({"instruction": "Add.", "input": [1]}, "input is not text"),
    ('{"prompt": "x", "score": NaN}', "NaN is no number"),
    ('{"prompt": "half \\ud83d"}', "half of a surrogate pair"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_line_is_named(row: Any, message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "fine"}, "", row, {"prompt": "fine"})
    with pytest.raises(DataError) as raised:
        generate_file("./none", source, tmp_path / "out.jsonl")
    text = str(raised.value)
    assert text.startswith(f"{source}: 1 bad line\n  line 3")
    assert message in text
    assert raised.value.exit_code == 2
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.usefixtures("no_model")
def test_many_bad_lines_and_none(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *["{"] * 13)
    with pytest.raises(DataError, match=r"13 bad lines\n  line 1, (.|\n)*\n  line 10, .*\n  and 3 more$"):
        read_rows(source)
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(write(source, "", " "))
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8 at byte 13"):
        read_rows(source)


def test_windows_files_are_read(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes('\ufeff{"prompt": "a"}\r\n{"prompt": "é"}\r\n'.encode())
    assert [row["prompt"] for _, row, _ in read_rows(source)] == ["a", "é"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": "0"}, "--batch-size: found 0, expected auto or a number"),
        ({"batch_size": "-3"}, "--batch-size: found -3"),
        ({"batch_size": "²"}, "--batch-size: found ²"),
        ({"batch_size": "all"}, "--batch-size: found all"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({"temperature": -1.0}, "temperature: found -1"),
        ({"top_p": 0.0}, "top_p: found 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        generate_file("./none", write(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl", **settings)


def test_prompts_that_fill_the_context_are_named_before_the_first_answer(folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi"}, "", {"prompt": "7" * 200}, {"prompt": "8" * 300}]
    with pytest.raises(DataError) as raised:
        generate_file(folder, write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl")
    assert "2 of 3 prompts cannot be answered\n  line 3: the prompt has 2" in str(raised.value)
    assert "line 4: the prompt has 3" in str(raised.value)
    assert not (tmp_path / "out.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------- continuing


@pytest.mark.usefixtures("no_model")
def test_complete_is_said_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", *ROWS)
    target = write(tmp_path / "out.jsonl", *[{**row, "response": "x", "finish_reason": "stop"} for row in ROWS])
    before = target.read_bytes()
    generate_file("./none", source, target)
    assert f"holds all {len(ROWS)} answers already" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "lines",
    [
        [{"prompt": "other", "response": "x", "finish_reason": "stop"}],
        [{**ROWS[1], "response": "x", "finish_reason": "stop"}],  # another order
        [ROWS[0]],  # no answer in it
        [{**ROWS[0], "response": "x", "finish_reason": "stop"}, "not JSON"],
        ["[1, 2]"],
        ["notes of mine"],
        [{**row, "response": "x", "finish_reason": "stop"} for row in [*ROWS, ROWS[0]]],  # more than came in
    ],
)
def test_an_output_of_other_rows_is_refused(lines: list[Any], tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", *ROWS), write(tmp_path / "out.jsonl", *lines)
    before = target.read_bytes()
    with pytest.raises(DataError, match=rf"--output: line {len(lines)} of .* made from other rows; name another file"):
        generate_file("./none", source, target)
    assert target.read_bytes() == before


@pytest.mark.usefixtures("no_model")
def test_a_file_of_somebody_else_without_a_line_break_is_not_cut(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "notes.txt"
    target.write_text("my notes")
    with pytest.raises(DataError, match="holds something else than answers"):
        generate_file("./none", source, target)
    assert target.read_text() == "my notes"
    with pytest.raises(DataError, match="is a folder"):
        generate_file("./none", source, tmp_path)


@pytest.mark.parametrize("cut", [3, 40, 400])
def test_a_half_written_line_is_made_anew(cut: int, folder: str, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=8, batch_size="2")
    whole = target.read_bytes()
    target.write_bytes(whole[:cut])
    generate_file(folder, source, target, max_new_tokens=8, batch_size="2")
    assert target.read_bytes() == whole


def test_killed_and_continued(folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """kill -9 in the middle; the same command completes the file, equal to one that was never interrupted."""
    rows = [{"prompt": f"{i} " + "7" * (i % 13), "i": i} for i in range(40)]
    source, target = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    command = [
        *(sys.executable, "-m", "instructft", "generate", folder, "--input", str(source), "--output", str(target)),
        *("--max-new-tokens", "24", "--batch-size", "1"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (target.exists() and target.read_bytes().count(b"\n") >= 8):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = target.read_bytes()
    assert 8 <= kept.count(b"\n") < len(rows)
    with target.open("ab") as file:  # as if it had died in the middle of a write
        file.write(b'{"prompt": "' + "é".encode()[:1])
    capfd.readouterr()
    generate_file(folder, source, target, max_new_tokens=24, batch_size="1")
    assert f"holds {kept.count(10)} of {len(rows)} answers already" in capfd.readouterr().err
    assert target.read_bytes().startswith(kept)
    uninterrupted = tmp_path / "once.jsonl"
    generate_file(folder, source, uninterrupted, max_new_tokens=24, batch_size="1")
    assert target.read_bytes() == uninterrupted.read_bytes()
    assert [row["i"] for row in read(target)] == list(range(40))
