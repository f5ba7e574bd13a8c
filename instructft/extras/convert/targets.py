"""What each tensor of a converted model is made from: matrices transposed, q, k and v joined, padding cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from instructft.errors import UsageError
from instructft.extras.convert.layouts import Layout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GPT2_VOCABULARY = 50257  # tokens; nanoGPT rounds it up to 50304, a multiple of 64
PADDING = 128  # rows: vocabularies are padded to a multiple of this at most


class Target(NamedTuple):
    """A tensor of the converted model: the places that it is made from (none: zeros), how, and the means to make it."""

    places: tuple[str, ...]
    how: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


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

    def plain(name: str, place: str, rows: int | None = None) -> None:
        tensor = layout.tensors[place]
        made = tensor if rows is None else tensor[:rows]
        how = "copied" if made.shape == tensor.shape else f"its first {rows} rows"
        found[name] = Target((place,), how, tuple(made.shape), made.dtype, lambda: made)

    def zeros(name: str, size: int) -> None:
        dtype = layout.dtype
        found[name] = Target(
            (), "zeros: the source has no such bias", (size,), dtype, lambda: torch.zeros(size, dtype=dtype)
        )

    def bias(name: str, places: tuple[str, ...], size: int) -> None:
        tensors = [layout.tensors.get(place) for place in places]
        if all(tensor is None for tensor in tensors):
            zeros(name, size)
            return
        width = size // len(places)  # where only some of q, k and v have a bias, the others' is zero
        parts = [torch.zeros(width, dtype=layout.dtype) if tensor is None else tensor for tensor in tensors]
        made = torch.cat(parts)
        there = tuple(place for place, tensor in zip(places, tensors, strict=True) if tensor is not None)
        found[name] = Target(there, "copied" if len(parts) == 1 else "joined", (size,), made.dtype, lambda: made)

    def matrix(name: str, places: tuple[str, ...], into: int, out: int) -> None:
        tensors = [layout.tensors[place] for place in places]
        dtype = tensors[0].dtype
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        how = "joined" if len(places) > 1 else ""
        how += (" and " if how else "") + "transposed" if layout.linear else "" if how else "copied"

        def make() -> torch.Tensor:  # (in, out), as Conv1D holds it
            parts = [tensor.T if layout.linear else tensor for tensor in tensors]
            return torch.cat([part.to(dtype) for part in parts], dim=1).contiguous()

        found[name] = Target(places, how, (into, out), dtype, make)

    width, inner = layout.n_embd, layout.n_inner
    plain("transformer.wte.weight", "wte.w", vocabulary)
    plain("transformer.wpe.weight", "wpe.w")
    for i in range(layout.n_layer):
        to, at = f"transformer.h.{i}", f"h.{i}"
        joined = ("qkv",) if f"{at}.attn.qkv.w" in layout.tensors else ("q", "k", "v")
        qkv = tuple(f"{at}.attn.{part}" for part in joined)
        for norm in ("ln_1", "ln_2"):
            plain(f"{to}.{norm}.weight", f"{at}.{norm}.w")
            bias(f"{to}.{norm}.bias", (f"{at}.{norm}.b",), width)
        for name, places, into, out in (
            ("attn.c_attn", qkv, width, 3 * width),
            ("attn.c_proj", (f"{at}.attn.proj",), width, width),
            ("mlp.c_fc", (f"{at}.mlp.fc",), width, inner),
            ("mlp.c_proj", (f"{at}.mlp.proj",), inner, width),
        ):
            matrix(f"{to}.{name}.weight", tuple(f"{place}.w" for place in places), into, out)
            bias(f"{to}.{name}.bias", tuple(f"{place}.b" for place in places), out)
    plain("transformer.ln_f.weight", "ln_f.w")
    bias("transformer.ln_f.bias", ("ln_f.b",), width)
    if not layout.tied:
        plain("lm_head.weight", "head.w", vocabulary)
    return found
