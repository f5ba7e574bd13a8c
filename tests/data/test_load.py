"""Raw rows and their splits: from files, URLs and formats of every kind, the same on every process."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import instructft
from instructft.data.files.kinds import SUFFIXES
from instructft.data.load import conversations, file_conversations, load_parts
from instructft.data.prepare import prepare
from instructft.errors import DataError
from instructft.prompt.loss_mask import encode_conversation
from tests.data.test_readers import write
from tests.helpers.rows import PAIRS, SHAPES, answers, held, made_up, prepared


def test_splits_have_their_sizes_share_no_row_and_are_together_all_rows(recipe):
    splits = held(recipe(made_up(1100)))
    assert {name: len(numbers) for name, numbers in splits.items()} == {"train": 770, "validation": 110, "test": 220}
    assert sorted(number for numbers in splits.values() for number in numbers) == list(range(1100))
    for numbers in splits.values():
        assert numbers == sorted(numbers)
    assert splits["test"] != list(range(220))  # drawn, not cut off


def test_splits_depend_on_the_data_seed_alone(recipe):
    def splits(*overrides):
        return held(recipe(made_up(60), overrides=overrides))

    first = splits()
    for same in ("data.template=chatml", "data.max_length=20", "train.seed=7", "data.train_on=everything"):
        assert splits(same) == first, same
    assert splits("data.seed=43") != first
    assert splits("data.seed=43") == splits("data.seed=43")
    # a larger test split takes from training: what validates stays what it was
    assert splits("data.splits.test=0.5")["validation"] == first["validation"]


def test_two_parts_of_the_same_size_are_split_apart(recipe):
    both = recipe(made_up(60), made_up(60))
    assert held(both, 0) != held(both, 1)


def test_another_process_makes_the_same_rows_in_the_same_order(recipe, tmp_path):
    mine = recipe(made_up(60), {"name": "quickstart", "rows": 40})
    code = f"""
import instructft, instructft.data.prepare as data
recipe = instructft.load_recipe({mine.source!r})
made = data.prepare(recipe, instructft.load_tokenizer(recipe))
tests = [list(part.rows["test"]) for part in data.load_parts(recipe)]
print(made.fingerprint, tests == {[held(mine, i)["test"] for i in (0, 1)]})
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "another-cache"), "PYTHONHASHSEED": "5"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert ran.stdout.split() == [prepared(mine).fingerprint, "True"], ran.stderr


def test_rows_draws_by_the_seed_and_keeps_the_order_of_the_file(recipe):
    def questions(**entry):
        path = {"path": str(Path(recipe(made_up(60)).data.datasets[0].path))}
        part = load_parts(recipe({**path, **entry}, overrides=overrides, name="drawn"))[0]
        return [part.row(row)["instruction"] for row in part.raw]

    overrides: list[str] = []
    everything = questions()
    drawn = questions(rows=20)
    assert len(set(drawn)) == 20
    assert [q for q in everything if q in drawn] == drawn != everything[:20]
    assert questions(rows=60) == everything
    overrides = ["data.seed=7"]
    assert questions(rows=20) != drawn


def test_every_format_gives_the_same_ids_for_the_same_conversation(recipe):
    found = {name: prepared(recipe(rows, name=name)) for name, rows in SHAPES.items()}
    for name, made in found.items():
        assert made.fingerprint == found["alpaca"].fingerprint, name
        assert made.rows == {"train": 14, "validation": 2, "test": 4}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_type_of_file_gives_the_same_ids(recipe, tmp_path, suffix):
    made = prepared(recipe({"path": str(write(tmp_path, suffix, SHAPES["alpaca"]))}, name="file"))
    assert made.fingerprint == prepared(recipe(SHAPES["alpaca"])).fingerprint
    assert not made.dropped


def test_data_sets_of_different_formats_with_mapped_columns_stand_side_by_side(recipe, tmp_path):
    other = [{"question": f"Q{i}?", "reply": f"R{i}", "output": "wrong", "category": "x"} for i in range(10)]
    path = write(tmp_path, ".csv", other)
    mapped = {"path": str(path), "columns": {"instruction": "question", "output": "reply"}}
    others = [
        {"messages": [{"role": "user", "content": f"{q}!"}, {"role": "assistant", "content": f"{a}, sir"}]}
        for q, a in PAIRS
    ]
    mixed = recipe(SHAPES["hh"], mapped, others, {"name": "quickstart", "rows": 30})
    parts = load_parts(mixed)
    assert [part.format for part in parts] == ["hh", "alpaca", "messages", "alpaca"]
    made = prepared(mixed)
    assert made.rows == {"train": 14 + 7 + 14 + 21, "validation": 2 + 1 + 2 + 3, "test": 4 + 2 + 4 + 6}
    assert sum(made.groups.values()) == 8  # validation rows are told apart, so that each set has a loss of its own
    assert len(made.groups) == 4
    tokenizer = instructft.load_tokenizer(mixed)
    assert sorted(
        a for name in made.splits for a in answers(made.splits[name], tokenizer) if a[:1] == "R" and a[1:].isdigit()
    ) == [f"R{i}" for i in range(10)]
    assert not any("wrong" in answer for name in made.splits for answer in answers(made.splits[name], tokenizer))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the folder `tmp_path / "web"` on 127.0.0.1; its address comes back."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path != "/broken.jsonl":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"instruction": "a", "output": "b"}\n')  # and no more

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".parquet"])
def test_a_file_at_a_url_gives_the_same_ids(recipe, tmp_path, server, suffix):
    path = write(tmp_path / "web", suffix, SHAPES["alpaca"])
    made = prepared(recipe({"url": f"{server}/{path.name}?download=true"}, name="url"))
    assert made.fingerprint == prepared(recipe(SHAPES["alpaca"])).fingerprint


def test_a_url_that_gives_nothing_or_nonsense_is_a_data_error(recipe, tmp_path, server):
    with pytest.raises(
        DataError, match=r"data\.datasets\[0\]: http://.*/none\.json could not be fetched from its URL: "
    ):
        load_parts(recipe({"url": f"{server}/none.json"}))
    with pytest.raises(DataError, match="the connection broke after 36 of 1,000 bytes"):
        load_parts(recipe({"url": f"{server}/broken.jsonl"}))
    (tmp_path / "web" / "page.json").write_text("<html>", encoding="utf-8")
    with pytest.raises(DataError, match=r"/page\.json, line 1, column 1: not JSON"):
        load_parts(recipe({"url": f"{server}/page.json"}))


def test_a_file_at_a_url_is_fetched_anew_and_its_copy_serves_when_offline(recipe, tmp_path, server, monkeypatch):
    import datasets

    mine = recipe({"url": f"{server}/rows.jsonl"})

    def count():
        return len(load_parts(mine)[0].raw)

    path = write(tmp_path / "web", ".jsonl", SHAPES["alpaca"])
    assert count() == 20
    write(tmp_path / "web", ".jsonl", SHAPES["alpaca"][:5])
    assert count() == 5
    path.unlink()
    with pytest.raises(DataError, match="HTTP Error 404"):
        load_parts(mine)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert count() == 5
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        load_parts(recipe({"url": f"{server}/other.jsonl"}))


def test_conversations_are_exactly_the_rows_of_the_split(recipe):
    rows = made_up(30)
    rows[5]["category"] = "sums"
    mine = recipe([{"instruction": "bad", "output": ""}, *rows], {"name": "quickstart", "rows": 20})
    tokenizer = instructft.load_tokenizer(mine)
    made = prepare(mine, tokenizer)
    for name, split in made.splits.items():
        found = conversations(mine, name)
        assert [encode_conversation(row["messages"], tokenizer) for row in found] == list(split)
        assert conversations(mine, name, limit=3) == found[:3]
    everything = [row for name in made.splits for row in conversations(mine, name)]
    assert {row["dataset"] for row in everything} == {mine.data.datasets[0].path, "quickstart"}
    assert [r["category"] for r in everything if r["messages"][0]["content"] == "Question 5?"] == ["sums"]


def test_file_conversations_reads_a_file_whole_and_says_when_nothing_is_in_it(tmp_path):
    path = write(tmp_path, ".csv", [*SHAPES["alpaca"], {"instruction": "a", "output": ""}])
    found = file_conversations(str(path))
    assert [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in found] == PAIRS
    assert file_conversations(str(path), limit=2) == found[:2]
    useless = write(tmp_path, ".jsonl", [{"instruction": "a", "output": ""}])
    with pytest.raises(DataError, match=r"--data: no row of .*rows\.jsonl has a question and an answer"):
        file_conversations(str(useless))
    (tmp_path / "broken.json").write_text("[{]", encoding="utf-8")
    with pytest.raises(DataError, match=r"--data: .*broken\.json, line 1, column 3: not JSON"):
        file_conversations(str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match=r"--data: there is no file nowhere\.json"):
        file_conversations("nowhere.json")


def test_a_cache_folder_that_cannot_be_made_is_named_and_not_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from instructft.data.load import not_read
    from instructft.recipe.schema import DatasetEntry

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/gone/home/.cache/huggingface/datasets"))
    entry = DatasetEntry(path="rows.jsonl")
    error = FileNotFoundError(2, "No such file or directory", "/gone/home")
    said = not_read(entry, "rows.jsonl", "data.datasets[0]", error)
    assert said.startswith("the cache folder /gone/home/.cache/huggingface/datasets cannot be made: /gone/home")
    assert "HF_HOME" in said
    other = not_read(entry, "rows.jsonl", "data.datasets[0]", FileNotFoundError(2, "gone", "/elsewhere/rows.jsonl"))
    assert other.startswith("data.datasets[0]: rows.jsonl could not be read")
