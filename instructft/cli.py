"""The command line: the commands, grouped by what one wants; one message and an exit code for each error."""

from __future__ import annotations

import inspect as inspection
import os
import sys
from typing import Annotated, Any

import typer

from instructft.commands.judge import compare, evaluate, gate, rows, runs, verify
from instructft.commands.prepare import check, docs, doctor, import_, init, inspect, prepare, recipes
from instructft.commands.share import convert, export, merge, push
from instructft.commands.train import launch, train
from instructft.commands.use import chat, generate, ui
from instructft.errors import EXIT_FAILED, InstructftError, UsageError, is_panic
from instructft.version import __version__

GROUPS = {
    "Prepare": (recipes, init, import_, check, inspect, prepare, doctor, docs),
    "Train": (train, launch),
    "Judge": (evaluate, gate, verify, rows, runs, compare),
    "Use": (chat, ui, generate),
    "Share": (merge, convert, export, push),
}


class Grouped(typer.core.TyperGroup):
    """Lists the commands under what one wants, with their first sentences whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # classes that typer keeps private
        for title, functions in GROUPS.items():
            named = [(function.__name__, self.commands[function.__name__]) for function in functions]
            with formatter.section(title):
                formatter.write_dl([(name, command.get_short_help_str(limit=200)) for name, command in named])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was typed; another tool's word for it is answered with ours."""
        if args and args[0] not in self.commands:
            from instructft.commands.peers import command_of

            if said := command_of(args[0], sorted(self.commands)):
                raise UsageError(said)
        return super().resolve_command(ctx, args)


class OfARecipe(typer.core.TyperCommand):
    """A command that takes `KEY=VALUE`; keys that are written as options are answered with how they are written."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        given = list(args)  # the parser takes words away
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # classes that typer keeps private
            if type(error).__name__ != "NoSuchOption":
                raise
            from instructft.commands.peers import keys_of

            known = {name for option in self.params for name in getattr(option, "opts", ())}
            if said := keys_of(str(self.name), given, known):
                raise UsageError(said) from None
            raise


app = typer.Typer(
    name="instructft",
    cls=Grouped,
    help="A YAML recipe in, a chat model you can trust out.",
    no_args_is_help=True,
    subcommand_metavar="COMMAND [ARGS]",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and errors: rich would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _functions in GROUPS.values():
    for _function in _functions:
        _takes_keys = "overrides" in inspection.signature(_function).parameters
        app.command(cls=OfARecipe if _takes_keys else None)(_function)


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
    """`--columns a=b c=d` and `--suite A B` as the parser takes them: with the option's name before each value.

    >>> _each_named(["evaluate", "run", "--columns", "a=b", "c=d", "--limit", "3"])
    ['evaluate', 'run', '--columns', 'a=b', '--columns', 'c=d', '--limit', '3']
    >>> _each_named(["gate", "run", "--suite", "facts", "ours.jsonl"])
    ['gate', 'run', '--suite', 'facts', '--suite', 'ours.jsonl']
    """
    named: list[str] = []
    for word in words:
        last = named[-2] if len(named) > 1 else ""
        if not word.startswith("-") and (last == "--suite" or (last == "--columns" and "=" in word)):
            named.append(last)
        named.append(word)
    return named


def main() -> None:
    """Run the command line; every error on purpose is one message on stderr and an exit code."""
    # Nothing is reported to anybody: not by this library, and not by those that it calls.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # On a CPU whose cores are shared, threads that wait by spinning slow small models 10 to 50 times. It has to be
    # said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("INSTRUCTFT_TRACEBACK") != "1":
        # a panic of the tokenizers library becomes a message of ours; its 200 lines of stack would bury that
        os.environ["RUST_BACKTRACE"] = "0"
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
