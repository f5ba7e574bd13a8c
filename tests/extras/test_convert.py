"""A converted checkpoint gives the logits of the code that wrote it, and says what became of each tensor; or nothing
is written.

The models below follow nanoGPT's `GPT` and the `GPTModel` of LLMs from scratch, module by module and name by name, and
share no code with the converter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from instructft.errors import ModelError, UsageError
from instructft.extras.convert import convert as module
from instructft.extras.convert import targets
from instructft.extras.convert.convert import convert as really_convert

QUIET = Console(quiet=True)
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 96, "dropout": 0.0}


# --------------------------------------------------------------------------------------------------------------------
# nanoGPT, https://github.com/karpathy/nanoGPT/blob/master/model.py
# --------------------------------------------------------------------------------------------------------------------


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class NanoNorm(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    def __init__(self, c: Any):
        super().__init__()
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.n_head, self.n_embd = c.n_head, c.n_embd
        if c.masks:
            self.register_buffer("bias", torch.tril(torch.ones(c.block_size, c.block_size))[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class NanoMLP(nn.Module):
    def __init__(self, c: Any):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)
        self.act = c.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class NanoBlock(nn.Module):
    def __init__(self, c: Any):
        super().__init__()
        self.ln_1, self.attn = NanoNorm(c.n_embd, c.bias), NanoAttention(c)
        self.ln_2, self.mlp = NanoNorm(c.n_embd, c.bias), NanoMLP(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, tied: bool = True, bias: bool = True, act: Any = F.gelu, masks: bool = False, **sizes: Any):
        super().__init__()
        c = SimpleNamespace(**{**SIZES, **sizes}, bias=bias, act=act, masks=masks)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(c.vocab_size, c.n_embd),
                "wpe": nn.Embedding(c.block_size, c.n_embd),
                "h": nn.ModuleList([NanoBlock(c) for _ in range(c.n_layer)]),
                "ln_f": NanoNorm(c.n_embd, c.bias),
            }
        )
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


# --------------------------------------------------------------------------------------------------------------------
# LLMs from scratch, https://github.com/rasbt/LLMs-from-scratch/blob/main/ch04/01_main-chapter-code/gpt.py
# --------------------------------------------------------------------------------------------------------------------


class ScratchNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(var + 1e-5) + self.shift


class ScratchGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return tanh_gelu(x)


class ScratchAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.W_query = nn.Linear(width, width, bias=qkv_bias)
        self.W_key = nn.Linear(width, width, bias=qkv_bias)
        self.W_value = nn.Linear(width, width, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(context, context), diagonal=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        k, q, v = (
            f(x).view(b, n, self.heads, self.size).transpose(1, 2) for f in (self.W_key, self.W_query, self.W_value)
        )
        scores = q @ k.transpose(2, 3)
        scores.masked_fill_(self.mask.bool()[:n, :n], -torch.inf)
        weights = torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).contiguous().view(b, n, d))


class ScratchFeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), ScratchGELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class ScratchBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.att, self.ff = ScratchAttention(width, context, heads, qkv_bias), ScratchFeedForward(width)
        self.norm1, self.norm2 = ScratchNorm(width), ScratchNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class GPTModel(nn.Module):
    def __init__(self, qkv_bias: bool = False):
        super().__init__()
        width, context, vocab = SIZES["n_embd"], SIZES["block_size"], SIZES["vocab_size"]
        self.tok_emb, self.pos_emb = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.trf_blocks = nn.Sequential(
            *[ScratchBlock(width, context, SIZES["n_head"], qkv_bias) for _ in range(SIZES["n_layer"])]
        )
        self.final_norm = ScratchNorm(width)
        self.out_head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


# --------------------------------------------------------------------------------------------------------------------
# What the tests share
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """As build-nanogpt saves it, object and all."""

    block_size: int = SIZES["block_size"]
    vocab_size: int = SIZES["vocab_size"]
    n_layer: int = SIZES["n_layer"]
    n_head: int = SIZES["n_head"]
    n_embd: int = SIZES["n_embd"]


def shaken(model: nn.Module) -> Any:
    """Weights large enough that each part matters: at nanoGPT's start the MLP is all but silent."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.25 if parameter.dim() > 1 else 0.2)
    return model.eval()


def args(bias: bool = True, **sizes: Any) -> dict[str, Any]:
    return {**SIZES, **sizes, "bias": bias}


def convert(file: Path, output: Path, **options: Any) -> dict[str, Any]:
    return dict(really_convert(file, output, console=QUIET, **options).facts)


def ids(vocab: int = SIZES["vocab_size"], length: int = SIZES["block_size"]) -> torch.Tensor:
    return torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(7))


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]] == []
    return model.eval()


def gap(original: Any, folder: Path, vocab: int = SIZES["vocab_size"]) -> float:
    """Largest difference of a logit, as a share of the largest logit."""
    given = ids(vocab)
    with torch.no_grad():
        expected = original(given)[..., :vocab]
        return float((loaded(folder, dtype=torch.float32)(given).logits - expected).abs().max() / expected.abs().max())


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def write(what: Any, name: str = "ckpt.pt", **options: Any) -> Path:
        torch.save(what, tmp_path / name, **options)
        return tmp_path / name

    return write


# --------------------------------------------------------------------------------------------------------------------
# Equal to the code that wrote it
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_nanogpt(tmp_path: Path, save: Any, bias: bool, tied: bool) -> None:
    model = shaken(NanoGPT(bias=bias, tied=tied))
    checkpoint = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
        "model_args": args(bias, dropout=0.2),
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.5),
        "config": {"n_head": 12, "n_layer": 12, "compile": True},  # what was asked for, not what was built
    }
    facts = convert(save(checkpoint), tmp_path / "out")
    assert gap(model, tmp_path / "out") < 1e-5
    assert facts["activation"]["name"] == "gelu"
    assert facts["left_out"] == ["optimizer", "iter_num", "best_val_loss", "config"]
    config = loaded(tmp_path / "out").config
    assert (config.n_head, config.n_layer, config.n_positions, config.tie_word_embeddings) == (4, 2, 48, tied)
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.2, 0.2, 0.2)
    # two norms and four matrices a layer, and the last norm
    assert len(facts["added"]) == (0 if bias else 2 * 6 + 1)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_llms_from_scratch(tmp_path: Path, save: Any, qkv_bias: bool) -> None:
    model = shaken(GPTModel(qkv_bias))
    file = save({"model_state_dict": model.state_dict(), "optimizer_state_dict": {"state": {}, "param_groups": []}})
    facts = convert(file, tmp_path / "out", n_head=4)
    assert gap(model, tmp_path / "out") < 1e-5
    assert facts["activation"]["name"] == "gelu_new"
    assert not facts["tied"]
    assert sorted(facts["dropped"]) == ["trf_blocks.0.att.mask", "trf_blocks.1.att.mask"]
    assert len(facts["added"]) == (0 if qkv_bias else 2)


def test_build_nanogpt_with_a_settings_object(tmp_path: Path, save: Any) -> None:
    model = shaken(NanoGPT(act=tanh_gelu))
    facts = convert(save({"model": model.state_dict(), "config": GPTConfig(), "step": 9}), tmp_path / "out")
    assert gap(model, tmp_path / "out") < 1e-5
    assert facts["settings"] == {"from": "config", **{key: SIZES[key] for key in vars(GPTConfig())}}


def test_masks_are_dropped_and_tell_the_older_activation(tmp_path: Path, save: Any) -> None:
    model = shaken(NanoGPT(act=tanh_gelu, masks=True))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    facts = convert(save(state), tmp_path / "out", n_head=4)
    assert gap(model, tmp_path / "out") < 1e-5
    assert sorted(facts["dropped"]) == [
        "module.lm_head.weight",
        "module.transformer.h.0.attn.bias",
        "module.transformer.h.1.attn.bias",
    ]


@pytest.mark.parametrize("name", ["gelu_new", "relu"])
def test_a_given_activation(tmp_path: Path, save: Any, name: str) -> None:
    model = shaken(NanoGPT(act={"gelu_new": tanh_gelu, "relu": F.relu}[name]))
    convert(save({"model": model.state_dict(), "model_args": args()}), tmp_path / "out", activation=name)
    assert gap(model, tmp_path / "out") < 1e-5


def test_transformers_own_layout(tmp_path: Path, save: Any, tiny_model: Any) -> None:
    shaken(tiny_model)
    state = tiny_model.state_dict() | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    convert(save(state), tmp_path / "out", n_head=2)
    made = loaded(tmp_path / "out")
    ours, theirs = made.state_dict(), tiny_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert made.config.activation_function == tiny_model.config.activation_function


def test_square_matrices_lie_as_the_others(tmp_path: Path, save: Any) -> None:
    """q, k and v apart and an MLP as wide as the model: no shape tells how any matrix lies."""
    torch.manual_seed(0)
    width = SIZES["n_embd"]
    state = {"tok_emb.weight": torch.randn(50, width), "pos_emb": torch.randn(1, 16, width)}
    for part in ("attn.query", "attn.key", "attn.value", "attn.proj", "mlp.0", "mlp.2"):
        state |= {f"blocks.0.{part}.weight": torch.randn(width, width) / 4, f"blocks.0.{part}.bias": torch.randn(width)}
    for part in ("blocks.0.ln1", "blocks.0.ln2", "ln_f"):
        state |= {f"{part}.weight": torch.randn(width), f"{part}.bias": torch.randn(width)}
    state["head.weight"] = torch.randn(50, width)
    facts = convert(save(state), tmp_path / "out", n_head=2)
    made = loaded(tmp_path / "out").state_dict()
    assert torch.equal(made["transformer.h.0.mlp.c_fc.weight"], state["blocks.0.mlp.0.weight"].T)
    joined = torch.cat([state[f"blocks.0.attn.{part}.weight"] for part in ("query", "key", "value")])
    assert torch.equal(made["transformer.h.0.attn.c_attn.weight"], joined.T)
    assert facts["mlp_width"] == width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(tmp_path: Path, save: Any, dtype: torch.dtype) -> None:
    model = shaken(NanoGPT(bias=False)).to(dtype)
    convert(save({"model": model.state_dict(), "model_args": args(False)}), tmp_path / "out")
    assert {tensor.dtype for tensor in loaded(tmp_path / "out", dtype="auto").state_dict().values()} == {dtype}
    assert gap(model.float(), tmp_path / "out") < 1e-5


def test_the_old_file_format(tmp_path: Path, save: Any) -> None:
    model = shaken(NanoGPT())
    state = {"model": model.state_dict(), "model_args": args()}
    convert(save(state, _use_new_zipfile_serialization=False), tmp_path / "out")
    assert gap(model, tmp_path / "out") < 1e-5


def test_shards(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHARD", 40_000)
    model = shaken(NanoGPT())
    convert(save({"model": model.state_dict(), "model_args": args()}), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert gap(model, tmp_path / "out") < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# Vocabulary and tokenizer
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_cut_by_the_tokenizer(tmp_path: Path, save: Any, tokenizer: Any, tied: bool) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    tokens = len(tokenizer)
    rows = tokens + 46
    model = shaken(NanoGPT(vocab_size=rows, tied=tied))
    file = save({"model": model.state_dict(), "model_args": args(vocab_size=rows)})
    facts = convert(file, tmp_path / "out", tokenizer=str(tmp_path / "tok"))
    assert facts["vocabulary"]["kept"] == tokens
    assert gap(model, tmp_path / "out", tokens) < 1e-5
    made = loaded(tmp_path / "out")
    assert made.get_output_embeddings().weight.shape == (tokens, 32)
    assert made.config.eos_token_id == made.generation_config.eos_token_id == tokenizer.eos_token_id

    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("What is 2 + 2?").input_ids == tokenizer("What is 2 + 2?").input_ids
    assert again.model_max_length <= SIZES["block_size"]
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.json")]
    assert len(texts) >= 4
    assert [text for text in texts if str(tmp_path) in text] == []

    facts = convert(file, tmp_path / "kept", tokenizer=str(tmp_path / "tok"), keep_padding=True)
    assert facts["vocabulary"] == {"rows": rows, "kept": rows, "cut": None}
    assert gap(model, tmp_path / "kept", rows) < 1e-5


def test_gpt2s_own_padding_is_cut_without_a_tokenizer(
    tmp_path: Path, save: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8}
    model = shaken(NanoGPT(vocab_size=50304, **small))
    file = save({"model": model.state_dict(), "model_args": args(vocab_size=50304, **small)})
    really_convert(file, tmp_path / "out")
    said = capsys.readouterr().out
    assert "47 rows beyond GPT-2's 50257 tokens" in said
    assert "--tokenizer openai-community/gpt2" in said
    made = loaded(tmp_path / "out")
    assert made.get_input_embeddings().weight.shape[0] == made.config.vocab_size == 50257
    assert made.config.eos_token_id == 50256


def test_no_other_vocabulary_is_cut(tmp_path: Path, save: Any) -> None:
    file = save({"model": shaken(NanoGPT()).state_dict(), "model_args": args()})
    assert convert(file, tmp_path / "out")["vocabulary"]["kept"] == 96


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, save: Any, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    file = save({"model": NanoGPT().state_dict(), "model_args": args()})
    with pytest.raises(UsageError, match=f"{len(tokenizer)} tokens and the model 96 embedding rows"):
        convert(file, tmp_path / "out", tokenizer=str(tmp_path / "tok"))
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------------
# The account, the proof, and what is refused
# --------------------------------------------------------------------------------------------------------------------


def test_every_tensor_is_accounted_for(tmp_path: Path, save: Any) -> None:
    model = shaken(GPTModel())
    state = model.state_dict()
    convert(save(state), tmp_path / "out", n_head=4)
    facts = json.loads((tmp_path / "out" / "convert.json").read_text(encoding="utf-8"))
    assert facts["tensors"].keys() | facts["dropped"].keys() == state.keys()
    assert not facts["tensors"].keys() & facts["dropped"].keys()
    made = loaded(tmp_path / "out").state_dict()
    assert {entry["to"] for entry in facts["tensors"].values()} | facts["added"].keys() == made.keys()
    assert facts["tensors"]["trf_blocks.1.att.W_key.weight"] == {
        "to": "transformer.h.1.attn.c_attn.weight",
        "how": "joined and transposed",
    }
    assert facts["proof"]["lengths"] == [1, 2, 33, 48]
    assert 0 < facts["proof"]["difference"] <= facts["proof"]["tolerance"] <= 1e-4 * facts["proof"]["scale"]


WRONG: dict[str, Callable[[Any], Any]] = {
    "another part not transposed": lambda t: t["transformer.h.1.attn.c_proj.weight"],
    "another order of q, k and v": lambda t: t["transformer.h.0.attn.c_attn.weight"],
    "another bias": lambda t: t["transformer.h.1.mlp.c_fc.bias"],
    "other positions": lambda t: t["transformer.wpe.weight"],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_conversion_is_not_kept(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    right = targets.make_targets

    def wrong(*given: Any) -> Any:
        made = right(*given)
        (name,) = (name for name, target in made.items() if target is WRONG[what](made))
        old = made[name]

        def spoil() -> torch.Tensor:
            tensor = old.make()
            if what.endswith("transposed"):
                return tensor.T.contiguous()
            return tensor.roll(32, -1) if "q, k" in what else tensor.flip(0)

        made[name] = old._replace(make=spoil)
        return made

    monkeypatch.setattr(module, "make_targets", wrong)
    file = save({"model": shaken(NanoGPT()).state_dict(), "model_args": args()})
    with pytest.raises(ModelError, match="is not the source: a logit differs by"):
        convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_the_other_gelu_is_not_within_the_tolerance(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save({"model": shaken(NanoGPT()).state_dict(), "model_args": args()})
    right = module._write_configs

    def wrong(folder: Path, source: Any, layout: Any, heads: int, activation: str, *rest: Any) -> None:
        assert activation == "gelu"
        right(folder, source, layout, heads, "gelu_new", *rest)

    monkeypatch.setattr(module, "_write_configs", wrong)
    with pytest.raises(ModelError, match="is not the source"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, Any]], Any]:
    def edit(checkpoint: dict[str, Any]) -> None:
        full = f"transformer.{name}"
        if tensor is None:
            del checkpoint["model"][full]
        else:
            checkpoint["model"][full] = tensor

    return edit


def setting(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: checkpoint["model_args"].update(values)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown": (change("h.0.attn.q_norm.weight", torch.ones(8)), r"does not have: transformer.h.0.attn.q_norm.weight"),
    "missing": (change("h.1.ln_2.weight", None), r"missing are h.1.ln_2.w "),
    "a missing bias": (change("h.1.mlp.c_fc.bias", None), r"missing are h.1.mlp.fc.b "),
    "no positions": (change("wpe.weight", None), r"missing are wpe.w "),
    "shape": (change("h.1.mlp.c_proj.weight", torch.ones(128, 32)), r"c_proj.weight \(128, 32\), expected \(32, 128\)"),
    "width": (change("h.0.attn.c_attn.weight", torch.ones(64, 32)), r"expected 96 × 32"),
    "NaN": (change("ln_f.weight", torch.full((32,), math.nan)), r"NaN in transformer.ln_f.weight"),
    "dtype": (change("ln_f.weight", torch.ones(32, dtype=torch.int8)), r"ln_f.weight is torch.int8"),
    "window": (
        change("h.0.attn.bias", torch.ones(48, 48).tril().triu(-8)),
        r"not have: transformer.h.0.attn.bias",
    ),
    "twice": (change("h.0.mlp.fc1.weight", torch.ones(128, 32)), r"the same twice: .*c_fc.weight and .*fc1.weight"),
    "layers": (setting(n_layer=3), r"contradicts itself: model_args says n_layer 3, its tensors 2"),
    "another model": (setting(use_rotary=True), r"model_args says use_rotary=True, which GPT-2 does not have"),
    "heads": (setting(n_head=5), r"found 5, expected a divisor of the width 32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused(tmp_path: Path, save: Any, case: str) -> None:
    checkpoint = {"model": NanoGPT().state_dict(), "model_args": args()}
    edit, message = BROKEN[case]
    edit(checkpoint)
    with pytest.raises(UsageError, match=message):
        convert(save(checkpoint), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_heads_have_to_be_known(tmp_path: Path, save: Any) -> None:
    sizes = {"n_embd": 128, "n_layer": 1}
    file = save(NanoGPT(**sizes).state_dict())
    with pytest.raises(UsageError, match=r"would be --n-head 2$"):
        convert(file, tmp_path / "out")
    both = save({"model": NanoGPT().state_dict(), "model_args": args()}, "both.pt")
    with pytest.raises(UsageError, match=r"found 2, but model_args in .* says 4"):
        convert(both, tmp_path / "out", n_head=2)


class Code:
    """What a file must not do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"model": NanoGPT().state_dict(), "model_args": args(), "extra": Code()}
    with pytest.raises(UsageError, match=r"more than tensors and numbers \(\w+\.mkdir\).*was not loaded"):
        convert(save(state, _use_new_zipfile_serialization=zipped), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_other_files_are_refused(tmp_path: Path, save: Any) -> None:
    whole = save({"model": NanoGPT().state_dict(), "model_args": args()}, "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    (tmp_path / "empty.pt").write_bytes(b"")
    cases = {
        "cut.pt": "cut short",
        "text.pt": "no file of torch.save",
        "empty.pt": "no file of torch.save",
        "none.pt": "there is no file",
        ".": "is a folder",
    }
    for name, message in cases.items():
        with pytest.raises(UsageError, match=message):
            convert(tmp_path / name, tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds step, note, expected a state dict"):
        convert(save({"step": 1, "note": "x"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, save: Any) -> None:
    from instructft.cli import app

    file = save({"model": shaken(NanoGPT()).state_dict(), "model_args": args()})
    done = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for part in (
        "4 heads (from model_args)",
        "activation gelu: the exact GELU",
        "transposed",
        "proof ",
        "no tokenizer",
    ):
        assert part in done.output
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out")])
    assert isinstance(again.exception, UsageError)
    assert again.exception.exit_code == 2
    assert "is not empty" in str(again.exception)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
