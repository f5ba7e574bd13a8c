"""The gate asks both models the same, counts what it says it counts, and leaves its verdict where people look."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instructft.commands import judge
from instructft.errors import DataError, UsageError
from instructft.evaluation import compare as compare_module
from instructft.evaluation import gate as module
from instructft.evaluation.gate import gate
from instructft.evaluation.suites import Question
from instructft.evaluation.verdict import MARGIN
from instructft.inference import reference_model
from instructft.inference.generator import Generator
from instructft.inference.reference_model import START
from tests.helpers.evaluation import row

CARD = "# A run\n\n## Use\n\n```python\n```\n"
PAGE = "<main><!-- verdict --><!-- /verdict --><!-- judged --><!-- /judged --><h2>The data</h2></main>"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Eighty questions of two suites, answers of two tokens."""
    rows = [
        {"suite": ("known", "sums")[i % 2], "messages": [{"role": "user", "content": f"What is {i} + 1?"}],
         "check": {"number": i + 1}, "max_new_tokens": 2, "known": i % 2 == 0}
        for i in range(80)
    ]  # fmt: skip
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(moved_run: Path) -> Path:
    """A run folder with a card and a page."""
    (moved_run / "run.json").write_text("{}", encoding="utf-8")
    (moved_run / "README.md").write_text(CARD, encoding="utf-8")
    (moved_run / "report.html").write_text(PAGE, encoding="utf-8")
    return moved_run


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Two models whose losses and answers are given; neither is loaded."""

    def script(after: Callable[[int], bool], before: Callable[[int], bool], loss: Sequence[float] = (1.0, 2.0)) -> None:
        ours, theirs = (SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict), loss=one) for one in loss)

        def ask_both(model: str, base: str, ask: Any) -> dict[str, Any]:
            return {"tuned": ask(ours), "base": ask(theirs)}

        def evaluate(generator: Any, rows: Any, **_: Any) -> dict[str, Any]:
            return {"rows": [row(nll=generator.loss + i % 3 / 10) for i in range(30)]}

        def answers(generator: Any, questions: Sequence[Question], temperature: float = 0.0) -> dict[str, str]:
            right = after if generator is ours else before
            return {q.id: str(q.check["number"]) if right(int(q.check["number"]) - 1) else "no idea" for q in questions}

        for name, function in (("ask_both", ask_both), ("evaluate", evaluate), ("_answers", answers)):
            monkeypatch.setattr(module, name, function)
        monkeypatch.setattr(module, "_as_served", lambda generator, model, against: generator)

    return script


def test_two_models_are_asked_and_the_run_says_so(
    run: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "ANSWER_TOKENS", 4)
    said = gate(str(run), suites=[str(suite)], limit=12, json_file=tmp_path / "new" / "found.json")
    found = json.loads((run / "gate.json").read_text(encoding="utf-8"))
    assert found == json.loads((tmp_path / "new" / "found.json").read_text(encoding="utf-8"))
    assert said == found["verdict"]
    assert found["against"] == "start"
    assert found["task"]["rows"] == 12
    assert found["task"]["loss"]["after"] != found["task"]["loss"]["before"]
    assert found["not_known"] == 40  # a model of random weights knows no sum
    assert found["rest"]["questions"] == 40
    assert "model.safetensors" in found["files"]
    assert str(tmp_path) not in json.dumps(found)
    assert [one["prompt"] for one in found["rows"]] == [f"What is {i} + 1?" for i in range(80)]
    card = (run / "README.md").read_text(encoding="utf-8")
    assert f"## Gate\n\n**{said.capitalize()}**, against start:" in card
    assert card.index("## Gate") < card.index("## Use")
    assert "The gate" in (run / "report.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert out.startswith("gate: 12 held-out rows and 80 questions")
    assert "40 questions do not count" in out
    assert "nothing here that could be lost" in " ".join(out.split())


def test_the_same_model_loses_nothing_and_its_task_is_not_up(run: Path, suite: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    shutil.copytree(run, same)
    (same / "run.json").unlink()
    assert gate(str(same), against=str(run), suites=[str(suite)], limit=12) == "not passed"
    assert not (same / "gate.json").exists()  # no run's own folder


@pytest.mark.parametrize(
    ("after", "loss", "expected", "reason"),
    [
        (lambda i: True, (1.0, 2.0), "passed", "the task is up: loss"),
        (lambda i: i % 4 > 1, (1.0, 2.0), "not passed", "the rest is down: -50.0%"),
        (lambda i: True, (2.0, 2.0), "not passed", "the task is not up"),
        (lambda i: True, (2.0, 1.0), "not passed", "the task is down: loss"),
        (lambda i: i % 20 != 3, (1.0, 2.0), "too few", "would do"),
    ],
)
def test_verdicts(
    after: Callable[[int], bool], loss: Sequence[float], expected: str, reason: str, run: Path, suite: Path,
    scripted: Callable[..., None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    few = expected == "too few"  # as many come as go, on a tenth of the questions
    scripted(after, lambda i: not few or i % 20 != 7, loss)
    margin = 0.03 if few else 0.1
    assert gate(str(run), suites=[str(suite)], margin=margin) == expected
    out = " ".join(capsys.readouterr().out.split())
    assert f"{expected.upper()} in" in out
    assert reason in out
    if "down" in reason and "rest" in reason:
        assert "lost: What is" in out


@pytest.mark.parametrize(("later", "expected"), [(True, "passed"), (False, "not passed")])
def test_where_the_first_questions_cannot_tell_further_ones_are_asked_once(
    later: bool, expected: str, run: Path, suite: Path, scripted: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked: list[str] = []

    def more(names: Sequence[str]) -> list[Question]:
        asked.append(names[0])
        messages = [{"role": "user", "content": "?"}]
        return [Question(f"more-{i}", "sums", messages, {"number": i + 1001}, 2, False) for i in range(600)]

    monkeypatch.setattr(module, "further", more)
    scripted(lambda i: i % 20 != 3 if i < 900 else later, lambda i: i % 20 != 7)
    assert gate(str(run), suites=[str(suite)], margin=0.03) == expected
    assert asked == [str(suite)]
    found = json.loads((run / "gate.json").read_text(encoding="utf-8"))
    assert found["rest"]["questions"] == len(found["rows"]) - found["not_known"] > 670
    assert found["rest"]["suites"]["sums"]["questions"] == 640
    assert "questions cannot tell; 600 further ones are asked" in " ".join(capsys.readouterr().out.split())


def test_of_what_a_model_knew_only_that_counts(run: Path, suite: Path, scripted: Callable[..., None]) -> None:
    scripted(lambda i: False, lambda i: i % 4 == 0)  # half of `known`, and no sum
    gate(str(run), suites=[str(suite)])
    found = json.loads((run / "gate.json").read_text(encoding="utf-8"))
    assert found["not_known"] == 20
    known, sums = (found["rest"]["suites"][name] for name in ("known", "sums"))
    assert (known["questions"], known["before"], known["after"]) == (20, 1.0, 0.0)
    assert (sums["questions"], sums["before"]) == (40, 0.0)
    assert found["rest"]["lost"] == ["known"]


def test_tasks_of_another_tool_count_by_their_questions(run: Path, suite: Path, scripted: Callable[..., None]) -> None:
    scripted(lambda i: True, lambda i: True)
    scores = iter([{"arc": {str(i): float(i >= 20) for i in range(60)}}, {"arc": {str(i): 1.0 for i in range(80)}}])
    named: list[Any] = []

    def other_tasks(names: Sequence[str]) -> Any:
        named.append(list(names))
        return lambda generator: next(scores)

    assert gate(str(run), suites=[str(suite), "arc"], other_tasks=other_tasks) == "not passed"
    assert named == [["arc"]]
    arc = json.loads((run / "gate.json").read_text(encoding="utf-8"))["rest"]["suites"]["arc"]
    assert (arc["questions"], arc["before"]) == (60, 1.0)
    assert arc["after"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("usable", [True, False])
def test_the_other_model_is_asked_by_its_own_template(
    usable: bool, run: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that template can be used at all: one that never ends an answer cannot."""
    template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token if usable }} {% endfor %}a:"
    template = template.replace("eos_token if usable", "eos_token" if usable else "''")
    base = tmp_path / "base"
    shutil.copytree(run, base)
    (base / "chat_template.jinja").write_text(template, "utf-8")
    asked: list[tuple[str, str]] = []

    def answers(generator: Generator, questions: Sequence[Question], temperature: float = 0.0) -> dict[str, str]:
        ids = generator.encoder.prompts([questions[0].messages])[0]
        asked.append((generator.tokenizer.decode(ids), str(temperature)))
        return {question.id: "" for question in questions}

    monkeypatch.setattr(module, "_answers", answers)
    monkeypatch.setattr(module, "ANSWER_TOKENS", 2)
    gate(str(run), against=str(base), suites=[str(suite)], limit=10)
    assert [text.startswith("u: What is") for text, _ in asked] == [False, usable, usable]
    assert [heat for _, heat in asked] == ["0.0", "0.0", "0.7"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure."""

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(compare_module, "load_for_inference", refuse)
    for name in ("load_for_inference", "load_bare", "load_model"):
        monkeypatch.setattr(reference_model, name, refuse)


@pytest.mark.usefixtures("no_model")
def test_what_is_wrong_is_said_before_weights_are_loaded(run: Path, suite: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "recipe.yaml").unlink()
    for model, options, message in [
        ("./none", {}, "there is no model folder ./none"),
        (run, {"against": "./none"}, "there is no model folder ./none"),
        (bare, {}, "--against start needs a run folder"),
        (bare, {"against": str(run)}, "there is no recipe.yaml beside this model; .*--data FILE"),
        (run, {"margin": 0.0}, "--margin: found 0, expected a share above 0"),
        (run, {"margin": 5.0}, "--margin: found 5, expected"),
        (run, {"limit": 0}, "--limit: found 0"),
        (run, {"suites": ["fact"]}, 'there is no suite fact; did you mean "facts"'),
        (run, {"suites": ["none.jsonl"]}, "there is no file none.jsonl"),
        (run, {"json_file": tmp_path}, "--json: .* is a folder"),
    ]:
        with pytest.raises((UsageError, DataError), match=message):
            gate(str(model), **options)


def test_what_help_says_is_what_happens() -> None:
    """`--help` waits for no numpy, so the defaults stand there once more."""
    asked = inspect.signature(judge.gate).parameters
    assert asked["margin"].default == MARGIN
    assert asked["against"].default == START
    assert f"default: {module.ROWS}." in asked["limit"].annotation


def test_exit_codes(run: Path, suite: Path, scripted: Callable[..., None]) -> None:
    from typer.testing import CliRunner

    from instructft.cli import app

    def code(*words: str) -> int:
        found = CliRunner().invoke(app, ["gate", str(run), "--suite", str(suite), *words])
        return found.exception.exit_code if isinstance(found.exception, UsageError) else found.exit_code

    scripted(lambda i: True, lambda i: True)
    assert code("--margin", "0.1") == 0
    scripted(lambda i: False, lambda i: True)
    assert code() == 1
    scripted(lambda i: i % 20 != 3, lambda i: i % 20 != 7)
    assert code("--margin", "0.03") == 1
    assert code("--margin", "3") == 2
