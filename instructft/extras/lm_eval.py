"""`instructft evaluate MODEL --tasks hellaswag,…`: public benchmarks, handed over to lm-evaluation-harness.

The harness (https://github.com/EleutherAI/lm-evaluation-harness, the extra `eval`) fetches the tasks, builds their
prompts and scores them; only the model is loaded here, as every other command loads it, adapters included.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructft.errors import UsageError
from instructft.evaluation.compare import ask_both, check_json, check_models, plain_table, write_json
from instructft.formatting import first_line
from instructft.inference.generator import Generator


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
    check_models(model, base)
    check_json(json_file)
    harness = _harness()
    manager = harness.tasks.TaskManager()
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UsageError(f"--tasks: lm-evaluation-harness knows no {', '.join(unknown)}; see lm_eval --tasks list")

    def judge(generator: Generator) -> dict[str, Any]:
        wrapped = harness.models.huggingface.HFLM(generator.model, tokenizer=generator.tokenizer, batch_size=8)
        found = harness.simple_evaluate(
            model=wrapped, tasks=names, limit=limit, task_manager=manager, apply_chat_template=True, log_samples=False
        )  # None on all processes but the first
        return {"tasks": found["results"] if found else {}, "harness": harness.__version__}

    results = ask_both(model, base, judge)
    write_json(json_file, results)
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


def _print(console: Any, results: Mapping[str, Any]) -> None:
    names = [name for name in ("base", "tuned") if name in results]
    titles = {"base": "before", "tuned": "after"}
    table = plain_table("task", "questions", "metric", *(titles[name] for name in names), left=3)
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
