"""Adapters really train, the base never does, and what is saved is what was trained."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

import instructft
from instructft.adapters import lora as lora_module
from instructft.adapters import quantization
from instructft.adapters.adapter_folder import read_adapter
from instructft.adapters.attach import attach, locate_base
from instructft.adapters.frozen_check import AdapterProof, digest
from instructft.errors import InstructftError, RecipeError, UsageError
from instructft.models.load import weights_dtype
from instructft.models.starting_point import starting_point
from instructft.models.tokenizer import new_tokens
from instructft.training import fused_loss
from instructft.training.fused_loss import add_supervised_head

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128},  # Conv1D, tied
    "llama": {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "qwen2": {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True},  # biases
    "mistral": {**SMALL, "num_key_value_heads": 1},
    "phi": {**SMALL, "resid_pdrop": 0.0},  # a head with a bias
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
}
# Rows of whole blocks, as 4-bit weights have them on a CPU, and sides that kernels take.
WIDE: dict[str, dict[str, Any]] = {
    "gpt2": {**SHAPES["gpt2"], "n_embd": 128},
    "llama": {**SHAPES["llama"], "hidden_size": 128, "intermediate_size": 256},
}
LINEAR = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}
LINEAR["qwen2"] = LINEAR["mistral"] = LINEAR["llama"]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a tiny base with the bundled tokenizer, once each."""
    from tests.helpers.quickstart import tokenizer

    made: dict[str, Path] = {}

    def make(kind: str, spare_rows: int = 0, wide: bool = False) -> Path:
        key = f"{kind}-{spare_rows}-{wide}"
        if key not in made:
            tok, folder = tokenizer(), tmp_path_factory.mktemp(key)
            ids = {f"{name}_token_id": getattr(tok, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                kind, vocab_size=len(tok) + spare_rows, initializer_range=0.1, **ids, **(WIDE if wide else SHAPES)[kind]
            )
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tok.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def recipe(base: Path, tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "lora.yaml"
    path.write_text(
        f"""
model: {{name_or_path: {base}}}
data: {{datasets: [{{name: quickstart, rows: 12}}], template: instruction, max_length: 128, splits: {{validation: 0}}}}
adapter: {{type: lora, r: 4, alpha: 8, dropout: 0.0}}
train: {{max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1, warmup_steps: 0, learning_rate: 1e-2,
         use_cpu: true, save_strategy: "no", report_to: none}}
output_dir: {tmp_path / "run"}
"""
    )
    return instructft.load_recipe(path, overrides)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any, str]]:
    """Trains and gives (result, the model that was trained, what was printed); draws no curves."""
    module = import_module("instructft.training.run")
    kept: list[Any] = []
    load = module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **k: kept.append(load(*a, **k)) or kept[-1])
    monkeypatch.setattr("instructft.report.curves.plot_loss", lambda *args: None)

    def run(recipe: Any) -> tuple[Any, Any, str]:
        printed = io.StringIO()
        result = instructft.train(recipe, console=Console(file=printed, width=200))
        return result, kept[-1].eval(), printed.getvalue()

    return run


def reloaded(folder: Path, trainable: bool = False, **kwargs: Any) -> Any:
    adapter = read_adapter(folder)
    model = AutoModelForCausalLM.from_pretrained(locate_base(adapter), dtype=torch.float32, **kwargs)
    return attach(model, adapter, trainable=trainable)


def logits(model: Any, rows: int = 1400) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.cat([torch.randint(0, 1400, (2, 15)), torch.tensor([[rows - 1], [rows - 2]])], dim=1)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(ids).logits
    return result


def batch(rows: int) -> dict[str, torch.Tensor]:
    """(3, 20), its last `rows` - 1490 ids new tokens, which are input and label."""
    torch.manual_seed(1)
    ids = torch.randint(0, 1490, (3, 20))
    if rows > 1490:
        ids[:, 9::5] = torch.randint(1490, rows, ids[:, 9::5].shape)
    labels = ids.clone()
    labels[:, :6] = -100
    labels[1, 14:] = -100
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


# -- what is trained -------------------------------------------------------------------------------------------------


VARIANTS = [*((kind, []) for kind in SHAPES), *((kind, ["adapter.use_dora=true"]) for kind in ("gpt2", "llama"))]
VARIANTS += [(kind, ["adapter.use_rslora=true", "adapter.dropout=0.1"]) for kind in ("gpt2", "qwen2")]


@pytest.mark.parametrize(("kind", "more"), VARIANTS, ids=str)
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


# -- quantized bases -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_base_is_trained_over(kind: str, bits: str, base: Any, tmp_path: Path, train: Any) -> None:
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
    again = reloaded(result.output_dir, quantization_config=config, device_map={"": "cpu"})
    torch.testing.assert_close(logits(again, 1492), logits(model, 1492), atol=1e-5, rtol=0)


def test_packed_weights_are_stored_so_that_fsdp_can_shard_them() -> None:
    pytest.importorskip("bitsandbytes")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        config = quantization.configuration("4bit", dtype)
        assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == dtype
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)


@pytest.mark.parametrize("broken", ["missing", "device", "wrong"])
def test_without_a_working_bitsandbytes_it_is_refused_before_weights(
    broken: str, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    quantization.trouble_with.cache_clear()
    functional = SimpleNamespace(
        quantize_4bit=lambda x, **_: (x, None), dequantize_4bit=lambda packed, state: torch.zeros_like(packed)
    )
    fake = SimpleNamespace(__version__="0.1", supported_torch_devices={"cpu"}, functional=functional)
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


# -- new tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_exactly_the_rows_of_new_tokens_are_trained_and_saved(kind: str, base: Any, tmp_path: Path, train: Any) -> None:
    from peft import AutoPeftModelForCausalLM

    asked = recipe(base(kind), tmp_path, "data.template=chatml")
    result, model, _ = train(asked)
    tied = kind != "llama"
    adapter = read_adapter(result.output_dir)
    beside = {name: shape for name, shape in adapter.shapes.items() if "lora_" not in name}
    assert len(beside) == (1 if tied else 2)
    assert all(name.endswith("trainable_tokens_delta") and shape == (2, 32) for name, shape in beside.items())
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    new = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert new == [1490, 1491]

    again = reloaded(result.output_dir)
    assert adapter.base.vocab_size == len(tokenizer) == again.config.vocab_size == 1492
    old = AutoModelForCausalLM.from_pretrained(base(kind))
    mean = old.get_input_embeddings().weight.mean(0)
    for mine, before in (
        (again.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (again.get_output_embeddings().weight, old.get_output_embeddings().weight),
    ):
        assert mine.shape == (1492, 32)
        assert torch.equal(mine[:1490], before)
    assert (again.get_input_embeddings().weight[1490:] - mean).abs().amax(1).min() > 1e-3
    same = torch.equal(again.get_input_embeddings().weight[new], again.get_output_embeddings().weight[new])
    assert same == tied
    torch.testing.assert_close(logits(again, 1492), logits(model, 1492), atol=1e-6, rtol=0)
    plain = AutoPeftModelForCausalLM.from_pretrained(result.output_dir)
    torch.testing.assert_close(logits(plain, 1492), logits(model, 1492), atol=1e-6, rtol=0)


def test_a_new_token_in_a_spare_row_grows_nothing_and_is_trained(base: Any, tmp_path: Path, train: Any) -> None:
    asked = recipe(base("llama", spare_rows=22), tmp_path, "data.template=chatml")
    result, _, _ = train(asked)
    adapter = read_adapter(result.output_dir)
    assert adapter.base.vocab_size == 1512
    assert set(map(tuple, adapter.config["trainable_token_indices"].values())) == {(1490, 1491)}


def test_known_tokens_are_not_new(base: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base("llama"))
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base("llama", spare_rows=22)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    asked = recipe(folder, tmp_path, "data.template=chatml")
    assert new_tokens(asked, instructft.load_tokenizer(asked), 1512) == [1491]
    plain = recipe(folder, tmp_path)
    assert new_tokens(plain, instructft.load_tokenizer(plain), 1512) == []


def tokens_model(base: Path, tmp_path: Path, *more: str) -> Any:
    """A model with new tokens, moved away from where it starts, so that stale rows would show."""
    asked = recipe(base, tmp_path, "data.template=chatml", *more)
    model = instructft.load_model(asked, instructft.load_tokenizer(asked)).eval()  # no dropout
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


def unfused(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of the plain logits."""
    scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("which", ["instructft", "trl"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [("gpt2", []), ("llama", []), ("llama", ["adapter.modules_to_save=[lm_head]"]), ("gpt_neox", [])],
)
def test_the_loss_and_its_gradient_are_those_of_the_plain_logits(
    kind: str, more: list[str], which: str, base: Any, tmp_path: Path
) -> None:
    model = tokens_model(base(kind), tmp_path, *more)
    inputs = batch(1492)
    wanted = unfused(model, inputs)
    expected = gradients(model, wanted)
    inner = model.get_base_model()
    add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
    if which == "instructft":
        assert add_supervised_head(inner) == (not more)  # a copy of the head stays TRL's business
    loss = model(**inputs, fused_lm_head=True).loss
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)
    rows = [name for name in expected if "trainable_tokens_delta" in name]
    assert len(rows) == {"gpt2": 1, "llama": 1 if more else 2, "gpt_neox": 2}[kind]
    assert all(expected[name].abs().amax(1).min() > 1e-4 for name in rows)


def test_new_tokens_of_unequal_weight(base: Any, tmp_path: Path) -> None:
    """loss_type: dft weighs each token by its own probability."""
    model, inputs = tokens_model(base("llama"), tmp_path), batch(1492)
    found = []
    for ours in (False, True):
        (add_supervised_head if ours else add_fused_lm_head)(model.get_base_model())
        log_probs = model(**inputs, fused_lm_head=True).log_probs
        found.append(gradients(model, -(log_probs * log_probs.exp().detach()).sum()))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4)


# -- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["frozen", "rows", "trained"])
def test_no_gradient_is_made_for_a_frozen_head(
    what: str, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "rows":
        model = tokens_model(base("llama"), tmp_path)
    else:
        asked = recipe(base("llama"), tmp_path, f"adapter={'{type: lora}' if what == 'frozen' else 'none'}")
        model = instructft.load_model(asked, instructft.load_tokenizer(asked)).train()
    add_supervised_head(getattr(model, "get_base_model", lambda: model)())
    made: list[tuple[int, ...]] = []
    zeros = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, *a, **k: made.append(tuple(x.shape)) or zeros(x, *a, **k))
    calls: list[tuple[int, ...]] = []
    addmm = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda x, *a: calls.append(tuple(x.shape)) or addmm(x, *a))
    model(**batch(1490), fused_lm_head=True).loss.backward()
    matrix = {"frozen": [], "rows": [(2, 32)], "trained": [(1490, 32)]}[what]
    assert [shape for shape in made if shape[0] in (2, 1490, 1492) and len(shape) == 2] == matrix
    assert calls == matrix


def test_a_disabled_adapter_leaves_the_base(base: Any, tmp_path: Path) -> None:
    model, inputs = tokens_model(base("llama"), tmp_path), batch(1492)
    add_fused_lm_head(model.get_base_model())
    add_supervised_head(model.get_base_model())
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(**inputs, fused_lm_head=True).loss, unfused(model, inputs))


# -- the proof -------------------------------------------------------------------------------------------------------


def test_a_run_that_changes_the_base_is_an_error(base: Any, tmp_path: Path, train: Any, monkeypatch: Any) -> None:
    from instructft.training.trainer import Trainer

    step = Trainer.training_step

    def sabotage(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            weight = next(p for p in model.parameters() if not p.requires_grad)
            weight.view(-1)[7] *= 1 + 2e-7  # the last bit of one number
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", sabotage)
    with pytest.raises(InstructftError, match=r"base changed .*: 1 weights, the first .*wte"):
        train(recipe(base("gpt2"), tmp_path))
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert read_adapter(tmp_path / "run" / "unproved").base.name_or_path == str(base("gpt2"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_base_that_is_trained_by_mistake_is_an_error(base: Any, tmp_path: Path, train: Any, monkeypatch: Any) -> None:
    lora = lora_module.ADAPTERS["lora"]

    def careless(*args: Any, **kwargs: Any) -> Any:
        model = lora(*args, **kwargs)
        model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
        return model

    monkeypatch.setitem(lora_module.ADAPTERS, "lora", careless)
    with pytest.raises(InstructftError, match=r"base changed .*embed_tokens"):
        train(recipe(base("llama"), tmp_path))


def test_biases_may_be_trained_where_the_recipe_says_so(base: Any, tmp_path: Path, train: Any) -> None:
    result, model, _ = train(recipe(base("qwen2"), tmp_path, "adapter.bias=all"))
    assert any(
        name.endswith("q_proj.base_layer.bias") or name.endswith("q_proj.bias")
        for name in read_adapter(result.output_dir).shapes
    )
    torch.testing.assert_close(logits(reloaded(result.output_dir)), logits(model), atol=1e-6, rtol=0)


def test_an_adapter_that_does_not_move_is_an_error(base: Any, tmp_path: Path, train: Any, monkeypatch: Any) -> None:
    from instructft.training.trainer import Trainer

    loss = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda *a, **k: 0 * loss(*a, **k))
    with pytest.raises(InstructftError, match=r"did not move: 8 of 8 tensors .*lora_B"):
        train(recipe(base("gpt2"), tmp_path))
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert read_adapter(tmp_path / "run" / "unproved").base.name_or_path == str(base("gpt2"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_without_a_learning_rate_it_is_a_message(base: Any, tmp_path: Path, train: Any) -> None:
    result, _, printed = train(recipe(base("gpt2"), tmp_path, "train.warmup_steps=1", "train.max_steps=1"))
    assert result.facts["adapter"]["moved"] is False
    assert "the learning rate was 0 in every step" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.float64])
def test_the_digest_sees_every_change(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import instructft.adapters.frozen_check as proof

    monkeypatch.setattr(proof, "_CHUNK", 1000)
    torch.manual_seed(0)
    x = (torch.randn(64, 64) * 50).to(dtype)
    y = x.clone()
    assert digest(x) == digest(y)
    y[3, 5] = x[3, 5] + 1
    assert digest(x) != digest(y)
    flat = x.flatten()
    swapped = torch.cat([flat[1000:2000], flat[:1000], flat[2000:]])  # two whole chunks
    assert digest(flat) != digest(swapped)
    ones = torch.ones(64, 64).to(dtype)  # as in a norm: all change alike, which an exclusive or would not see
    assert digest(ones) != digest(ones + 1)


def test_scales_of_packed_weights_are_part_of_the_proof(base: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    asked = recipe(base("llama", wide=True), tmp_path, "model.quantization=4bit")
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    proof = AdapterProof(model)
    assert proof.verdict(model)["base_unchanged"]
    packed = next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    scales = {"absmax": packed.quant_state, "code": packed.quant_state, "offset": packed.quant_state}
    for name, state in {**scales, "absmax2": packed.quant_state.state2, "code2": packed.quant_state.state2}.items():
        scale = getattr(state, name.rstrip("2"))
        right = scale.clone()
        scale += 1
        with pytest.raises(InstructftError, match=rf"base changed .*: 1 weights, the first .*weight:{name}\."):
            proof.verdict(model)
        scale.copy_(right)
    assert proof.verdict(model)["base_unchanged"]


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


@pytest.mark.usefixtures("cpu")
def test_bfloat16_over_packed_weights_leaves_the_biases_as_they_are(base: Any, tmp_path: Path, train: Any) -> None:
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


# -- what is refused -------------------------------------------------------------------------------------------------


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
        ("llama", ["adapter.init_lora_weights=pissa"], "init_lora_weights: pissa changes the base's weights"),
        ("phi", ["data.template=chatml"], "drops the bias of a head"),
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
