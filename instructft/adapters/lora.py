"""LoRA: which weights an adapter adds to a model, which rows of new tokens it trains, and what it leaves on disk.

The frozen base stays as it was loaded. An adapter adds `scale · B·A` to linear layers of the backbone
(arXiv:2106.09685), with a magnitude per output in DoRA (arXiv:2402.09353) and with `scale = alpha / sqrt(r)` in rsLoRA
(arXiv:2312.03732). Tokens that the template brings have no trained embedding in the base; their rows, and no others,
are trained with it.

::

    embed_tokens (V, D)   frozen, but the rows of new tokens are trained (PEFT's trainable_token_indices)
    layers.*.q_proj, …    frozen + B·A           all-linear: every linear layer of the backbone
    layers.*.experts      frozen + B·A of each   adapter.experts, see `instructft.adapters.experts`
    lm_head (V, D)        frozen, but the rows of new tokens are trained; tied to embed_tokens they stay one set
"""

from __future__ import annotations

import copy
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from instructft.adapters.experts import reach_experts
from instructft.adapters.frozen_pairs import (
    begin_with_factors,
    begins_with_factors,
    refuse_factors,
    refuse_too_many_factors,
)
from instructft.errors import UsageError
from instructft.formatting import first_line, nearest
from instructft.prompt.sandbox import SECONDS, at_most
from instructft.weights import remote_code
from instructft.weights.model_class import auto_class, backbone, inside, shortest_names, towers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    from instructft.recipe.schema import Recipe

# How PEFT may fill A and B before the first step, and why its other ways are not taken.
_INITS = (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora")
_NEEDS_DATA = "is worked out from activations over the data, for which PEFT wants a pass of its own before training"
_REFUSED = {
    "eva": _NEEDS_DATA,
    "corda": _NEEDS_DATA,
    "lora_ga": "is worked out from gradients over the data, for which PEFT wants a pass of its own before training",
    "loftq": "puts other weights in the place of the base's, so that the adapter would fit no base on disk",
    "mica": "trains A alone over a B of PEFT's own kind, and no merge of that is proved here",
}


def _no_adapter(model: Any, recipe: Recipe, new_tokens: Sequence[int] = (), **_: Any) -> Any:
    return model


def add_lora(model: Any, recipe: Recipe, new_tokens: Sequence[int] = (), *, only_shapes: bool = False) -> PeftModel:
    """Freeze a model and put the recipe's LoRA into it; the adapter's weights are float32, whatever the base holds.

    Args:
        new_tokens: ids whose embedding rows are trained, in the input embedding and in the output head.
        only_shapes: the model lies on PyTorch's meta device, and so shall its adapter.

    Example::

        model = add_lora(AutoModelForCausalLM.from_pretrained("gpt2"), recipe, new_tokens=[50257, 50258])
        count_parameters(model)
        # (2360832, 126802176)

    Raises:
        UsageError: the adapter does not fit this model.
    """
    from peft import get_peft_model

    said: list[str] = []
    config = lora_config(recipe, model, new_tokens, said.append)
    said += _without_dropout(config, model)
    if str(recipe.adapter.target_modules).lower() == "all-linear" and (left := _left_out(model)):
        said.append(
            f"adapter.target_modules: all-linear leaves out {', '.join(left)}, which PEFT refuses to adapt here"
        )
    if not only_shapes:
        from transformers import set_seed

        for line in said:
            print(line, file=sys.stderr)

        set_seed(recipe.train["seed"])  # A is random; it shall not depend on what was drawn before
    try:
        adapted = get_peft_model(model, config, low_cpu_mem_usage=only_shapes)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UsageError(f"adapter: PEFT refuses it for {type(model).__name__}: {error}") from error
    lora = adapted.peft_config["default"]
    lora.base_model_name_or_path = recipe.model.name_or_path
    lora.revision = recipe.model.revision
    adapted = as_trained_here(adapted)
    factors = "" if only_shapes else begins_with_factors(recipe.adapter.more.get("init_lora_weights"))
    return begin_with_factors(adapted, factors) if factors else adapted


ADAPTERS: dict[str, Callable[..., Any]] = {"none": _no_adapter, "lora": add_lora}


def as_trained_here(model: PeftModel) -> PeftModel:
    """Let a `PeftModel` save its own weights alone, and its head answer as TRL asks it."""
    made: Any = model
    # PEFT would add both embedding matrices as soon as the vocabulary grew, and a model card in the place of ours
    made.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    made.create_or_update_model_card = lambda output_dir: None
    head = model.get_base_model().get_output_embeddings()
    if token_rows(head) is not None:
        head.bias = None  # TRL's fused head reads it; PEFT's wrapper knows no attribute but `weight` (peft 0.21)
    return model


# --------------------------------------------------------------------------------------------------------------------
# The configuration
# --------------------------------------------------------------------------------------------------------------------


def lora_config(
    recipe: Recipe, model: Any, new_tokens: Sequence[int] = (), say: Callable[[str], Any] = lambda line: None
) -> LoraConfig:
    """`peft.LoraConfig` for a model: the recipe's keys with what depends on the architecture filled in.

    `all-linear` becomes the names of the backbone's linear layers. The output head is not among them: training reads
    its weight directly, past any adapter on it. The experts of a mixture are added as `adapter.experts` says.

    Args:
        say: told in one line what is left out.

    Example::

        lora_config(recipe, gpt2).target_modules
        # {'c_attn', 'c_fc', 'c_proj'}

    Raises:
        UsageError: a module that does not exist, or one that cannot be trained this way.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    fields = recipe.adapter.peft_kwargs()
    init = fields.get("init_lora_weights", True)
    if begins_with_factors(init):
        refuse_factors(recipe, fields)
        fields["init_lora_weights"] = True  # of layers that have none, and until the factors are taken
    elif init not in _INITS:
        known = ", ".join(str(way).lower() for way in _INITS)
        why = _REFUSED.get(str(init).lower(), "is no way of PEFT's to fill an adapter")
        raise UsageError(f"adapter.init_lora_weights: {init} {why}; expected one of {known}")
    all_linear = str(fields["target_modules"]).lower() == "all-linear"
    _refuse_what_is_nowhere(fields, model, new_tokens)
    if all_linear:
        fields["target_modules"] = _linear_layers(model)
    for line in reach_experts(fields, recipe.adapter, model, all_linear=all_linear):
        say(line)
    if new_tokens:
        fields["trainable_token_indices"] = rows_to_train(model, fields, new_tokens)
    given = {name: value for name, value in fields.items() if value is not None}  # null is PEFT's own default
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **given)
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"adapter: PEFT refuses it: {first_line(error)}") from error
    targets = _targets(model, config, recipe.adapter.target_modules)
    _refuse_patterns_of_nothing(config, targets)
    aside = tuple(tower.name for tower in towers(model))
    if any(inside(name, aside) for name in targets):  # `q_proj` is a name in many a vision tower too
        targets = {name: module for name, module in targets.items() if not inside(name, aside)}
        if not targets:
            raise UsageError(
                f"adapter.target_modules: {recipe.adapter.target_modules} reaches only {', '.join(aside)}, which text "
                "does not go through; all-linear takes the layers of the language model"
            )
        config.target_modules = shortest_names(model, set(targets))
    _refuse_tied_and_head(model, config, targets)
    _refuse_parameters_of_nothing(fields, config, model)
    if begins_with_factors(init):
        refuse_too_many_factors(init, config.r, targets)
    # weights of a Conv1D lie as (in, out); a quantized one is a Linear by now, but merges into the Conv1D of its base
    conv = any(Conv1D in (type(module), getattr(module, "source_cls", None)) for module in targets.values())
    config.fan_in_fan_out = conv
    return config


def _refuse_what_is_nowhere(fields: dict[str, Any], model: Any, new_tokens: Sequence[int]) -> None:
    """Patterns that are none, and numbers of layers and tokens that the model does not have; PEFT fails on them raw."""
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        asked = fields.get(key)
        for pattern in asked if isinstance(asked, dict) else [asked] if isinstance(asked, str) else ():
            try:
                re.compile(str(pattern))
            except re.error as error:
                raise UsageError(f"adapter.{key}: {pattern} is no regular expression: {error}") from error
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (fields.get(key) or {}).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UsageError(f"adapter.{key}: {pattern}: found {value}, expected a number above 0")
    name, layers = type(model).__name__, getattr(model.config.get_text_config(), "num_hidden_layers", None)
    chosen = fields.get("layers_to_transform")
    for layer in chosen or () if isinstance(chosen, list) or chosen is None else [chosen]:
        if layers and layer not in range(layers):
            raise UsageError(f"adapter.layers_to_transform: found {layer}; {name} has layers 0 to {layers - 1}")
    for span in fields.get("layer_replication") or ():
        first, behind = span if isinstance(span, list) and len(span) == 2 else (-1, -1)
        if layers and not (first in range(layers) and behind in range(first + 1, layers + 1)):
            raise UsageError(
                f"adapter.layer_replication: found {span}, expected pairs of a first layer and the one behind "
                f"the last, from 0 to {layers}, the layers of {name}"
            )
    rows = max([model.get_input_embeddings().weight.shape[0], *(token + 1 for token in new_tokens)])
    trained = fields.get("trainable_token_indices") or ()
    for ids in trained.values() if isinstance(trained, dict) else [trained]:
        for token in ids if isinstance(ids, list | tuple) else [ids]:
            if token not in range(rows):
                raise UsageError(f"adapter.trainable_token_indices: found {token}; {name} has tokens 0 to {rows - 1}")


def _refuse_patterns_of_nothing(config: LoraConfig, targets: dict[str, Any]) -> None:
    """A rank or alpha of layers that get no adapter has no effect, and PEFT says nothing of it."""
    from peft.utils.other import get_pattern_key

    for key in ("rank_pattern", "alpha_pattern") if not config.target_parameters else ():
        for pattern in getattr(config, key):
            if not any(get_pattern_key([pattern], name) == pattern for name in targets):
                kinds = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
                raise UsageError(
                    f"adapter.{key}: {pattern} is none of the layers that get an adapter; there are {kinds}"
                )


def _refuse_parameters_of_nothing(fields: dict[str, Any], config: LoraConfig, model: Any) -> None:
    """A single parameter that is not there gets no adapter, and PEFT warns at most; older names of it are known."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    meant = copy.deepcopy(config)
    convert_peft_config_for_transformers(meant, model, None)
    there = [name for name, _ in model.named_parameters()]
    for asked in set(fields.get("target_parameters") or ()) & set(meant.target_parameters or ()):
        if not any(name == asked or name.endswith(f".{asked}") for name in there):
            near = nearest(asked, there)
            raise UsageError(f"adapter.target_parameters: {type(model).__name__} has no parameter {asked}{near}")


def _without_dropout(config: LoraConfig, model: Any) -> list[str]:
    """Take the dropout out of an adapter over single parameters, where PEFT has none (0.21); what to say about it.

    Experts of a mixture are such parameters since transformers 5, and PEFT finds them by their old names.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    meant = copy.deepcopy(config)
    convert_peft_config_for_transformers(meant, model, None)
    if not meant.target_parameters or not config.lora_dropout:
        return []
    config.lora_dropout = 0.0
    return ["adapter.dropout: 0 in this run; PEFT has no dropout for the weights of experts that this adapter reaches"]


# What PEFT refuses to adapt in models of these types, since their kernels read the weight past any adapter (0.21).
_MAMBA_KIN = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_PAST_ADAPTERS = ("out_proj",)


def _left_out(model: Any) -> list[str]:
    """Last parts of the names of layers that no adapter can be put on in this architecture."""
    if getattr(model.config, "model_type", None) not in _MAMBA_KIN:
        return []
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(names.intersection(_PAST_ADAPTERS))


def _linear_layers(model: Any) -> list[str]:
    """Names of the backbone's linear layers: last parts where these say it all, else whole names."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    on_the_way = {id(module) for module in backbone(model).modules()}  # what the loss is computed through
    aside = tuple(tower.name for tower in towers(model))
    left_out = _left_out(model)
    whole = {
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] not in left_out
        and isinstance(module, torch.nn.Linear | Conv1D)
        and id(module) in on_the_way
        and module is not head
        and not inside(name, aside)
        and not _answers_its_own_way(module)
    }
    if not whole:
        raise UsageError(f"adapter.target_modules: all-linear, but {type(model).__name__} has no linear layer to adapt")
    return shortest_names(model, whole)


def _answers_its_own_way(module: Any) -> bool:
    """Whether a model made its own kind of linear layer, as routers that return a tuple; LoRA would add to that.

    Falcon's own kind returns what any linear layer does, and takes an adapter as any does.
    """
    import torch

    own = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
    if not own or type(module).forward is torch.nn.Linear.forward:
        return False
    try:
        with torch.no_grad():
            found = module(torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device))
    except Exception:
        return True
    return not isinstance(found, torch.Tensor) or found.shape != (1, module.out_features)


def _targets(model: Any, config: LoraConfig, asked: Any) -> dict[str, Any]:
    """Name -> module of all that the adapter will change; a name that is nowhere is refused."""
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(model.named_modules())
    linear = sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
    weighty = {
        name.rpartition(".")[2] for name, module in modules.items() if getattr(module, "weight", None) is not None
    }
    listed = asked if isinstance(asked, tuple) else ()
    for key, wanted, there in (
        ("target_modules", listed, linear),
        ("modules_to_save", config.modules_to_save or (), sorted(weighty)),
    ):
        for name in wanted:
            if not any(other == name or other.endswith(f".{name}") for other in modules):
                near = nearest(name, there)
                raise UsageError(
                    f"adapter.{key}: {type(model).__name__} has no module {name}"
                    f"{near + ' It' if near else '; it'} has {', '.join(there)}"
                )
    try:
        with at_most(SECONDS):
            found = {name: module for name, module in modules.items() if check_target_module_exists(config, name)}
    except TimeoutError as error:
        raise UsageError(
            f"adapter.target_modules: matching {asked} with the names of {type(model).__name__}'s modules takes more "
            f"than {SECONDS} s; write a simpler pattern, or a list of names"
        ) from error
    if not found and not config.target_parameters:
        raise UsageError(
            f"adapter.target_modules: nothing in {type(model).__name__} matches {asked}; it has {', '.join(linear)}"
        )
    return found


def _refuse_tied_and_head(model: Any, config: LoraConfig, targets: dict[str, Any]) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    on_the_way = {id(module) for module in model.base_model.modules()}
    for name, module in targets.items():
        if module is head or id(module) not in on_the_way:
            raise UsageError(
                f"adapter.target_modules: reaches {name}, which training reads past any adapter (it multiplies by its "
                "weight directly), so nothing there would be learned; take it out. all-linear leaves it out"
            )
        if module is embedding and tied(model):
            raise UsageError(
                f"adapter.target_modules: reaches {name}, whose weights are also the output head's, where the adapter "
                "would not take part; take it out"
            )
    for name in config.modules_to_save or ():
        whole = [n for n, module in model.named_modules() if module in (head, embedding)]
        if tied(model) and any(n == name or n.endswith(f".{name}") for n in whole):
            raise UsageError(
                f"adapter.modules_to_save: {name} shares its weights between input embedding and output head, and a "
                "copy of one would part them; take it out. The rows of new tokens are trained in any case"
            )


# --------------------------------------------------------------------------------------------------------------------
# Around a run
# --------------------------------------------------------------------------------------------------------------------


def check(recipe: Recipe, config: PretrainedConfig, new_tokens: Sequence[int] = ()) -> None:
    """Refuse an adapter that does not fit the architecture; done on shapes alone, before any weight is read.

    Raises:
        UsageError: what does not fit, and what the model has instead.
    """
    import torch

    if recipe.adapter.type == "none":
        return
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config), **remote_code.flag())
        add_lora(model, recipe, new_tokens, only_shapes=True)


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, all) numbers of a model and its adapter; a weight packed in 4 bits counts as what it stands for.

    Example::

        count_parameters(torch.nn.Linear(3, 2))
        # (8, 8)
    """
    found = [0, 0]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes: two weights a byte
        size = state.shape.numel() if state is not None else parameter.numel()
        found[0] += size if parameter.requires_grad else 0
        found[1] += size
    return found[0], found[1]


def faster_b(optimizer: Any, model: Any, ratio: float) -> None:
    """Give B of every pair `ratio` times the learning rate (LoRA+, arXiv:2402.12354), whatever the optimizer.

    A schedule multiplies the rate of each group, so that the ratio holds at every step.
    """
    b = {id(weight) for name, weight in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name}
    groups = []
    for group in optimizer.param_groups:
        fast = [weight for weight in group["params"] if id(weight) in b]
        groups.append({**group, "params": [weight for weight in group["params"] if id(weight) not in b]})
        if fast:
            groups.append({**group, "params": fast, "lr": group["lr"] * ratio})
    optimizer.param_groups = groups


def is_peft(model: Any) -> bool:
    """Whether a model carries an adapter; imports nothing."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def fit_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Grow the embeddings to `tokens` rows; each new row is the mean of the old ones. They never shrink.

    All that grows with them is treated alike: the bias of a head, and the embeddings that Gemma 3n and Gemma 4 have for
    each layer, which transformers would fill with random numbers, others each time that the model is loaded.
    """
    import torch

    if tokens <= model.get_input_embeddings().weight.shape[0]:
        return
    before = {name: weight.shape for name, weight in model.named_parameters()}
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.shape != before[name]:
                old = before[name][0]
                exact = torch.float32 if weight.device.type == "mps" else torch.float64  # as a merge has it
                weight[old:] = (weight[:old].sum(dim=0, dtype=exact) / old).to(weight.dtype)


def rows_to_train(model: Any, fields: dict[str, Any], new_tokens: Sequence[int]) -> dict[str, list[int]]:
    """Module name -> ids: the input embedding, and the head unless it is the same matrix."""
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UsageError(
            f"data.template: brings new tokens, whose rows in the output head of {type(model).__name__} must be "
            "trained; PEFT drops the bias of a head that it trains rows of. Use a template without tokens of its own, "
            "such as data.template=instruction"
        )
    own = fields.get("trainable_token_indices") or {}
    rows = dict(own) if isinstance(own, dict) else {names[id(embedding)]: list(own)}
    whole = fields.get("modules_to_save") or ()
    for module in (embedding,) if tied(model) else (embedding, head):
        name = names[id(module)]
        if any(name == saved or name.endswith(f".{saved}") for saved in whole):
            continue  # trained as a whole
        given = next((key for key in rows if name == key or name.endswith(f".{key}")), name)
        rows[given] = sorted({*rows.get(given, ()), *new_tokens})
    return rows


def token_rows(module: Any) -> Any:
    """PEFT's layer that holds a module's trained token rows, or None.

    Its `token_indices["default"]` are n ids and `trainable_tokens_delta["default"]` the (n, D) rows in their place.
    """
    layer = getattr(module, "_modules", {}).get("token_adapter")
    return layer if layer is not None and layer.active_adapters and not layer.disable_adapters else None


def tied(model: Any) -> bool:
    """Whether input embedding and output head are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
