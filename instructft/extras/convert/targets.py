"""What each tensor of a converted model is made from: matrices transposed, q, k and v joined, padding cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from instructft.errors import UsageError
from instructft.extras.convert.layouts import Layout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GPT2_VOCABULARY = 50257  # tokens; nanoGPT rounds it up to 50304, a multiple of 64
PADDING = 128  # rows: vocabularies are padded to a multiple of this at most


class Target(NamedTuple):
    """A tensor of the converted model: the places that it is made from (none: zeros), and how."""

    places: tuple[str, ...]
    how: str
    tensor: torch.Tensor


def choose_vocabulary(layout: Layout, tokenizer: PreTrainedTokenizerBase | None, keep: bool) -> tuple[int, str]:
    """Rows of the converted embedding, and the reason where some are cut.

    Raises:
        UsageError: the tokenizer is not the one that the model was trained with.
    """
    rows = layout.rows
    if tokenizer is not None:
        tokens = len(tokenizer)
        if not 0 <= rows - tokens < PADDING:
            raise UsageError(
                f"--tokenizer: it has {tokens} tokens and the model {rows} embedding rows, expected as many or up to "
                f"{PADDING - 1} rows of padding; it is not the one that the model was trained with"
            )
        wanted, why = tokens, f"rows beyond the {tokens} tokens of the tokenizer"
    elif rows % 64 == 0 and 0 < rows - GPT2_VOCABULARY < PADDING:
        wanted, why = GPT2_VOCABULARY, f"rows beyond GPT-2's {GPT2_VOCABULARY} tokens"
    else:
        return rows, ""
    return (rows, "") if keep or wanted == rows else (wanted, why)


def make_targets(layout: Layout, vocabulary: int) -> dict[str, Target]:
    """Name in `GPT2LMHeadModel` -> how it is made; q, k and v stand in this order, first all of q."""
    import torch

    found: dict[str, Target] = {}

    def copy(name: str, place: str, rows: int | None = None) -> None:
        tensor = layout.tensors[place]
        how = "copied" if rows in (None, len(tensor)) else f"its first {rows} rows"
        found[name] = Target((place,), how, tensor[:rows].clone())

    def bias(name: str, places: tuple[str, ...], size: int) -> None:
        zeros = torch.zeros(size // len(places), dtype=layout.dtype)  # where only some of q, k and v have a bias
        there = tuple(place for place in places if place in layout.tensors)
        how = "zeros: the source has no such bias" if not there else "copied" if len(places) == 1 else "joined"
        found[name] = Target(there, how, torch.cat([layout.tensors.get(place, zeros) for place in places]))

    def matrix(name: str, places: tuple[str, ...]) -> None:
        parts = [layout.tensors[place].T if layout.linear else layout.tensors[place] for place in places]
        done = ["joined"] * (len(places) > 1) + ["transposed"] * layout.linear
        found[name] = Target(places, " and ".join(done) or "copied", torch.cat(parts, dim=1))  # (in, out), as in Conv1D

    width, inner = layout.n_embd, layout.n_inner
    copy("transformer.wte.weight", "wte.w", vocabulary)
    copy("transformer.wpe.weight", "wpe.w")
    for i in range(layout.n_layer):
        to, at = f"transformer.h.{i}", f"h.{i}"
        joined = ("qkv",) if f"{at}.attn.qkv.w" in layout.tensors else ("q", "k", "v")
        qkv = tuple(f"{at}.attn.{part}" for part in joined)
        for norm in ("ln_1", "ln_2"):
            copy(f"{to}.{norm}.weight", f"{at}.{norm}.w")
            bias(f"{to}.{norm}.bias", (f"{at}.{norm}.b",), width)
        for name, places, out in (
            ("attn.c_attn", qkv, 3 * width),
            ("attn.c_proj", (f"{at}.attn.proj",), width),
            ("mlp.c_fc", (f"{at}.mlp.fc",), inner),
            ("mlp.c_proj", (f"{at}.mlp.proj",), width),
        ):
            matrix(f"{to}.{name}.weight", tuple(f"{place}.w" for place in places))
            bias(f"{to}.{name}.bias", tuple(f"{place}.b" for place in places), out)
    copy("transformer.ln_f.weight", "ln_f.w")
    bias("transformer.ln_f.bias", ("ln_f.b",), width)
    if not layout.tied:
        copy("lm_head.weight", "head.w", vocabulary)
    return found
