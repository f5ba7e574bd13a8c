"""4-bit weights lie in memory as they were packed, on every CPU and in every command; no Hub is asked for a kernel."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import instructft
from instructft.adapters import quantization
from instructft.adapters.frozen_check import AdapterProof
from instructft.errors import InstructftError, ModelError
from instructft.evaluation.metrics import evaluate
from instructft.inference.generator import Generator
from instructft.merging import comparison
from instructft.models import load_for_inference as loading
from tests.helpers.device import here, in_float32, of_the_cpu, on
from tests.helpers.telling import telling

QUIET = Console(quiet=True)
pytest.importorskip("bitsandbytes")


def make_base(folder: Path, width: int = 128) -> Path:
    from tests.helpers.quickstart import tokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = tokenizer()
    ids = {f"{name}_token_id": getattr(made, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(vocab_size=len(made), max_position_embeddings=128, initializer_range=0.1, **shape, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def recipe(base: Path, tmp_path: Path, *overrides: str) -> Any:
    """Steps and evaluations in turn, with sample answers between them."""
    path = tmp_path / "qlora.yaml"
    path.write_text(
        here(f"""
model: {{name_or_path: {base}, quantization: 4bit}}
data: {{datasets: [{{name: quickstart, rows: 24}}], template: instruction, max_length: 128,
        splits: {{validation: 0.2}}}}
adapter: {{type: lora, r: 4, alpha: 8}}
train: {{max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1, warmup_steps: 0, learning_rate: 1e-2,
         eval_strategy: steps, eval_steps: 1, use_cpu: true, save_strategy: steps, save_steps: 1, report_to: none}}
samples: [Name a colour.]
output_dir: {tmp_path / "run"}
""")
    )
    return instructft.load_recipe(path, in_float32(*overrides))


def packed(model: Any) -> dict[str, torch.Tensor]:
    """Every bit of the packed weights, and of all that they are unpacked with."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        parts = {"": parameter.data, "absmax": state.absmax, "code": state.code}
        if state.nested:
            parts |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
        found |= {f"{name}.{part}": tensor.detach().clone() for part, tensor in parts.items()}
    assert len({name.partition(".weight.")[0] for name in found}) == 14
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)), name


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """(model, its packed weights right then) of every model on its way through transformers."""
    seen: list[tuple[Any, dict[str, torch.Tensor]]] = []
    load = AutoModelForCausalLM.from_pretrained

    def loading(*args: Any, **options: Any) -> Any:
        made = load(*args, **options)
        model = made[0] if isinstance(made, tuple) else made
        if any(getattr(parameter, "quant_state", None) is not None for parameter in model.parameters()):
            seen.append((model, packed(model)))
        return made

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    return seen


# -- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "double"),
    telling(itertools.product([True, False], [True, False]), (True, True), (False, False)),
    indirect=["cpu"],
)
def test_no_bit_of_packed_weights_moves_from_training_to_the_merge(
    cpu: bool, double: bool, base: Path, tmp_path: Path, loads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = quantization.configuration

    def chosen(*args: Any) -> Any:
        config = configuration(*args)
        config.bnb_4bit_use_double_quant = double
        return config

    monkeypatch.setattr(quantization, "configuration", chosen)
    monkeypatch.setattr(comparison, "ANSWER", 4)
    monkeypatch.setattr(comparison, "FIXED", comparison.FIXED[:3])
    monkeypatch.setattr(comparison, "ROWS", 3)
    result = instructft.train(recipe(base, tmp_path), console=QUIET)
    assert result.facts["adapter"]["base_unchanged"]
    assert len((result.output_dir / "samples.jsonl").read_text().splitlines()) >= 3
    logged = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert len([entry for entry in logged if "eval_loss" in entry]) == 3
    assert ("absmax2" in {name.rpartition(".")[2] for name in loads[0][1]}) == double

    tuned, tokenizer = loading.load_for_inference(str(result.output_dir))
    Generator(tuned, tokenizer).answers([[{"role": "user", "content": "Name a colour."}]], 3)
    evaluate(tuned, [{"prompt": "Name a colour.", "completion": "Red."}], tokenizer=tokenizer, max_new_tokens=3)
    tuned.train()
    tuned.eval()
    tuned.state_dict()
    merged = instructft.merge_adapter(result.output_dir, tmp_path / "merged", measure_quantized=True, console=QUIET)
    assert merged.facts["quantized"]["quantization"] == "4bit"
    assert merged.facts["quantized"]["nearer"] == "dequantized"
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "4bit base" in (tmp_path / "merged" / "README.md").read_text()

    assert len(loads) == 4  # the run, its use, what the merge measures, and what it unpacks for good
    for model, before in loads:
        same(before, loads[0][1])
        if model is not loads[-1][0]:
            same(packed(model), before)


@pytest.mark.usefixtures("cpu")
def test_a_base_that_comes_packed_keeps_its_layout(base: Path, tmp_path: Path, loads: Any) -> None:
    config = quantization.configuration("4bit", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    (tmp_path / "packed" / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    loaded, _ = loading.load_bare(str(tmp_path / "packed"))
    ids = torch.randint(0, 1400, (2, 9))
    with torch.inference_mode():
        loaded(on(loaded, ids))
    same(packed(loaded), loads[0][1])


def test_the_layer_has_the_setting_that_fixes_its_layout() -> None:
    """An attribute of bitsandbytes' own; under another name `fix_layout` would set nothing, and say nothing."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 32)
    assert isinstance(layer.support_avx512bf16_for_cpu, bool | int)
    layer.support_avx512bf16_for_cpu = True
    assert quantization.fix_layout(torch.nn.Sequential(layer))[0].support_avx512bf16_for_cpu is False


@of_the_cpu
def test_weights_that_a_kernel_laid_out_are_not_called_changed(base: Path, tmp_path: Path) -> None:
    """As they lie after bitsandbytes' own packing, which `fix_layout` keeps from happening."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    asked = recipe(base, tmp_path)
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    found = AdapterProof(model)
    assert found.verdict(model)["base_unchanged"]
    weight = next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(InstructftError, match=r"q_proj.* lies in memory as a kernel of bitsandbytes") as raised:
        found.verdict(model)
    assert "base changed while" not in str(raised.value)


# -- what a CPU cannot unpack ----------------------------------------------------------------------------------------


@of_the_cpu
def test_rows_of_parts_of_blocks_are_refused_where_they_are_unpacked_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(make_base(tmp_path / "narrow", 32), tmp_path)
    tokenizer = instructft.load_tokenizer(asked)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(ModelError, match=r"q_proj: its rows of 32 weights are no whole blocks of 64.*use a GPU"):
        instructft.load_model(asked, tokenizer)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert instructft.load_model(asked, tokenizer)


@pytest.mark.parametrize("width", [64, 128, 192])
def test_rows_of_whole_blocks_are_unpacked_rightly(width: int) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(96, width)
    back = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    assert (back - weight).abs().mean() < 0.1 * weight.abs().mean()


# -- what was trained is not lost ------------------------------------------------------------------------------------


def test_what_fails_after_the_last_step_loses_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("instructft.training.run")
    monkeypatch.setattr(module, "final_metrics", lambda trainer: 1 / 0)
    asked = recipe(base, tmp_path)
    with pytest.raises(ZeroDivisionError):
        instructft.train(asked, console=QUIET)
    kept = tmp_path / "run" / "unproved"
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.undo()
    left, _ = loading.load_for_inference(str(kept))
    result = instructft.train(asked, console=QUIET)  # goes on from the last checkpoint, and is proved
    proved, _ = loading.load_for_inference(str(result.output_dir))
    ids = torch.randint(0, 1400, (2, 9))
    with torch.inference_mode():
        assert torch.equal(left(on(left, ids)).logits, proved(on(proved, ids)).logits)
    assert not kept.exists()


# -- no code from a Hub ----------------------------------------------------------------------------------------------

_PRETEND = """
import ctypes, logging, platform, sys
real = ctypes.cdll.LoadLibrary
class Modern:  # the library on a CPU with AVX-512 BF16
    has_avx512bf16_cpu = staticmethod(lambda: True)
    def __init__(self, library): self.library = library
    def __getattr__(self, name): return getattr(self.library, name)
ctypes.cdll.LoadLibrary = lambda name: Modern(real(name)) if "bitsandbytes" in name else real(name)
platform.mac_ver = lambda: ("26.0", ("", "", ""), "arm64")
"""
_USE = """
import peft, bitsandbytes.backends.mps.ops as mps
assert "bitsandbytes.backends.cpu.ops" in sys.modules
mps._get_kernel()
import kernels; assert kernels.get_kernel  # is there for whoever wants it
"""

_HEARD = """
log = logging.getLogger("bitsandbytes.backends.cpu.ops")
class Library(Modern):
    @staticmethod
    def has_avx512bf16_cpu():
        log.warning("something else went wrong")
        return True
ctypes.cdll.LoadLibrary = lambda name: Library(real(name)) if "bitsandbytes" in name else real(name)
import bitsandbytes
"""


@pytest.fixture
def child(tmp_path: Path) -> Callable[[str], tuple[set[str], str]]:
    """Runs a program where the package `kernels` is there: (what it was asked for, stderr)."""
    package, asked = tmp_path / "path" / "kernels", tmp_path / "asked"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "def get_kernel(name, **_):\n"
        f"    open({str(asked)!r}, 'a').write(name + '\\n')\n"
        "    raise OSError('no network')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), *sys.path])}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes decorates with torch.compile, whose import takes a second

    def run(program: str) -> tuple[set[str], str]:
        asked.write_text("")
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return set(asked.read_text().split()), ran.stderr

    return run


@pytest.mark.battery
def test_bitsandbytes_asks_no_hub_for_a_kernel(child: Callable[[str], tuple[set[str], str]]) -> None:
    names, said = child(_PRETEND + _USE)
    assert len(names) == 2, said  # what it does by itself
    assert "Failed to load CPU gemm_4bit_forward" in said
    names, said = child(_PRETEND + "import instructft\n" + _USE)
    assert names == set()
    assert said == ""


def test_what_else_bitsandbytes_says_as_it_loads_is_heard(child: Callable[[str], tuple[set[str], str]]) -> None:
    _, said = child(_PRETEND + "import instructft\n" + _HEARD)
    assert "something else went wrong" in said
    assert "gemm_4bit_forward" not in said
