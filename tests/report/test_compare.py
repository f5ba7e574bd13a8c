"""Runs side by side: what differs and nothing else, what cannot be compared is said, and the page obeys no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import UsageError
from instructft.evaluation.confidence import differences
from instructft.report.compare import compare_runs, read_sides, recipe_differences
from tests.helpers.browser import Watched, browser
from tests.helpers.report import EVIL, LINES, Read, facts_of, fill

RECIPE = "model: {{name_or_path: org/base}}\ntrain: {{learning_rate: {rate}, seed: 42}}\noutput_dir: {out}\n{more}"

pytestmark = pytest.mark.drawn


def a_run(folder: Path, rate: str = "1e-4", answers: str = "Hi", more: str = "", **changes: Any) -> Path:
    fill(folder, LINES, [(0, "Hello", "blub"), (40, "Hello", answers)])
    (folder / "recipe.yaml").write_text(RECIPE.format(rate=rate, out=folder, more=more), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(facts_of(**changes)), encoding="utf-8")
    return folder


def evaluated(run: Path, right: int) -> Path:
    rows = [
        {"prompt": f"Q{i}", "reference": "yes", "prediction": "yes" if i < right else "no", "nll": 1.0,
         "supervised_tokens": 2, "answer_tokens": 1, "reference_tokens": 1, "finish_reason": "stop", "repeated": 0.0,
         "rougeL": float(i < right)} for i in range(40)
    ]  # fmt: skip
    side = {"loss": 0.5, "exact_match": right / 40, "intervals": {"exact_match": [0.1, 0.9]}, "rows": rows}
    (run / "evaluation.json").write_text(json.dumps({"tuned": side}), encoding="utf-8")
    return run


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    one = a_run(tmp_path / "a" / "run")
    other = a_run(tmp_path / "b" / "run", "2e-4", more="samples: [Hello]\ncheck: {max_leaks: 3}\n")
    sides = read_sides([str(one), str(other)])
    assert [side.name for side in sides] == ["a/run", "b/run"]
    assert recipe_differences(sides) == {
        "train.learning_rate": [1e-4, 2e-4],
        "samples": ["not there", ["Hello"]],
        "check.max_leaks": ["not there", 3],
    }


def compared(capsys: pytest.CaptureFixture[str], *runs: Path, **more: Any) -> dict[str, Any]:
    compare_runs([str(run) for run in runs], as_json=True, differences=differences, **more)
    return json.loads(capsys.readouterr().out)


def test_figures_have_intervals_and_noise_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [evaluated(a_run(tmp_path / name), right) for name, right in (("first", 10), ("same", 11), ("better", 35))]
    found = compared(capsys, *runs)["figures"]["exact_match"]
    assert [one["value"] for one in found] == [10 / 40, 11 / 40, 35 / 40]
    assert found[0]["interval"] == [0.1, 0.9]
    assert found[1]["against_first"]["noise"]
    assert not found[2]["against_first"]["noise"]
    compare_runs([str(run) for run in runs], differences=differences)
    said = capsys.readouterr().out
    assert "noise)" in said
    assert "87.5% (against the first: +" in said


def test_what_does_not_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluated(a_run(tmp_path / "one"), 3)
    warned = [{"step": 7, "kind": "diverged", "text": "the run has diverged"}]
    other = a_run(tmp_path / "other", data__fingerprint="ffff", versions={"torch": "2.14.0"}, warnings=warned)
    broken = a_run(tmp_path / "broken")
    (broken / "run.json").write_text("{", encoding="utf-8")
    (broken / "recipe.yaml").write_bytes(b"\xff")
    found = compared(capsys, one, other, broken)
    said = "\n".join(found["notes"])
    for part in (
        "their losses do not compare", "Not evaluated: other, broken", "other, step 7: the run has diverged",
        "broken: run.json cannot be read", "broken: recipe.yaml cannot be read",
    ):  # fmt: skip
        assert part in said
    assert found["made with"]["versions.torch"] == ["2.13.0", "2.14.0", None]
    assert found["recipe"] == {}
    assert found["overview"]["training loss"] == ["1.2500", "1.2500", "2.0000"]  # of the broken one by its log


@pytest.mark.parametrize(
    ("names", "said"),
    [(["one"], "two runs or more"), (["one", "oen"], 'did you mean "one"'), (["one", "./one"], "named twice"),
     (["one", "empty"], "holds no run"), (["one"] * 9, "8 runs at most")],
)  # fmt: skip
def test_what_is_no_pair_of_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=said):
        compare_runs(names)


def test_the_page_is_one_file_and_obeys_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "data: {datasets: [{url: 'https://ada:pw@host.example/rows.jsonl?key=K3y'}]}\n"
    one = evaluated(a_run(tmp_path / "secret" / "one", "1e-4", EVIL, secret), 10)
    other = evaluated(a_run(tmp_path / "secret" / "other", "2e-4", EVIL, versions={"torch": EVIL}), 35)
    (one / "gate.json").write_text(
        json.dumps({"passed": True, "rest": {"suites": {EVIL: {"after": 0.5}}, "lost": []}}), encoding="utf-8"
    )
    html = tmp_path / "pages" / "compare.html"
    compare_runs([str(one), str(other)], html, differences=differences)
    assert str(html) in capsys.readouterr().out
    text = html.read_text(encoding="utf-8")
    read = Read(text)
    assert not {"script", "img", "link", "iframe", "object", "base", "a", "form"} & set(read.tags)
    assert read.links == []
    assert not set(text) & set("\x1b\u202e\x00")
    assert "default-src 'none'" in text
    for private in (str(tmp_path), "secret", "K3y", "ada:pw"):
        assert private not in text
    for part in ("train.learning_rate", "0.0002", "87.5%", "Q10", "Hello", "the gate"):
        assert part in read.text
    assert read.tags.count("svg") == 4
    assert ">Q0<" not in text  # answered alike: there is room for those that are not
    with browser() as chromium:
        for width in (1280, 390):
            watched = Watched(chromium, width)
            watched.page.goto(f"file://{html}")
            assert not watched.scrolls_sideways
            assert watched.complaints == []
            assert watched.requests == [f"file://{html}"]
