"""What an adapter folder holds, whether it is whole, which base it belongs to, and how the two become one model.

::

    adapter_config.json        PEFT's: which layers, ranks, new tokens
    adapter_model.safetensors  PEFT's: the trained tensors
    base.json                  ours: the base by name, revision, fingerprint and rows of its vocabulary
    tokenizer, chat template, generation_config.json

PEFT warns about a tensor that is missing and goes on with random numbers in its place; here that is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from instructft.adapters.adapter_folder import (
    CONFIG,
    WEIGHTS,
    AdapterFolder,
    first_three,
    is_adapter,
    trained_rows,
)
from instructft.errors import AdapterError, ModelError
from instructft.formatting import first_line
from instructft.weights import remote_code
from instructft.weights.base_record import BASE, BaseModelRecord, base_folder, is_hub_id
from instructft.weights.model_class import auto_class
from instructft.weights.weight_files import fingerprint

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

_ROWS = ".token_adapter.trainable_tokens_delta"  # the trained rows of an embedding

# --------------------------------------------------------------------------------------------------------------------
# The base
# --------------------------------------------------------------------------------------------------------------------


def locate_base(adapter: AdapterFolder) -> Path:
    """The local folder of an adapter's base, verified by its fingerprint; from the Hub's cache or the Hub if need be.

    A folder is looked for as it is named, from the working directory, and then from the adapter's own folder and those
    above it, so that a base and its runs can move together.

    Raises:
        AdapterError: the base is not there, is an adapter itself, or has another fingerprint.
    """
    base = adapter.base
    written = adapter.folder / BASE
    if not written.is_file():
        written = adapter.folder.resolve().parent / BASE
    key = f"name_or_path in {written}" if base.fingerprint else f"base_model_name_or_path in {adapter.folder / CONFIG}"
    places = [Path(base.name_or_path).expanduser()]
    if not places[0].is_absolute():
        here = adapter.folder.resolve()
        places += [place / base.name_or_path for place in (here, *here.parents)]
    local = [p for place in places if ((p := place / (base.subfolder or "")) / "config.json").is_file()]
    prints: dict[Path, str] = {}
    for place in _candidates(list(dict.fromkeys(local)), base):
        if is_adapter(place):  # transformers would put it on the base without a word
            raise AdapterError(f"{place}, the base of {adapter.folder}, holds an adapter itself; merge that one first")
        if not base.fingerprint:
            print(
                f"{adapter.folder} has no {BASE}: that {place} is the base it was trained on is not verified.",
                file=sys.stderr,
            )
            return place
        prints[place] = fingerprint(place)
        if prints[place] == base.fingerprint:
            return place
    if prints:
        place, found = next(iter(prints.items()))
        raise AdapterError(
            f"{place} is not the base that {adapter.folder} was trained on: found the fingerprint {found}, expected "
            f"{base.fingerprint}. Bring the old weights back; if they lie elsewhere, write their place to {key}"
        )
    nested = ": it is an adapter itself, merge it first" if is_adapter(base.name_or_path) else ""
    raise AdapterError(
        f"{adapter.folder} was trained on {base.name_or_path}, which is neither a folder with a model here nor to be "
        f"had from the Hugging Face Hub or its cache{nested}. If the base has moved, write its new place to {key}"
    )


def _candidates(local: list[Path], base: BaseModelRecord) -> Iterator[Path]:
    """Where the base may be: folders, and only when none of them was it the Hub."""
    yield from local
    if (base.fingerprint or not local) and is_hub_id(base.name_or_path):
        fetched = base_folder(base.name_or_path, base.commit or base.revision, base.subfolder)
        if fetched is not None and fetched not in local:
            yield fetched


# --------------------------------------------------------------------------------------------------------------------
# Base and adapter together
# --------------------------------------------------------------------------------------------------------------------


def attach(model: PreTrainedModel, adapter: AdapterFolder, *, trainable: bool = False) -> PeftModel:
    """Put an adapter on its base, strictly: every tensor of the file has its place, every place its tensor.

    The embeddings grow to the rows of training first. Adapter weights are float32 also on a base in bfloat16.

    Args:
        trainable: False gives a model in evaluation mode without gradients.

    Example::

        attach(AutoModelForCausalLM.from_pretrained(locate_base(adapter)), adapter).generate(**batch)

    Raises:
        AdapterError: tensors are missing, left over, of another shape than this base needs, or not finite.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from instructft.adapters.quantization import fix_layout

    weights = load_file(adapter.folder / WEIGHTS)
    if bad := [f"{name} holds NaN or infinity" for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise AdapterError(f"{adapter.folder / WEIGHTS} is not usable:\n" + first_three(sorted(bad)))
    wrapped = _wrap(fix_layout(model), adapter, trainable)
    converted = _check(wrapped, adapter, weights)
    for name, original in saved_twice(
        converted, get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    ).items():
        if not converted.pop(name).equal(converted[original]):
            raise AdapterError(
                f"{adapter.folder / WEIGHTS}: {name} and {original} stand for one weight, and their values differ; "
                "save the adapter again with PEFT's save_pretrained"
            )
        del weights[name]
    set_peft_model_state_dict(wrapped, weights)
    now = wrapped.state_dict() | get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    for name, tensor in converted.items():
        if not (now[name].cpu() == tensor.to(now[name].dtype)).all():
            raise ModelError(f"{adapter.folder}: PEFT did not load {name} as it is in the file")
    if not trainable:
        wrapped.requires_grad_(False)
        wrapped.eval()
    return wrapped


def leaves_base_as_it_is(adapter: AdapterFolder) -> bool:
    """Whether the model without its adapter (PEFT's `disable_adapter`) computes exactly what its base does.

    An adapter can change the base itself: its biases, its whole embedding, or its weights where the first values of
    the pairs are taken out of them (PiSSA and its kin).
    """
    own = all(".lora_" in name or name.endswith(".trainable_tokens_delta") for name in adapter.shapes)
    return own and isinstance(adapter.config.get("init_lora_weights", True), bool)


def check_fit(adapter: AdapterFolder, base: Path) -> None:
    """Check what `attach` would on the configuration of the base in `base` alone, before weights are loaded.

    Raises:
        AdapterError: as `attach` does.
    """
    import torch
    from transformers import AutoConfig

    trust = remote_code.flag()
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(base, **trust)
            model = auto_class(config).from_config(config, **trust)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{base} could not be read as a model: {first_line(error)}") from error
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in adapter.shapes.items()}
        _check(_wrap(model, adapter, trainable=False, empty=True), adapter, empty)


def _wrap(model: PreTrainedModel, adapter: AdapterFolder, trainable: bool, empty: bool = False) -> PeftModel:
    """The base with PEFT's layers in place, their weights still to be loaded."""
    from peft import LoraConfig, PeftModelForCausalLM

    from instructft.adapters.lora import fit_embeddings

    fit_embeddings(model, adapter.base.vocab_size)
    rows = model.get_input_embeddings().weight.shape[0]
    most = max((max(indices) for indices in trained_rows(adapter.config).values() if indices), default=0)
    if most >= rows:
        raise AdapterError(f"{adapter.folder} trained token {most}; its base has {rows} rows: it is another base")
    try:
        config = LoraConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = not trainable
        if empty:  # some initial values are worked out from the base's weights, which are not there
            config.init_lora_weights = False
        return PeftModelForCausalLM(model, config, low_cpu_mem_usage=empty)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        reason = first_line(error)
        raise AdapterError(f"{adapter.folder} does not fit its base {adapter.base.name_or_path}: {reason}") from error


def _check(wrapped: PeftModel, adapter: AdapterFolder, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compare the tensors of the file with those that the wrapped model would save; they come back as it names them."""
    from peft import get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    # transformers 5 names the experts of some models otherwise than older files do; PEFT converts them as it loads
    found = convert_peft_adapter_state_dict_for_transformers(wrapped, wrapped.peft_config["default"], dict(weights))
    needed = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    allowed = expected | _whole_embeddings(wrapped)
    allowed |= {name: expected[original] for name, original in saved_twice(found, expected).items()}
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    problems += [f"{name} belongs to no layer of this base" for name in sorted(set(found) - set(allowed))]
    problems += [
        f"{name} has the shape {tuple(tensor.shape)}; expected {allowed[name]}"
        for name, tensor in sorted(found.items())
        if name in allowed and tuple(tensor.shape) != allowed[name]
    ]
    if problems:
        base = adapter.base.name_or_path
        raise AdapterError(f"{adapter.folder / WEIGHTS} does not fit its base {base}:\n" + first_three(problems))
    return found


def saved_twice(names: Iterable[str], needed: Collection[str]) -> dict[str, str]:
    """Tensors that PEFT saves once more under another name, with whole embeddings -> the name it loads them by.

    >>> saved_twice(["lm_head.weight", "lm_head.modules_to_save.weight"], ["lm_head.weight"])
    {'lm_head.modules_to_save.weight': 'lm_head.weight'}

    Args:
        needed: the names that PEFT asks a file for.
    """
    rows = [name for name in needed if name.endswith(_ROWS)]
    found = {}
    for name in names:
        original = name.replace(".modules_to_save.", ".")
        if name.endswith(_ROWS) and len(rows) == 1:  # a tied head has none of its own
            original = rows[0]
        if name not in needed and original in needed:
            found[name] = original
    return found


def _whole_embeddings(wrapped: PeftModel) -> dict[str, tuple[int, ...]]:
    """Tensors of the base that PEFT saves with an adapter whose vocabulary has grown: a file may hold them."""
    layers = (wrapped.get_input_embeddings(), wrapped.get_output_embeddings())
    names = [name for name, module in wrapped.named_modules() if any(module is layer for layer in layers)]
    own = re.compile(r"lora_|trainable_tokens|modules_to_save")
    return {
        key: tuple(tensor.shape)
        for key, tensor in wrapped.state_dict().items()
        if any(key.startswith(f"{name}.") for name in names) and not own.search(key)
    }
