"""report.html says what the run's files say, is one file that loads nothing, and obeys no text of data or models."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.data.prepare import prepare
from instructft.report import page as page_module
from instructft.report.page import draw_report, page, write_report
from tests.conftest import TINY
from tests.helpers.browser import Watched, browser
from tests.helpers.report import EVIL, LINES, Read, facts_of, fill

RECIPE = TINY + "samples: [Hi there]\n"

pytestmark = pytest.mark.drawn


@pytest.fixture
def recipe(write_recipe: Any) -> Any:
    return instructft.load_recipe(write_recipe(RECIPE))


def test_the_page_says_what_the_files_say(recipe: Any, tmp_path: Path) -> None:
    samples = [(0, "Hi there", "blub blub"), (20, "Hi there", "Hel"), (40, "Hi there", "Hello to you")]
    text = page(fill(tmp_path / "run", LINES, samples), recipe, facts_of())
    read = Read(text)
    for said in (
        "random weights trained on quickstart", "96 rows, 40 steps in 12 min 34 s on cpu",
        "1.5", "perplexity 4.48", "6,543", "37.7% carry loss", "4,321", "1,234 (38.4%)",
        "dropped: near duplicate of held out", "7 rows", "12.5%", "0123456789abcdef", "2.13.0",
        "Hi there", "blub blub", "Hello to you", "step 0 and step 40", "per_device_train_batch_size: 4",
        "instructft chat", "vllm serve", "from_pretrained",
    ):  # fmt: skip
        assert said in " ".join(read.text.split()), said
    assert read.tags.count("svg") == 3  # loss, learning rate, speed; nobody measured what was guessed right
    assert text.index("blub blub") < text.index("Hello to you")
    assert "resumed from" not in text
    assert "Evaluation" not in text


def test_the_row_and_the_lengths_are_those_of_the_data(recipe: Any, tmp_path: Path) -> None:
    tokenizer = instructft.load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    text = page(fill(tmp_path / "run", LINES, []), recipe, facts_of(), tokenizer, data)
    shown = re.findall(r'<span class="(\w)[^"]*" data-i="([\d ]+)"', text)
    assert [int(i) for _, ids in shown for i in ids.split()] == data.example["input_ids"]
    loss = [int(i) for kind, ids in shown for i in ids.split() if kind == "l"]
    assert loss == [label for label in data.example["labels"] if label != -100]
    counted = [
        int(n.replace(",", ""))
        for n in re.findall(
            r"<td>[\d,]+(?: to [\d,]+)?</td><td>([\d,]+)</td></tr>", text[text.index("Tokens in a row") :]
        )
    ]
    assert sum(counted) == len(data.splits["train"])
    longest = max(len(ids) for ids in data.splits["train"]["input_ids"])
    assert f"· {longest}</td>" in text
    Read(text)


def test_text_of_others_is_shown_and_not_obeyed(write_recipe: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": EVIL + str(i)}, {"role": "assistant", "content": EVIL}]}
            for i in range(12)]  # fmt: skip
    file = tmp_path / "<script>rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = TINY.replace("{name: quickstart, rows: 120}", json.dumps({"path": str(file)})).replace("128", "1024")
    recipe = instructft.load_recipe(write_recipe(text + f"samples: [{json.dumps(EVIL)}]\n", name="<script>.yaml"))
    tokenizer = instructft.load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    run = fill(tmp_path / "run", [*LINES, {"step": 50, "loss": EVIL}], [(0, EVIL, EVIL), (40, EVIL, EVIL)])
    row = {"prompt": EVIL, "prediction": EVIL, "reference": EVIL}
    side = {"loss": 1.0, "perplexity": 2.7, "exact_match": 0.5, "rougeL": 0.25, "bleu": 3.0, "rows": [row] * 3}
    (run / "evaluation.json").write_text(json.dumps({"tuned": side, "base": side}), encoding="utf-8")
    facts = facts_of(data__dropped={EVIL: 3}, versions={"instructft": EVIL}, metrics={EVIL: 1.0, "loss": EVIL})
    found = page(run, recipe, facts, tokenizer, data)
    read = Read(found)
    assert not {"script", "img", "link", "iframe", "object", "base", "a", "form"} & set(read.tags)
    assert read.links == []
    assert read.tags.count("style") == 1
    assert not re.search(r"url\(|@import", found)
    assert not set(found) & set("\x1b\u202e\x00")
    assert "default-src 'none'" in found
    shown = "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)> &amp; \"' \\x1b[31m \\u202eback"
    assert read.text.count(shown) > 15
    assert "50.0%" in read.text  # the evaluation's table


def test_no_folder_of_this_machine_is_named(recipe: Any, write_recipe: Any, tmp_path: Path) -> None:
    base = tmp_path / "secret" / "my-base"
    base.mkdir(parents=True)
    text = RECIPE.replace(re.search(r"  config: .*\n  tokenizer: .*\n", RECIPE)[0], f"  name_or_path: {base}\n")
    local = instructft.load_recipe(write_recipe(text))
    samples = [(0, "Hi", f"see {tmp_path}/run/loss.png"), (4, "Hi", "fine")]
    found = page(fill(tmp_path / "run", LINES, samples), local, facts_of())
    assert str(tmp_path) not in found
    assert str(Path.home()) + "/" not in found
    assert "<b>my-base</b> fine-tuned on" in found
    assert "secret" not in found


def test_a_long_run_is_a_page_of_bounded_size(recipe: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = [
        {"step": s, "loss": 2 + rng.random(), "learning_rate": 1e-4, "tokens_per_second": 1e4 + rng.random(),
         "mean_token_accuracy": rng.random()} for s in range(1, 20_001)
    ]  # fmt: skip
    lines[7_776]["loss"] = 99.5
    samples = [(s, f"prompt {i}", "word " * 2_000) for s in (0, 1, 2) for i in range(100)]
    text = page(fill(tmp_path / "run", lines, samples), recipe, facts_of())
    assert len(text.encode()) < 2_000_000
    assert "<td>7,777</td><td>99.5</td>" in text  # the one spike of 20,000 steps
    assert "99.5" in text
    assert "70 more prompts are in samples.jsonl" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__resumed": [{"step": 20, "changed": {}, "versions": {}, "exact": False}]},
         "resumed from step 20, on a GPU: equal but for rounding."),
        ({"train__resumed": [{"step": 20, "changed": {"train.logging_steps": [1, 2]}, "versions": {}}]},
         "interrupted and resumed from step 20.|Changed when it was resumed: train.logging_steps"),
        ({"train__loss_spikes": [{"step": 7, "loss": 9.0, "median": 2.0, "skipped": True}]},
         "Step 7 had a loss of 9, where 2 was usual; the step was left out."),
        ({"train__rows_at_once": 2}, "smaller batches were taken: 2 rows at once"),
        ({"data__cut": {"rows": 24, "tokens": 100}}, "24 rows were longer than max_length and lost their end"),
        ({"data__alike": True}, "nearly the same as held-out ones, whose loss says nothing of other rows."),
        ({"data__rows": {"train": 9, "validation": 0, "test": 0}}, "No rows were held out for validation"),
        ({"metrics__loss": float("nan")}, "Not a number: loss."),
    ],
)  # fmt: skip
def test_what_a_reader_should_know_first(changes: Any, said: str, recipe: Any, tmp_path: Path) -> None:
    run = fill(tmp_path / "run", LINES, [])
    plain, found = Read(page(run, recipe, facts_of())).text, Read(page(run, recipe, facts_of(**changes))).text
    for line in said.split("|"):
        assert line in found
        assert line not in plain


# The run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.yaml"
    path.write_text(f"{RECIPE}output_dir: {folder / 'run'}\n", encoding="utf-8")
    recipe = instructft.load_recipe(path)
    return recipe, instructft.train(recipe)


def test_every_run_leaves_one(trained: Any) -> None:
    _, result = trained
    text = (result.output_dir / "report.html").read_text(encoding="utf-8")
    read = Read(text)
    assert f"{result.facts['data']['tokens']:,}" in read.text
    assert result.facts["data"]["fingerprint"] in read.text
    assert f"{result.metrics['eval_loss']:.4g}" in read.text
    assert read.tags.count("svg") == 5
    assert "A row as it was trained" in read.text
    assert str(result.output_dir.parent) not in text
    assert not list(result.output_dir.glob("*.partial"))
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    assert len(speeds) == 4
    # the clock of each line runs over its steps only: their seconds together are no more than the whole run's
    seen = [0, *(line["num_tokens"] for line in lines if "loss" in line)]
    tokens = [after - before for before, after in pairwise(seen)]
    assert 0 < sum(n / v for n, v in zip(tokens, speeds, strict=True)) < result.facts["train"]["seconds"] + 0.1


def test_a_page_that_cannot_be_drawn_loses_no_run(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page_module, "PAGE", tmp_path / "gone.jinja")
    result = instructft.train(instructft.load_recipe(write_recipe(TINY.replace("max_steps: 4", "max_steps: 1"))))
    assert (result.output_dir / "run.json").is_file()
    assert (result.output_dir / "model.safetensors").is_file()
    assert not (result.output_dir / "report.html").exists()
    said = capsys.readouterr().err
    assert "report.html was not drawn (FileNotFoundError" in said
    assert "the run is whole" in said


def test_drawing_again_gives_the_same_page(recipe: Any, tmp_path: Path) -> None:
    run = fill(tmp_path / "run", LINES, [])
    first = write_report(run, recipe, facts_of()).read_bytes()
    assert draw_report(run, recipe, facts_of()).read_bytes() == first


# In a browser


def test_in_a_browser(trained: Any) -> None:
    _, result = trained
    address = (result.output_dir / "report.html").as_uri()
    grounds, lines = set(), set()
    with browser() as chromium:
        for scheme in ("light", "dark"):
            for width in (1280, 360):
                seen = Watched(chromium, width, scheme=scheme)
                seen.page.goto(address)
                assert seen.requests == [address]
                assert seen.complaints == []
                assert not seen.scrolls_sideways
                lines.add(
                    (
                        scheme,
                        seen.page.evaluate("getComputedStyle(document.querySelector('svg path[style*=--a]')).stroke"),
                    )
                )
                grounds.add((scheme, seen.page.evaluate("getComputedStyle(document.body).backgroundColor")))
        values = seen.page.locator("figure details").first
        assert not values.locator("td").first.is_visible()
        values.locator("summary").click()
        assert values.locator("td").first.is_visible()
    for found in (grounds, lines):
        assert len(found) == len({colour for _, colour in found}) == 2


def test_the_speed_of_a_line_is_that_of_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens in 2 s, an evaluation of 50 s that counts for nothing, 300 tokens in 3 s."""
    from types import SimpleNamespace

    from instructft.training import callbacks

    clock = iter([0.0, 2.0, 52.0, 55.0])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[])
    file = callbacks.MetricsFile(tmp_path / "metrics.jsonl")
    file.on_train_begin(None, state, None)
    for step, tokens in ((1, 100.0), (2, 400.0)):
        file.on_step_begin(None, state, None)
        state.global_step = step
        file.on_log(None, state, None, {"loss": 1.0, "num_tokens": tokens})
        file.on_log(None, state, None, {"eval_loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens_per_second"] for line in lines] == [50.0, 100.0]


def test_figures_of_answers_are_drawn_with_their_interval(recipe: Any, tmp_path: Path) -> None:
    answers = [
        {"step": s, "eval_loss": 1.0, "eval_exact_match": x, "eval_exact_match_low": x - 0.1,
         "eval_exact_match_high": x + 0.1, "eval_answered": 32}
        for s, x in ((20, 0.25), (40, 0.5))
    ]  # fmt: skip
    facts = facts_of(metrics={"eval_loss": 1.0, **{k: v for k, v in answers[-1].items() if k != "step"}})
    text = page(fill(tmp_path / "run", answers, []), recipe, facts)
    read = " ".join(Read(text).text.split())
    assert "Exact match" in read
    assert "answers to 32 held-out rows; band: 95% interval" in read
    assert "0.4 to 0.6" in read  # in the table of its values
    assert "fill-opacity: 0.2" in text
    assert "validation, share of answers that match exactly" in read
    assert "eval_exact_match_low" not in read
