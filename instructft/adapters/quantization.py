"""4-bit and 8-bit weights through bitsandbytes: the one thing in which QLoRA (arXiv:2305.14314) differs from LoRA.

Only the base is quantized, and only its linear layers: embeddings, norms and the output head keep the model's dtype,
the adapter is float32. `peft.prepare_model_for_kbit_training` is left out on purpose: it would hold embeddings, head
and norms in float32, 2 GB more for a vocabulary of 128,000 and 4,096 dimensions; autocast and the models' own norms
already compute in float32 what needs it.

Packed weights lie in memory as `from_pretrained` packs them, in training and in inference (`fix_layout`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from instructft.errors import ModelError, UsageError
from instructft.formatting import first_line

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig

    from instructft.recipe.schema import Recipe

_Model = TypeVar("_Model", bound="torch.nn.Module")


def check(recipe: Recipe, config: PretrainedConfig | None = None) -> None:
    """Refuse quantization where it would not work, before any weight is read.

    Args:
        config: of the model, whose layers are looked at too.

    Raises:
        UsageError: bitsandbytes is not installed, or does not run on this machine's device, or not with such layers.
    """
    quantization = recipe.model.quantization
    if quantization == "none":
        return
    if quantization == "8bit" and recipe.adapter.use_dora:
        raise UsageError(
            "adapter.use_dora: DoRA over 8bit weights loses their scales on its way through PEFT (peft 0.21, "
            "bitsandbytes 0.50); use model.quantization=4bit, or leave DoRA out"
        )
    if quantization == "8bit" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UsageError(
            "model.quantization: 8bit weights cannot be sharded, since FSDP parts them from their scales "
            "(bitsandbytes 0.50); use 4bit, or another strategy than FSDP"
        )
    trouble = trouble_with(device(recipe), quantization)
    if trouble:
        raise UsageError(
            f"model.quantization: {quantization} needs bitsandbytes, which {trouble}. "
            "Install it with pip install 'instructft[quant]', or train without: model.quantization=none"
        )
    if config is not None and quantization == "4bit" and device(recipe) == "cpu":
        for name, rows in _rows_of_layers(config):
            if why := _rows_in_parts(name, rows):
                raise UsageError(f"model.quantization: {why}")


@functools.cache
def trouble_with(where: str, quantization: str) -> str:
    """Why bitsandbytes cannot be used, or "". Found by quantizing a small matrix, since its import rarely fails."""
    import torch

    try:
        import bitsandbytes as bnb
    except ModuleNotFoundError:
        return "is not installed"
    except Exception as error:  # a library that does not load says so in many ways
        return f"does not load here ({first_line(error)})"
    if torch.device(where).type not in getattr(bnb, "supported_torch_devices", {"cuda"}):
        return f"does not know the device {torch.device(where).type} (version {bnb.__version__})"
    try:
        sample = torch.linspace(-1, 1, 64 * 64, device=where).view(64, 64)
        if quantization == "4bit":
            packed, state = bnb.functional.quantize_4bit(sample, quant_type="nf4", compress_statistics=True)
            back = bnb.functional.dequantize_4bit(packed, state)
        else:
            rows, scales, _ = bnb.functional.int8_vectorwise_quant(sample.half())
            back = rows.float() * scales.float()[:, None] / 127
        off = float((back - sample).abs().max())
        return "" if off < 0.2 else f"does not work here (a matrix came back with numbers off by {off:.2f})"
    except Exception as error:
        return f"does not work here ({first_line(error)})"


def device(recipe: Recipe) -> str:
    """Where a run trains: the GPU of this process, or the CPU."""
    import torch

    if torch.cuda.is_available() and not recipe.train.get("use_cpu"):
        return f"cuda:{torch.cuda.current_device()}"
    if torch.backends.mps.is_available() and not recipe.train.get("use_cpu"):
        return "mps"
    return "cpu"


def loading(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize while the weights are read; none without quantization.

    Example::

        loading(load_recipe("mistral-7b-qlora"), torch.bfloat16)["quantization_config"].bnb_4bit_quant_type
        # 'nf4'
    """
    if recipe.model.quantization == "none":
        return {}
    return {
        "quantization_config": configuration(recipe.model.quantization, dtype),
        "device_map": {"": device(recipe)},
    }


def configuration(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The form in which weights are held: nf4 with quantized scales (0.52 bytes a weight), or int8 by rows.

    Args:
        quantization: 4bit or 8bit.
        dtype: of the rest of the model; layers compute in it, and packed 4-bit weights are stored as if they were of
            it, since FSDP shards only tensors of one dtype together.
    """
    # int8 layers compute in float16 whatever comes in, and say so at every one of millions of calls (0.50)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def fix_layout(model: _Model) -> _Model:
    """Have bitsandbytes leave 4-bit weights as they lie; to be called on every model as soon as it is loaded.

    On a CPU with AVX-512 BF16, `Linear4bit` packs its weights anew for a faster kernel when it first computes in
    evaluation mode, and back when it is saved. Its scales come back rounded to bfloat16, so that a run that evaluates
    would train on another base than it began with; and layers whose sides are no multiples of 32 and 64 are not
    packed, but raise an error (bitsandbytes 0.50).

    Raises:
        ModelError: this CPU would compute with other weights than were packed.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            _refuse_rows_in_parts(name, module)
    return model


def _refuse_rows_in_parts(name: str, layer: Any) -> None:
    """With AVX-512 every row is unpacked as if a block of weights began there, and past the end of the scales.

    Rows of real models are whole blocks of 64 with few exceptions (bitsandbytes 0.50, `dequantizeBlockwise4bitCpu`).
    """
    if layer.weight.device.type == "cpu" and (why := _rows_in_parts(name, layer.in_features, layer.weight.blocksize)):
        raise ModelError(why)


def _rows_in_parts(name: str, rows: int, block: int = 64) -> str:
    """Why a layer whose rows have so many weights cannot be computed in 4 bits on this CPU; "" where it can."""
    import torch

    if rows % block == 0 or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return ""
    return _in_parts(name, rows, block)


def _in_parts(name: str, rows: int, block: int = 64) -> str:
    return (
        f"{name}: its rows of {rows} weights are no whole blocks of {block}, and bitsandbytes unpacks such 4-bit "
        "weights wrongly on a CPU with AVX-512; use a GPU, model.quantization=8bit or model.quantization=none"
    )


def told_by_width(config: Mapping[str, Any]) -> str:
    """What `check` will find on a CPU in 4 bits, as far as the width in a `config.json` tells it, without torch; or "".

    Example::

        told_by_width({"n_embd": 32})
        # 'n_embd: its rows of 32 weights are no whole blocks of 64, …'
    """
    for key in ("hidden_size", "n_embd", "d_model"):  # each block has layers that read a token's whole vector
        width = config.get(key)
        if isinstance(width, int) and width % 64 and _torch_takes_avx512():
            return _in_parts(key, width)
    return ""


def _torch_takes_avx512() -> bool:
    """What torch finds by the same flags; not where a variable tells it otherwise, or where there is no such file."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    needed = {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"}
    return needed <= flags and "ATEN_CPU_CAPABILITY" not in os.environ


def _rows_of_layers(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """The layers that are quantized, each with the weights of one of its rows; on shapes alone."""
    import torch

    from instructft.weights import remote_code
    from instructft.weights.model_class import auto_class

    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config), **remote_code.flag())
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head:
            yield name, module.weight.shape[1 if type(module).__name__ == "Linear" else 0]


def packed_for_kernel(state: Any) -> bool:
    """Whether the weights of a bitsandbytes `QuantState` lie as only the kernel for AVX-512 BF16 reads them."""
    return bool(getattr(state, "packing_format_for_cpu", False))


# --------------------------------------------------------------------------------------------------------------------
# No code from the Hub
# --------------------------------------------------------------------------------------------------------------------

# Wherever the package `kernels` is there, bitsandbytes fetches compiled code from the Hub: on a CPU with AVX-512 BF16
# when it is imported, on Apple's GPUs when a layer first computes. Who only wants to fine-tune has asked for neither,
# and it has its own code for both. PEFT and transformers import it wherever it is installed, so that no call of ours
# comes before it: the two modules that ask are loaded with `kernels` out of sight. There is no setting for it
# (bitsandbytes 0.50, `backends/cpu/ops.py` and `backends/mps/ops.py`).
_ASKING = {"bitsandbytes.backends.cpu.ops", "bitsandbytes.backends.mps.ops"}
_NONE_THERE = "Failed to load CPU gemm_4bit_forward from kernels-community"


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        log = logging.getLogger(module.__name__)
        with _hidden("kernels"):
            log.addFilter(_says_something_else)
            try:
                super().exec_module(module)
            finally:
                log.removeFilter(_says_something_else)
            if hasattr(module, "_get_kernel"):
                module._get_kernel()  # on Apple's GPUs: asks now and finds none, and does not ask again


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ASKING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def keep_off_the_hub() -> None:
    """From now on bitsandbytes asks no Hub; one that is loaded already has asked."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _says_something_else(record: logging.LogRecord) -> bool:
    """Whether it is not the advice to install `kernels`; anything else that goes wrong there is said."""
    return not str(record.msg).startswith(_NONE_THERE)


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A package cannot be imported inside, whether it is installed or loaded."""
    loaded = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # how Python marks what cannot be imported
    try:
        yield
    finally:
        if loaded is None:
            del sys.modules[name]
        else:
            sys.modules[name] = loaded
