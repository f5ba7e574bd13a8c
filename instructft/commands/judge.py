"""How good a model is, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from instructft.commands.options import ColumnsOption, ModelArgument, option, quiet_libraries
from instructft.errors import EXIT_FAILED, UsageError


def evaluate(
    model: ModelArgument,
    base: Annotated[
        str | None, option(help="A second model to compare with; `start`: what the run began from.")
    ] = None,
    data: Annotated[str | None, option(help="A file, or a recipe; default: the run's own recipe.")] = None,
    split: Annotated[str | None, option(help="train, validation or test; default: test, else validation.")] = None,
    limit: Annotated[int | None, option(help="Evaluate on this many rows.")] = None,
    columns: ColumnsOption = None,
    show: Annotated[int, typer.Option(help="Rows to show with question, expected answer and answers.")] = 10,
    json_file: Annotated[Path | None, option("--json", help="Write the results to this file.")] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="All checkpoints of a run in one table.")] = False,
    prompts: Annotated[bool, typer.Option("--prompts", help="Answer thirty built-in prompts, to be read.")] = False,
    tasks: Annotated[
        str | None, option(metavar="NAME,…", help="Tasks of lm-evaluation-harness (extra `eval`).")
    ] = None,
) -> None:
    """Measure a model on held-out rows; with --base, two side by side."""
    ways = {"--checkpoints": checkpoints, "--prompts": prompts, "--tasks": tasks is not None}
    chosen = [name for name, wanted in ways.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are different evaluations; choose one at a time")
    given = {"--base": base, "--data": data, "--split": split, "--limit": limit, "--columns": columns}
    useless = {"--checkpoints": ["--base"], "--prompts": ["--data", "--split", "--limit", "--columns"]}
    useless["--tasks"] = ["--data", "--split", "--columns"]
    for useless_option in useless[chosen[0]] if chosen else []:
        if given[useless_option] is not None:
            raise UsageError(f"{useless_option} has no effect with {chosen[0]}; leave it out")
    quiet_libraries()
    if tasks is not None:
        from instructft.extras.further_evaluation import run_tasks

        run_tasks(model, tasks, base=base, limit=limit, json_file=json_file)
    elif checkpoints:
        from instructft.data.formats import columns_asked
        from instructft.evaluation.compare import compare_checkpoints

        compare_checkpoints(model, data, split, limit, json_file, columns_asked(columns or ()))
    elif prompts:
        from instructft.extras.further_evaluation import read_prompts

        read_prompts(model, base, json_file)
    else:
        from instructft.data.formats import columns_asked
        from instructft.evaluation.compare import compare

        compare(model, base, data, split, limit, show, json_file, columns_asked(columns or ()))


def gate(
    model: ModelArgument,
    against: Annotated[
        str, typer.Option(help="The model to compare with; `start`: what the run began from.")
    ] = "start",
    suite: Annotated[
        list[str] | None,
        option(
            metavar="FILE|TASK …",
            help="Questions beside the task: names of suites that ship, files, tasks of lm-evaluation-harness (extra "
            "`eval`); default: all that ship.",
        ),
    ] = None,
    margin: Annotated[float, typer.Option(metavar="SHARE", help="What may be lost of those questions.")] = 0.05,
    data: Annotated[str | None, option(help="Rows of the task, a file or a recipe; default: the run's own.")] = None,
    limit: Annotated[int | None, option(help="Held-out rows at most; default: 200.")] = None,
    json_file: Annotated[Path | None, option("--json", help="Write the verdict and all answers to this file.")] = None,
) -> None:
    """Decide whether the task is up and the rest not down: exit code 0, or 1."""
    quiet_libraries()
    from instructft.evaluation import gate as room
    from instructft.evaluation.verdict import PASSED
    from instructft.extras.further_evaluation import scores_of

    if room.gate(model, against, suite or (), margin, data, limit, json_file, scores_of) != PASSED:
        raise typer.Exit(EXIT_FAILED)
