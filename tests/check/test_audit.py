"""Every fault that is planted in a file is found and counted, a clean file gives no finding, and limits hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft import cli
from instructft.check.audit import FINDINGS, audit
from instructft.check.report import LIMITS, check, limits
from instructft.data.files.row_ids import row_id
from instructft.data.load import load_parts
from instructft.data.prepare import prepare
from instructft.recipe.load import load_recipe
from instructft.recipe.schema import CheckSection
from tests.conftest import GPT2, ROWS

RECIPE = """
model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128}, tokenizer: quickstart}
data: {datasets: [{path: FILE}], template: instruction, max_length: 64, splits: {validation: 0}}
train: {max_steps: 2, per_device_train_batch_size: 4, use_cpu: true, report_to: []}
"""
NO_LIMITS = "check: {max_dropped_share: null, max_refused_share: null}\n"
RECIPE += NO_LIMITS


def row(question: Any, answer: Any) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer}


CLEAN = [row(f"Which number comes after {n}?", f"After it comes {n + 1}.") for n in range(100, 140)]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes rows and a recipe on them; gives the recipe's path."""
    monkeypatch.chdir(tmp_path)

    def make(*files: list[dict[str, Any]], text: str = RECIPE) -> str:
        names = []
        for i, rows in enumerate(files):
            names.append(f"rows{i}.jsonl")
            Path(names[-1]).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        entries = "}, {path: ".join(names)
        Path("my.yaml").write_text(text.replace("{path: FILE}", f"{{path: {entries}}}"), encoding="utf-8")
        return "my.yaml"

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs `instructft check` in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["instructft", "check", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def audited(path: str, *overrides: str) -> dict[str, Any]:
    recipe = load_recipe(path, overrides)
    return audit(recipe, instructft.load_tokenizer(recipe))


def counts(account: dict[str, Any]) -> dict[str, int]:
    return {name: finding["rows"] for name, finding in account["findings"].items() if finding["rows"]}


# -- planted faults --------------------------------------------------------------------------------------------------

# (row, what it must be found as); the row's number in the file follows from the order
PLANTED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (row("Which number comes after 100?", "After it comes 101."), ("exact_duplicates",)),
    (row("Which number comes after 101?", "After it comes 102."), ("exact_duplicates",)),
    (row("which number   comes after 102", "AFTER IT COMES 103!"), ("near_duplicates",)),
    (row("Is the sea blue?", "Yes, mostly it is."), ("contradictions",)),
    (row("Is the sea blue?", "No, it is green."), ("contradictions",)),
    (row("What is 3.5 + 1?", "It is 4.5 then."), ()),  # not the same as 35 + 1
    (row("What is 35 + 1?", "It is 36 then."), ()),
    (row("Say nothing.", ""), ("empty_answers",)),
    (row("Say nothing again.", "   "), ("empty_answers",)),
    (row("", "An answer to what?"), ()),
    (row(12, "A number is no text."), ()),
    (row("Capital of France?", "Paris."), ("one_word_answers",)),
    (row("Capital of Spain?", "Madrid"), ("one_word_answers",)),
    (row("Capital of Japan?", "東京"), ("one_word_answers",)),
    (row("Japan's capital, please.", "日本の首都は東京です。"), ()),
    (row("Show a template.", "Here:\n### Response:\nfine"), ("markers_in_answers",)),
    (row("Show the end.", "The end is <|endoftext|> there."), ("markers_in_answers",)),
    (row("Mid-line is fine.", "They write ### Response: in the middle."), ()),
    (row("What is <|endoftext|>?", "It is a token."), ("markers_in_prompts",)),
    (row("Ring the bell.", "Here \x07 it rings."), ("control_characters",)),
    (row("Hide a space.", "Here\u200bit hides."), ("zero_width_characters",)),
    (row("Join two letters.", "a\u200db is odd."), ("zero_width_characters",)),
    (row("Show a family.", "This one: 👩\u200d👩\u200d👧 here."), ()),
    (row("Turn it around.", "Here \u202eit turns."), ("bidi_characters",)),
    (row("What was lost?", "Caf\ufffd was lost."), ("replacement_characters",)),
    (row("Half an emoji?", "Here \ud83d is half."), ("lone_surrogates",)),
    (row("Write code.", "    indented = True"), ("outer_space",)),
    (row("Which line ends?\n", "These two."), ("outer_space",)),
    (row("Lines of Windows?", "One.\r\nTwo."), ("windows_line_ends",)),
    (row("Count.", " ".join(str(n) for n in range(200))), ()),
    (row("Read: " + "word " * 90 + "end", "The answer is gone."), ()),
]
EXPECTED_DROPS = {"empty_answer": 2, "empty_prompt": 1, "not_text": 1, "answer_cut_away": 1}


def test_every_planted_fault_is_found_and_counted(make: Any) -> None:
    report = audited(make(CLEAN + [faulty for faulty, _ in PLANTED]))
    (account,) = report["datasets"]
    expected: dict[str, list[int]] = {}
    for i, (_, names) in enumerate(PLANTED):
        for name in names:
            expected.setdefault(name, []).append(len(CLEAN) + i + 1)
    assert counts(account) == {name: len(rows) for name, rows in expected.items()}
    for name, rows in expected.items():
        assert [example["row"] for example in account["findings"][name]["examples"]] == rows[:3]
    total = len(CLEAN) + len(PLANTED)
    assert account["rows"] == total
    assert {reason: f["rows"] for reason, f in account["dropped"]["reasons"].items()} == EXPECTED_DROPS
    assert account["dropped"]["rows"] == 5
    assert account["dropped"]["share"] == 5 / total
    assert account["dropped"]["reasons"]["answer_cut_away"]["examples"] == [{"row": total, "note": ""}]
    assert account["cut"]["rows"] == 1
    assert account["cut"]["examples"][0]["row"] == total - 1
    assert account["cut"]["tokens"] == account["lengths"]["max"] - 64
    assert account["turns"] == 2 * (total - 4)
    assert counts({"findings": report["total"]["findings"]}) == counts(account)
    notes = {name: f["examples"][0]["note"] for name, f in account["findings"].items() if f["rows"]}
    assert notes["exact_duplicates"] == "as row 1"
    assert notes["near_duplicates"] == "as row 3"
    assert notes["markers_in_answers"] == "### Response:"
    assert notes["bidi_characters"] == "U+202E"


def test_a_clean_file_gives_no_finding(make: Any) -> None:
    report = audited(make(CLEAN), "data.splits={validation: 0.2, test: 0.1}")
    assert counts(report["datasets"][0]) == {}
    assert report["total"]["dropped"] == {"rows": 0, "share": 0, "reasons": {}}
    assert report["total"]["cut"] == {"rows": 0, "share": 0, "tokens": 0}
    assert report["total"]["splits"] == {"train": 28, "validation": 8, "test": 4}


def test_leaks_between_splits_and_data_sets(make: Any) -> None:
    again = [CLEAN[0]] * 6 + [CLEAN[5]] * 6 + CLEAN[:20]
    path = make(CLEAN, again)
    report = audited(path, "data.splits={validation: 0.3, test: 0.2}")
    parts = load_parts(load_recipe(path, ["data.splits={validation: 0.3, test: 0.2}"]))
    rows = [CLEAN, again]
    held = {str(rows[i][n]) for i, p in enumerate(parts) for s in ("validation", "test") for n in p.rows[s]}
    expected = [sum(str(rows[i][n]) in held for n in p.rows["train"]) for i, p in enumerate(parts)]
    assert min(expected) > 0
    assert [account["findings"]["leaks"]["rows"] for account in report["datasets"]] == expected
    assert report["total"]["findings"]["leaks"]["rows"] == sum(expected)
    assert report["datasets"][1]["findings"]["exact_duplicates"]["rows"] == len(again) - 20
    note = report["datasets"][0]["findings"]["leaks"]["examples"][0]["note"]
    assert "row " in note
    assert ".jsonl" in note


def test_row_numbers_are_those_of_the_file(make: Any) -> None:
    rows = [*CLEAN, row("Bell?", "It \x07 rings.")]
    for seed in (1, 2, 3):
        account = audited(make(rows), "data.datasets=[{path: rows0.jsonl, rows: 30}]", f"data.seed={seed}")["datasets"][
            0
        ]
        assert account["rows"] == 30
        for example in account["findings"]["control_characters"]["examples"]:
            assert example["row"] == 41


def test_lengths_are_before_cutting_whatever_becomes_of_long_rows(make: Any) -> None:
    rows = [*CLEAN, row("Count.", " ".join(str(n) for n in range(200)))]
    reports = [audited(make(rows), f"data.on_too_long={way}")["datasets"][0] for way in ("truncate", "drop", "error")]
    assert reports[0]["lengths"] == reports[1]["lengths"] == reports[2]["lengths"]
    assert [r["cut"]["rows"] for r in reports] == [1, 0, 1]
    assert reports[1]["dropped"]["reasons"]["too_long"]["rows"] == 1
    whole = audited(make(rows), "data.max_length=128", "model.config.n_positions=128")["datasets"][0]["lengths"]
    assert whole == reports[0]["lengths"]


# -- a file of many kinds of rows ------------------------------------------------------------------------------------


def test_totals_of_a_file_against_an_independent_count(make: Any) -> None:
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    overrides = [f"data.datasets=[{{path: {ROWS}}}]", f"model.tokenizer={GPT2}", "data.max_length=1024"]
    overrides.append("model.config.n_positions=1024")
    path = make(CLEAN)
    account = audited(path, *overrides)["datasets"][0]
    tok = instructft.load_tokenizer(load_recipe(path, overrides))
    tokens = supervised = 0
    usable = [r for r in rows if r["output"].strip()]
    for r in usable:
        extra = f"\n\n### Input:\n{r['input'].strip()}" if r.get("input", "").strip() else ""
        prompt = f"### Instruction:\n{r['instruction'].strip()}{extra}\n\n### Response:\n"
        answer = len(tok(r["output"].strip() + tok.eos_token)["input_ids"])
        tokens += len(tok(prompt)["input_ids"]) + answer
        supervised += answer
    assert (account["rows"], account["tokens"], account["supervised_tokens"]) == (len(rows), tokens, supervised)
    assert account["turns"] == 2 * len(usable)
    texts = [tuple(r.get(k, "").strip() for k in ("instruction", "input", "output")) for r in usable]
    assert account["findings"]["exact_duplicates"]["rows"] == len(texts) - len(set(texts)) == 2
    one = sum(len(text[-1].split()) == 1 and text[-1].isascii() for text in texts)  # Japanese has no blanks
    assert account["findings"]["one_word_answers"]["rows"] == one
    assert account["findings"]["empty_answers"]["rows"] == len(rows) - len(usable) == 2


# -- the command -----------------------------------------------------------------------------------------------------


def schema(value: Any) -> Any:
    """The shape of a JSON value: keys and types, a list by its first element."""
    if isinstance(value, dict):
        return {key: schema(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [schema(value[0])] if value else []
    return type(value).__name__


def test_the_json_report(make: Any, run: Any) -> None:
    code, out, _ = run(make(CLEAN), "--json", "--tokens-per-second", "1000")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    found = schema(report)
    finding = {"examples": [], "rows": "int", "share": "float"}
    assert set(found) == {
        "schema",
        "recipe",
        "data",
        "training",
        "estimate",
        "measured",
        "rehearsal",
        "limits",
        "left_open",
        "remarks",
        "problems",
        "ok",
    }
    (data,) = found["data"]["datasets"]
    assert data["findings"] == dict.fromkeys(sorted(FINDINGS), finding)
    assert set(data) == {
        "name", "format", "rows", "splits", "turns", "tokens", "supervised_tokens", "supervised_share", "lengths",
        "cut", "dropped", "findings", "excluded",
    }  # fmt: skip
    assert set(found["data"]["total"]) == set(data) - {"name", "format"}
    assert found["training"] == {
        "dropped": {}, "packing": "NoneType", "rows": {"test": "int", "train": "int", "validation": "int"},
        "supervised_tokens": "int", "tokens": "int", "template_date": "NoneType",
        "hidden": {"left_out": {}, "not_folded": "str", **dict.fromkeys(
            ("last_tokens", "only_read", "tokens", "turns", "unrolled", "folded_rows", "folded_tokens"), "int")},
    }  # fmt: skip
    assert set(found["estimate"]) == {
        "device", "parameters", "memory", "host_memory", "batch", "exact", "schedule", "time", "precision",
    }  # fmt: skip
    assert set(found["estimate"]["memory"]) == {
        "weights", "gradients", "optimizer", "activations", "head", "communication", "allocator", "framework", "total",
    }  # fmt: skip
    assert set(found["estimate"]["time"]) == {"tokens_per_second", "source", "seconds"}
    assert report["estimate"]["time"]["seconds"] == report["estimate"]["schedule"]["total_tokens"] / 1000


def test_the_report_agrees_with_what_training_prepares(make: Any) -> None:
    path = make(CLEAN + [faulty for faulty, _ in PLANTED])
    everything = load_recipe(path, ["data.splits.validation=0", "data.train_on=everything"])
    whole = check(everything)
    assert whole["data"]["total"]["supervised_tokens"] == whole["training"]["supervised_tokens"]
    overrides = ["data.packing=true", "data.splits.validation=0.2"]
    recipe = load_recipe(path, overrides)
    report = check(recipe)
    data = prepare(recipe, instructft.load_tokenizer(recipe))
    assert report["training"]["rows"] == data.rows
    assert report["training"]["tokens"] == data.tokens["train"]
    packing = report["training"]["packing"]
    assert packing["packs"] == len(data.splits["train"])
    assert packing["fill"] == data.tokens["train"] / (64 * packing["packs"])
    kept = sum(data.rows.values()) + data.dropped["near_duplicate_of_held_out"]
    assert report["data"]["total"]["rows"] - report["data"]["total"]["dropped"]["rows"] == kept


def test_no_weight_is_loaded(make: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = make(CLEAN)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setattr("instructft.models.load.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    real = torch.nn.Parameter.__new__

    def only_shapes(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        kind = type(data).__name__
        # the optimizer of the recipe is made for a layer of four by four
        shapes_alone = data is None or data.device.type == "meta" or kind == "FakeTensor" or data.numel() <= 16
        assert shapes_alone, f"a weight was made: {kind}"
        return real(cls, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", only_shapes)
    assert run(config, "--json")[0] == 0


def test_what_people_read_fits_80_columns(make: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(make(CLEAN + [faulty for faulty, _ in PLANTED], CLEAN), "data.packing=true")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for words in (
        "rows0.jsonl (alpaca)",
        "all 2 data sets",
        "half a character",
        "repeat an earlier",
        "full",
        "unknown",
        "total",
    ):
        assert words in out
    assert not set("\x07\u202e\u200b") & set(out)


def test_limits_are_the_keys_of_the_recipe() -> None:
    assert list(LIMITS) == list(CheckSection.model_fields)


def test_a_passed_limit_is_named(make: Any) -> None:
    path = make(CLEAN + [faulty for faulty, _ in PLANTED])
    report = check(load_recipe(path))
    assert report["limits"] == []

    def found(*keys: str) -> dict[str, Any]:
        return {limit["key"]: limit for limit in limits(load_recipe(path, [f"check.{key}" for key in keys]), report)}

    some = found("max_dropped_share=0.01", "max_leaks=0", "max_markers=1", "max_memory_gib=1000")
    assert {key: limit["kept"] for key, limit in some.items()} == {
        "check.max_dropped_share": False, "check.max_leaks": True, "check.max_markers": False,
        "check.max_memory_gib": True,
    }  # fmt: skip
    assert some["check.max_markers"]["found"] == 2
    assert some["check.max_dropped_share"]["found"] == 5 / 71
    least = {name: "1e-9" if name == "max_memory_gib" else "0" for name in LIMITS}
    passed = [key for key, limit in found(*(f"{n}={v}" for n, v in least.items())).items() if not limit["kept"]]
    assert passed == [f"check.{name}" for name in LIMITS if name not in ("max_leaks", "max_refused_share")]


def test_a_passed_limit_is_exit_2(make: Any, run: Any) -> None:
    path = make([*CLEAN, CLEAN[0]], text=RECIPE.replace(NO_LIMITS, ""))
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("check: {max_duplicate_share: 0.001}\n")
    code, out, _ = run(path)
    assert code == 2
    assert "check.max_duplicate_share: found 0.02439, allowed 0.001" in " ".join(out.split())
    assert run(path, "check.max_duplicate_share=0.1")[0] == 0


def test_rows_that_the_recipe_leaves_out_are_in_no_figure(make: Any, tmp_path: Path) -> None:
    rows = [*CLEAN, row(CLEAN[3]["instruction"], "It is another number.")]
    path = make(rows)
    listed = tmp_path / "out.txt"
    listed.write_text(f"{row_id(rows[3])}\n{'0' * 16}\n")
    before, found = (
        audit(asked, instructft.load_tokenizer(asked))
        for asked in (load_recipe(path), load_recipe(path, [f"data.exclude={listed}"]))
    )
    assert [one["total"]["findings"]["contradictions"]["rows"] for one in (before, found)] == [2, 0]
    assert [one["total"]["rows"] for one in (before, found)] == [41, 40]
    assert found["datasets"][0]["excluded"] == found["total"]["excluded"] == 1
    assert "1 of the 2 ids in out.txt match no training row" in found["exclude"]
