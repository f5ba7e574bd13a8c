"""Public benchmarks are handed over to lm-evaluation-harness, stood in."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import UsageError
from instructft.extras.further_evaluation import run_tasks, scores_of
from instructft.inference.generator import Generator
from instructft.models.load_for_inference import load_for_inference


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in with the names, arguments and shapes of lm_eval 0.4.9; returns the calls of `simple_evaluate`."""
    calls: list[dict[str, Any]] = []

    class HFLM:
        def __init__(self, pretrained: Any, *, tokenizer: Any = None, batch_size: Any = 1, max_length: Any = None):
            self.pretrained, self.tokenizer = pretrained, tokenizer

    class TaskManager:
        def match_tasks(self, task_list: list[str]) -> list[str]:
            return [name for name in ("arc_easy", "hellaswag") if name in task_list]

    def simple_evaluate(
        model: Any, model_args: Any = None, tasks: Any = None, *, batch_size: Any = None, limit: Any = None,
        log_samples: bool = True, apply_chat_template: bool = False, task_manager: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        assert isinstance(model, HFLM)
        calls.append({"tasks": tasks, "limit": limit, "chat": apply_chat_template, "model": model})
        weight = float(next(model.pretrained.parameters()).detach().abs().mean())
        figures = {
            "alias": "x",
            "name": "x",
            "sample_len": 73,
            "acc,none": weight,
            "acc_stderr,none": 0.25,
            "acc_norm,none": 0.5,
        }
        results = {name: {**figures, "acc_norm_stderr,none": "N/A"} for name in tasks}
        if not log_samples:
            return {"results": results, "versions": {}}
        kinds = [("strict", 0.0), ("flexible", 1.0)] if "arc_easy" in tasks else [("none", 1.0)]
        samples = [
            {"doc_id": i, "filter": kind, "acc": 0.0, "acc_norm": right} for kind, right in kinds for i in range(3)
        ]
        return {"results": results, "samples": dict.fromkeys(tasks, samples), "versions": {}}

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.tasks")}
    hf: Any = types.ModuleType("lm_eval.models.huggingface")
    top: Any = modules["lm_eval"]
    top.simple_evaluate, top.__version__ = simple_evaluate, "0.4.9"
    top.models, top.tasks = modules["lm_eval.models"], modules["lm_eval.tasks"]
    top.models.huggingface, hf.HFLM, top.tasks.TaskManager = hf, HFLM, TaskManager
    for name, module in {**modules, "lm_eval.models.huggingface": hf}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tasks_are_handed_over(
    moved_run: Path, tmp_path: Path, harness: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    bigger = tmp_path / "bigger"
    shutil.copytree(moved_run, bigger)
    run_tasks(str(moved_run), "hellaswag, arc_easy", base=str(bigger), limit=5, json_file=tmp_path / "t.json")
    assert [(call["tasks"], call["limit"], call["chat"]) for call in harness] == [
        (["hellaswag", "arc_easy"], 5, True)
    ] * 2  # fmt: skip
    assert harness[0]["model"].tokenizer.chat_template
    results = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert results["tuned"]["harness"] == "0.4.9"
    value = results["tuned"]["tasks"]["hellaswag"]["acc,none"]
    assert results["base"]["tasks"]["arc_easy"]["acc,none"] == value > 0
    out = capsys.readouterr().out
    assert f"{value:.4f} ± 0.2500" in out
    assert "acc_norm,none" in out
    assert [line.split()[1:3] for line in out.splitlines() if "acc" in line][:1] == [["73", "acc,none"]]
    assert "stderr" not in out
    with pytest.raises(UsageError, match="knows no hellaswagg"):
        run_tasks(str(moved_run), "hellaswagg")
    with pytest.raises(UsageError, match="expected names with commas"):
        run_tasks(str(moved_run), " , ")


def test_without_the_harness_the_extra_is_named(moved_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"not installed .*pip install 'instructft\[eval\]'"):
        run_tasks(str(moved_run), "hellaswag")


def test_questions_of_a_task_one_by_one(moved_run: Path, harness: list[dict[str, Any]]) -> None:
    """Normed accuracy goes first; of several ways to read an answer one is taken."""
    generator = Generator(*load_for_inference(str(moved_run)))
    assert scores_of(["hellaswag"])(generator) == {"hellaswag": {"0": 1.0, "1": 1.0, "2": 1.0}}
    assert scores_of(["arc_easy"])(generator) == {"arc_easy": {"0": 1.0, "1": 1.0, "2": 1.0}}
    assert harness[0]["chat"]
    with pytest.raises(UsageError, match="--suite: lm-evaluation-harness knows no hellaswagg"):
        scores_of(["hellaswagg"])
