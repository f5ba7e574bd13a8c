"""instructft: a YAML recipe in, a chat model you can trust out.

`import instructft` loads no torch; every public name loads on first use.

>>> import instructft
>>> recipe = instructft.load_recipe("quickstart", overrides=["train.max_steps=10"])
>>> recipe.train["max_steps"]
10
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from instructft import hub_kernels

__version__ = "0.1.0"

# public name -> the module that holds it
_PUBLIC = {
    "Chat": "generate",
    "CompletionOnlyCollator": "collate",
    "InstructftError": "errors",
    "Recipe": "recipe",
    "encode_conversation": "encode",
    "evaluate": "evaluate",
    "generate": "generate",
    "load_model": "models",
    "load_recipe": "recipe",
    "load_tokenizer": "models",
    "merge_adapter": "merge",
    "prepare_dataset": "data",
    "push_to_hub": "push",
    "train": "train",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from instructft.collate import CompletionOnlyCollator as CompletionOnlyCollator
    from instructft.data import prepare_dataset as prepare_dataset
    from instructft.encode import encode_conversation as encode_conversation
    from instructft.errors import InstructftError as InstructftError
    from instructft.evaluate import evaluate as evaluate
    from instructft.generate import Chat as Chat
    from instructft.generate import generate as generate
    from instructft.merge import merge_adapter as merge_adapter
    from instructft.models import load_model as load_model
    from instructft.models import load_tokenizer as load_tokenizer
    from instructft.push import push_to_hub as push_to_hub
    from instructft.recipe import Recipe as Recipe
    from instructft.recipe import load_recipe as load_recipe
    from instructft.train import train as train


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'instructft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"instructft.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps `instructft.train` the function although a module has the same name.

    The import system binds every submodule on its package; for a name that is public that would
    replace the function, in whatever order things are imported. `from instructft.train import …` is not affected.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
hub_kernels.switch_off()  # before anything imports bitsandbytes
