"""Pairs that stay as they are beside those that are trained: an adapter beneath a new one, or where PiSSA begins.

Each layer adds both to what its base gives. On the disk the two are one plain adapter of the base, of the sum of their
ranks, so that all that loads, merges, serves or goes on with an adapter takes it as any other::

    in memory       W x + s·B·A x + s·B₀·A₀ x      A, B trained; A₀, B₀ frozen; W as it is on the disk
    on the disk     A₀ over A (r₀ + r, in)         B₀ beside B (out, r₀ + r)         s = alpha / (r₀ + r)

    adapter.stack                      A₀, B₀ are the earlier adapter, B₀ scaled so that s is right for it
    init_lora_weights: pissa, olora    A, B begin as factors of W (arXiv:2404.02948, 2406.01775); A₀, -B₀ are what they
                                       began as, so that B·A + B₀·A₀ is 0 then: W less its factors, and W is unchanged

PEFT's own way for the latter takes the factors out of W, and converts when it saves
(`path_initial_model_for_weight_conversion`): then the base in memory is another one than on the disk, and that nothing
of it moved could not be proved.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.adapters.adapter_folder import CONFIG, PREFIX, WEIGHTS
from instructft.errors import CheckpointError, UsageError
from instructft.weights.model_class import shortest_names

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel

    from instructft.recipe.schema import Recipe

    Pair = tuple[torch.Tensor, torch.Tensor]  # A (r, in) and B (out, r); of E experts A (E·r, in) and B (out, r·E)

BENEATH = "beneath"  # PEFT's name for the adapter that stays; the one that is trained is its `default`
# Of an adapter's options those by which it is more than pairs of one rank and one scale.
_MORE_THAN_PAIRS = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern")
_HALVES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def refuse_more_than_pairs(config: Mapping[str, Any], whose: str) -> None:
    """An adapter with which another cannot become one: DoRA, biases, weights that are trained whole.

    Raises:
        UsageError: it is one.
    """
    found = [name for name in _MORE_THAN_PAIRS if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if found:
        raise UsageError(
            f"{whose} has {', '.join(found)}: with such a one no other adapter can be one adapter of the base. Merge "
            "what is there into a model first (instructft merge), and begin from that"
        )


def layers_of(model: PeftModel) -> dict[str, Any]:
    """Name of a layer in an adapter file -> PEFT's layer, which holds its pairs."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def pairs_of(model: PeftModel, adapter: str = "default") -> dict[str, Pair]:
    """The pairs of an adapter, by the names of their layers, on the CPU in float32."""
    found: dict[str, Pair] = {}
    for name, layer in layers_of(model).items():
        for a, b in (tuple(half.removesuffix(".weight") for half in halves) for halves in _HALVES):
            if adapter in getattr(layer, a):
                halves = (getattr(layer, kind)[adapter] for kind in (a, b))
                one, other = (getattr(half, "weight", half).detach().cpu().float().clone() for half in halves)
                found[name] = one, other
    return found


def over_parameters(model: PeftModel) -> list[str]:
    """Names of the layers whose pairs lie over one parameter of theirs, such as all experts."""
    from peft.tuners.lora.layer import ParamWrapper

    return [name for name, layer in layers_of(model).items() if isinstance(layer, ParamWrapper)]


def scaling_of(config: LoraConfig) -> float:
    """What pairs of an adapter are multiplied by."""
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))


def lay_beneath(
    model: PeftModel, pairs: Mapping[str, Pair], parameters: Collection[str], kind: LoraConfig, scaling: float
) -> PeftModel:
    """Put pairs that stay under the adapter that a model is trained with; they are saved and loaded with it, as one.

    Args:
        pairs: by the names of their layers.
        parameters: those of them that lie over a single parameter of their layer, such as all experts.
        kind: the configuration that they come with: which parameters, which rank.
        scaling: that they come with.

    Raises:
        UsageError: PEFT cannot hold the two together.
    """
    import torch
    from peft import LoraConfig

    own = model.peft_config["default"]
    scale = scaling_of(own)
    config = LoraConfig(
        task_type=own.task_type,
        r=kind.r,
        lora_alpha=scale * kind.r,  # type: ignore[arg-type]  # PEFT divides it by the rank, whole or not
        lora_dropout=0.0,  # what stays is as certain as the base
        # by whole names, since layers can have been left out by other means too
        target_modules=[name.removeprefix(PREFIX) for name in pairs if name not in parameters],
        target_parameters=kind.target_parameters,
        fan_in_fan_out=kind.fan_in_fan_out,
        init_lora_weights=False,
    )
    try:
        model.add_adapter(BENEATH, config)
    except ValueError as error:
        raise UsageError(
            f"adapter.stack: PEFT does not hold both adapters: {error}. Merge the one that is there first"
        ) from error
    layers = layers_of(model)
    if pairs_of(model, BENEATH).keys() != pairs.keys():  # what has no values of its own would be drawn by chance
        raise UsageError(
            "adapter.stack: PEFT does not put the adapter that is there on its own layers beside another one. Merge it "
            "into a model first (instructft merge), and begin from that"
        )
    scaled = {name: (a, (b.double() * (scaling / scale)).to(torch.float32)) for name, (a, b) in pairs.items()}
    held = _named(scaled, layers)
    _put_beneath(layers, held)
    model.base_model.set_adapter(["default", BENEATH])
    for name, weight in model.named_parameters():
        if f".{BENEATH}." in name:
            weight.requires_grad_(False)
    _as_one_on_disk(model, held, {name: int(getattr(layer, "num_experts", 1)) for name, layer in layers.items()})
    return model


def begins_with_factors(init: Any) -> str:
    """How pairs begin as factors of the base's weights: `pissa`, `pissa_niter_4`, `olora`; "" where they do not."""
    text = str(init).lower()
    return text if re.fullmatch(r"pissa(_niter_\d+)?|olora", text) else ""


def refuse_factors(recipe: Recipe, fields: Mapping[str, Any]) -> None:
    """Where pairs cannot begin as factors of the base's weights.

    Raises:
        UsageError: of packed weights, of an adapter on an adapter, or of one that is more than pairs.
    """
    key = f"adapter.init_lora_weights: {fields['init_lora_weights']}"
    if recipe.model.quantization != "none":
        raise UsageError(
            f"{key} takes factors of the base's weights, and those are packed with model.quantization: "
            f"{recipe.model.quantization}; write init_lora_weights: true"
        )
    if recipe.adapter.stack:
        raise UsageError(f"{key} and adapter.stack: each puts pairs of its own beneath the adapter; choose one of them")
    refuse_more_than_pairs(fields, f"{key}: the adapter")


def refuse_too_many_factors(init: Any, rank: int, targets: Mapping[str, Any]) -> None:
    """A weight has as many factors as its shorter side is long.

    Raises:
        UsageError: the rank is larger.
    """
    for name, module in targets.items():
        shape = tuple(module.weight.shape)
        if min(shape) < rank:
            raise UsageError(
                f"adapter.init_lora_weights: {init} takes {rank} factors of {name}, which has the shape {shape}; set "
                f"adapter.r to {min(shape)} or less"
            )


def begin_with_factors(model: PeftModel, how: str) -> PeftModel:
    """Let pairs begin as factors of the weights below them, by PEFT's own arithmetic, with the weights as they were.

    Args:
        how: `pissa`, `pissa_niter_N` or `olora`.
    """
    import copy

    import torch
    from peft.tuners.lora import Linear

    config, begun = copy.copy(model.peft_config["default"]), []
    for name, layer in layers_of(model).items():
        if type(layer) is not Linear:  # experts, embeddings: PEFT has no factors of these; B begins as 0
            continue
        weight = layer.get_base_layer().weight
        with torch.no_grad():
            place, before = weight.data, weight.detach().clone()
            if how == "olora":
                if layer.fan_in_fan_out:  # PEFT factorizes the weight of a Conv1D as it lies (peft 0.21)
                    weight.data = place.T.contiguous()
                layer.olora_init("default")
            else:
                layer.pissa_init("default", how)
            weight.data = place.copy_(before)
        begun.append(name)
    config.target_parameters = None
    taken_away = {name: (a, -b) for name, (a, b) in pairs_of(model).items() if name in begun}
    return lay_beneath(model, taken_away, (), config, scaling_of(config))


# --------------------------------------------------------------------------------------------------------------------
# Two adapters in memory, one on the disk
# --------------------------------------------------------------------------------------------------------------------


def _as_one_on_disk(model: PeftModel, held: dict[str, torch.Tensor], experts: Mapping[str, int]) -> None:
    """Let a model save and load both of its adapters as one.

    Args:
        held: the halves of the pairs that stay, by their names in a file; what is loaded takes their place.
        experts: name of a layer -> how many share a half of its pairs.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    made: Any = model
    own = model.peft_config["default"]
    ranks = model.peft_config[BENEATH].r, own.r
    save = made.save_pretrained

    def save_pretrained(folder: str | Path, **options: Any) -> None:
        save(folder, **{**options, "selected_adapters": ["default"]})
        weights, config = Path(folder) / WEIGHTS, Path(folder) / CONFIG
        if not options.get("is_main_process", True):
            return
        save_file(_joined(load_file(weights), held, ranks, experts), weights, metadata={"format": "pt"})
        text = {**json.loads(config.read_text(encoding="utf-8")), **_joined_config(model)}
        config.write_text(json.dumps(text, indent=2, sort_keys=True), encoding="utf-8")

    def load_adapter(folder: str | Path, *_: Any, **__: Any) -> None:
        there = load_file(Path(folder) / WEIGHTS)
        held.update(_part(there, held, ranks, experts, first=True))
        trained = {name for name in there if name not in held or _is_trained(model, name)}
        mine = _part(there, trained, ranks, experts, first=False)
        set_peft_model_state_dict(model, mine, adapter_name="default")
        _put_beneath(layers_of(model), held)

    made.save_pretrained, made.load_adapter = save_pretrained, load_adapter
    # of `instructft.weights.weight_files`, which asks for shapes alone, on the meta device
    made.as_one_on_disk = functools.partial(_joined, held=held, ranks=ranks, experts=experts)


def _put_beneath(layers: Mapping[str, Any], held: Mapping[str, torch.Tensor]) -> None:
    """Give the pairs that stay their values. (PEFT would ask for rows of tokens too, which they have none of.)"""
    import torch

    for name, tensor in held.items():
        layer, _, half = name.rpartition(".lora_")
        place = getattr(layers[layer], f"lora_{half.removesuffix('.weight')}")[BENEATH]
        with torch.no_grad():
            getattr(place, "weight", place).copy_(tensor)


def _is_trained(model: PeftModel, name: str) -> bool:
    layer, _, half = name.rpartition(".lora_")
    return "default" in getattr(model.get_submodule(layer), f"lora_{half.removesuffix('.weight')}")


def _joined_config(model: PeftModel) -> dict[str, Any]:
    """What the configuration of both says otherwise than that of the trained one."""
    own, beneath, base = model.peft_config["default"], model.peft_config[BENEATH], model.get_base_model()
    rank = own.r + beneath.r
    plain = layers_of(model).keys() - set(over_parameters(model))
    parameters = sorted({*(own.target_parameters or ()), *(beneath.target_parameters or ())})
    return {
        "r": rank,
        "lora_alpha": scaling_of(own) * rank,
        "use_rslora": False,
        "init_lora_weights": True,
        **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules")),  # the names say it all
        "target_modules": shortest_names(base, {name.removeprefix(PREFIX) for name in plain}),
        "target_parameters": parameters or None,
    }


def _joined(
    own: Mapping[str, torch.Tensor],
    held: Mapping[str, torch.Tensor],
    ranks: tuple[int, int],
    experts: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """Both adapters as one: pairs side by side, and zeros where one of the two has no pair on a layer."""
    import torch

    found = {name: tensor for name, tensor in own.items() if _half(name) is None}
    for name in sorted({*own, *held} - found.keys()):
        there = own[name] if name in own else held[name]
        parts = []
        for tensor, rank in zip((held.get(name), own.get(name)), ranks, strict=True):
            view = _by_rank(there if tensor is None else tensor.to(there), name, experts)
            empty = view.new_zeros((view.shape[0], rank, view.shape[2]))
            parts.append(empty if tensor is None else view)
        whole = torch.cat(parts, dim=1)
        found[name] = (whole.flatten(0, 1) if _half(name) == 0 else whole.flatten(1)).contiguous()
    return found


def _part(
    there: Mapping[str, torch.Tensor],
    names: Iterable[str],
    ranks: tuple[int, int],
    experts: Mapping[str, int],
    *,
    first: bool,
) -> dict[str, torch.Tensor]:
    """Of both adapters as one the tensors of the one that stays (`first`), or of the one that is trained."""
    found = {}
    for name in names:
        if name not in there:
            raise CheckpointError(f"{name} is missing in the adapter that is to be loaded: it is of another run")
        if _half(name) is None:
            found[name] = there[name]
            continue
        view = _by_rank(there[name], name, experts)
        if view.shape[1] != sum(ranks):
            raise CheckpointError(
                f"{name}: found the rank {view.shape[1]}, expected {ranks[0]} of the adapter beneath and {ranks[1]} "
                "of the one that is trained: it is of another run"
            )
        part = view[:, : ranks[0]] if first else view[:, ranks[0] :]
        found[name] = (part.flatten(0, 1) if _half(name) == 0 else part.flatten(1)).contiguous()
    return found


def _half(name: str) -> int | None:
    """0 of an A, 1 of a B; None of any other tensor.

    >>> _half("q.lora_A.weight"), _half("q.lora_B.weight"), _half("wte.token_adapter.trainable_tokens_delta")
    (0, 1, None)
    """
    return next((kind for ends in _HALVES for kind, end in enumerate(ends) if name.endswith(f".{end}")), None)


def _by_rank(tensor: torch.Tensor, name: str, experts: Mapping[str, int]) -> torch.Tensor:
    """A half with its rank in the middle: A as (E, r, in), B as (out, r, E)."""
    count = experts[name.rpartition(".lora_")[0]]
    if _half(name) == 0:
        return tensor.reshape(count, -1, tensor.shape[-1])
    return tensor.reshape(tensor.shape[0], -1, count)


def _named(pairs: Mapping[str, Pair], layers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Pairs by the names that their halves have in an adapter file."""
    found: dict[str, torch.Tensor] = {}
    for name, (a, b) in pairs.items():
        first, second = _HALVES[bool(getattr(layers[name], "lora_embedding_A", None))]
        found |= {f"{name}.{first}": a, f"{name}.{second}": b}
    return found
