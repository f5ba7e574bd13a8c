"""The class that a checkpoint's config names, and which of its weights text goes through.

Many models of today see or hear beside reading. Such a checkpoint is loaded, trained and saved as what it is, tower and
all, and by the class that its config names; what text does not reach stays as it lies on the disk.

::

    Gemma3ForConditionalGeneration
      model.vision_tower, model.multi_modal_projector     not reached by text: frozen
      model.language_model  (get_decoder)                 trained
      lm_head                                             trained
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError
from instructft.formatting import nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What a checkpoint says of its images and sounds; the text part of a run changes nothing of it.
PROCESSOR = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}

# Of these transformers has a class for causal language models, and still none that could be trained to answer.
NO_ANSWERS = {
    "blt": "transformers cannot generate with it: its configuration has no number of layers for a cache",
    "gemma4_assistant": "it drafts tokens from the hidden states of a Gemma 4, and answers nothing by itself",
    "gemma4_unified_assistant": "it drafts tokens from the hidden states of a Gemma 4, and answers nothing by itself",
    "moshi": "it speaks: its text goes along with sound, and with text alone its answers are not those of its forward",
    "musicgen": "it makes music: the tokens that it predicts are sounds",
    "musicgen_melody": "it makes music: the tokens that it predicts are sounds",
    "reformer": "it trains rows of one fixed length alone, and where its attention looks is drawn by chance",
    "xlm": "its `generate` puts a mask behind each prompt, and so answers another text than the one it learned",
}

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


@dataclass(frozen=True)
class Tower:
    """A part of a model that text does not go through.

    Args:
        name: of the module, or of a parameter that stands alone.
        tensors: its parameters and buffers on disk.
        parameters: numbers in them.
    """

    name: str
    tensors: int
    parameters: int

    @property
    def kind(self) -> str:
        """What it is, in words.

        >>> Tower("model.vision_tower", 21, 100).kind, Tower("model.multi_modal_projector", 2, 10).kind
        ('vision tower', 'projector')
        """
        last = self.name.rpartition(".")[2].lower()
        if any(part in last for part in ("projector", "projection", "connector", "merger", "embed_", "newline")):
            return "projector"
        heard = any(part in last for part in ("audio", "speech"))
        seen = any(part in last for part in ("vision", "visual", "image", "video"))
        return "audio tower" if heard else "vision tower" if seen else last


def refuse_what_does_not_answer(config: PretrainedConfig) -> None:
    """Refuse an architecture that has the form of a language model, and cannot answer as one.

    Raises:
        UsageError: it is one of these.
    """
    if why := NO_ANSWERS.get(config.model_type):
        raise UsageError(
            f"model.name_or_path: a model of type {config.model_type} cannot be trained to answer: {why}. "
            "Take a causal language model"
        )


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class of transformers that builds the class named in `architectures` of a config.

    One that names none, or none that is known, is built whole where it has towers beside its text.

    Example::

        auto_class(AutoConfig.from_pretrained("google/gemma-3-4b-it")).__name__
        # 'AutoModelForImageTextToText'
    """
    import transformers

    classes = [getattr(transformers, name) for name in _AUTO_CLASSES if hasattr(transformers, name)]
    own_code = getattr(config, "auto_map", None) or {}
    if own_code:
        return next((kind for kind in classes if kind.__name__ in own_code), classes[0])
    if getattr(config, "is_encoder_decoder", False):  # it answers by other means than going on with a text
        return classes[0]
    built = [(kind, _built_by(kind, config)) for kind in classes]
    given = getattr(config, "architectures", None)
    named = [name for name in given if isinstance(name, str)] if isinstance(given, list | tuple) else ()
    for kind, names in built:
        if names.intersection(named):
            return kind
    whole = [*built[1:], built[0]] if config.get_text_config() is not config else built
    return next((kind for kind, names in whole if names), classes[0])


def _built_by(kind: Any, config: PretrainedConfig) -> set[str]:
    """Names of the classes that an Auto class has for a config."""
    found = kind._model_mapping.get(type(config), ())
    return {one.__name__ for one in (found if isinstance(found, list | tuple) else (found,))}


def text_module(model: PreTrainedModel) -> Any:
    """The module that text goes through: the model itself, or the language model among its towers.

    Example::

        text_module(gemma3)
        # Gemma3TextModel(…)
    """
    if model.config.get_text_config() is model.config:
        return model
    decoder = model.get_decoder()
    return model if decoder is None else decoder


def backbone(model: PreTrainedModel) -> Any:
    """The module below the output head, whose `last_hidden_state` the head reads."""
    if model.base_model is not model:
        return model.base_model
    below = text_module(model)
    if below is not model and below.get_output_embeddings() is not None:  # Llama 4 has its head there
        return getattr(below, "model", below)
    return below


def towers(model: PreTrainedModel) -> list[Tower]:
    """The parts of a model that text does not go through, each as the outermost module that it fills.

    Example::

        towers(gemma3)
        # [Tower('model.vision_tower', 437, 416866032), Tower('model.multi_modal_projector', 2, 2951424)]
    """
    text = text_module(model)
    if text is model:
        return []
    reached = {id(weight) for part in _reached(model, text) for weight in part.parameters()}
    saved = set(model.state_dict(keep_vars=True))
    return list(_outermost(model, "", text, reached, saved))


def freeze_towers(model: PreTrainedModel) -> list[Tower]:
    """Freeze what text does not reach, and say what that is."""
    found = towers(model)
    names = tuple(tower.name for tower in found)
    for name, weight in model.named_parameters():
        if inside(name, names):
            weight.requires_grad_(False)
    return found


def freeze_named(model: PreTrainedModel, patterns: Collection[str]) -> list[str]:
    r"""Freeze the weights that a pattern names, or that lie in a module that it names; their names.

    Example::

        freeze_named(llama, [r"model\.embed_tokens", r"model\.layers\.[0-7]"])
        # ['model.embed_tokens.weight', 'model.layers.0.self_attn.q_proj.weight', …]

    Raises:
        UsageError: a pattern names nothing, or nothing is left to be trained.
    """
    found: list[str] = []
    weights = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        named = re.compile(pattern)
        chosen = [name for name in weights if any(named.fullmatch(part) for part in _parts(name))]
        if not chosen:
            some = sorted({re.sub(r"\.\d+\.", ".0.", name).rpartition(".")[0] for name in weights})
            raise UsageError(
                f"model.freeze: nothing in {type(model).__name__} is called {pattern}"
                f"{nearest(pattern, some) or '; it has ' + ', '.join(some[:12])}"
            )
        found += chosen
    for name in found:
        weights[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise UsageError(f"model.freeze: {', '.join(patterns)} leave nothing of {type(model).__name__} to be trained")
    return sorted(set(found))


def frozen_as_named(model: PreTrainedModel, patterns: Collection[str]) -> str:
    """How much of a model its patterns freeze, in words: `9 tensors, 4,096 parameters`."""
    weights = dict(model.named_parameters())
    chosen = [name for name in freeze_named(model, patterns) if name in weights]
    return f"{len(chosen)} tensors, {sum(weights[name].numel() for name in chosen):,} parameters"


def _parts(name: str) -> Iterator[str]:
    """A weight's name, and those of the modules that it lies in.

    >>> list(_parts("model.norm.weight"))
    ['model.norm.weight', 'model.norm', 'model']
    """
    while name:
        yield name
        name = name.rpartition(".")[0]


def inside(name: str, towers: Collection[str]) -> bool:
    """Whether a module or tensor is, or lies in, one of the towers of these names.

    >>> inside("model.visual.blocks.0.attn.qkv", ["model.visual"])
    True
    """
    return any(name == tower or name.startswith(f"{tower}.") for tower in towers)


def name_blocks_that_are_there(model: Any) -> None:
    """Leave of a model's `_no_split_modules` the classes that occur in it; accelerate and PEFT refuse any other (FSDP).

    A model with towers has the names of all that its towers might be made of (transformers 5.23).

    Example::

        name_blocks_that_are_there(gemma3)
        gemma3._no_split_modules
        # {'Gemma3DecoderLayer', 'SiglipEncoderLayer', …}
    """
    names = getattr(model, "_no_split_modules", None)
    if names:
        there = {type(module).__name__ for module in model.modules()}
        model._no_split_modules = type(names)(name for name in names if name in there)


def shortest_names(model: Any, whole: set[str]) -> list[str]:
    """Names by which an adapter finds just these modules: last parts where these say it all, else whole names."""
    last = {name.rpartition(".")[2] for name in whole}
    reached = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if reached == whole else whole)


def towers_in_words(found: Collection[Tower]) -> str:
    """A line for the terminal.

    >>> towers_in_words([Tower("model.visual", 21, 12000)])
    'vision tower (model.visual), 21 tensors, 12,000 parameters; text does not reach it'
    """
    parts = [
        f"{tower.kind} ({tower.name}), {tower.tensors} tensors, {tower.parameters:,} parameters" for tower in found
    ]
    return f"{', '.join(parts)}; text does not reach {'it' if len(parts) == 1 else 'them'}"


def _reached(model: PreTrainedModel, text: Any) -> Iterator[Any]:
    yield text
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            yield layer


def _outermost(module: Any, name: str, text: Any, reached: set[int], saved: set[str]) -> Iterator[Tower]:
    for last, weight in module.named_parameters(recurse=False):
        if id(weight) not in reached:
            yield Tower(f"{name}.{last}".lstrip("."), 1, weight.numel())
    for last, child in module.named_children():
        inner = f"{name}.{last}".lstrip(".")
        own = {id(weight): weight for weight in child.parameters()}
        if child is text or not own or own.keys() <= reached:
            continue
        if own.keys() & reached:
            yield from _outermost(child, inner, text, reached, saved)
        else:
            tensors = sum(key.startswith(f"{inner}.") for key in saved)
            yield Tower(inner, tensors, sum(weight.numel() for weight in own.values()))
