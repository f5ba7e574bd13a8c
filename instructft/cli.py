"""The command line: one function a command. Heavy imports stand inside, so that `--help` never waits for torch."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from instructft.errors import EXIT_FAILED, EXIT_USAGE, InstructftError, UsageError, is_panic
from instructft.version import __version__

app = typer.Typer(
    name="instructft",
    help="A YAML recipe in, a chat model you can trust out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and errors: rich would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)

_option = functools.partial(typer.Option, show_default=False)  # whose default is told by its help, or is none

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Override recipe keys, as train.learning_rate=1e-4.", show_default=False),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint in it, any model folder, or a Hub id.")
]
ResumeOption = Annotated[
    str,
    typer.Option(
        metavar="auto|never|CHECKPOINT",
        help="auto resumes from the newest checkpoint that verifies; never wants an empty run folder.",
    ),
]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option(help="Nucleus sampling.")]
MaxNewTokensOption = Annotated[int, typer.Option(help="Tokens in an answer, at most.")]
ColumnsOption = Annotated[
    list[str] | None,
    _option(
        metavar="OURS=THEIRS …", help="Columns of the file, as instruction=question; default: as the run's recipe."
    ),
]
StrategyOption = Annotated[
    str, typer.Option(metavar="ddp|fsdp2|zero2|zero3", help="ddp: each process holds the whole model; else divided.")
]


@app.command()
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

    from instructft.checkpoints.manifest import full_disk_explained
    from instructft.checkpoints.run_folder import own
    from instructft.launch.command import RANKS, processes_of_train
    from instructft.launch.command import launch as launch_processes
    from instructft.launch.signals import SIGNALS, listen
    from instructft.recipe.load import load_recipe
    from instructft.report.logs import lasting_output

    ends = [number for number in SIGNALS if number != signal.SIGINT]  # of which Python makes KeyboardInterrupt
    listen(lambda number, _: sys.exit(128 + number), ends)  # until training listens itself
    loaded = load_recipe(recipe, overrides or [])
    count, why = processes_of_train(loaded, processes)
    if why:
        print(why, flush=True)
    if count > 1:
        raise typer.Exit(
            launch_processes(recipe, overrides or [], processes=str(count), resume=resume, rehearsal=not no_rehearsal)
        )
    first = next((int(os.environ[name]) for name in RANKS if name in os.environ), 0) == 0
    mine = own(loaded, resume) if first else contextlib.nullcontext()  # what can be told without torch is told at once
    with lasting_output(), full_disk_explained(Path(loaded.output_dir)), mine:
        _quiet_libraries()
        from instructft.training.run import train as run_training

        result = run_training(loaded, resume=resume, rehearsal=not no_rehearsal)
        if first:
            _print_outcome(result)


@app.command()
def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Annotated[
        str, typer.Option(metavar="auto|N", help="On each machine; auto is one for each GPU, one without.")
    ] = "auto",
    strategy: StrategyOption = "ddp",
    machines: Annotated[int, typer.Option(min=1, help="That train together; each runs this command.")] = 1,
    machine_rank: Annotated[int | None, _option(help="Which one this is, from 0.")] = None,
    main_address: Annotated[str | None, _option(metavar="HOST", help="Of the machine of rank 0.")] = None,
    main_port: Annotated[int, typer.Option(min=1, max=65535, help="Of the same, with several machines.")] = 29500,
    resume: ResumeOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and run nothing.")] = False,
) -> None:
    """Train on several processes or machines: prints the `accelerate launch` command it stands for, and runs it."""
    from instructft.launch.command import launch as launch_processes

    code = launch_processes(
        recipe,
        overrides or [],
        processes=processes,
        strategy=strategy,
        machines=machines,
        machine_rank=machine_rank,
        main_address=main_address,
        main_port=main_port,
        resume=resume,
        dry_run=dry_run,
    )
    raise typer.Exit(code)


@app.command()
def prepare(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Tokenize, mask, split, pack and cache the data once, ahead of a run."""
    import time

    from instructft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _quiet_libraries()
    from instructft.data.prepare import prepare as prepare_data
    from instructft.models.branches import why_not
    from instructft.models.starting_point import starting_point
    from instructft.models.tokenizer import date_in_prompts, load_tokenizer, said_of_date

    began = time.perf_counter()
    tokenizer = load_tokenizer(loaded)
    origin = starting_point(loaded, tokenizer)
    data = prepare_data(loaded, tokenizer, lambda: why_not(loaded, origin.config))
    seconds = time.perf_counter() - began
    day = date_in_prompts(loaded, tokenizer)
    lines = [*data.account(loaded.data.max_length), *([("date", said_of_date(day))] if day else [])]
    for what, how_much in [*lines, ("fingerprint", data.fingerprint)]:
        print(f"{what:12} {how_much}")
    files = [file["filename"] for split in data.splits.values() for file in split.cache_files]
    print(f"{'cache':12} {Path(files[0]).parent if files else 'none needed: these rows are made in memory'}")
    print(f"{'time':12} {seconds:.1f} s, {sum(data.tokens.values()) / seconds:,.0f} tokens/s")


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    tokens_per_second: Annotated[
        float | None, _option(min=1e-9, help="Speed to reckon the time by; default: the last run's.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Find out by real steps here what fits, and how fast it is.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Load the model, and try on one short batch all that a run does.")
    ] = False,
    device: Annotated[str | None, _option(help="cpu or cuda; default: where it would train here.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 1,
    devices: Annotated[int | None, _option(min=1, help="GPUs that are not here: memory and hours on paper.")] = None,
    card: Annotated[str, typer.Option(metavar="h100|h200|a100", help="Which, with --devices.")] = "h100",
    strategy: StrategyOption = "ddp",
) -> None:
    """Validate a recipe, audit its data, estimate memory and time; nothing is trained."""
    from instructft.launch.command import STRATEGIES
    from instructft.recipe.load import load_recipe

    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device: found {device}, expected cpu or cuda")
    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy: found {strategy}, expected one of {', '.join(STRATEGIES)}")
    loaded = load_recipe(recipe, overrides or [])
    _quiet_libraries()
    from instructft.check.report import run

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
    if not run(loaded, as_json, tokens_per_second=tokens_per_second, **asked):
        raise typer.Exit(EXIT_USAGE)


def _print_outcome(result: Any) -> None:
    from rich.console import Console

    from instructft.formatting import clock, perplexity

    console = Console(soft_wrap=True)
    facts, metrics = result.facts["train"], result.metrics
    parts = [f"{facts['steps']:,} steps in {clock(facts['seconds'])}", f"{facts['tokens_per_second']:,.0f} tokens/s"]
    if "eval_loss" in metrics:
        parts.append(f"validation loss {metrics['eval_loss']:.4f}, perplexity {perplexity(metrics['eval_loss'])}")
    console.print("Done: " + " · ".join(parts), highlight=False)
    console.print(
        f"The model is in {result.output_dir}. Talk to it:\n\n  instructft chat {result.output_dir}\n",
        markup=False,
        highlight=False,
    )
    if result.pushed is not None:
        console.print(str(result.pushed), markup=False, highlight=False)


@app.command()
def inspect(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Rows to show, drawn by data.seed.")] = 3,
    row: Annotated[
        list[int] | None, _option("--row", help="Show this row, counted from 1; may be given again.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    ids: Annotated[bool, typer.Option("--ids", help="Show each token above its id.")] = False,
    html: Annotated[Path | None, _option("--html", help="Write one self-contained page to this file.")] = None,
) -> None:
    """Show rows token by token: which carry loss, where documents begin in a pack."""
    from instructft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _quiet_libraries()
    from instructft.check.rows import inspect_rows

    inspect_rows(loaded, split, count, row or (), ids, html)


@app.command()
def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe, for editors.")] = False,
) -> None:
    """List the shipped recipes."""
    from instructft.recipe.json_schema import json_schema
    from instructft.recipe.load import recipe_purpose, shipped_recipes

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    found = shipped_recipes()
    width = max(map(len, found), default=0)
    for name, path in sorted(found.items()):
        print(f"{name:{width}}  {recipe_purpose(path)}")


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe; `instructft recipes` lists them.")],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Where to write it; NAME.yaml if left out.", show_default=False),
    ] = None,
) -> None:
    """Write a shipped recipe to a file, as a starting point."""
    from instructft.recipe.load import shipped_recipes

    found = shipped_recipes()
    if name not in found:
        raise UsageError(f"there is no shipped recipe {name}; there is {', '.join(sorted(found))}")
    target = file or Path(f"{name}.yaml")
    if target.exists():
        raise UsageError(f"{target} exists already; name another file")
    target.write_text(found[name].read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Wrote {target}. Train it with: instructft train {target}")


@app.command()
def chat(
    model: ModelArgument,
    system: Annotated[str | None, _option(help="A system prompt.")] = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 256,
    base: Annotated[str, typer.Option(help="What /compare asks; `start`: what the run began from.")] = "start",
) -> None:
    """Talk to a model in the terminal."""
    _quiet_libraries()
    from instructft.inference.chat import Chat
    from instructft.inference.terminal import converse

    told = Chat(model, system=system, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    converse(told, model, base)


@app.command()
def ui(
    model: ModelArgument,
    port: Annotated[int | None, _option(min=1, max=65535, help="On 127.0.0.1; default: a free one.")] = None,
    base: Annotated[str | None, _option(help="A model to compare with; default: what the run began from.")] = None,
    system: Annotated[str, _option(help="A system prompt to begin with.")] = "",
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 256,
    share: Annotated[bool, typer.Option("--share", help="Also make a public link, through Gradio's servers.")] = False,
) -> None:
    """Talk to a model on a page in the browser, served on this machine only."""
    _quiet_libraries()
    from instructft.inference.web import Settings, serve

    settings = Settings(system, temperature, top_p, max_new_tokens)
    serve(model, port=port, share=share, base=base, settings=settings)


@app.command()
def generate(
    model: ModelArgument,
    input: Annotated[Path, typer.Option("--input", help="JSONL: messages, prompt, or instruction with input/context.")],
    output: Annotated[Path, typer.Option("--output", help="JSONL: each row with response and finish_reason.")],
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    batch_size: Annotated[str, typer.Option(help="Prompts answered at once, or auto.")] = "auto",
    base: Annotated[
        str | None, _option(help="A second model, for base_response; `start`: what the run began from.")
    ] = None,
    backend: Annotated[str, typer.Option(help="transformers, or vllm where it is installed.")] = "transformers",
    columns: ColumnsOption = None,
) -> None:
    """Answer a file of prompts. The same command again resumes where it stopped."""
    from instructft.data.formats import columns_asked

    mapped = columns_asked(columns or ())
    from instructft.inference.generate_file import generate_file

    _quiet_libraries()
    generate_file(model, input, output, max_new_tokens, temperature, top_p, batch_size, base, backend, mapped)


@app.command()
def evaluate(
    model: ModelArgument,
    base: Annotated[
        str | None, _option(help="A second model to compare with; `start`: what the run began from.")
    ] = None,
    data: Annotated[str | None, _option(help="A file, or a recipe; default: the run's own recipe.")] = None,
    split: Annotated[str | None, _option(help="train, validation or test; default: test, else validation.")] = None,
    limit: Annotated[int | None, _option(help="Evaluate on this many rows.")] = None,
    columns: ColumnsOption = None,
    show: Annotated[int, typer.Option(help="Rows to show with question, expected answer and answers.")] = 10,
    json_file: Annotated[Path | None, _option("--json", help="Write the results to this file.")] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="All checkpoints of a run in one table.")] = False,
    prompts: Annotated[bool, typer.Option("--prompts", help="Answer thirty built-in prompts, to be read.")] = False,
    tasks: Annotated[
        str | None, _option(metavar="NAME,…", help="Tasks of lm-evaluation-harness (extra `eval`).")
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
    for option in useless[chosen[0]] if chosen else []:
        if given[option] is not None:
            raise UsageError(f"{option} has no effect with {chosen[0]}; leave it out")
    _quiet_libraries()
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


@app.command()
def merge(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run folder, a checkpoint in it, an adapter folder."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new or empty folder for the merged model.")],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove that the merged model answers as the adapter does.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="auto (the base's), float32, bfloat16 or float16.")] = "auto",
    rounding: Annotated[
        str, typer.Option(help="To bfloat16: nearest, stochastic, or auto, which takes what loses less.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of one weight file.")] = "5GB",
    measure_quantized: Annotated[
        bool, typer.Option("--measure-quantized", help="Also compare with the adapter on its quantized base.")
    ] = False,
    into: Annotated[
        str, typer.Option(help="Of a QLoRA adapter: original (the published base), or dequantized (as it was trained).")
    ] = "original",
) -> None:
    """Merge a LoRA adapter into its base, shard by shard, and prove it."""
    from instructft.checkpoints.run_folder import refuse_used

    refuse_used(output)
    _quiet_libraries()
    from instructft.merging.merge import merge_adapter

    merge_adapter(
        model,
        output,
        verify=verify,
        dtype=dtype,
        rounding=rounding,
        max_shard_size=max_shard_size,
        measure_quantized=measure_quantized,
        into=into,
    )


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT.pt", help="A GPT-2 state dict of torch.save, as nanoGPT's ckpt.pt.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new or empty folder for the converted model.")],
    n_head: Annotated[int | None, _option(min=1, help="Attention heads, where the file does not say.")] = None,
    activation: Annotated[
        str | None,
        _option(
            metavar="gelu|gelu_new|relu",
            help="Of the MLP: exact GELU, tanh GELU, ReLU; default: as the code that writes such files has it.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, _option(metavar="FOLDER|HUB_ID", help="A tokenizer to save with the model.")
    ] = None,
    keep_padding: Annotated[
        bool, typer.Option("--keep-padding", help="Keep embedding rows that belong to no token.")
    ] = False,
) -> None:
    """Make a `from_pretrained` folder of a GPT-2 state dict in nanoGPT's layout and its kin, and prove it."""
    from instructft.checkpoints.run_folder import refuse_used

    refuse_used(output)
    _quiet_libraries()
    from instructft.extras.convert.convert import convert as convert_checkpoint

    convert_checkpoint(
        checkpoint, output, n_head=n_head, activation=activation, tokenizer=tokenizer, keep_padding=keep_padding
    )


@app.command()
def push(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run folder, a checkpoint in it, an adapter folder, any model folder."),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to, as org/name; made where there is none.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who may see it. Private never goes into a public repository.")
    ] = True,
    path_in_repo: Annotated[str | None, _option(metavar="FOLDER", help="A folder in the repository.")] = None,
) -> None:
    """Upload model, tokenizer, chat template and model card to the Hub, in one commit, and read it back."""
    _quiet_libraries()
    from instructft.hub.push import push_to_hub

    pushed = push_to_hub(model, repo_id, private=private, path_in_repo=path_in_repo)
    if pushed.left_out:
        print("left out: " + ", ".join(f"{name} ({why})" for name, why in sorted(pushed.left_out.items())))
    print(pushed)


def _quiet_libraries() -> None:
    """Their bars and notices are replaced by ours, and what they say to developers is not for users."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _version(value: bool) -> None:
    if value:
        print(f"instructft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With any command: let a model run its own code.")
    ] = False,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="With train: resume from another's checkpoint that can run code.")
    ] = False,
) -> None:
    if trust_remote_code:
        from instructft.weights import remote_code

        remote_code.allow()
    if trust_checkpoint:
        from instructft.checkpoints import pickles

        pickles.trust()


def _each_named(words: list[str]) -> list[str]:
    """`--columns a=b c=d` as the parser takes it: with the option's name before each pair.

    >>> _each_named(["evaluate", "run", "--columns", "a=b", "c=d", "--limit", "3"])
    ['evaluate', 'run', '--columns', 'a=b', '--columns', 'c=d', '--limit', '3']
    """
    named: list[str] = []
    for word in words:
        if named[-2:-1] == ["--columns"] and "=" in word and not word.startswith("-"):
            named.append("--columns")
        named.append(word)
    return named


def main() -> None:
    """Run the command line; every error on purpose is one message on stderr and an exit code."""
    # Nothing is reported to anybody: not by this library, and not by those that it calls.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # On a CPU whose cores are shared, threads that wait by spinning slow small models 10 to 50 times. It has to be
    # said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # a log in ASCII is no reason to end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        # may stand behind any command
        trust = sorted({word for word in sys.argv[1:] if word in ("--trust-remote-code", "--trust-checkpoint")})
        app([*trust, *_each_named([word for word in sys.argv[1:] if word not in trust])])
    except InstructftError as error:
        if os.environ.get("INSTRUCTFT_TRACEBACK") == "1":
            raise
        print(f"instructft: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if os.environ.get("INSTRUCTFT_TRACEBACK") == "1" or not (isinstance(error, Exception) or is_panic(error)):
            raise
        print(
            f"instructft: {type(error).__name__}: {error}\nSet INSTRUCTFT_TRACEBACK=1 to see where it happened.",
            file=sys.stderr,
        )
        sys.exit(EXIT_FAILED)
