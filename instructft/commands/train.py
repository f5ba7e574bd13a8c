"""A run, on one process or on many."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from instructft.commands.options import (
    Overrides,
    RecipeArgument,
    ResumeOption,
    StrategyOption,
    option,
    quiet_libraries,
    read_recipe,
)


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: ResumeOption = "auto",
    processes: Annotated[str, typer.Option(metavar="auto|N", help="auto is one for each GPU, one without.")] = "auto",
    no_rehearsal: Annotated[
        bool, typer.Option("--no-rehearsal", help="Begin without a try of the run on one short batch.")
    ] = False,
) -> None:
    """Train the model of a recipe; what comes out is its run folder. The same command again resumes a run.

    Where there are several GPUs, each gets a process, as with `instructft launch`.
    """
    import contextlib
    import signal

    from instructft.progress import RANKS, is_first
    from instructft.training.launch.signals import SIGNALS, listen

    ends = [number for number in SIGNALS if number != signal.SIGINT]  # of which Python makes KeyboardInterrupt
    listen(lambda number, _: sys.exit(128 + number), ends)  # until training listens itself
    loaded = read_recipe(recipe, overrides, here=True)

    from instructft.checkpoints.finished import finished_at_a_glance
    from instructft.checkpoints.manifest import full_disk_explained
    from instructft.checkpoints.run_folder import own
    from instructft.report.logs import lasting_output
    from instructft.training.launch.command import launch as launch_processes
    from instructft.training.launch.command import processes_of_train

    count, why = processes_of_train(loaded, processes)
    if why:
        print(why, flush=True)
    if count > 1:
        raise typer.Exit(
            launch_processes(recipe, overrides or [], processes=str(count), resume=resume, rehearsal=not no_rehearsal)
        )
    first = is_first()
    if not any(name in os.environ for name in RANKS) and resume == "auto" and (steps := finished_at_a_glance(loaded)):
        print(f"{loaded.output_dir} is finished, {steps:,} steps: there is nothing to resume")
        return
    mine = own(loaded, resume) if first else contextlib.nullcontext()  # what can be told without torch is told at once
    with lasting_output(), full_disk_explained(Path(loaded.output_dir)), mine:
        quiet_libraries()
        from instructft.training.run import train as run_training

        result = run_training(loaded, resume=resume, rehearsal=not no_rehearsal)
        if first:
            print_outcome(result)


def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Annotated[
        str, typer.Option(metavar="auto|N", help="On each machine; auto is one for each GPU, one without.")
    ] = "auto",
    strategy: StrategyOption = "ddp",
    context_parallel: Annotated[
        int, option(metavar="N", help="Processes that share each row, with fsdp2: for long rows.")
    ] = 1,
    machines: Annotated[int, typer.Option(min=1, help="That train together; each runs this command.")] = 1,
    machine_rank: Annotated[int | None, option(help="Which one this is, from 0.")] = None,
    main_address: Annotated[str | None, option(metavar="HOST", help="Of the machine of rank 0.")] = None,
    main_port: Annotated[int, typer.Option(min=1, max=65535, help="Of the same, with several machines.")] = 29500,
    resume: ResumeOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and run nothing.")] = False,
) -> None:
    """Train on several processes or machines: prints the `accelerate launch` command it stands for, and runs it."""
    from instructft.training.launch.command import launch as launch_processes

    code = launch_processes(
        recipe,
        overrides or [],
        processes=processes,
        strategy=strategy,
        context_parallel=context_parallel,
        machines=machines,
        machine_rank=machine_rank,
        main_address=main_address,
        main_port=main_port,
        resume=resume,
        dry_run=dry_run,
    )
    raise typer.Exit(code)


def print_outcome(result: Any) -> None:
    """The last lines of a run: how it went, where the model and its report lie, how to talk to it, what was pushed."""
    from rich.console import Console

    from instructft.formatting import clock, perplexity, typed

    console = Console(soft_wrap=True)
    facts, metrics = result.facts["train"], result.metrics
    parts = [f"{facts['steps']:,} steps in {clock(facts['seconds'])}", f"{facts['tokens_per_second']:,.0f} tokens/s"]
    if "eval_loss" in metrics:
        parts.append(f"validation loss {metrics['eval_loss']:.4f}, perplexity {perplexity(metrics['eval_loss'])}")
    if "evaluation_share" in facts:
        parts.append(f"evaluation took {facts['evaluation_share']:.0%} of the time")
    console.print("Done: " + " · ".join(parts), highlight=False)
    run = result.output_dir
    console.print(f"The model is in {run}.", markup=False, highlight=False)
    page = f"Read {typed(run / 'report.html')}, and talk to it:" if (run / "report.html").is_file() else "Talk to it:"
    console.print(f"{page}  instructft chat {typed(run)}", markup=False, highlight=False)
    if result.pushed is not None:
        console.print(str(result.pushed), markup=False, highlight=False)
