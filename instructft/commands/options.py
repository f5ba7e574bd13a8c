"""What several commands take, and what each does before it loads libraries."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Annotated

import typer

from instructft.errors import UsageError
from instructft.progress import say

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe

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

TemperatureOption = Annotated[float, typer.Option("--temperature", "--temp", help="0 is greedy.")]

TopPOption = Annotated[float, typer.Option("--top-p", "--top_p", help="Nucleus sampling.")]

MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "--max", help="Tokens in an answer, at most.")]

ColumnsOption = Annotated[
    list[str] | None,
    option(metavar="OURS=THEIRS …", help="Columns of the file, as instruction=question; default: as the run's recipe."),
]

StrategyOption = Annotated[
    str, typer.Option(metavar="ddp|fsdp2|zero2|zero3", help="ddp: each process holds the whole model; else divided.")
]


def read_recipe(recipe: str, overrides: list[str] | None, here: bool = False) -> Recipe:
    """The recipe of a command, with a first sign of life; what can be told of it without torch is told here.

    Args:
        here: it is to be trained on this machine.

    Raises:
        UsageError: the recipe is wrong, or what it names is not there or not installed.
    """
    say(f"reading {recipe} …")
    from instructft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from instructft.models.first_look import refuse_at_a_glance

    refuse_at_a_glance(loaded, here)
    return loaded


def quiet_libraries(*models: str | None) -> None:
    """Load torch and its kin, and say so first; their bars and notices are replaced by ours.

    Args:
        models: that the command will load, or None and `start`, which name none; looked for before anything is loaded.

    Raises:
        UsageError: a model is not there, as far as this machine knows without the network; with what is near.
    """
    named = [model for model in models if model not in (None, "start")]
    if named:
        from instructft.models.first_look import look_for_the_hub, missing

        for model in named:
            if why := missing(str(model), bare=False):
                raise UsageError(why)
        if said := look_for_the_hub(map(str, named)):
            say(said)
    names = ["torch", "transformers", *map(str, named[:1])]
    say(f"loading {', '.join(names[:-1])} and {names[-1]} …")
    if named:
        from instructft.models.load_for_inference import locate

        for model in named:
            locate(str(model))
    import logging
    import warnings

    # what they say to developers is not for users
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # each request that fails is told with its name and reason; of its tries nobody need hear
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
