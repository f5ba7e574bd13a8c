"""How good a model is, in numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from instructft.commands.options import ColumnsOption, ModelArgument, option, quiet_libraries, run_names
from instructft.errors import EXIT_DONE, EXIT_FAILED, UsageError


def rows(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended.")],
    limit: Annotated[int, typer.Option("-n", "--rows", min=0, help="Rows of each kind to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    exclude: Annotated[
        Path | None, option(help="Write the ids of --kinds to this new file, which data.exclude takes.")
    ] = None,
    kinds: Annotated[
        str,
        typer.Option(metavar="NAME,…", help="never_learned, contradicting, at_once; hardest, longest: as many as -n."),
    ] = "never_learned,contradicting",
) -> None:
    """Show how each training row was learned: never, at once, against others."""
    from instructft.report.rows import tell_rows

    tell_rows(run, limit, as_json, exclude, [name.strip() for name in kinds.split(",") if name.strip()])


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
    max_new_tokens: Annotated[int | None, option(min=1, help="Tokens in an answer, at most; default: 256.")] = None,
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
    given["--max-new-tokens"] = max_new_tokens
    useless = {
        "--checkpoints": ["--base"],
        "--prompts": ["--data", "--split", "--limit", "--columns", "--max-new-tokens"],
    }
    useless["--tasks"] = ["--data", "--split", "--columns", "--max-new-tokens"]
    for useless_option in useless[chosen[0]] if chosen else []:
        if given[useless_option] is not None:
            raise UsageError(f"{useless_option} has no effect with {chosen[0]}; leave it out")
    quiet_libraries(model, base)
    if tasks is not None:
        from instructft.extras.further_evaluation import run_tasks

        run_tasks(model, tasks, base=base, limit=limit, json_file=json_file)
    elif checkpoints:
        from instructft.data.formats import columns_asked
        from instructft.evaluation.compare import compare_checkpoints

        compare_checkpoints(model, data, split, limit, json_file, columns_asked(columns or ()), max_new_tokens)
    elif prompts:
        from instructft.extras.further_evaluation import read_prompts

        read_prompts(model, base, json_file)
    else:
        from instructft.data.formats import columns_asked
        from instructft.evaluation.compare import compare

        compare(model, base, data, split, limit, show, json_file, columns_asked(columns or ()), max_new_tokens)


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
    quiet_libraries(model, against)
    from instructft.evaluation import gate as room
    from instructft.evaluation.verdict import PASSED
    from instructft.extras.further_evaluation import scores_of

    if room.gate(model, against, suite or (), margin, data, limit, json_file, scores_of) != PASSED:
        raise typer.Exit(EXIT_FAILED)


def verify(
    model: ModelArgument,
    server: Annotated[str, typer.Option(metavar="URL", help="A running server, as http://127.0.0.1:8000.")],
    api_key_env: Annotated[
        str | None, option(metavar="NAME", help="The environment variable that holds its API key.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Conversations whose prompts are compared.")] = 50,
    answers: Annotated[int | None, option(min=0, help="How many are also answered; default: half.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens in an answer, at most.")] = 32,
    name: Annotated[str | None, option(help="The model's name on a server that has several.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one request may take.")] = 120,
    json_file: Annotated[Path | None, option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Does a running server read and answer as the model was trained? If not: the first token that differs, and why."""
    from instructft.extras.serving.client import Client
    from instructft.extras.serving.servers import reach

    found = reach(Client(server, api_key_env, timeout), name)
    weights = f" ({found.weights})" if found.weights else ""
    print(
        f"server   {found.kind} {found.version}".rstrip() + f" at {found.client.url}: {found.model}{weights}",
        flush=True,
    )
    quiet_libraries(model)
    from instructft.extras.serving.verify import verify as verify_server
    from instructft.models.base_template import TemplateWatch

    watch = TemplateWatch(model)
    code = verify_server(model, found, rows, answers, max_new_tokens, json_file).exit_code
    if line := watch.said(patience=2):
        print(line, file=sys.stderr)
    if code != EXIT_DONE:
        raise typer.Exit(code)


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
