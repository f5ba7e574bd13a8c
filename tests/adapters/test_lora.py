"""Adapters really train, the base never does, and what is saved is what was trained."""

from __future__ import annotations

import copy
import itertools
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

import instructft
from instructft.adapters import lora as lora_module
from instructft.adapters import quantization
from instructft.adapters.adapter_folder import read_adapter
from instructft.adapters.frozen_check import AdapterProof
from instructft.errors import InstructftError, RecipeError, UsageError
from instructft.models.kernels import fused_loss
from instructft.models.kernels.fused_loss import add_supervised_head
from instructft.models.load import weights_dtype
from instructft.models.starting_point import starting_point
from tests.helpers.adapters import (
    LINEAR,
    QUIET,
    SHAPES,
    batch,
    logits,
    recipe,
    reloaded,
)
from tests.helpers.device import DEVICE, of_the_cpu
from tests.helpers.telling import telling

VARIANTS = [*((kind, []) for kind in SHAPES), *((kind, ["adapter.use_dora=true"]) for kind in ("gpt2", "llama"))]
VARIANTS += [(kind, ["adapter.use_rslora=true", "adapter.dropout=0.1"]) for kind in ("gpt2", "qwen2")]


# Conv1D, biases, a head with a bias, DoRA, and another scale with dropout; layers like those of llama train there too
TELLING = [("gpt2", []), ("qwen2", []), ("phi", []), VARIANTS[-3], VARIANTS[-2]]


@pytest.mark.parametrize(("kind", "more"), telling(VARIANTS, *TELLING), ids=str)
def test_the_adapter_moves_the_base_does_not_and_what_is_saved_answers_alike(
    kind: str, more: list[str], base: Any, tmp_path: Path, train: Any
) -> None:
    from peft import PeftModel

    folder = base(kind)
    result, model, printed = train(recipe(folder, tmp_path, *more))
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): p
        for name, p in model.named_parameters()
        if not p.requires_grad
    }
    original = dict(before.named_parameters())
    assert frozen.keys() == original.keys()
    assert all(torch.equal(p, original[name]) for name, p in frozen.items())

    weights = load_file(result.output_dir / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights if "lora_A" in name} == LINEAR[kind]
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert any("magnitude" in name for name in weights) == ("adapter.use_dora=true" in more)
    facts = result.facts["adapter"]
    assert facts["moved"] is facts["base_unchanged"] is True
    assert facts["trainable"] == sum(t.numel() for t in weights.values())
    assert facts["total"] == facts["trainable"] + before.num_parameters()
    assert f"{facts['trainable']:,} trainable" in printed
    assert "the base did not (compared bit by bit)" in printed

    trained = logits(model)
    assert (trained - logits(before)).abs().max() > 1e-3
    torch.testing.assert_close(logits(reloaded(result.output_dir)), trained, atol=1e-6, rtol=0)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(result.output_dir))
    torch.testing.assert_close(logits(peft), trained, atol=1e-6, rtol=0)


def test_the_adapter_folder(base: Any, tmp_path: Path, train: Any) -> None:
    asked = recipe(base("gpt2"), tmp_path, "train.save_strategy=steps", "train.save_steps=3", "data.template=chatml")
    run = train(asked)[0].output_dir
    names = {path.name for path in run.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "base.json", "generation_config.json"}
    assert names >= {"tokenizer.json", "chat_template.jinja", "recipe.yaml", "run.json", "README.md"}
    assert not names & {"config.json", "model.safetensors", "training_args.bin"}
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base("gpt2"))
    assert config["fan_in_fan_out"] is True
    card = (run / "README.md").read_text()
    assert "library_name: peft" in card
    assert "Adapter: LoRA, rank 4, alpha 8; " in card
    checkpoint = run / "checkpoint-3"
    assert not (checkpoint / "README.md").exists()
    assert (checkpoint / "base.json").read_bytes() == (run / "base.json").read_bytes()
    assert load_file(checkpoint / "adapter_model.safetensors").keys() == read_adapter(run).shapes.keys()
    stop = json.loads((run / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.convert_ids_to_tokens(stop[0]) == "<|im_end|>" == tokenizer.eos_token


def test_conv1d_is_adapted_without_a_warning(base: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    asked = recipe(base("gpt2"), tmp_path)
    instructft.load_model(asked, instructft.load_tokenizer(asked))
    assert not [str(w.message) for w in recwarn if "fan_in_fan_out" in str(w.message)]


def test_other_fields_of_peft_pass_through(base: Any, tmp_path: Path) -> None:
    more = ["adapter.rank_pattern={q_proj: 2}", "adapter.layers_to_transform=[1]", "adapter.exclude_modules=[v_proj]"]
    asked = recipe(base("llama"), tmp_path, *more)
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    ranks = {name: p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert len(ranks) == 6
    assert all(".layers.1." in name and "v_proj" not in name for name in ranks)
    assert {rank for name, rank in ranks.items() if "q_proj" in name} == {2}
    assert {rank for name, rank in ranks.items() if "q_proj" not in name} == {4}


def test_the_adapter_starts_from_the_seed_alone(base: Any, tmp_path: Path) -> None:
    asked = recipe(base("llama"), tmp_path)
    tokenizer = instructft.load_tokenizer(asked)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(instructft.load_model(asked, tokenizer))
    for one, two in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_gradient_checkpointing_changes_nothing(base: Any, tmp_path: Path, train: Any) -> None:
    found = []
    for on in ("true", "false"):
        asked = recipe(
            base("llama"), tmp_path, f"train.gradient_checkpointing={on}", f"output_dir={tmp_path / on}",
            "data.template=chatml",
        )  # fmt: skip
        found.append(load_file(train(asked)[0].output_dir / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-5, rtol=0)
    assert all(tensor.abs().max() > 0 for name, tensor in found[0].items() if "lora_B" in name)


def test_training_goes_on_from_an_adapter_folder(base: Any, tmp_path: Path, train: Any) -> None:
    first, model, _ = train(recipe(base("llama"), tmp_path, "data.template=chatml"))
    asked = recipe(first.output_dir, tmp_path, "data.template=tokenizer", f"output_dir={tmp_path / 'more'}")
    tokenizer = instructft.load_tokenizer(asked)
    torch.testing.assert_close(logits(instructft.load_model(asked, tokenizer), 1492), logits(model, 1492))
    again, _, _ = train(asked)
    one, two = (read_adapter(result.output_dir) for result in (first, again))
    assert one.base == two.base
    assert one.config["base_model_name_or_path"] == two.config["base_model_name_or_path"]
    assert again.facts["adapter"]["base_unchanged"]
    with pytest.raises(UsageError, match=r"adapter\.r: found 8, .* has 4; write r: 4"):
        starting_point(recipe(first.output_dir, tmp_path, "adapter.r=8"), tokenizer)
    with pytest.raises(UsageError, match=r"adapter\.target_modules: found \['q_proj'\], but .* has \['down_proj'"):
        starting_point(recipe(first.output_dir, tmp_path, "adapter.target_modules=[q_proj]"), tokenizer)
    with pytest.raises(UsageError, match="instructft merge"):
        starting_point(recipe(first.output_dir, tmp_path, "adapter=none"), tokenizer)


# each value of each once; on either kind of CPU packed weights keep their bits (`test_quantization.py`)
@pytest.mark.parametrize(
    ("cpu", "bits", "kind"),
    telling(
        itertools.product([True, False], ["4bit", "8bit"], ["gpt2", "llama"]),
        (True, "4bit", "llama"), (False, "8bit", "gpt2"),
    ),
    indirect=["cpu"],
)  # fmt: skip
def test_a_quantized_base_is_trained_over(
    cpu: bool, kind: str, bits: str, base: Any, tmp_path: Path, train: Any
) -> None:
    more = [f"model.quantization={bits}", "train.max_steps=20", "train.learning_rate=1e-2"]
    asked = recipe(base(kind, wide=True), tmp_path, *more, "data.template=chatml")
    result, model, printed = train(asked)
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.5

    inner = model.get_base_model()
    layers = [m for m in inner.base_model.modules() if "bit" in type(m).__name__.lower() and hasattr(m, "source_cls")]
    assert len(layers) == {"gpt2": 8, "llama": 14}[kind]
    assert type(inner.get_output_embeddings().original_module) is torch.nn.Linear
    weights = load_file(result.output_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(base(kind, wide=True))
    facts = result.facts["adapter"]
    width = plain.get_input_embeddings().weight.shape[1]
    grown = 2 * width * (1 if kind == "gpt2" else 2)  # the two rows, in one matrix or in two
    assert facts["total"] == plain.num_parameters() + grown + sum(t.numel() for t in weights.values())
    assert facts["base_unchanged"] is facts["moved"] is True
    assert f"base in {bits}" in printed
    assert result.facts["versions"]["bitsandbytes"]
    assert read_adapter(result.output_dir).base.quantization == bits

    config = quantization.configuration(bits, torch.float32)
    again = reloaded(result.output_dir, quantization_config=config, device_map={"": DEVICE})
    torch.testing.assert_close(logits(again, 1492), logits(model, 1492), atol=1e-5, rtol=0)


def test_packed_weights_are_stored_so_that_fsdp_can_shard_them() -> None:
    pytest.importorskip("bitsandbytes")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        config = quantization.configuration("4bit", dtype)
        assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == dtype
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)


@of_the_cpu
@pytest.mark.parametrize("broken", ["missing", "device", "wrong"])
def test_without_a_working_bitsandbytes_it_is_refused_before_weights(
    broken: str, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    quantization.trouble_with.cache_clear()
    functional = SimpleNamespace(
        quantize_4bit=lambda x, **_: (x, None), dequantize_4bit=lambda packed, state: torch.zeros_like(packed)
    )
    fake = SimpleNamespace(
        __version__="0.1",
        __spec__=ModuleSpec("bitsandbytes", None),
        supported_torch_devices={"cpu"},
        functional=functional,
    )
    if broken == "device":
        fake.supported_torch_devices = {"cuda"}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None if broken == "missing" else fake)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    asked = recipe(base("gpt2"), tmp_path, "model.quantization=4bit")
    with pytest.raises(UsageError, match=r"quantization: 4bit needs bitsandbytes.*instructft\[quant\]") as raised:
        instructft.train(asked, console=QUIET)
    says = {"missing": "not installed", "device": "does not know the device cpu", "wrong": "does not work here"}
    assert says[broken] in str(raised.value)
    assert not (tmp_path / "run").exists()
    quantization.trouble_with.cache_clear()


@of_the_cpu
def test_the_type_of_frozen_weights(base: Any, tmp_path: Path) -> None:
    asked = recipe(base("gpt2"), tmp_path)
    assert weights_dtype(asked, "cpu") == torch.float32
    assert weights_dtype(asked, "cuda") == torch.bfloat16
    assert weights_dtype(recipe(base("gpt2"), tmp_path, "train.fp16=true"), "cuda") == torch.float16
    assert weights_dtype(recipe(base("gpt2"), tmp_path, "adapter=none"), "cuda") == torch.float32
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    asked = recipe(base("llama"), tmp_path, "model.dtype=bfloat16", "data.template=chatml")
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_biases_may_be_trained_where_the_recipe_says_so(base: Any, tmp_path: Path, train: Any) -> None:
    result, model, _ = train(recipe(base("qwen2"), tmp_path, "adapter.bias=all"))
    assert any(
        name.endswith("q_proj.base_layer.bias") or name.endswith("q_proj.bias")
        for name in read_adapter(result.output_dir).shapes
    )
    torch.testing.assert_close(logits(reloaded(result.output_dir)), logits(model), atol=1e-6, rtol=0)


@of_the_cpu
@pytest.mark.parametrize("more", [["data.template=chatml"], ["model.quantization=4bit", "model.dtype=bfloat16"]])
def test_shards_of_fsdp_carry_the_adapter(more: list[str], base: Any, tmp_path: Path) -> None:
    """FSDP2 in one process: the same loss, a gradient for every B, and the proof reads whole weights."""
    if "model.quantization=4bit" in more:
        pytest.importorskip("bitsandbytes")
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    asked = recipe(base("llama", wide=True), tmp_path, *more)
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    add_fused_lm_head(model.get_base_model())
    add_supervised_head(model.get_base_model())
    inputs = batch(model.config.vocab_size)
    wanted = model(**inputs, fused_lm_head=True).loss.item()
    proof = AdapterProof(model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = model(**inputs, fused_lm_head=True).loss
        loss.backward()
        assert loss.item() == pytest.approx(wanted, abs=1e-5)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        moving = [p for name, p in model.named_parameters() if "lora_B" in name or "trainable_tokens" in name]
        assert all(p.grad.full_tensor().abs().max() > 0 for p in moving)
        assert proof.verdict(model)["base_unchanged"]
        next(p for p in model.parameters() if not p.requires_grad).data.to_local().view(-1)[0] += 1
        with pytest.raises(InstructftError, match="base changed"):
            proof.verdict(model)
    finally:
        distributed.destroy_process_group()


def test_8bit_weights_under_fsdp_are_refused(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"8bit weights cannot be sharded.*use 4bit"):
        quantization.check(recipe(base("gpt2"), tmp_path, "model.quantization=8bit"))


def test_dora_over_8bit_weights_is_refused(base: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter\.use_dora: .*use model\.quantization=4bit"):
        quantization.check(recipe(base("gpt2"), tmp_path, "model.quantization=8bit", "adapter.use_dora=true"))


@pytest.mark.parametrize("cpu", telling([True, False], True), indirect=True)
def test_bfloat16_over_packed_weights_leaves_the_biases_as_they_are(
    cpu: bool, base: Any, tmp_path: Path, train: Any
) -> None:
    asked = recipe(
        base("gpt2", wide=True), tmp_path, "model.quantization=4bit", "train.bf16=true", "adapter.use_dora=true"
    )
    assert train(asked)[0].facts["adapter"]["base_unchanged"]


def test_packed_weights_are_counted_as_what_they_stand_for() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_storage=torch.float32).to("cpu")
    assert layer.weight.numel() < 64 * 96
    assert lora_module.count_parameters(layer)[1] == 64 * 96


@pytest.mark.parametrize(
    ("kind", "overrides", "says"),
    [
        ("llama", ["adapter.target_modules=[q_proj, v_porj]"], r'no module v_porj; did you mean "v_proj"\?.*q_proj'),
        ("llama", ["adapter.target_modules=nothing.*"], r"nothing in LlamaForCausalLM matches nothing\.\*; it has"),
        ("llama", ["adapter.target_modules=[lm_head]"], "reaches lm_head, which training reads past any adapter"),
        ("llama", ["adapter.target_modules='.*(q_proj|lm_head)'"], "reaches lm_head"),
        ("gpt_neox", ["adapter.target_modules=[embed_out]"], "embed_out"),
        ("llama", ["adapter.target_modules=[input_layernorm]"], "PEFT refuses it"),
        ("gpt2", ["adapter.target_modules=[wte]"], "reaches transformer.wte, whose weights are also the output head's"),
        ("gpt2", ["adapter.modules_to_save=[lm_head]"], "shares its weights"),
        ("llama", ["adapter.modules_to_save=[lm_heat]"], r'no module lm_heat; did you mean "lm_head"\?'),
        ("llama", ["adapter.init_lora_weights=loftq"], "init_lora_weights: loftq puts other weights in the place"),
        ("phi", ["data.template=chatml"], "drops the bias of a head"),
        ("llama", ["adapter.target_modules='('"], r"target_modules: \( is no regular expression: missing \)"),
        ("llama", ["adapter.exclude_modules='['"], r"exclude_modules: \[ is no regular expression"),
        ("llama", ["adapter.rank_pattern={'(': 4}"], r"rank_pattern: \( is no regular expression"),
        ("llama", ["adapter.alpha_pattern={q_proj: .nan}"], "alpha_pattern: q_proj: found nan, expected a number abo"),
        ("llama", ["adapter.rank_pattern={q_porj: 4}"], "rank_pattern: q_porj is none of the layers.*q_proj"),
        (
            "llama",
            ["adapter.layers_to_transform=[0, 9]"],
            "layers_to_transform: found 9; LlamaForCausalLM has layers 0",
        ),
        ("llama", ["adapter.layer_replication=[[0, 9]]"], r"layer_replication: found \[0, 9\], expected pairs"),
        ("llama", ["adapter.trainable_token_indices=[999999]"], "trainable_token_indices: found 999999; Llama"),
        ("llama", ["adapter.trainable_token_indices=[-1]"], "trainable_token_indices: found -1"),
        ("llama", ["adapter.trainable_token_indices={embed_tokens: foo}"], "trainable_token_indices: found foo"),
        ("llama", ["adapter.layers_to_transform=[foo]"], "layers_to_transform: found foo"),
        ("llama", ["adapter.layer_replication=[foo, 1]"], "layer_replication: found foo"),
        (
            "llama",
            ["adapter.target_parameters=[nope.weight]"],
            "target_parameters: LlamaForCausalLM has no parameter n",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_weights(
    kind: str, overrides: list[str], says: str, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(base(kind), tmp_path, *overrides)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=says) as raised:
        instructft.train(asked, console=QUIET)
    assert raised.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_an_adapter_over_random_weights_is_refused(write_recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.type: found lora over random weights \(model\.config\)"):
        instructft.load_recipe(write_recipe(), ["adapter=lora"])


@pytest.mark.parametrize("kind", SHAPES)
def test_all_linear_never_reaches_the_head(kind: str, base: Any, tmp_path: Path) -> None:
    asked = recipe(base(kind), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base(kind))
    config = lora_module.lora_config(asked, copy.deepcopy(model))
    assert set(config.target_modules) == LINEAR[kind]
    adapted = lora_module.add_lora(model, asked)
    assert not hasattr(adapted.get_base_model().get_output_embeddings(), "lora_A")
    assert fused_loss._head(adapted.get_base_model())[1:] == (None, None)


def test_all_linear_leaves_out_what_peft_refuses_and_says_so(tmp_path: Any, capsys: Any) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=99, chunk_size=8, **sizes))
    adapted = lora_module.add_lora(model, recipe("base", tmp_path))
    assert adapted.peft_config["default"].target_modules == {"in_proj"}
    assert "all-linear leaves out out_proj, which PEFT refuses" in capsys.readouterr().err


def test_linear_layers_of_a_models_own_are_adapted_and_routers_are_not(tmp_path: Any) -> None:
    """Falcon has a linear layer of its own, which is one; PhiMoE has a router that returns a tuple."""
    from transformers import FalconConfig, FalconForCausalLM, PhimoeConfig, PhimoeForCausalLM

    falcon = FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    adapted = lora_module.add_lora(FalconForCausalLM(falcon), recipe("base", tmp_path))
    named = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert adapted.peft_config["default"].target_modules == named
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    phi = PhimoeConfig(vocab_size=99, **sizes, num_key_value_heads=2, num_local_experts=2)
    adapted = lora_module.add_lora(PhimoeForCausalLM(phi), recipe("base", tmp_path, "adapter.dropout=0"))
    assert adapted.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_an_adapter_over_single_parameters_has_no_dropout_and_says_so(tmp_path: Any, capsys: Any) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=99, **sizes, num_key_value_heads=2, num_local_experts=2)
    asked = recipe("base", tmp_path, "adapter.target_parameters=[mlp.experts.down_proj]", "adapter.dropout=0.05")
    adapted = lora_module.add_lora(MixtralForCausalLM(config), asked)
    assert adapted.peft_config["default"].lora_dropout == 0.0
    assert "adapter.dropout: 0 in this run" in capsys.readouterr().err


def test_lora_plus_trains_b_faster_at_every_step() -> None:
    from instructft.adapters.lora import faster_b

    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2), "lora_B": torch.nn.Linear(2, 2, bias=False)})
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    faster_b(optimizer, model, 16.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(3):
        before = {name: weight.detach().clone() for name, weight in names.items()}
        for weight in names.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved = {name: float((weight - before[name]).abs().max()) for name, weight in names.items()}
        assert moved["lora_B.weight"] == pytest.approx(16 * moved["lora_A.weight"], rel=1e-3)
        assert moved["lora_A.weight"] == pytest.approx(0.1 / (step + 1), rel=1e-3)
        schedule.step()
