"""Loads the model of a recipe, and makes it agree with its tokenizer on template, special tokens and sizes.

With `adapter: lora` the model comes frozen, with the adapter in it (`instructft.adapters.lora`); with
`model.quantization` its linear layers are packed while they are read (`instructft.adapters.quantization`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.adapters import lora, quantization
from instructft.adapters.adapter_folder import AdapterFolder
from instructft.adapters.attach import attach
from instructft.adapters.frozen_pairs import lay_beneath, over_parameters, pairs_of, scaling_of
from instructft.adapters.lora import fit_embeddings
from instructft.errors import ModelError, UsageError
from instructft.models.kernels.activations import fuse_activations
from instructft.models.latest import resolve_latest
from instructft.models.starting_point import StartingPoint, starting_point
from instructft.models.tokenizer import not_loaded
from instructft.weights import remote_code
from instructft.weights.model_class import auto_class, freeze_named, freeze_towers, name_blocks_that_are_there
from instructft.weights.readable import reading

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe


def weights_dtype(recipe: Recipe, device: str | None = None) -> torch.dtype:
    """The type in which weights are held.

    Trained weights are float32 (`dtype: auto`): AdamW's updates are mostly smaller than bfloat16 can add to a weight.
    Frozen ones, below an adapter, need no such room: on a GPU they are bfloat16 where it has that, float16 with
    `train.fp16`; on a CPU float32, which is faster there.

    >>> weights_dtype(load_recipe("quickstart"))
    torch.float32
    """
    import torch

    if recipe.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, recipe.model.dtype)
        return dtype
    if recipe.model.quantization != "none" and recipe.train.get("bf16"):
        return torch.bfloat16  # bitsandbytes rounds the biases of packed layers to what comes in
    if recipe.adapter.type == "none" or not (device or quantization.device(recipe)).startswith("cuda"):
        return torch.float32
    if recipe.train.get("fp16"):
        return torch.float16
    here = torch.cuda.is_available()
    return torch.bfloat16 if not here or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def load_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, start: StartingPoint | None = None
) -> PreTrainedModel:
    """Load the recipe's model, or start one from random weights, ready to be trained with `tokenizer`.

    Full fine-tuning keeps its weights in float32 (`weights_dtype`) and lets autocast do the work in bfloat16 where
    the hardware has it. With an adapter it is a `peft.PeftModel` over the frozen base. Embedding rows of tokens that
    the template added start from the mean of the old rows. Random weights depend on `train.seed` alone.

    Args:
        start: where the weights come from, if that was found already.

    Raises:
        UsageError: the model is unknown or does not fit the recipe.
        ModelError: its weights could not be read.
    """
    from transformers import set_seed

    recipe, _ = resolve_latest(recipe)
    start = start or starting_point(recipe, tokenizer)
    quantization.check(recipe)
    dtype = weights_dtype(recipe)
    how = {"dtype": dtype, "attn_implementation": recipe.model.attn_implementation}
    if how["attn_implementation"] in ("auto", "varlen"):  # a run switches a loaded model to varlen, for its packs alone
        how["attn_implementation"] = None
    config = copy.deepcopy(start.config)
    if not start.name:
        set_seed(recipe.train["seed"])
        model = auto_class(config).from_config(config, **how, **remote_code.flag())
    else:
        where = {"revision": start.revision, "subfolder": start.subfolder}
        trust = remote_code.pinned(start.name, start.revision)
        with reading(f"model.name_or_path: {start.name}", Path(start.name) / start.subfolder):
            try:
                model, info = auto_class(config).from_pretrained(
                    start.name,
                    config=config,
                    output_loading_info=True,
                    **how,
                    **where,
                    **trust,
                    **quantization.loading(recipe, dtype),
                )
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                raise ModelError(not_loaded("model.name_or_path", start.name, "a model", error)) from error
        if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers and goes on
            raise ModelError(
                f"model.name_or_path: {start.name} is not whole: it holds no weights for {', '.join(missing[:3])} "
                f"({len(missing)} in all) of {type(model).__name__}, the class that its config.json names"
            )
    quantization.fix_layout(model)
    freeze_towers(model)
    name_blocks_that_are_there(model)
    fuse_activations(model)
    if start.adapter is not None and not recipe.adapter.stack:
        return _train_further(recipe, start.adapter, model, tokenizer)
    fit_embeddings(model, max(len(tokenizer), start.adapter.base.vocab_size if start.adapter else 0))
    fit_special_tokens(model, tokenizer)
    freeze_named(model, recipe.model.freeze or ())
    if start.adapter is not None:
        return _train_over(recipe, start.adapter, model, start.new_tokens)
    return lora.ADAPTERS[recipe.adapter.type](model, recipe, start.new_tokens)


def _train_further(
    recipe: Recipe, adapter: AdapterFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """The base with an adapter that was trained before, ready to be trained further."""
    if len(tokenizer) > max(adapter.base.vocab_size, model.get_input_embeddings().weight.shape[0]):
        key = "model.new_tokens" if recipe.model.new_tokens else "data.template"
        raise UsageError(
            f"{key}: needs tokens that the adapter in {adapter.folder} was not trained with ({len(tokenizer)}, "
            f"expected {adapter.base.vocab_size}); use data.template=tokenizer, or merge it first and begin from what "
            "that gives"
        )
    adapted = lora.as_trained_here(attach(model, adapter, trainable=True))
    fit_special_tokens(adapted, tokenizer)
    return adapted


def _train_over(recipe: Recipe, beneath: AdapterFolder, model: PreTrainedModel, new_tokens: Sequence[int]) -> Any:
    """The base with an adapter that stays as it is, and a new one on top of it; rows of its tokens are trained further.

    Args:
        beneath: whole, and of this base.
        new_tokens: ids without a trained embedding in the base.

    Raises:
        UsageError: the two cannot be one adapter of the base.
        AdapterError: the one beneath does not fit the base.
    """
    first = attach(model, beneath)
    pairs, parameters, kind = pairs_of(first), over_parameters(first), first.peft_config["default"]
    rows = {name: layer for name, layer in first.named_modules() if lora.token_rows(layer) is not None}
    begun = {
        name: (
            lora.token_rows(layer).token_indices["default"],
            lora.token_rows(layer).trainable_tokens_delta["default"].detach(),
        )
        for name, layer in rows.items()
    }
    known = {token for tokens, _ in begun.values() for token in tokens}
    model = first.unload()
    adapted = lora.add_lora(model, recipe, sorted({*new_tokens, *known}))
    adapted.peft_config["default"].base_model_name_or_path = beneath.base.name_or_path
    adapted.peft_config["default"].revision = beneath.base.revision
    _put_rows(adapted, begun, beneath)
    return lay_beneath(adapted, pairs, parameters, kind, scaling_of(kind))


def _put_rows(model: Any, begun: Mapping[str, tuple[Sequence[int], Any]], beneath: AdapterFolder) -> None:
    """Let rows of tokens begin as an adapter before this one has trained them."""
    import torch

    layers = dict(model.named_modules())
    for name, (tokens, values) in begun.items():
        own = lora.token_rows(layers.get(name))
        if own is None:
            raise UsageError(
                f"adapter.stack: the adapter in {beneath.folder} has trained rows of {name}, and the new one would not "
                "go on with them. Merge what is there into a model first (instructft merge), and begin from that"
            )
        place = {token: i for i, token in enumerate(own.token_indices["default"])}
        with torch.no_grad():
            for token, value in zip(tokens, values, strict=True):
                own.trainable_tokens_delta["default"][place[token]] = value


def fit_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let configuration and generation configuration stop where the trained template stops."""
    from instructft.prompt.loss_mask import encoder

    ends = encoder(tokenizer).stop_ids
    config, generation = model.config.get_text_config(), model.generation_config
    known = generation.eos_token_id if generation.eos_token_id is not None else []
    known = [known] if isinstance(known, int) else list(known)
    stops = [*ends, *(token for token in known if token not in ends)]
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    generation.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    if (first := pad_of_positions(model)) is not None:
        config.pad_token_id = first
    config.eos_token_id = ends[0]
    config.bos_token_id = generation.bos_token_id = tokenizer.bos_token_id
    answer_plainly(generation)


def pad_of_positions(model: PreTrainedModel) -> int | None:
    """The id after which a model counts its positions, as RoBERTa and its kin do: with another it is another model."""
    import torch
    from transformers import PreTrainedModel

    for module in model.modules():
        found = vars(module).get("padding_idx")  # its own: a wrapper answers for what it wraps
        if not isinstance(found, int) or isinstance(module, torch.nn.Embedding | PreTrainedModel):
            continue
        if next(iter(inspect.signature(module.forward).parameters), "") != "position_ids":  # XGLM is told them
            return found
    return None


_NO_SETTING = ("transformers_version", "_from_model_config", "use_cache")  # by which no answer changes


def answer_plainly(generation: GenerationConfig) -> dict[str, Any]:
    """Take out of a generation configuration all that changes answers, but for the tokens that begin, pad and end them.

    A published model brings the sampling that its authors like (a temperature, a penalty, a limit), by which a server
    answers whoever asks without: vLLM samples by `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` of
    this file, and cuts at its `max_new_tokens`. A model that was tuned since is another one, and is to answer there as
    it was judged here. Some of them could not be saved either (`early_stopping` without beams).

    Returns what was taken out: name -> value.
    """
    from transformers import GenerationConfig

    plain = GenerationConfig()
    changed = {
        name: value
        for name, value in generation.to_diff_dict().items()
        if hasattr(plain, name)
        and not name.endswith("_token_id")
        and name not in _NO_SETTING
        and value not in (None, False)
    }
    for name in changed:
        setattr(generation, name, getattr(plain, name))
    generation.do_sample = False
    return changed
