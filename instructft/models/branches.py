"""Whether a model can be trained on folded turns: how it takes their mask, and the proof that branches are apart."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.adapters import quantization
from instructft.data.batches.branches import Masks, fold, last_readers
from instructft.data.packing import look, position_ids
from instructft.errors import InstructftError, ModelError
from instructft.formatting import first_line
from instructft.models.attention import VARLEN
from instructft.prompt.loss_mask import IGNORE_INDEX
from instructft.weights import remote_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from instructft.recipe.schema import Recipe

MASKED = ("sdpa", "eager")  # attention that takes a mask slot by slot
LARGEST = 4e9  # weights of a model that is made only to be asked
_SEEN = {"sliding_attention": "window", "chunked_attention": "chunk"}
_NARROW = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim")


def masks_for(config: PretrainedConfig) -> Masks:
    """How a model with this configuration, and the attention that it says, takes masks of branches; for `Masks`."""
    text = config.get_text_config()
    added = getattr(text, "_attn_implementation", None) == "eager"
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    sizes = {"sliding_attention": window, "chunked_attention": chunk}
    kinds = set(getattr(text, "layer_types", None) or [])
    kinds -= _without_mask(config)
    if not kinds:
        kinds = {"full_attention"} if window is None else {"sliding_attention"}
    layers = {kind: (_SEEN[kind], int(size)) if (size := sizes.get(kind)) else ("all", 0) for kind in sorted(kinds)}
    return Masks(layers, by_layer=len(layers) > 1, added=added)


def _without_mask(config: PretrainedConfig) -> set[str]:
    """Types of its layers that look at no mask, such as those of a state-space model."""
    return set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", *_SEEN}


def why_not(recipe: Recipe, config: PretrainedConfig) -> str:
    """Why a run of this recipe cannot train folded turns; "" where it can.

    A small model of the same architecture is made and asked, since the answer shapes the data, which is prepared before
    weights are loaded. What is trained is asked again then (`instructft.training.rehearsal.isolation`).
    """
    asked = recipe.model.attn_implementation
    device = quantization.device(recipe)
    if asked not in ("auto", *MASKED):
        return f"attention {asked} takes no mask slot by slot, as sdpa and eager do"
    if asked == "auto" and recipe.data.packing and device.startswith("cuda") and recipe.data.fold_turns == "auto":
        from instructft.models.kernels.varlen import refusal

        if not refusal(config):
            return f"packs are trained by attention {VARLEN}, which knows borders alone (data.fold_turns: true folds)"
    if other := _without_mask(config):
        return f"{config.model_type} has layers without a mask ({', '.join(sorted(other))})"
    try:
        model = _small(config, None if asked == "auto" else asked, device)
        probe(model, model.device)
    except InstructftError as error:
        return first_line(error)
    except Exception as error:  # an architecture may refuse a mask, or being made small, in any way
        return f"{config.model_type} does not take the mask ({first_line(error)})"
    return ""


def _small(config: PretrainedConfig, attention: str | None, device: str) -> PreTrainedModel:
    """A model of random weights with as many layers as show every type, and few words."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    text = config.get_text_config()
    types = list(getattr(text, "layer_types", None) or [])
    layers = next((n for n in range(2, len(types)) if set(types[:n]) == set(types)), len(types)) or 2
    layers = min(layers, text.num_hidden_layers)
    text.num_hidden_layers, text.vocab_size = layers, 64
    if types:
        text.layer_types = types[:layers]
    for name in _NARROW:
        if getattr(text, name, None):
            setattr(text, name, 64)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, None)
    made = {"attn_implementation": attention}
    with torch.device("meta"):
        weights = sum(
            p.numel() for p in AutoModelForCausalLM.from_config(config, **made, **remote_code.flag()).parameters()
        )
    if weights > LARGEST:
        raise ValueError(f"{layers} of its layers have {weights / 1e9:.1f}e9 weights, too many to try")
    kind = torch.get_default_dtype()
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=kind, **made, **remote_code.flag())
        with torch.no_grad():  # larger than a fresh model's, so that attention is no mean
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
    return model


def probe(model: PreTrainedModel, device: Any, width: int = 64) -> float:
    """Ask the model whether three turns, folded into a row with a branch from a branch, give what each gives alone.

    Args:
        width: tokens of the row, padding included.

    Returns the largest difference of logits, as a share of the largest logit.

    Raises:
        ModelError: a branch sees another, is not what its turn is alone, or the model has layers that take no mask.
    """
    import torch

    if other := _without_mask(model.config):
        raise ModelError(_leaks(model, f"it has layers without a mask ({', '.join(sorted(other))})"))
    masks = masks_for(model.config)
    words = model.get_input_embeddings().weight.shape[0]
    draw = np.random.default_rng(0)
    part = (width - 4) // 6
    trunk, one, two, three, four = (draw.integers(0, words, n * part) for n in (2, 1, 1, 1, 1))
    turns = [np.concatenate(parts) for parts in ((trunk, one), (trunk, two, three), (trunk, two, four))]
    (row,) = fold([(ids, np.full(len(ids), IGNORE_INDEX)) for ids in turns], width)
    ids = np.pad(row.input_ids, (0, width - len(row.input_ids)))
    last = last_readers(row.lengths, row.starts, width)
    positions = position_ids(row.lengths, width, row.starts)
    ends = np.cumsum(row.lengths) - 1
    slots = [np.flatnonzero((last >= end) & (np.arange(width) <= end)) for end in ends]
    inputs = {
        "position_ids": torch.from_numpy(positions)[None],
        "attention_mask": masks(positions[None], last[None]),
    }
    rows, places = ([torch.from_numpy(value) for value in values] for values in (turns, slots))
    return look(model, device, torch.from_numpy(ids), inputs, rows, places, _leaks)


def _leaks(model: PreTrainedModel, what: str) -> str:
    return (
        f"data.fold_turns: {type(model).__name__} ({model.config.model_type}, attention "
        f"{model.config._attn_implementation}) does not keep the turns of a folded row apart: {what}.\n"
        "Set data.fold_turns=false, which trains each turn as a row of its own"
    )
