"""Every benchmark runs, at sizes at which its figures say nothing, so that none rots."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instructft
from tests.helpers.telling import telling

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script; they import each other by their plain names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def tiny(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a script with `--tiny` in this process; returns what it printed."""

    def run(name: str, *options: str) -> str:
        module = script(name)
        monkeypatch.setattr(sys, "argv", [name, "--tiny", *options])
        module.main()
        return capfd.readouterr().out

    return run


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in Markdown, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {i for i, line in enumerate(lines) for i in (i - 1, i) if re.fullmatch(r"[-:| ]+", line)}
    return [[cell.strip() for cell in line[1:-1].split("|")] for i, line in enumerate(lines) if i not in heads]


def number(cell: str) -> float:
    return float(cell.replace(",", "").rstrip("% "))


def test_train_cpu_compares_losses_and_prints_a_row_for_each(tiny: Any, script: Any) -> None:
    text = tiny("train_cpu")
    cases = script("train_cpu").CASES
    found = {(cells[0], cells[1]): cells for cells in rows(text)}
    assert list(found) == [(case, who) for case, contestants in cases.items() for who in contestants]
    assert all(number(cells[2]) > 0 for cells in found.values())
    assert [number(cells[4]) for (_, who), cells in found.items() if who == "plain loop"] == [100] * len(cases)
    gaps = re.findall(r"(plain loop|TRL|TRL, padding_free) (\d\.\de[-+]\d\d)", text)
    assert len(gaps) == 6  # TRL three times on our batches, the loop three times
    assert all(float(gap) < 1e-4 for _, gap in gaps)


def test_heads_agree_with_trls(tiny: Any) -> None:
    found = {cells[1]: cells for cells in rows(tiny("heads"))}
    assert {"TRL", "ours, operators", "recomputed", "Liger", "torch"} <= set(found)
    for name in ("ours, operators", "recomputed"):
        assert number(found[name][2]) > 0
        assert float(found[name][4]) < 1e-3
        assert float(found[name][5]) < 1e-2


def test_losses_that_differ_end_the_comparison(script: Any) -> None:
    compare = script("train_cpu").compare
    mine = {"losses": [2.0, 1.0], "entropy": [1.0, 1.0], "mean_token_accuracy": [0.0, 0.5]}
    assert "plain loop 5.0e-05" in compare("padded", {"instructft": mine, "plain loop": {"losses": [2.0, 1.00005]}})
    with pytest.raises(SystemExit, match="losses differ"):
        compare("padded", {"instructft": mine, "plain loop": {"losses": [2.0, 1.001]}})
    with pytest.raises(SystemExit, match="mean_token_accuracy differs"):
        compare("padded", {"instructft": mine, "TRL": {**mine, "mean_token_accuracy": [0.0, 0.6]}})


@pytest.mark.battery
def test_a_contestant_in_a_process_of_its_own(script: Any, tmp_path: Path) -> None:
    contestants = script("contestants")
    source, tokenizer = contestants.source_and_tokenizer(tmp_path, bundled=True)
    shape = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}
    task = contestants.Task(str(tmp_path), here=True, tokenizer=tokenizer, shape=shape)
    made = contestants.make(task, source, 8)
    assert made["body"] == 2 * 12 * 16 * 16  # attention 4 d², MLP 8 d²
    assert made["head"] == made["parameters"] - made["body"] - 64 * 16 - 2 * (4 + 9) * 16 - 2 * 16
    with pytest.raises(RuntimeError, match=r"prepare failed:[\s\S]*8 rows are too few for 10 steps of 8"):
        contestants.run(contestants.Task(str(tmp_path), which="prepare", tokenizer=tokenizer))


@pytest.mark.battery
def test_overheads(tiny: Any) -> None:
    text = tiny("overheads")
    for part in ("--help: ", "a recipe with a wrong key: ", "first step: ", "checkpoints: 4 times", "evaluation: "):
        assert part in text, part
    for how in ("waited for", "beside"):
        assert f"  {how}: training held up for " in text
    assert text.startswith("--help")


@pytest.mark.battery
def test_scaling(tiny: Any, tmp_path: Path) -> None:
    text = tiny("scaling", "--only", "batch,gpus", "--plots", str(tmp_path))
    found = rows(text)
    assert [cells[0] for cells in found] == ["1", "2", "Llama 8B"]
    assert "Estimated, not measured" in text
    assert [path.name for path in tmp_path.iterdir()] == ["batch.png"]


def test_scaling_tells_the_power_of_growth(script: Any) -> None:
    text = script("scaling").table("tokens", [(10, 1.0, ""), (20, 4.0, "")])
    assert rows(text)[-1][-1] == "2.00"


@pytest.mark.battery
def test_profile_of_a_step(tiny: Any) -> None:
    from instructft.training.trainer import Trainer

    before = dict(Trainer.__dict__)
    text = tiny("profile_step", "--steps", "2")
    assert dict(Trainer.__dict__) == before
    parts = {cells[0]: number(cells[2]) for cells in rows(text) if len(cells) == 3}
    assert {"forward: body, head and the head's gradient", "backward: body", "AdamW", "clipping"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(100, abs=1)
    assert all(share > 0 for share in parts.values())


@pytest.mark.battery  # what it counts, `tests/prompt/test_template_matrix.py` compares
def test_templates(tiny: Any) -> None:
    text = tiny("templates")
    assert "26 combinations" in text
    assert " 0 silently wrong" in text
    assert [row[0] for row in rows(text)] == ["cohere", "cohere2"]


def test_batches_are_compared_and_timed(tiny: Any) -> None:
    found = rows(tiny("batches"))
    assert [(cells[0], cells[1].split(",")[0]) for cells in found] == [
        (what, how) for what in ("rows, padded", "packs", "packs end to end") for how in ("lists", "slices")
    ]
    assert all(number(cells[3]) > 0 for cells in found)


@pytest.mark.parametrize("family", telling(["gemma3", "qwen3_moe", "rwkv"], "qwen3_moe"))
def test_a_family_goes_through_all_that_a_run_does(script: Any, tmp_path: Path, family: str) -> None:
    cells = script("family_cells")
    found = cells.of_family(family, tmp_path)
    verdicts = {column: found[column]["verdict"] for column in cells.COLUMNS}
    packed = "refused" if family == "rwkv" else "right"
    experts = "right" if family == "qwen3_moe" else "none"
    wanted = dict.fromkeys(cells.COLUMNS, "right") | {"packed": packed, "experts": experts}
    assert verdicts == wanted, found
    if family == "qwen3_moe":
        assert found["experts"]["share"] == 1
    if family == "rwkv":
        assert "see each other" in found["packed"]["text"]
        assert found["answers"]["text"].startswith("one at a time")


def test_a_step_that_is_not_the_models_own_is_found(script: Any, tmp_path: Path) -> None:
    cells = script("family_cells")
    bench = cells.Bench("gpt2", tmp_path)
    recipe = instructft.load_recipe(str(bench._recipe("rows")))
    data = instructft.prepare_dataset(recipe, instructft.load_tokenizer(recipe))
    reference = cells.Reference(cells.plain(bench.base), data)
    name = next(iter(reference.step))
    reference.step[name] = reference.step[name] * 1.1
    found = cells.full(bench, reference)
    assert found["verdict"] == "wrong"
    assert name in found["text"]


def test_the_table_of_families_says_each_note_once_and_leaves_none_out(script: Any) -> None:
    families = script("families")
    cell = {"verdict": "right", "text": ""}
    refused = {"verdict": "refused", "text": "Gpt (gpt2) lets documents of a pack see each other: 0.5"}
    whole = {"class": "Gpt", **dict.fromkeys(families.COLUMNS, cell)}
    dense = {"experts": {"verdict": "none", "text": ""}}
    results = {"gpt2": whole | dense, "opt": whole | {"packed": refused}, "rwkv": whole | {"packed": refused}}
    left = {"git": "a picture", "xlm": "refused: of type xlm cannot be trained to answer: a mask. Take another"}
    text = families.table(results | {family: {"family": family, "unbuilt": why} for family, why in left.items()})
    assert [row[0] for row in rows(text)] == ["`gpt2`, GPT-2", "`opt`", "`rwkv`"]
    assert all(all(row) for row in rows(text))
    assert text.count("see each other") == 1
    assert "Of 20 cells: 18 right, 2 refused, 0 wrong, 0 crash" in text
    assert "- `git`: a picture" in text
    assert "- `xlm`: a mask\n" in text
    assert "5 families, of which 3 are asked below, 1 are refused by their config, and 1 could not" in text


def test_the_page_of_models_has_no_fault() -> None:
    text = (FOLDER.parent / "docs" / "models.md").read_text(encoding="utf-8")
    found = [row for row in rows(text) if row[0].startswith("`")]
    assert len(found) > 100
    assert all(re.match(r"✓|refused|—", cell) for row in found for cell in row[1:])
