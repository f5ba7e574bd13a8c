"""Streams: the rows of `prepare`, in a seeded order, with flat memory, and refusals that say what to do."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from accelerate.data_loader import IterableDatasetShard
from rich.console import Console
from typer.testing import CliRunner

import instructft
from instructft.cli import app
from instructft.data.prepare import prepare
from instructft.data.streaming import Streamed, prepare_stream
from instructft.errors import DataError, RecipeError, TemplateError

Rows = list[dict[str, Any]]


def made(count: int = 1200) -> Rows:
    """Rows of many lengths, some of which are dropped or cut at 40 tokens."""
    rows: Rows = []
    for i in range(count):
        rows.append({"instruction": f"Say {i * 7919}.", "input": "", "output": " ".join([str(i)] * (1 + i % 15))})
        if i % 100 == 7:
            rows[-1]["output"] = ""
        if i % 100 == 9:
            rows[-1]["instruction"] = "a long question " * 40
    return rows


def jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    """Loads the tiny recipe with these data sets, nothing held out."""

    def load(*entries: dict[str, Any], overrides: Iterable[str] = (), streaming: bool = True) -> Any:
        datasets = json.dumps([{**entry, "streaming": streaming} for entry in entries])
        base = [f"data.datasets={datasets}", "data.max_length=40", "data.splits={validation: 0, test: 0}"]
        return instructft.load_recipe(write_recipe(), [*base, *overrides])

    return load


def opened(recipe: Any) -> Streamed:
    return prepare_stream(recipe, instructft.load_tokenizer(recipe))


def as_set(rows: Iterable[dict[str, Any]]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    return Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_a_pass_holds_the_rows_of_the_ordinary_road_and_the_same_account(
    recipe: Any, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"rows.{kind}"
    jsonl(tmp_path / "rows.jsonl", made())
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    elif kind != "jsonl":
        import pandas

        frame = pandas.DataFrame(made())
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    mine = recipe({"path": str(path)})
    stream = opened(mine)
    rows = list(stream.splits["train"])
    whole = recipe({"path": str(path)}, streaming=False)
    data = prepare(whole, instructft.load_tokenizer(whole))
    assert as_set(rows) == as_set(data.splits["train"])
    assert stream.dropped == data.dropped == {"empty_answer": 12, "answer_cut_away": 12}
    assert (stream.cut, stream.cut_tokens) == (data.cut, data.cut_tokens)
    assert data.cut > 0
    assert stream.rows == data.rows
    assert (stream.tokens, stream.supervised_tokens) == (data.tokens, data.supervised_tokens)


def test_each_pass_has_its_own_order_which_follows_from_the_seed(recipe: Any, tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", made(300)))
    mine = recipe({"path": path})
    train, again = (opened(mine).splits["train"] for _ in range(2))
    first = list(train)
    assert list(train) == first == list(again)
    train.set_epoch(1)
    second = list(train)
    assert second != first
    assert as_set(second) == as_set(first)
    assert list(opened(recipe({"path": path}, overrides=["data.seed=7"])).splits["train"]) != first
    endless = opened(mine)
    rows = list(islice(endless.for_training, 2 * len(first)))
    assert rows == first + second
    assert endless.rows["train"] == 2 * len(first)
    assert endless.dropped == {"empty_answer": 6, "answer_cut_away": 6}


def test_packs_hold_every_document_once_and_none_is_split(recipe: Any, tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", made()))
    stream = opened(recipe({"path": path}, overrides=["data.packing=true", "data.max_length=100"]))
    plain = opened(recipe({"path": path}, overrides=["data.max_length=100"]))
    packs = list(stream.splits["train"])
    documents: Rows = []
    for row in packs:
        start = 0
        for length in row["seq_lengths"]:
            documents.append({name: row[name][start : start + length] for name in ("input_ids", "labels")})
            start += length
        assert start == len(row["input_ids"]) <= 100
    assert as_set(documents) == as_set(plain.splits["train"])
    assert stream.rows == plain.rows
    fill = stream.tokens["train"] / 100 / len(packs)
    assert fill > 0.95
    assert dict(stream.account(100))["packed"].startswith("in windows of 1,000 rows, packs of 100 tokens, 9")


def test_two_streams_are_mixed_by_weight_and_each_is_read_to_its_end(recipe: Any, tmp_path: Path) -> None:
    def rows(word: str, count: int) -> Rows:
        return [{"instruction": f"{word} {i}", "output": word} for i in range(count)]

    few = {"path": str(jsonl(tmp_path / "few.jsonl", rows("ant", 100))), "weight": 1}
    many = {"path": str(jsonl(tmp_path / "many.jsonl", rows("bee", 1000))), "weight": 3}
    mine = recipe(few, many)
    tokenizer = instructft.load_tokenizer(mine)
    stream = opened(mine)
    texts = [tokenizer.decode(row["input_ids"]) for row in stream.splits["train"]]
    bees = [text for text in texts if "bee" in text]
    assert len(bees) / len(texts) == pytest.approx(0.75, abs=0.03)
    assert len(set(bees)) == 1000
    assert len(set(texts)) == 1100
    assert "25% " in dict(stream.account(40))["data"]


def test_rows_are_the_first_and_columns_and_format_are_those_of_the_recipe(recipe: Any, tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "reply": f"a{i}"} for i in range(50)]
    entry = {"path": str(jsonl(tmp_path / "rows.jsonl", rows)), "rows": 5}
    with pytest.raises(DataError, match="no known format has the columns question, reply"):
        opened(recipe(entry))
    mine = recipe({**entry, "columns": {"instruction": "question", "output": "reply"}})
    tokenizer = instructft.load_tokenizer(mine)
    texts = " ".join(tokenizer.decode(row["input_ids"]) for row in opened(mine).splits["train"])
    assert all(f"a{i}" in texts for i in range(5))
    assert "a5" not in texts


def test_the_bundled_set_and_the_public_function_stream(recipe: Any) -> None:
    mine = recipe({"name": "quickstart", "rows": 50})
    splits = instructft.prepare_dataset(mine, instructft.load_tokenizer(mine))
    assert list(splits) == ["train"]
    assert sum(1 for _ in splits["train"]) == 50


@pytest.mark.parametrize("packed", [False, True])
def test_two_processes_get_different_rows(recipe: Any, tmp_path: Path, packed: bool) -> None:
    """As accelerate divides an iterable data set when its batches are not dispatched, which TRL sees to."""
    path = str(jsonl(tmp_path / "rows.jsonl", made(400)))
    mine = recipe({"path": path}, overrides=["data.packing=true"] if packed else [])
    per_process = [
        list(islice(IterableDatasetShard(opened(mine).for_training, 4, True, 2, rank), 60)) for rank in (0, 1)
    ]
    one = list(islice(opened(mine).for_training, 120))
    assert not as_set(per_process[0]) & as_set(per_process[1])
    assert as_set(per_process[0]) + as_set(per_process[1]) == as_set(one)


def test_a_file_on_the_web_is_not_put_on_the_disk(recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from datasets import config

    web = tmp_path / "web"
    web.mkdir()
    jsonl(web / "rows.jsonl", made(300))
    (web / "rows.jsonl.gz").write_bytes(gzip.compress((web / "rows.jsonl").read_bytes()))
    handler = partial(SimpleHTTPRequestHandler, directory=str(web))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("instructft.data.readers.download", lambda url: pytest.fail("downloaded"))
    try:
        here = f"http://127.0.0.1:{server.server_port}"
        wanted = as_set(opened(recipe({"path": str(web / "rows.jsonl")})).splits["train"])
        for name in ("rows.jsonl", "rows.jsonl.gz"):
            assert as_set(opened(recipe({"url": f"{here}/{name}"})).splits["train"]) == wanted
        with pytest.raises(DataError, match="could not be fetched from its URL: HTTP Error 404"):
            opened(recipe({"url": f"{here}/none.jsonl"}))
    finally:
        server.shutdown()


def test_the_fingerprint_follows_file_and_settings(recipe: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", made(50))
    entry = {"path": str(path)}
    seen = {opened(recipe(entry)).fingerprint for _ in range(2)}
    assert len(seen) == 1
    for override in ("data.template=chatml", "data.max_length=41", "data.seed=1", "data.packing=true"):
        seen.add(opened(recipe(entry, overrides=[override])).fingerprint)
    jsonl(path, made(51))
    seen.add(opened(recipe(entry)).fingerprint)
    assert len(seen) == 6


# --------------------------------------------------------------------------------------------------------- what is not


def test_a_bad_line_in_mid_stream_is_named(recipe: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", made())
    lines = path.read_text().splitlines()
    lines[1150] = "{broken"
    path.write_text("\n".join(lines))
    stream = opened(recipe({"path": str(path)}))
    with pytest.raises(DataError, match=r"data\.datasets\[0\]: .*rows\.jsonl, line 1151, column 2: not JSON"):
        list(stream.splits["train"])


def test_a_row_of_the_stream_is_named_by_its_place_in_the_file(recipe: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"} for _ in range(1100)]
    rows[1050]["output"] = "long " * 100
    path = jsonl(tmp_path / "rows.jsonl", rows)
    stream = opened(recipe({"path": str(path)}, overrides=["data.on_too_long=error"]))
    with pytest.raises(DataError, match=r"row 1051 of .*rows\.jsonl has \d+ tokens, more than data\.max_length"):
        list(stream.splits["train"])


def test_a_stream_without_a_row_to_train_on_ends_with_a_reason(recipe: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": ""}] * 20)
    with pytest.raises(DataError, match="can be trained on: 20 with an empty answer"):
        opened(recipe({"path": str(path)})).account(40)
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        opened(recipe({"path": str(tmp_path / "none.jsonl")}))


def test_a_stream_that_loses_too_many_rows_is_refused_before_the_first_step(recipe: Any, tmp_path: Path) -> None:
    rows = made(1300)
    for row in rows[:300]:
        row["output"] = " "
    path = str(jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(
        DataError, match=r"31.4% of the first 1,000 rows of .* check.max_dropped_share allows 20.0%: "
    ) as e:
        opened(recipe({"path": path})).account(40)
    assert "row 1: nothing in `output`" in str(e.value)
    allowed = recipe({"path": path}, overrides=["check.max_dropped_share=0.4"])
    assert dict(opened(allowed).account(40))["dropped"]
    greeting = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    template = tmp_path / "refuses.jinja"
    template.write_text(
        "{%- for m in messages -%}{%- if m.content == 'bad' -%}{{ raise_exception('no') }}{%- endif -%}"
        "{{ m.role + m.content + eos_token }}{%- endfor -%}{%- if add_generation_prompt -%}assistant{%- endif -%}"
    )
    bad = {"messages": [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "b"}]}
    path = str(jsonl(tmp_path / "chat.jsonl", [greeting] * 50 + [bad]))
    with pytest.raises(TemplateError, match=r"2\.0% of the first 51 rows .* check.max_refused_share allows 0.0%"):
        opened(recipe({"path": path}, overrides=[f"data.template={template}"])).account(40)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.splits={validation: 0.05}"], r"data\.splits: .*set data\.splits={validation: 0, test: 0}"),
        (["train.max_steps=-1"], r"train\.max_steps: .*needs a number of steps"),
        (["train.dataloader_num_workers=2"], r"train\.dataloader_num_workers: a stream is read in the training"),
        (["data.datasets=[{path: a.jsonl, streaming: true}, {path: b.jsonl}]"], r"\[1\] does not stream; either all"),
        (
            ["data.datasets=[{url: 'https://example.org/a.json', streaming: true}]"],
            r"one JSON array.*save it as \.jsonl",
        ),
        (["data.datasets=[{name: llms-from-scratch, streaming: true}]"], r"one JSON array"),
        (["data.datasets=[{hub: a/b, split: 'train[:5%]', streaming: true}]"], r"use rows: N"),
        (["data.datasets=[{path: a.jsonl, repeat: 2, streaming: true}]"], r"begins again; set its share with weight"),
        (["data.test=[{path: a.jsonl, repeat: 2}]"], r"data\.test.*\.repeat: held-out rows are judged once"),
    ],
)
def test_what_a_stream_cannot_have_is_refused(recipe: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe({"path": "rows.jsonl"}, overrides=overrides)


def test_the_refusal_exits_with_2_and_names_all_at_once(write_recipe: Any) -> None:
    path = write_recipe()
    told = CliRunner().invoke(
        app, ["train", str(path), "data.datasets.0.streaming=true", "train.max_steps=-1"], catch_exceptions=True
    )
    assert isinstance(told.exception, RecipeError) or told.exit_code == 2
    said = str(told.exception) + told.output
    assert "data.splits={validation: 0, test: 0}" in said
    assert "train.max_steps" in said


def test_commands_that_need_the_whole_set_say_so(recipe: Any) -> None:
    mine = recipe({"name": "quickstart"})
    with pytest.raises(DataError, match="streaming: false"):
        prepare(mine, instructft.load_tokenizer(mine))


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_run_on_a_stream_leaves_a_complete_run_folder(recipe: Any, tmp_path: Path, packing: str) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", made(400)))
    mine = recipe(
        {"path": path}, overrides=["train.max_steps=3", "train.tokens_per_step=300", f"data.packing={packing}"]
    )
    said = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    run = instructft.train(mine, console=said).output_dir
    facts = json.loads((run / "run.json").read_text())
    assert facts["train"]["steps"] == 3
    data = facts["data"]
    assert data["rows"]["train"] > 0
    assert data["tokens"] >= facts["train"]["tokens"] > 0
    assert facts["train"]["tokens"] / 3 == pytest.approx(300, rel=0.4)
    assert data["dropped"]
    assert len(data["fingerprint"]) == 16
    for name in ("config.json", "model.safetensors", "recipe.yaml", "metrics.jsonl", "README.md"):
        assert (run / name).is_file(), name
    text = said.export_text()
    assert "read as it is trained on" in text
    assert "estimated from the first" in text


def test_a_run_goes_on_past_the_end_of_the_data(recipe: Any, tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(10)]))
    facts = instructft.train(recipe({"path": path}, overrides=["train.max_steps=6"]), console=Console(quiet=True)).facts
    assert facts["train"]["steps"] == 6
    assert facts["data"]["rows"]["train"] >= 24


def test_memory_is_flat(recipe: Any, tmp_path: Path) -> None:
    """`benchmarks/stream_memory.py` does it with a million rows."""
    import psutil

    rows = ({"instruction": f"Say {i * 7919 % 100003}.", "output": f"{i}."} for i in range(30_000))
    stream = opened(recipe({"path": str(jsonl(tmp_path / "rows.jsonl", rows))}))
    process, settled, most = psutil.Process(), 0, 0
    for number, _ in enumerate(stream.splits["train"], 1):
        if number == 12_000:
            settled = process.memory_info().rss
        if number > 12_000 and number % 3_000 == 0:
            most = max(most, process.memory_info().rss)
    assert stream.rows["train"] == 30_000
    assert most - settled < 30 * 2**20
