"""What several commands take, and what each does before it loads libraries."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

option = functools.partial(typer.Option, show_default=False)  # whose default is told by its help, or is none

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
    option(metavar="OURS=THEIRS …", help="Columns of the file, as instruction=question; default: as the run's recipe."),
]

StrategyOption = Annotated[
    str, typer.Option(metavar="ddp|fsdp2|zero2|zero3", help="ddp: each process holds the whole model; else divided.")
]


def quiet_libraries() -> None:
    """Their bars and notices are replaced by ours, and what they say to developers is not for users."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
