"""What several commands take, and what each does before it loads libraries."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from instructft.errors import UsageError
from instructft.progress import say

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe

option = functools.partial(typer.Option, show_default=False)  # whose default is told by its help, or is none

_RUN_FILES = ("instructft.json", "run.json", "adapter_config.json", "config.json")


def recipe_names(incomplete: str) -> list[str]:
    """What a RECIPE that is begun may become: a shipped one, or a YAML file or a folder on the way to one."""
    from instructft.recipe.shipped import shipped_recipes

    shipped = [name for name in shipped_recipes() if name.startswith(incomplete)]
    return shipped + [path for path in _paths(incomplete) if path.endswith((".yaml", ".yml", "/"))]


def run_names(incomplete: str) -> list[str]:
    """What a MODEL or a RUN that is begun may become: a run folder in runs/, or a folder on the way to one."""
    runs = [path.rstrip("/") for path in _paths("runs/") if _is_model(path)] if Path("runs").is_dir() else []
    found = [path for path in runs if path.startswith(incomplete)]
    folders = [path.rstrip("/") if _is_model(path) else path for path in _paths(incomplete) if path.endswith("/")]
    return found + [path for path in folders if path not in found]


def page_names(incomplete: str) -> list[str]:
    """What a page of the documentation that is begun may be called."""
    from instructft.extras.documentation import pages

    return [name for name in pages() if name.startswith(incomplete)]


def _paths(incomplete: str) -> list[str]:
    """Files, and folders with a slash behind them, that a path may become."""
    folder, _, name = incomplete.rpartition("/")
    begin = f"{folder}/" if "/" in incomplete else ""
    try:
        inner = sorted(Path(begin or ".").expanduser().iterdir())
    except OSError:
        return []
    found = [path for path in inner if path.name.startswith(name) and (name or not path.name.startswith("."))]
    return [f"{begin}{path.name}{'/' if path.is_dir() else ''}" for path in found]


def _is_model(path: str) -> bool:
    return any((Path(path).expanduser() / name).is_file() for name in _RUN_FILES)


RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", autocompletion=recipe_names),
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Override recipe keys, as train.learning_rate=1e-4.", show_default=False),
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run folder, a checkpoint in it, any model folder, or a Hub id.",
        autocompletion=run_names,
    ),
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

    from instructft.hub.commit import limit_waits

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    limit_waits()
