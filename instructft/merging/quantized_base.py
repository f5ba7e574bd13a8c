"""The two bases of a QLoRA adapter: the quantized one that it was trained on, and the published one, which was whole.

What the quantization took away stays away in training, and the adapter learned beside it. So merged into the published
base it is another model than was trained, merged into the quantized one, unpacked again, it is that model. Both can be
had, and how far each is from what was trained is measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from instructft.merging.comparison import Texts, agreement, apart, look, look_once
from instructft.merging.plan import Machine
from instructft.merging.proof import load_adapted, load_plain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from instructft.adapters.adapter_folder import AdapterFolder

ORIGINAL, DEQUANTIZED = "original", "dequantized"
BASES = (ORIGINAL, DEQUANTIZED)


@contextmanager
def dequantized_base(adapter: AdapterFolder, base: Path, beside: Path) -> Iterator[Path]:
    """A folder with the base as the adapter was trained on it: quantized, and unpacked again, in float32.

    Args:
        beside: where it lies meanwhile, since it is as large as the model.

    Raises:
        ModelError: this machine cannot quantize it.
    """
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="base.partial-", dir=beside) as name:
        folder = Path(name) / "base"
        model = _dequantized(adapter, base)
        model.save_pretrained(folder)
        for path in base.iterdir():  # tokenizer, templates, code
            if path.is_file() and not (folder / path.name).exists() and not _weights(path):
                shutil.copyfile(path, folder / path.name)
        del model
        yield folder


def _weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")


def _dequantized(adapter: AdapterFolder, base: Path) -> PreTrainedModel:
    import torch

    from instructft.adapters.quantization import fix_layout

    model, _ = load_plain(base, **_as_trained(adapter))
    fix_layout(model).dequantize(torch.float32)
    return model.to(torch.float32).eval()


def _as_trained(adapter: AdapterFolder) -> dict[str, Any]:
    import torch

    from instructft.adapters.quantization import configuration

    dtype: torch.dtype = getattr(torch, adapter.base.dtype, torch.float32)
    return {"dtype": dtype, "quantization_config": configuration(adapter.base.quantization, dtype)}


def measure_quantized(
    adapter: AdapterFolder, original: Path, merged: Path, into: str, texts: Texts, machine: Machine
) -> dict[str, Any]:
    """How far the merged model is from the adapter on the quantized base that it was trained on; nothing is required.

    Returns:
        `quantization`; `trained_loss` of the adapter on that base; of the merged model `into`, `kl`, `top1`,
        `difference`, `loss`, `tokens` and `equal_tokens`; `other`, the same four of the adapter on the other base; and
        which of the two is `nearer`.

    Raises:
        ModelError: this machine cannot quantize the base.
    """
    from accelerate.utils.memory import clear_device_cache

    from instructft.adapters.attach import attach

    see = look if machine.whole else look_once
    live, _ = load_adapted(original, adapter, machine, **_as_trained(adapter))
    seen = see(live, texts)
    del live
    clear_device_cache(garbage_collection=True)
    model, _ = load_plain(merged, machine.dtype)
    now = see(model.to(machine.device), texts)
    del model
    clear_device_cache(garbage_collection=True)
    if into == ORIGINAL:
        rest = attach(_dequantized(adapter, original).to(machine.device), adapter)
    else:
        rest, _ = load_adapted(original, adapter, machine)
    other = apart(seen, see(rest, texts, answers=False))
    del rest
    clear_device_cache(garbage_collection=True)
    tokens, equal = agreement(seen.answers, now.answers)
    found = apart(seen, now)
    elsewhere = DEQUANTIZED if into == ORIGINAL else ORIGINAL
    return {
        "quantization": adapter.base.quantization,
        "trained_loss": seen.loss,
        "into": into,
        **found,
        "tokens": tokens,
        "equal_tokens": equal,
        "other": {"into": elsewhere, **other},
        "nearer": into if found["kl"] <= other["kl"] else elsewhere,
    }
