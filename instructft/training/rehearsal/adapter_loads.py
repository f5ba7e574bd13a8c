"""An adapter that is saved now is the adapter that plain PEFT loads: tried before the first step, without the base.

What is saved under names that PEFT does not look for is left out when the adapter is loaded, with a warning, and the
model that answers is another one. Its base lies on PyTorch's meta device here, so that this takes no memory.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

from instructft.adapters.lora import fit_embeddings, is_peft
from instructft.errors import ModelError
from instructft.weights import remote_code
from instructft.weights.model_class import auto_class

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer


def refuse_adapter_that_does_not_load(trainer: Trainer) -> None:
    """Save the adapter to a scratch folder and load it; on the first process alone.

    Raises:
        ModelError: PEFT does not find all that was saved.
    """
    import torch
    from peft import PeftModel

    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft(model) or not trainer.is_world_process_zero() or getattr(model, "is_quantized", False):
        return
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if getattr(config, "quantization_config", None) is not None:
        return
    if model.peft_config["default"].trainable_token_indices:
        return  # PEFT merges such rows while it loads, and cannot on the meta device (peft 0.21)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
        with torch.device("meta"):
            plain = auto_class(config).from_config(config, **remote_code.flag())
            fit_embeddings(plain, base.get_input_embeddings().weight.shape[0])
            PeftModel.from_pretrained(plain, folder, low_cpu_mem_usage=True)
    missing = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    if missing:
        raise ModelError(
            f"adapter: what is trained on {type(base).__name__} cannot be loaded again by PEFT: {missing[0][:300]}. "
            "Leave these layers out of adapter.target_modules, or train all weights (adapter.type=none)"
        )
