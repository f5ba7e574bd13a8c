"""instructft: a YAML recipe in, a chat model you can trust out.

`import instructft` loads no torch; every public name loads on first use.

>>> import instructft
>>> recipe = instructft.load_recipe("quickstart", overrides=["train.max_steps=10"])
>>> recipe.train["max_steps"]
10
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from instructft.adapters import quantization
from instructft.version import __version__

# public name -> the module that holds it
_PUBLIC = {
    "Chat": "inference.chat",
    "CompletionOnlyCollator": "data.collator",
    "InstructftError": "errors",
    "Recipe": "recipe.schema",
    "encode_conversation": "prompt.loss_mask",
    "encode_turns": "prompt.loss_mask",
    "evaluate": "evaluation.metrics",
    "generate": "inference.chat",
    "load_model": "models.load",
    "load_recipe": "recipe.load",
    "load_tokenizer": "models.tokenizer",
    "merge_adapter": "merging.merge",
    "prepare_dataset": "data.prepare",
    "push_to_hub": "hub.push",
    "train": "training.run",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from instructft.data.collator import CompletionOnlyCollator as CompletionOnlyCollator
    from instructft.data.prepare import prepare_dataset as prepare_dataset
    from instructft.errors import InstructftError as InstructftError
    from instructft.evaluation.metrics import evaluate as evaluate
    from instructft.hub.push import push_to_hub as push_to_hub
    from instructft.inference.chat import Chat as Chat
    from instructft.inference.chat import generate as generate
    from instructft.merging.merge import merge_adapter as merge_adapter
    from instructft.models.load import load_model as load_model
    from instructft.models.tokenizer import load_tokenizer as load_tokenizer
    from instructft.prompt.loss_mask import encode_conversation as encode_conversation
    from instructft.prompt.loss_mask import encode_turns as encode_turns
    from instructft.recipe.load import load_recipe as load_recipe
    from instructft.recipe.schema import Recipe as Recipe
    from instructft.training.run import train as train


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'instructft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"instructft.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


quantization.keep_off_the_hub()  # before anything imports bitsandbytes
