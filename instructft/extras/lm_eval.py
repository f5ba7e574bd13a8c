"""`instructft evaluate MODEL --tasks hellaswag,…`: public benchmarks, handed over to lm-evaluation-harness.

The harness (https://github.com/EleutherAI/lm-evaluation-harness, the extra `eval`) fetches the tasks, builds their
prompts and scores them; here only the model is loaded, as every other command loads it, adapters included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructft.errors import UsageError
from instructft.evaluation.compare import json_place
from instructft.formatting import first_line
from instructft.inference.chat import Generator, load_for_inference, locate
from instructft.inference.reference_model import ReferenceModel, check_base


def run_tasks(
    model: str, tasks: str, *, base: str | None = None, limit: int | None = None, json_file: Path | None = None
) -> None:
    """Run tasks of lm-evaluation-harness on a model, and on a second one beside it; print a table, write `json_file`.

    Questions are put through the model's chat template, as in every other command. The file holds `tuned` and, with
    `base`, `base`: each `tasks` (task -> metric -> value) under the harness's own names, and `harness`, its version.

    Args:
        tasks: names as the harness knows them, with commas between: `hellaswag,arc_easy`.
        limit: rows of each task at most; for a first look only.

    >>> run_tasks("runs/gpt2-dolly", "hellaswag", limit=100)
    hellaswag  acc,none  0.2900 ± 0.0456
    …

    Raises:
        UsageError: the harness is not installed, no such model, or a task that it does not know; before weights are
            loaded.
    """
    from rich.console import Console

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--tasks: found {tasks!r}, expected names with commas between, such as hellaswag,arc_easy")
    locate(model)
    if base:
        check_base(model, base)
    json_place(json_file)
    harness = _harness()
    manager = harness.tasks.TaskManager()
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UsageError(f"--tasks: lm-evaluation-harness knows no {', '.join(unknown)}; see lm_eval --tasks list")

    tuned = Generator(*load_for_inference(model))
    results = {"tuned": _run(harness, manager, tuned, names, limit)}
    if base:
        with ReferenceModel.of(model, base, tuned).answering() as other:
            results["base"] = _run(harness, manager, other, names, limit)
    if json_file:
        json_file.write_text(json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    _print(Console(highlight=False), results)


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UsageError(
            "--tasks needs lm-evaluation-harness, which is not installed "
            f"({first_line(error)}): pip install 'instructft[eval]'"
        ) from error
    return lm_eval


def _run(harness: Any, manager: Any, asked: Generator, tasks: list[str], limit: int | None) -> dict[str, Any]:
    """The results of one model: `tasks` and `harness`."""
    wrapped = harness.models.huggingface.HFLM(pretrained=asked.model, tokenizer=asked.tokenizer, batch_size=8)
    found = harness.simple_evaluate(
        model=wrapped, tasks=tasks, limit=limit, task_manager=manager, apply_chat_template=True, log_samples=False
    )
    if found is None:  # on all processes but the first
        return {"tasks": {}, "harness": harness.__version__}
    return {"tasks": found["results"], "harness": harness.__version__}


def _print(console: Any, results: Mapping[str, Any]) -> None:
    from rich.table import Table

    names = [name for name in ("base", "tuned") if name in results]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("task", "questions", "metric", *({"base": "before", "tuned": "after"}[name] for name in names)):
        table.add_column(title)
    for task, figures in results["tuned"]["tasks"].items():
        for metric in figures:
            head, comma, kind = metric.partition(",")
            if not comma or head.endswith("_stderr"):  # a name, a count
                continue
            cells = []
            for name in names:
                found = results[name]["tasks"].get(task, {})
                value, error = found.get(metric), found.get(f"{head}_stderr,{kind}")
                text = f"{value:.4f}" if isinstance(value, float) else str(value)
                cells.append(f"{text} ± {error:.4f}" if isinstance(error, float) else text)
            table.add_row(task, str(figures.get("sample_len", "")), metric, *cells)
    console.print(table)
