"""Before a run: shipped recipes, and what a recipe would do with its data, memory and time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from instructft.commands.options import (
    Overrides,
    RecipeArgument,
    StrategyOption,
    option,
    page_names,
    quiet_libraries,
    read_recipe,
    recipe_names,
)
from instructft.errors import EXIT_FAILED, EXIT_USAGE, UsageError


def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe, for editors.")] = False,
) -> None:
    """List the shipped recipes."""
    from instructft.recipe.json_schema import json_schema
    from instructft.recipe.shipped import recipe_purpose, shipped_recipes

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    found = shipped_recipes()
    width = max(map(len, found), default=0)
    for name, path in sorted(found.items()):
        print(f"{name:{width}}  {recipe_purpose(path)}")


def init(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A shipped recipe; or, with --data, FILE.",
            show_default=False,
            autocompletion=recipe_names,
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where to write; NAME.yaml if left out.", show_default=False)
    ] = None,
    data: Annotated[str | None, option(metavar="FILE", help="Rows of yours: JSON, JSONL, CSV, Parquet, …")] = None,
    model: Annotated[str | None, option(metavar="MODEL", help="What is to be trained: a folder or a Hub id.")] = None,
    goal: Annotated[
        str | None, option(metavar="lora|full|qlora", help="An adapter (the default), all weights, or 4-bit.")
    ] = None,
    columns: Annotated[
        list[str] | None, option(metavar="OURS=THEIRS …", help="Columns, as question=Frage; default: as they look.")
    ] = None,
) -> None:
    """Write a recipe for your own rows, with the reason of each number; or a shipped one, as a starting point."""
    from instructft.commands import asking

    wanted = asking.what_to_write(name, file, data, model, goal)
    if wanted.data is None:
        from instructft.recipe.shipped import write_shipped

        write_shipped(wanted.name, wanted.file)
        print(f"Wrote {wanted.file}. Train it with: instructft train {wanted.file}")
        return
    print(f"reading {wanted.data} …", flush=True)
    from instructft.check.first_recipe import look, write
    from instructft.data.formats import columns_asked

    found = look(
        wanted.data,
        wanted.model,
        wanted.goal,
        wanted.file,
        columns=columns_asked(columns or []),
        choose=asking.which if asking.in_terminal() else None,
    )
    quiet_libraries()
    write(found)
    print(f"\nWrote {wanted.file}. From here:\n\n  instructft check {wanted.file}\n  instructft train {wanted.file}")
    print(f"  instructft chat runs/{wanted.file.stem}")


def import_(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Of axolotl, LLaMA-Factory or `trl sft`.")],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Where to write; CONFIG's name with .yaml.", show_default=False),
    ] = None,
    prove: Annotated[
        bool | None, option("--prove/--no-prove", help="Compare 200 rows with TRL's; default: where they are here.")
    ] = None,
) -> None:
    """Make a recipe of another tool's configuration, and tell what has no counterpart."""
    from instructft.recipe.peers.imported import read

    target = file or Path(f"{config.stem}.yaml")
    if target.exists():
        hint = "" if file else f", as in: instructft import {config} {config.stem}-recipe.yaml"
        raise UsageError(f"{target} exists already; name another file{hint}")
    found = read(config, target.stem)
    written = found.write(target)
    print("\n".join(found.lines()))
    proved = _prove(found, target, prove)
    train = f"launch {target} --strategy {found.config.strategy}" if found.config.strategy else f"train {target}"
    print(f"\nWrote {' and '.join(map(str, written))}. From here:\n\n  instructft check {target}\n  instructft {train}")
    if not proved:
        raise typer.Exit(EXIT_FAILED)


def _prove(found: Any, recipe: Path, asked: bool | None) -> bool:
    """Compare rows with TRL's own, where that was asked for, or rows and tokenizer are on this machine."""
    if found.tool != "TRL":
        if asked:
            raise UsageError(f"--prove: rows are compared with TRL's, which is installed; this is {found.tool}'s")
        return True
    here = not found.problems and "path" in found.config.draft.values["data"]["datasets"][0]
    if asked is False or (asked is None and not (here and Path(str(found.values["model_name_or_path"])).is_dir())):
        return True
    from instructft.recipe.load import load_recipe

    loaded = load_recipe(recipe)
    quiet_libraries()
    from instructft.check.against_trl import compare

    try:
        equal, lines = compare(loaded, found.values)
    except UsageError as error:
        equal, lines = not asked, [f"not compared: {error}"]
    print("\n".join(lines))
    return equal


import_.__name__ = "import"  # a word of Python's own; this is what the command is called


def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    tokens_per_second: Annotated[
        float | None, option(min=1e-9, help="Speed to reckon the time by; default: the last run's.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Find out by real steps here what fits, and how fast it is.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Load the model, and try on one short batch all that a run does.")
    ] = False,
    device: Annotated[str | None, option(help="cpu or cuda; default: where it would train here.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 1,
    devices: Annotated[int | None, option(min=1, help="GPUs that are not here: memory and hours on paper.")] = None,
    card: Annotated[str, typer.Option(metavar="h100|h200|a100", help="Which, with --devices.")] = "h100",
    strategy: StrategyOption = "ddp",
) -> None:
    """Validate a recipe, audit its data, estimate memory and time; nothing is trained."""
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device: found {device}, expected cpu or cuda")
    here = device is None and devices is None
    loaded = read_recipe(recipe, overrides, here=here)
    from instructft.checkpoints.run_folder import refuse_what_is_no_run
    from instructft.training.launch.command import STRATEGIES

    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy: found {strategy}, expected one of {', '.join(STRATEGIES)}")
    if measure and (device is not None or processes > 1):
        raise UsageError("--measure takes steps on this machine, in one process; leave out --device and --processes")
    if rehearse and (device is not None or processes > 1 or devices is not None):
        raise UsageError(
            "--rehearse loads the model on this machine, in one process; leave out --device, --devices and --processes"
        )
    asked: dict[str, Any] = {"device": device, "processes": processes, "strategy": strategy}
    asked |= {"measure": measure, "rehearse": rehearse}
    if devices is not None:
        from instructft.models.several_devices import CARDS

        if card not in CARDS:
            raise UsageError(f"--card: found {card}, expected {', '.join(CARDS)}")
        if measure or processes > 1 or device == "cpu":
            raise UsageError("--devices is for GPUs that are not here; leave out --measure, --processes, --device cpu")
        asked |= {"device": "cuda", "processes": devices, "card": card}
    if here:
        refuse_what_is_no_run(Path(loaded.output_dir))
    quiet_libraries()
    from instructft.check.report import run

    if not run(loaded, as_json, tokens_per_second=tokens_per_second, **asked):
        raise typer.Exit(EXIT_USAGE)


def inspect(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Rows to show, drawn by data.seed.")] = 3,
    row: Annotated[list[int] | None, option("--row", help="Show this row, counted from 1; may be given again.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    ids: Annotated[bool, typer.Option("--ids", help="Show each token above its id.")] = False,
    html: Annotated[Path | None, option("--html", help="Write one self-contained page to this file.")] = None,
) -> None:
    """Show rows token by token: which carry loss, where documents begin in a pack."""
    loaded = read_recipe(recipe, overrides)
    quiet_libraries()
    from instructft.check.rows import inspect_rows

    inspect_rows(loaded, split, count, row or (), ids, html)


def prepare(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Tokenize, mask, split, pack and cache the data once, ahead of a run."""
    import time

    loaded = read_recipe(recipe, overrides)
    quiet_libraries()
    from instructft.data.prepare import prepare as prepare_data
    from instructft.models.branches import why_not
    from instructft.models.starting_point import starting_point
    from instructft.models.tokenizer import date_in_prompts, load_tokenizer, said_of_date
    from instructft.training.arguments import follow_model

    began = time.perf_counter()
    tokenizer = load_tokenizer(loaded)
    origin = starting_point(loaded, tokenizer)
    loaded, _ = follow_model(loaded, origin.config)
    data = prepare_data(loaded, tokenizer, lambda: why_not(loaded, origin.config))
    seconds = time.perf_counter() - began
    day = date_in_prompts(loaded, tokenizer)
    lines = [*data.account(loaded.data.max_length), *([("date", said_of_date(day))] if day else [])]
    for what, how_much in [*lines, ("fingerprint", data.fingerprint)]:
        print(f"{what:12} {how_much}")
    files = [file["filename"] for split in data.splits.values() for file in split.cache_files]
    print(f"{'cache':12} {Path(files[0]).parent if files else 'none needed: these rows are made in memory'}")
    print(f"{'time':12} {seconds:.1f} s, {sum(data.tokens.values()) / seconds:,.0f} tokens/s")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """What this machine has, what works on it and what is missing: to be pasted into a bug report."""
    from instructft.check.doctor import doctor as examine_machine

    examine_machine(as_json=as_json)


def docs(
    page: Annotated[
        str | None, typer.Argument(metavar="[PAGE]", help="Left out: the list of pages.", autocompletion=page_names)
    ] = None,
) -> None:
    """A page of the documentation, here in the terminal."""
    from instructft.extras.documentation import show_page

    show_page(page)
