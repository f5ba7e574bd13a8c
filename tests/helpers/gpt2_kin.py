"""The `GPT` of nanoGPT and the `GPTModel` of LLMs from scratch, module by module and name by name, with checkpoints.

They share no code with the converter. https://github.com/karpathy/nanoGPT/blob/master/model.py and
https://github.com/rasbt/LLMs-from-scratch/blob/main/ch04/01_main-chapter-code/gpt.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from instructft.extras.convert.convert import convert as really_convert

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 96, "dropout": 0.0}


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


QUIET = Console(quiet=True)


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
