"""What a run will save beside its weights is saved now, and read again by plain transformers.

A configuration, a generation configuration or a tokenizer that cannot be saved costs a run its end, and one that comes
back as another is found on a server. They are small: a scratch folder holds them for a moment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import ModelError
from instructft.formatting import first_line
from instructft.weights import remote_code

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

_TURNS = [{"role": "user", "content": "Hi"}]


def refuse_what_does_not_come_back(trainer: Trainer, ids: Sequence[int]) -> None:
    """Save configuration, generation configuration and tokenizer to a scratch folder and read them again.

    Of the weights, the one row that loading may set anew is asked.

    On the first process alone.

    Args:
        ids: some tokens of a training row.

    Raises:
        ModelError: one of them cannot be saved or read, or is another one then.
    """
    if not trainer.is_world_process_zero():
        return
    with tempfile.TemporaryDirectory() as place:
        for name, tried in (
            ("config.json", _config),
            ("generation_config.json", _generation),
            ("the tokenizer", _tokenizer),
            ("the row of the pad token in the embeddings", _pad_row),
        ):
            try:
                wrong = tried(trainer, Path(place), ids)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
                wrong = f"{type(error).__name__}: {first_line(error)}"
            if wrong:
                raise ModelError(
                    f"{name}, as this run would save it, is not read again by transformers as it is here: {wrong}. "
                    "Repair it in the base's folder; --no-rehearsal trains all the same"
                )


def _config(trainer: Trainer, folder: Path, ids: Sequence[int]) -> str:
    """What training sets in the model's configuration must be taken back in what is saved."""
    from transformers import AutoConfig

    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with trainer.config_as_loaded() as before:
        model.config.save_pretrained(folder)
    read = AutoConfig.from_pretrained(folder, **remote_code.flag()).get_text_config()
    return _unequal(before, {name: getattr(read, name, None) for name in before})


def _generation(trainer: Trainer, folder: Path, ids: Sequence[int]) -> str:
    from transformers import GenerationConfig

    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    model.generation_config.save_pretrained(folder)
    read = GenerationConfig.from_pretrained(folder)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return _unequal(*({name: getattr(one, name) for name in names} for one in (model.generation_config, read)))


def _tokenizer(trainer: Trainer, folder: Path, ids: Sequence[int]) -> str:
    """The same ids for a text of the data, the same prompt, the same special tokens."""
    from transformers import AutoTokenizer

    ours: Any = trainer.processing_class
    ours.save_pretrained(folder)
    text = ours.decode(ids, skip_special_tokens=True)

    def seen(tokenizer: Any) -> dict[str, Any]:
        return {
            "the tokens of a text": tokenizer(text)["input_ids"],
            "the prompt": tokenizer.apply_chat_template(_TURNS, tokenize=False, add_generation_prompt=True),
            "the special tokens": dict(tokenizer.special_tokens_map),
            "the number of tokens": len(tokenizer),
        }

    return _unequal(seen(ours), seen(AutoTokenizer.from_pretrained(folder, **remote_code.flag())))


def _pad_row(trainer: Trainer, folder: Path, ids: Sequence[int]) -> str:
    """Youtu sets it to zero whenever it is loaded (transformers 5.23), whatever the file says."""
    import torch

    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    layer, own_code = model.get_input_embeddings(), getattr(model.config, "auto_map", None)
    pad = getattr(layer, "padding_idx", None)
    if pad is None or own_code or not layer.weight.requires_grad:
        return ""
    loaded: Any = torch.nn.Embedding(pad + 1, 1, padding_idx=pad)
    torch.nn.init.ones_(loaded.weight)
    loaded.weight._is_hf_initialized = True  # so `from_pretrained` marks what it read from a file
    with torch.no_grad():
        model._init_weights(loaded)
    return "" if loaded.weight[pad].item() == 1 else f"loading sets that of token {pad} to zero"


def _unequal(ours: Mapping[str, Any], read: Mapping[str, Any]) -> str:
    """What differs, in words; "" where nothing does.

    >>> _unequal({"eos_token_id": 2, "pad_token_id": 0}, {"eos_token_id": 3, "pad_token_id": 0})
    'eos_token_id: found 3, expected 2'
    """
    found = [(name, read[name], value) for name, value in ours.items() if read[name] != value]
    return "; ".join(f"{name}: found {str(other)[:80]}, expected {str(value)[:80]}" for name, other, value in found)
