"""How good a model is, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from instructft.commands.options import ColumnsOption, ModelArgument, option, quiet_libraries, run_names
from instructft.errors import UsageError


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


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where runs lie.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects and nothing else.")] = False,
    sort: Annotated[
        str | None,
        option(metavar="KEY", help="Sort by a column or a figure; -KEY the other way. Default: -when."),
    ] = None,
) -> None:
    """The runs of a folder in one table: what was trained on what, how it ended, and how good it is."""
    from instructft.report.runs import show_runs

    show_runs(folder, as_json=as_json, sort=sort)


def compare(
    run: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Run folders, two or more.", autocompletion=run_names)
    ],
    html: Annotated[Path | None, option("--html", help="Also write one self-contained page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Two or more runs side by side: what differs in their recipes, their curves, figures and answers."""
    from instructft.evaluation.confidence import differences
    from instructft.report.compare import compare_runs

    compare_runs(run, html, as_json=as_json, differences=differences)
