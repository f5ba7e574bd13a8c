"""`instructft generate`: rows stay whole and in order, bad ones are named, a killed run is continued."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import DataError, UsageError
from instructft.inference import generate_file as module
from instructft.inference.generate_file import generate_file
from instructft.inference.generator import Generator
from tests.helpers.inference import (
    ASKED,
    ROWS,
    read,
    write,
)
from tests.helpers.processes import python


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure."""

    def refuse(name: str) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(module, "load_for_inference", refuse)
    monkeypatch.setattr(module, "_identity", lambda name: {"weights": name})


def refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(module, "load_for_inference", refuse)


@pytest.mark.parametrize("batch_size", ["auto", "1", "3"])
def test_rows_in_order_and_whole(batch_size: str, folder: str, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "new" / "folder" / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=8, batch_size=batch_size)
    made = read(target)
    assert [{k: v for k, v in row.items() if k not in ("response", "finish_reason")} for row in made] == ROWS
    assert [list(row)[-2:] for row in made] == [["response", "finish_reason"]] * len(ROWS)
    from instructft.models.load_for_inference import load_for_inference

    generator = Generator(*load_for_inference(folder))
    alone = [generator.answers([asked], max_new_tokens=8)[0] for asked in ASKED]
    assert [(row["response"], row["finish_reason"]) for row in made] == [(a.text, a.finish_reason) for a in alone]
    assert "日本" in target.read_text(encoding="utf-8")  # not \\u escapes


def test_chunks_keep_the_order(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 4)
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
    generate_file(folder, source, target, max_new_tokens=4)  # and the second call knows its own rows
    assert target.read_bytes() == before


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


def rejected(target: Path) -> list[dict[str, Any]]:
    return read(target.with_name(target.name + ".rejected.jsonl"))


def test_bad_lines_are_named_and_set_aside(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for row, _ in BAD for line in ({"prompt": f"fine {len(str(row))}"}, "", row)]
    source, target = write(tmp_path / "in.jsonl", *lines, {"prompt": "7" * 200}), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=2)
    made = read(target)
    assert [{"prompt": row["prompt"]} for row in made] == lines[::3]
    aside = rejected(target)
    assert [row["line"] for row in aside] == [*range(3, 3 * len(BAD) + 1, 3), 3 * len(BAD) + 1]
    for row, (bad, message) in zip(aside, BAD, strict=False):
        assert message in row["reason"] or message in f"column 2: {row['reason']}"
        assert row["text"] == (bad if isinstance(bad, str) else json.dumps(bad, ensure_ascii=False))
    assert aside[-1]["reason"].startswith("the prompt has 2")
    err = capsys.readouterr().err
    assert f"{source}: 14 lines are set aside in {target}.rejected.jsonl\n  line 3" in err
    assert err.count("\n  line ") == 10
    assert "and 4 more" in err
    before = target.read_bytes()
    generate_file(folder, source, target, max_new_tokens=2)
    assert "holds all 13 answers already" in capsys.readouterr().err
    assert (target.read_bytes(), rejected(target)) == (before, aside)


def test_a_mended_input_goes_on(folder: str, tmp_path: Path) -> None:
    """Lines that were set aside and come again, mended, behind the others."""
    rows: list[Any] = [{"prompt": "a"}, "{", {"prompt": "7" * 200}, {"prompt": "b"}]
    source, target = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=2)
    assert [row["line"] for row in rejected(target)] == [2, 3]
    write(source, *rows, {"prompt": "c"})
    generate_file(folder, source, target, max_new_tokens=2)
    assert [row["prompt"] for row in read(target)] == ["a", "b", "c"]


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


def test_no_prompt_that_fits(folder: str, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", {"prompt": "7" * 200}), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="none of its prompts can be answered"):
        generate_file(folder, source, target)
    assert not target.exists()


def test_complete_is_said_without_a_model(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=3)
    before = target.read_bytes()
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.meta.json"]
    refuse_models(monkeypatch)
    generate_file(folder, source, target, max_new_tokens=3)
    assert f"holds all {len(ROWS)} answers already" in capsys.readouterr().err
    assert target.read_bytes() == before


def test_another_model_or_setting_does_not_go_on_with_a_file(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    source, target = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=3)
    lines = target.read_bytes().split(b"\n")
    target.write_bytes(b"\n".join(lines[:3]) + b"\n")
    before = target.read_bytes()
    moved = shutil.copytree(folder, tmp_path / "moved")
    generate_file(str(moved), source, tmp_path / "other.jsonl", max_new_tokens=3)
    refuse_models(monkeypatch)
    for settings, key in (
        ({"max_new_tokens": 4}, "max_new_tokens: found 3, and now 4"),
        ({"temperature": 0.5}, "temperature: found 0.0, and now 0.5"),
        ({"top_p": 0.5}, "top_p: found 1.0, and now 0.5"),
        ({"backend": "vllm"}, 'backend: found "transformers", and now "vllm"'),
        ({"base": str(moved)}, "base"),
    ):
        with pytest.raises(UsageError, match=f"begun with another {key}|row 1 of the input") as raised:
            generate_file(folder, source, target, **{"max_new_tokens": 3, **settings})  # type: ignore[arg-type]
        assert raised.value.exit_code == 2
        assert "name another file" in str(raised.value)
    (moved / "chat_template.jinja").write_text("{{ messages[-1].content }}{{ eos_token }}")
    with pytest.raises(UsageError, match="begun with another model"):
        generate_file(str(moved), source, target, max_new_tokens=3)
    (tmp_path / "out.jsonl.meta.json").unlink()
    with pytest.raises(UsageError, match=r"there is no .*out.jsonl.meta.json to say which model"):
        generate_file(folder, source, target, max_new_tokens=3)
    (tmp_path / "out.jsonl.meta.json").write_text("{")
    with pytest.raises(UsageError, match="is not readable as JSON"):
        generate_file(folder, source, target, max_new_tokens=3)
    assert target.read_bytes() == before


def test_the_same_model_elsewhere_goes_on(folder: str, tmp_path: Path) -> None:
    import shutil

    source, target = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=3)
    whole = target.read_bytes()
    target.write_bytes(whole[: whole.index(b"\n") + 1])
    moved = shutil.copytree(folder, tmp_path / "moved")
    generate_file(str(moved), source, target, max_new_tokens=3)
    assert target.read_bytes() == whole


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


def test_killed_many_times_and_continued(folder: str, tmp_path: Path) -> None:
    """kill -9 at random, again and again: what was made is kept, no line is lost or there twice."""
    rows = [{"prompt": f"{i} " + "7" * (i * 7 % 13), "i": i} for i in range(60)]
    source, target = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    # One process imports what is needed and forks before it computes anything: a kill costs no import.
    script = (
        "import json, os, random, signal, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from instructft.inference import generate_file, jsonl\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel\n"
        "model, source, target = sys.argv[1:]\n"
        "put, draw = jsonl.Output.put, random.Random(5)\n"
        "def counted(self, i, columns):\n"
        "    global left\n"
        "    put(self, i, columns)\n"
        "    left -= 1\n"
        "    if left == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "jsonl.Output.put = counted\n"
        "for n in range(30):\n"
        "    left = drawn = draw.randint(5, 20)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        generate_file.generate_file(model, Path(source), Path(target), max_new_tokens=12, batch_size='8')\n"
        "        os._exit(0)\n"
        "    status = os.waitpid(child, 0)[1]\n"
        "    texts = [p.read_text() if p.exists() else '' for p in (Path(target), Path(target + '.ahead.jsonl'))]\n"
        "    print(json.dumps([drawn, os.waitstatus_to_exitcode(status), *texts]), flush=True)\n"
        "    if status == 0:\n"
        "        break\n"
        "    for name in (target, target + '.ahead.jsonl'):\n"  # as if it had died in the middle of a write
        "        if Path(name).stat().st_size:\n"
        "            with open(name, 'ab') as file:\n"
        '                file.write(b\'{"prompt": "\')\n'
    )
    (tmp_path / "script.py").write_text(script)
    done = python([str(tmp_path / "script.py"), folder, str(source), str(target)], tmp_path)
    assert done.returncode == 0, done.stderr
    *killed, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last[1] == 0
    assert len(killed) >= 3
    kept = 0
    for left, code, text, ahead in killed:
        assert code == -signal.SIGKILL
        made = [json.loads(line)["i"] for line in text.splitlines()]
        assert made == list(range(len(made)))
        waiting = {json.loads(line)["line"] for line in ahead.splitlines()} - {i + 1 for i in made}
        kept += left
        assert len(made) + len(waiting) == kept  # every answer is kept as it comes
    assert not (tmp_path / "out.jsonl.ahead.jsonl").exists()
    once = tmp_path / "once.jsonl"
    generate_file(folder, source, once, max_new_tokens=12, batch_size="8")
    assert [row["i"] for row in read(target)] == list(range(60))
    assert target.read_bytes() == once.read_bytes()


def test_base_beside(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from instructft.models.load_for_inference import load_for_inference

    other = load_for_inference(folder)[0]
    with __import__("torch").no_grad():
        for weight in other.parameters():
            weight.mul_(-1.3)
    other.save_pretrained(tmp_path / "base")
    load_for_inference(folder)[1].save_pretrained(tmp_path / "base")
    rows = [*ROWS, {"prompt": "x", "base_response": "mine"}]
    source, target = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=6, base=str(tmp_path / "base"))
    made = read(target)
    asked = [*ASKED, [{"role": "user", "content": "x"}]]
    for column, name in (("", folder), ("base_", str(tmp_path / "base"))):
        answers = Generator(*load_for_inference(name)).answers(asked, max_new_tokens=6)
        assert [row[f"{column}response"] for row in made] == [a.text for a in answers]
        assert [row[f"{column}finish_reason"] for row in made] == [a.finish_reason for a in answers]
    assert any(row["response"] != row["base_response"] for row in made)
    assert made[-1]["input_base_response"] == "mine"
    whole = target.read_bytes()
    target.write_bytes(whole[: len(whole) // 2])
    generate_file(folder, source, target, max_new_tokens=6, base=str(tmp_path / "base"))
    assert target.read_bytes() == whole
    with pytest.raises(UsageError, match="--base start needs a run folder"):
        generate_file(folder, source, tmp_path / "new.jsonl", base="start")
