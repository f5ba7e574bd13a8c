"""Experts of a mixture under an adapter: by which names it reaches them, and what share of the weights it reaches.

Since transformers 5 the experts of a layer are one parameter of three dimensions and no linear layers. A list of
modules passes them by, and with them most of the weights. PEFT reaches parameters by `target_parameters`::

    experts.gate_up_proj (E, 2F, D)   + B·A of each expert: A (E·r, D), B (2F, E·r)
    experts.down_proj    (E, D, F)    + B·A of each expert: A (E·r, F), B (D, E·r)
    router               frozen: an adapter over it would choose other experts than those that were trained

Adapters from before transformers 5 name experts as layers (`gate_proj`). PEFT takes such a name in `target_modules` for
the experts in every model that has them, and then the dense layers of this name (shared experts, the first layers of
DeepSeek) are not reached by it. Here they are named as parameters too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError

if TYPE_CHECKING:
    from instructft.recipe.schema import AdapterSection

# What of `peft.LoraConfig` has no meaning over single parameters (peft 0.21, `ParamWrapper`), where it is not this.
_NOT_OVER_PARAMETERS = {"use_dora": False, "lora_bias": False}


def expert_parameters(model: Any) -> dict[str, Any]:
    """Name -> parameter (E, …, …) of all experts that a layer holds as one.

    Example::

        sorted(expert_parameters(mixtral))[:2]
        # ['model.layers.0.mlp.experts.down_proj', 'model.layers.0.mlp.experts.gate_up_proj']
    """
    counts = _expert_counts(model)
    found = {}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):  # the weight of a convolution has three dimensions too
            continue
        for part, weight in module.named_parameters(recurse=False):
            named = "expert" in name.lower() or "expert" in type(module).__name__.lower()
            if weight.dim() == 3 and weight.shape[0] > 1 and (named or weight.shape[0] in counts):
                found[f"{name}.{part}"] = weight
    return found


def _expert_counts(model: Any) -> set[int]:
    """All numbers of a configuration that may be how many experts a layer has."""
    values = model.config.get_text_config().to_dict()
    return {value for key, value in values.items() if "expert" in key and type(value) is int and value > 1}


def reach_experts(fields: dict[str, Any], adapter: AdapterSection, model: Any, *, all_linear: bool) -> list[str]:
    """Add the experts to what `peft.LoraConfig` is called with, as `adapter.experts` says; what to say about it.

    Args:
        fields: changed: `target_parameters`, and `target_modules` without names that PEFT takes for experts.
        all_linear: the modules were chosen here.

    Raises:
        UsageError: experts were asked for that are not there or that this adapter cannot reach.
    """
    there, asked, said = expert_parameters(model), adapter.experts, []
    hindered = [name for name, fine in _NOT_OVER_PARAMETERS.items() if fields.get(name, fine) != fine]
    if asked is True and (hindered or not there):
        raise UsageError(
            f"adapter.experts: true, but PEFT has no {hindered[0]} for the weights of experts; leave one of them out"
            if there
            else f"adapter.experts: true, but {type(model).__name__} has no experts that are one weight of a layer; "
            "leave it out. Experts that are linear layers are reached as such"
        )
    wanted = bool(there) and (asked is True or (asked == "auto" and all_linear and not hindered))
    if there and asked == "auto" and all_linear and hindered:
        said.append(f"adapter.experts: the experts are left out, PEFT has no {hindered[0]} for their weights")
    parameters = set(fields.get("target_parameters") or ())
    if wanted:
        parameters |= _shortest(_in_chosen_layers(there, fields), model)
    modules = fields["target_modules"]
    if not isinstance(modules, str) and (taken := _taken_for_experts(modules, model)):
        if not all_linear and asked is False:
            raise UsageError(
                f"adapter.target_modules: {', '.join(sorted(taken))}: PEFT takes these names for the experts of "
                f"{type(model).__name__}, and adapter.experts is false; leave one of them out"
            )
        if all_linear or wanted:
            dense = _in_chosen_layers(_dense(taken, model), fields)
            packed = sorted(name for name, weight in dense.items() if weight.dim() != 2 or not _floating(weight))
            fields["target_modules"] = sorted(set(modules) - taken)
            if packed or hindered:
                why = "are quantized" if packed else f"would need {hindered[0]}"
                kinds = sorted({re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in dense})
                said.append(f"adapter.target_modules: left out, since PEFT takes them for experts and they {why}: "
                            + ", ".join(kinds))  # fmt: skip
            else:
                parameters |= _shortest(dense, model)
    if parameters:
        fields["target_parameters"] = sorted(parameters)
    return said


def _in_chosen_layers(parameters: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those that `layers_to_transform` and `exclude_modules` leave; PEFT reads these for modules alone (0.21)."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("layers_to_transform", "layers_pattern", "exclude_modules")
    chosen = {key: fields[key] for key in keys if fields.get(key) is not None}
    found = {}
    for name, weight in parameters.items():
        module = name.rpartition(".")[0]
        config = LoraConfig(target_modules=[module.rpartition(".")[2]], **chosen)
        if not chosen or check_target_module_exists(config, module):
            found[name] = weight
    return found


def _floating(weight: Any) -> bool:
    return bool(weight.dtype.is_floating_point)


def _taken_for_experts(names: Iterable[str], model: Any) -> set[str]:
    """Those names of modules that PEFT takes for experts in this architecture, whatever has them."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # half of what it fuses
            taken.add(name)
        if name not in (config.target_modules or ()):
            taken.add(name)
    return taken


def _dense(names: Iterable[str], model: Any) -> dict[str, Any]:
    """Name -> weight of the linear layers that a list of modules would reach by these names."""
    import torch

    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {
        f"{name}.weight": module.weight
        for name, module in layers.items()
        if any(name == wanted or name.endswith(f".{wanted}") for wanted in names)
    }


def _shortest(wanted: Mapping[str, Any], model: Any) -> set[str]:
    """Endings by which an adapter finds just these parameters: as few words as suffice."""
    every = [name for name, _ in model.named_parameters()]
    found = set()
    for name in wanted:
        words = name.split(".")
        for count in range(2, len(words) + 1):
            ending = ".".join(words[-count:])
            if all(other in wanted for other in every if other == ending or other.endswith(f".{ending}")):
                break
        found.add(ending)
    return found


# --------------------------------------------------------------------------------------------------------------------
# What is reached
# --------------------------------------------------------------------------------------------------------------------

# The kind of a weight: the first that the names or classes of the modules around it say, from the inside out.
_KINDS = (
    ("shared experts", r"shared_(expert|mlp)"),
    ("router", r"router|(^|[ _])gate($| )|topk"),
    ("experts", r"expert"),
    ("attention", r"att(n|ention)|delta_?net"),
    ("state space", r"mamba|ssm|conv|recurrent"),
    ("dense MLP", r"mlp|feed_?forward|ffn|^fc\d"),
)
KINDS = ("attention", "state space", "dense MLP", "shared experts", "experts", "router", "embeddings", "other")


def share_reached(model: Any) -> dict[str, tuple[int, int]]:
    """Kind of weight -> numbers of the base that lie under the adapter, and all of this kind.

    Args:
        model: with its adapter; a weight that is trained as a whole counts as reached.

    Example::

        share_reached(model)
        # {'attention': (37748736, 37748736), 'experts': (57982058496, 57982058496), 'router': (0, 12582912), …}
    """
    base = model.get_base_model()
    names = {id(module): name for name, module in base.named_modules()}
    embeddings = {names.get(id(layer)) for layer in (base.get_input_embeddings(), base.get_output_embeddings())}
    reached, fused = _under_adapter(base), {id(weight) for weight in expert_parameters(base).values()}
    found: dict[str, tuple[int, int]] = {}
    for name, weight in base.named_parameters():
        if ".lora_" in f".{name}" or ".trainable_tokens_" in f".{name}" or ".original_module." in f".{name}":
            continue
        if any(place is not None and name.startswith(f"{place}.") for place in embeddings):
            kind = "embeddings"
        elif id(weight) in fused:
            kind = "experts"
        else:
            kind = _kind(base, name)
        state = getattr(weight, "quant_state", None)  # bitsandbytes: two weights a byte
        size = state.shape.numel() if state is not None else math.prod(getattr(weight, "ds_shape", weight.shape))
        on, every = found.get(kind, (0, 0))
        found[kind] = on + (size if id(weight) in reached else 0), every + size
    return {kind: found[kind] for kind in KINDS if kind in found}


def _under_adapter(base: Any) -> set[int]:
    """The weights that an adapter adds to, and those that are trained as a whole."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = {id(weight) for weight in base.parameters() if weight.requires_grad}
    for module in base.modules():
        if isinstance(module, LoraLayer) and not {"default"} & {*module.lora_A, *module.lora_embedding_A}:
            continue  # of an adapter beneath the one that is trained
        if isinstance(module, ParamWrapper):
            found.add(id(module.get_param()))
        elif isinstance(module, LoraLayer):
            found.add(id(getattr(module.get_base_layer(), "weight", None)))
    return found


def _kind(base: Any, name: str) -> str:
    """Which kind of weight one is, by the names and classes of the modules around it; norms and biases are other."""
    if base.get_parameter(name).dim() < 2:
        return "other"
    module, around = base, []
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        around.append(part if part == "base_layer" else f"{part} {type(module).__name__}")
    for words in reversed(around[1:]):
        for kind, pattern in _KINDS:
            if re.search(pattern, words.lower()):
                return kind
    return "other"


def said_of_reach(reached: Mapping[str, tuple[int, int]]) -> str:
    """The line of a run's account.

    >>> said_of_reach({"attention": (10, 10), "experts": (60, 80), "router": (0, 10)})
    '70.0% of the weights: attention 100%, experts 75%; not router'
    """
    on, every = (sum(values) for values in zip(*reached.values(), strict=True))
    some = [f"{kind} {part / whole:.0%}" for kind, (part, whole) in reached.items() if part]
    none = [kind for kind, (part, _) in reached.items() if not part and kind != "other"]
    return f"{on / every:.1%} of the weights: {', '.join(some)}" + (f"; not {', '.join(none)}" if none else "")
