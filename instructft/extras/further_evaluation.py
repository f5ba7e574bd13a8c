"""What judges a model beyond held-out rows: public benchmarks (`--tasks`), and answers to be read (`--prompts`).

lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, the extra `eval`) fetches the tasks, builds
their prompts and scores them; only the model is loaded here, as every other command loads it, adapters included. The
thirty prompts lie in `reading_prompts.json`, written for this project, Apache-2.0 like the rest of it; no figure
replaces reading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructft.errors import UsageError
from instructft.evaluation.compare import ask_both, check_json, check_models, write_json
from instructft.evaluation.metrics import answers_to
from instructft.formatting import first_line, plain_table
from instructft.inference.generator import Generator
from instructft.prompt.conversation import Message


def run_tasks(
    model: str, tasks: str, *, base: str | None = None, limit: int | None = None, json_file: Path | None = None
) -> None:
    """Run tasks of lm-evaluation-harness on a model, and on a second one beside it; print a table, write `json_file`.

    Questions are put through the model's chat template, as in every other command. The file holds `tuned` and, with
    `base`, `base`: each `tasks` (task -> metric -> value) under the harness's own names, and `harness`, its version.

    Args:
        tasks: names as the harness knows them, with commas between: `hellaswag,arc_easy`.
        limit: rows of each task at most; for a first look only.

    Example::

        run_tasks("runs/gpt2-dolly", "hellaswag", limit=100)
        # hellaswag  acc,none  0.2900 ± 0.0456
        # …

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
    harness, manager = _knows(names, "--tasks")

    def judge(generator: Generator) -> dict[str, Any]:
        found = _ask(harness, manager, generator, names, limit)
        return {"tasks": found.get("results", {}), "harness": harness.__version__}

    results = ask_both(model, base, judge)
    write_json(json_file, results)
    _print_tasks(Console(highlight=False), results)


SCORES = ("exact_match", "acc_norm", "acc", "f1", "em")  # figures of a question that are 0 to 1, the first that it has


def scores_of(names: Sequence[str]) -> Callable[[Generator], dict[str, dict[str, float]]]:
    """Asks tasks of lm-evaluation-harness question by question, for `instructft.evaluation.gate`.

    Returns:
        What takes a model and returns task -> question -> score from 0 to 1. A group comes as its tasks.

    Raises:
        UsageError: the harness is not installed, or knows no such task.
    """
    harness, manager = _knows(names, "--suite")

    def ask(generator: Generator) -> dict[str, dict[str, float]]:
        found = _ask(harness, manager, generator, list(names), None, log_samples=True)
        scores: dict[str, dict[str, float]] = {}
        for task, samples in found.get("samples", {}).items():
            figure = next((name for name in SCORES if samples and name in samples[0]), None)
            if figure is None:
                raise UsageError(f"--suite: {task} has no figure of a question among {', '.join(SCORES)}")
            filters = {str(sample.get("filter", "")) for sample in samples}  # each answer comes once for each
            scores[task] = {
                str(one["doc_id"]): float(one[figure]) for one in samples if str(one.get("filter", "")) == min(filters)
            }
        return scores

    return ask


def _ask(
    harness: Any, manager: Any, generator: Generator, names: list[str], limit: int | None, log_samples: bool = False
) -> dict[str, Any]:
    wrapped = harness.models.huggingface.HFLM(generator.model, tokenizer=generator.tokenizer, batch_size=8)
    found = harness.simple_evaluate(
        model=wrapped, tasks=names, limit=limit, task_manager=manager, apply_chat_template=True, log_samples=log_samples
    )
    return found or {}  # None on all processes but the first


def _knows(names: Sequence[str], option: str) -> tuple[Any, Any]:
    """The harness and its tasks, where it is installed and knows them all."""
    harness = _harness(option)
    manager = harness.tasks.TaskManager()
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UsageError(f"{option}: lm-evaluation-harness knows no {', '.join(unknown)}; see lm_eval --tasks list")
    return harness, manager


def _harness(option: str) -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UsageError(
            f"{option} needs lm-evaluation-harness, which is not installed "
            f"({first_line(error)}): pip install 'instructft[eval]'"
        ) from error
    return lm_eval


def _print_tasks(console: Any, results: Mapping[str, Any]) -> None:
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


MAX_NEW_TOKENS = 200


def reading_prompts() -> list[dict[str, str]]:
    """The thirty prompts, each with its `kind`.

    >>> reading_prompts()[0]
    {'kind': 'fact', 'prompt': 'What is the capital of Japan?'}
    """
    found: list[dict[str, str]] = json.loads(
        Path(__file__).with_name("reading_prompts.json").read_text(encoding="utf-8")
    )
    return found


def read_prompts(model: str, base: str | None = None, json_file: Path | None = None) -> None:
    """Print the answers to the built-in prompts, base and tuned below each other; write `json_file`.

    The file holds `tuned` and, with `base`, `base`: each `rows` of `kind`, `prompt`, `prediction`, `finish_reason`.

    Example::

        read_prompts("runs/gpt2-dolly", base="start")
        # [fact] What is the capital of Japan?
        #   before  …
        #   after   Tokyo.

    Raises:
        UsageError: no such model, or a base that cannot be told; before weights are loaded.
    """
    from rich.console import Console

    check_models(model, base)
    check_json(json_file)
    results = ask_both(model, base, lambda generator: {"rows": _answered(generator)})
    write_json(json_file, results)
    console = Console(highlight=False, soft_wrap=True)
    for i, row in enumerate(results["tuned"]["rows"]):
        console.print(f"\n[{row['kind']}] {row['prompt']}", markup=False, style="bold")
        if base:
            _print_answer(console, "before", results["base"]["rows"][i])
        _print_answer(console, "after " if base else "answer", row)


def _answered(generator: Generator) -> list[dict[str, Any]]:
    rows = reading_prompts()
    asked: list[list[Message]] = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    return [
        {**row, "prediction": answer.text, "finish_reason": answer.finish_reason}
        for row, answer in zip(rows, answers_to(generator, asked, MAX_NEW_TOKENS), strict=True)
    ]


def _print_answer(console: Any, who: str, row: dict[str, Any]) -> None:
    text = row["prediction"].replace("\n", "\n          ") or "(nothing)"
    console.print(f"  {who}  {text}{'' if row['finish_reason'] == 'stop' else ' …'}", markup=False)
