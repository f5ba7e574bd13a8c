"""Decides which parameters of a base an adapter changes, and how; what has no proved merge is refused by its name."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.adapters.attach import saved_twice
from instructft.errors import ModelError, UsageError
from instructft.merging.arithmetic import Edit, Lora
from instructft.weights.tensor_io import pieces, read_tensors
from instructft.weights.weight_files import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."  # before every module's name in an adapter file
# what PEFT puts between the name of a layer that it wraps and the weight of the base in it
_UNWRAPPED = re.compile(r"\.(token_adapter\.)?(base_layer|original_module)\.")

# Options of peft.LoraConfig that are merged here, or that do not touch the result. Any other must be at its default.
_PROVED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices",
    "use_dora", "use_rslora",
}  # fmt: skip
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base as well, and that change is in no file here.
_PROVED_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def refuse_unproved(config: Mapping[str, Any], folder: Path) -> None:
    """Name every option of an `adapter_config.json` whose merge is not proved.

    Raises:
        UsageError: there are such options.
    """
    from peft import LoraConfig

    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    found = []
    for name, value in config.items():
        if name in _PROVED or not value:
            continue
        field = fields.get(name)
        if field is None or value != _default(field):
            found.append(name)
    if config.get("init_lora_weights", True) not in _PROVED_STARTS:
        found.append(f"init_lora_weights={config['init_lora_weights']}")
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type={config.get('peft_type')}")
    if found:
        raise UsageError(
            f"{folder}: {', '.join(found)}: no merge of this kind of adapter is proved here; "
            "use it as an adapter, or merge it with peft's merge_and_unload"
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def find_edits(
    model: PreTrainedModel,
    adapter: Path,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, list[str]],
) -> dict[str, Edit]:
    """Parameter -> what the adapter does to it. Every tensor of the adapter is in exactly one place."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config: LoraConfig = LoraConfig.from_pretrained(str(adapter))
    config.init_lora_weights, config.inference_mode = False, True
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config)
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    edits = _from_modules(wrapped, expected)
    taken = {name for edit in edits.values() for name in edit.names}
    twice = saved_twice(shapes, expected)
    own: dict[str, str] = {}  # parameter of the base -> the adapter's own copy of it: a bias, an embedding saved whole
    for name in sorted((expected.keys() | shapes.keys()) - taken - twice.keys()):
        parameter = _UNWRAPPED.sub(".", name.removeprefix(_PREFIX))
        if parameter in parameters:
            own[parameter] = name
            expected.setdefault(name, parameters[parameter])
    _refuse_unequal(adapter, {**twice, **_of_tied(own, groups)})
    for parameter, name in own.items():
        for member in groups.get(parameter, [parameter]):
            edit = edits.get(member, Edit())
            if not edit.replaced:  # one of `modules_to_save`, or one that is tied, has its copy already
                edits[member] = dataclasses.replace(edit, replaced=name)
    shapes = {name: shape for name, shape in shapes.items() if name not in twice}
    _check_tensors(expected, shapes, adapter)
    wrapped.unload()
    unknown = sorted(edits.keys() - parameters.keys())
    if without := [name for name in unknown if edits[name].bias]:
        raise UsageError(
            f"{adapter}: lora_bias: {', '.join(without[:3])} ({len(without)} in all): these layers of the base have no "
            "bias, so that no merged model could hold what the adapter adds; use the adapter as it is"
        )
    if unknown:
        raise UsageError(
            f"{adapter}: {', '.join(unknown[:3])}: adapted in more than one way, and no merge of that is proved here"
        )
    return edits


def _of_tied(own: Mapping[str, str], groups: Mapping[str, list[str]]) -> dict[str, str]:
    """Copies of one weight of the base under several names -> the first of them; a file may hold all."""
    first: dict[str, str] = {}
    found = {}
    for parameter, name in own.items():
        owner = first.setdefault(groups.get(parameter, [parameter])[0], name)
        if owner != name:
            found[name] = owner
    return found


def _refuse_unequal(adapter: Path, twice: Mapping[str, str]) -> None:
    """What a file holds under two names must be the same under both: PEFT would take the one or the other."""
    import torch

    tensors = read_tensors(adapter / ADAPTER_WEIGHTS) if twice else {}
    for name, original in twice.items():
        if original not in tensors:  # which the check of names and shapes will say
            continue
        one, other = tensors[name], tensors[original]
        if one.shape != other.shape or not all(
            torch.equal(one.read(*run), other.read(*run)) for run in pieces(one.rows, one.width)
        ):
            raise ModelError(
                f"{adapter}: {name} and {original} stand for one weight, and their values differ; save the adapter "
                "again with PEFT's save_pretrained"
            )


def _from_modules(wrapped: PeftModel, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Edit]:
    import torch
    from peft.tuners.lora import Embedding, Linear, LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
    from transformers.pytorch_utils import Conv1D

    edits: dict[str, Edit] = {}
    owners: dict[int, str] = {}  # token adapter -> its tensor; a tied one has none of its own

    def add(parameter: str, edit: Edit) -> None:
        if parameter in edits:
            raise UsageError(f"{parameter} is adapted in more than one way, and no merge of that is proved here")
        edits[parameter] = edit

    modules = dict(wrapped.named_modules())
    for name, module in modules.items():
        if isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            owners[id(module.token_adapter)] = f"{name}.token_adapter.trainable_tokens_delta"
    for name, module in modules.items():
        place = name.removeprefix(_PREFIX)
        if isinstance(module, ModulesToSaveWrapper):
            for key in module.modules_to_save["default"].state_dict():
                add(f"{place}.{key}", Edit(replaced=f"{name}.{key}"))
        elif isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            if getattr(module.original_module, "bias", None) is not None:
                raise UsageError(f"{place}: trained tokens of a layer with a bias have no proved merge here")
            owner = owners[id(tokens.tied_adapter or tokens)]
            add(f"{place}.weight", Edit(tokens=(owner, tuple(tokens.token_indices["default"]))))
        elif isinstance(module, ParamWrapper):  # several parameters of one module: wrappers in wrappers
            parameter = f"{place.replace('.base_layer', '')}.{module.parameter_name}"
            count, wide = module.num_experts, module.get_param().dim() == 3
            if wide and count == 1:
                raise UsageError(f"{parameter}: no merge of a single expert is proved here; use the adapter as it is")
            # PEFT's own mark of a weight that it takes as (E, out, in), and not as (E, in, out)
            transposed = wide and not module._did_swap_in_out_features
            names = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            add(parameter, Edit(lora=Lora(*names, module.scaling["default"], transposed, experts=count)))
        elif isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            # subclasses of PEFT's layers, and those for convolutions, experts and others, have their own arithmetic
            if type(module) is Linear and isinstance(layer, torch.nn.Linear | Conv1D):
                a, b, transposed = "lora_A.weight", "lora_B.weight", bool(module.fan_in_fan_out)
            elif type(module) is Embedding:
                a, b, transposed = "lora_embedding_A", "lora_embedding_B", True
            else:
                kind = f"{type(module).__name__} around {type(layer).__name__}"
                raise UsageError(f"{place}: no merge of {kind} is proved here; use the adapter as it is")
            magnitude = f"{name}.lora_magnitude_vector"
            scaling = module.scaling["default"]
            lora = Lora(f"{name}.{a}", f"{name}.{b}", scaling, transposed, magnitude if magnitude in expected else None)
            add(f"{place}.weight", Edit(lora=lora))
            if f"{name}.lora_B.bias" in expected:
                add(f"{place}.bias", Edit(bias=(f"{name}.lora_B.bias", scaling)))
    return edits


def _check_tensors(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], adapter: Path
) -> None:
    """Every tensor that the configuration asks for is there in its shape, and no other."""

    def some(names: Iterable[str]) -> str:
        listed = sorted(names)
        return f"{', '.join(listed[:3])} ({len(listed)} in all)"

    problems = []
    if missing := expected.keys() - shapes.keys():
        problems.append(f"it lacks {some(missing)}")
    if extra := shapes.keys() - expected.keys():
        problems.append(f"it holds {some(extra)}, which its adapter_config.json does not ask for")
    wrong = [name for name in expected.keys() & shapes.keys() if expected[name] != tuple(shapes[name])]
    if wrong:
        first = min(wrong)
        problems.append(f"{some(wrong)}: found the shape {tuple(shapes[first])}, expected {expected[first]}")
    if problems:
        raise ModelError(f"{adapter} does not fit its base: {'; '.join(problems)}")
