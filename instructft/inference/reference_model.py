"""The model that another one is compared with: what its run began from, or any model that is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from instructft.adapters.adapter_folder import AdapterFolder, is_adapter
from instructft.adapters.attach import leaves_base_as_it_is
from instructft.adapters.lora import fit_embeddings
from instructft.errors import ModelError, UsageError
from instructft.inference.generator import Generator
from instructft.models.load import load_model
from instructft.models.load_for_inference import (
    find_adapter,
    load_bare,
    load_bare_tokenizer,
    load_base,
    load_for_inference,
    locate,
    with_template,
)
from instructft.recipe.load import load_run_recipe
from instructft.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START = "start"  # the model that the run began from


def recipe_of(model: str) -> Recipe | None:
    """The recipe in a run folder, also when a checkpoint in it was named."""
    folder = Path(model).expanduser()
    for place in (folder, folder.resolve().parent):
        if (place / "recipe.yaml").is_file():
            return load_run_recipe(place)
    return None


class ReferenceModel:
    """The model that `tuned` is compared with: loaded when it is first asked for, and kept.

    What an adapter began from is the tuned model itself with the adapter switched off: its base is in memory once.
    Where that is not exact, the base is loaded anew.
    """

    def __init__(self, base: str, recipe: Recipe | None, tuned: Generator, adapter: AdapterFolder | None):
        self.base, self.recipe, self.tuned, self.adapter = base, recipe, tuned, adapter
        self._loaded: Generator | None = None
        if base == START and recipe is not None and recipe.model.name_or_path:
            began = Path(recipe.model.name_or_path).expanduser() / (recipe.model.subfolder or "")
            if is_adapter(began):  # what was trained was an adapter already
                self.adapter = None

    @classmethod
    def of(cls, model: str, base: str, tuned: Generator) -> ReferenceModel:
        """What the model that was loaded from `model` is compared with; nothing is loaded yet.

        Raises:
            UsageError: no such base, or `start` where nothing says what the model began from.
        """
        recipe, adapter = check_base(model, base)
        return cls(base, recipe, tuned, adapter)

    @contextmanager
    def answering(self) -> Iterator[Generator]:
        """The model, for as long as it is asked. `tuned` answers as itself again afterwards, and not before."""
        if self.base == START and self.adapter is not None and leaves_base_as_it_is(self.adapter):
            with self.tuned.model.disable_adapter():
                yield Generator(self.tuned.model, self.tuned.tokenizer)
            return
        if self._loaded is None:
            self._loaded = self._load()
        yield self._loaded

    def _load(self) -> Generator:
        """One of the same family is asked exactly as the tuned one is, another in its own way.

        Of the same family is one whose vocabulary is that of the tuned model, perhaps without tokens that training
        added; their embeddings start as they did in training.
        """
        tuned = self.tuned
        if self.base == START and self.adapter is not None:
            model = load_base(self.adapter)
            fit_embeddings(model, self.adapter.base.vocab_size)
            return Generator(model, tuned.tokenizer)
        if self.base == START:
            assert self.recipe is not None
            start = load_model(self.recipe, tuned.tokenizer)
            placed = start if self.recipe.model.quantization != "none" else start.to(tuned.model.device)
            return Generator(placed.eval(), tuned.tokenizer)
        model, tokenizer = load_bare(self.base)
        if tokenizer.get_vocab().items() <= tuned.tokenizer.get_vocab().items():
            if find_adapter(self.base) is None:  # an adapter brings its own rows
                fit_embeddings(model, len(tuned.tokenizer))
            return Generator(model, tuned.tokenizer)
        return Generator(*load_for_inference(self.base))


def own_tokenizer(model: str, base: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the base of `check_base` was published with; None where it has no chat template of its own."""
    name = base
    if base == START:
        recipe, adapter = recipe_of(model), find_adapter(model)
        if recipe is None:
            name = adapter.base.name_or_path if adapter else ""
        else:
            start = recipe.model
            name = start.name_or_path or ""
            if start.revision and not Path(name).expanduser().exists():
                name += f"@{start.revision}"
            if start.subfolder:
                name = str(Path(name) / start.subfolder) if Path(name).expanduser().is_dir() else ""
    try:
        tokenizer = load_bare_tokenizer(name) if name else None
    except (ModelError, UsageError):  # an adapter's base may lie elsewhere today, and bring no tokenizer
        return None
    return with_template(name, tokenizer) if tokenizer is not None and tokenizer.chat_template else None


def check_base(model: str, base: str, option: str = "--base") -> tuple[Recipe | None, AdapterFolder | None]:
    """The recipe and the adapter of `model`, after a look at whether `base` can be compared with it; loads no weights.

    Raises:
        UsageError: no such base, or `start` where nothing says what the model began from.
    """
    recipe, adapter = recipe_of(model), find_adapter(model)
    if base != START:
        locate(base)
    elif recipe is None and adapter is None:
        raise UsageError(
            f"{option} start needs a run folder, whose recipe.yaml says what the run began from; there is none beside "
            f"{model}. Name the base itself: {option} MODEL"
        )
    return recipe, adapter
