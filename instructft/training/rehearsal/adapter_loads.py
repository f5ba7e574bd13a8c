"""An adapter that is saved now is the adapter that plain PEFT loads: tried before the first step, without the base.

What is saved under names that PEFT does not look for is left out when the adapter is loaded, with a warning, and the
model that answers is another one. Its base lies on PyTorch's meta device here, so that this takes no memory.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

from instructft.adapters.lora import fit_embeddings, is_peft
from instructft.errors import ModelError
from instructft.training.rehearsal.gradients import take_adapters_off
from instructft.weights import remote_code
from instructft.weights.model_class import auto_class

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer


_MISSING = re.compile(r"base_model\.model\.([^']+?)\.lora_")


def leave_out_what_does_not_load(trainer: Trainer) -> list[str]:
    """Take the adapter off layers of which PEFT does not find again what is saved; the names of these layers.

    Every process does the same to its model. A model whose code is not here as its users have it is not asked.

    Raises:
        ModelError: PEFT does not find all that was saved, and there is no layer to blame, or no layer is left.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft(model) or not _can_be_asked(model):
        return []
    missing = _missing(model)
    layers = set(_MISSING.findall(missing))
    own = {name for name, weight in model.named_parameters() if weight.requires_grad}
    lost = {name for name in own if any(f".{layer}.lora_" in name for layer in layers)}
    taken = take_adapters_off(model, set(lost)) if lost < own else []
    if missing and (not taken or (missing := _missing(model))):
        what = f"adapter: what is trained on {type(model.get_base_model()).__name__} cannot be loaded again by PEFT"
        raise ModelError(
            f"{what}: {_which(missing)}. Leave these layers out of adapter.target_modules, or train all weights "
            "(adapter.type=none)"
        )
    return sorted(taken)


def _which(missing: str) -> str:
    """The layers that PEFT names, without the wrapper's words; what it says where it names none."""
    layers = sorted({name.removesuffix(".base_layer") for name in _MISSING.findall(missing)})
    if not layers:
        return missing[:300]
    named = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more layers" if len(layers) > 3 else "")
    return f"under the names that it looks for, nothing is saved of {named}"


def _can_be_asked(model: Any) -> bool:
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        return False
    # PEFT merges such rows while it loads, and cannot on the meta device (peft 0.21)
    return not model.peft_config["default"].trainable_token_indices


def _missing(model: Any) -> str:
    """What PEFT says of keys that it does not find in an adapter that it saved itself; "" where it finds all."""
    import torch
    from peft import PeftModel
    from transformers.initialization import no_init_weights

    base = model.get_base_model()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
        with torch.device("meta"), no_init_weights():  # nothing is drawn on that device
            plain = auto_class(base.config).from_config(copy.deepcopy(base.config), **remote_code.flag())
            fit_embeddings(plain, base.get_input_embeddings().weight.shape[0])
            PeftModel.from_pretrained(plain, folder, low_cpu_mem_usage=True)
    return " ".join(str(one.message) for one in said if "missing adapter keys" in str(one.message))
