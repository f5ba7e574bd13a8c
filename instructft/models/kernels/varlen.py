"""Attention of packs by their borders: torch's variable-length flash-attention, under a name that transformers knows.

    packs (B, L)   [A A A B B .] [C C C C . .]     flat (1, B·L), a pad is a document of its own
    borders        0     3   5 6         10   12   queries of B see keys of B up to their own, and nothing else

No mask is built and none is read: the work is that of each document alone, where a mask costs all pairs of a pack. The
name is registered with `AttentionInterface` alone. One that `AttentionMaskInterface` does not know gets no mask
(transformers 5.23, masking_utils.py), so nothing looks at `position_ids` for packs, on the device, at each step. The
price: whatever comes without borders is an error here, and answers, padded rows and documents alone run under
`plain(model)`.

A CPU has no such kernel, and the kernel no float32: there each document is attended to by itself, slow and exact.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface

from instructft.errors import ModelError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None
_ASKS_FOR_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters  # from 2.12

# Without "flash" in it, or transformers would look for the flash-attn package; "sdpa" and "flex" mean something too.
NAME = "varlen"
OLDEST_TORCH = (2, 11)  # from there `varlen_attn` takes a window and a scale
WIDEST_HEAD = 256
_HALF = (torch.bfloat16, torch.float16)


def takes_borders(model: Any) -> bool:
    """Whether a model's attention tells documents apart by their borders, and wants packs end to end in one row."""
    name = str(model.config._attn_implementation)
    return name == NAME or "flash" in name


def switch_on(model: Any) -> bool:
    """Let a model attend by borders; False where its attention is written in its own way, and nothing is changed."""
    AttentionInterface.register(NAME, attend)
    if not own_attention(type(_bare(model))):
        model.set_attn_implementation(NAME)
    return str(model.config._attn_implementation) == NAME


@contextlib.contextmanager
def plain(model: Any) -> Iterator[None]:
    """Run what has no borders (answers, padded rows, documents alone) under sdpa, and borders again afterwards."""
    if str(model.config._attn_implementation) != NAME:
        yield
        return
    switch_off(model)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def switch_off(model: Any) -> None:
    """The attention that transformers takes of itself: sdpa, or eager where the architecture has no other."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")


def own_attention(kind: Any) -> bool:
    """Whether an architecture computes attention in its own code, where no function of another name is called."""
    return not kind._can_set_attn_implementation()


def refusal(config: Any) -> str:
    """Why a model cannot be trained with attention by borders, and the way out; "" where it can.

    >>> from transformers import GPT2Config
    >>> refusal(GPT2Config(n_embd=1200, n_head=4, attn_pdrop=0.0))
    'its heads are 300 wide, and the kernel takes multiples of 8 up to 256'
    """
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if re.match(r"att(n|ention)_.*drop", name) and isinstance(value, float | int) and value:
            return (
                f"the model trains with an attention dropout of {value:g} ({name}), which the kernel does not have; "
                f"set model.overrides={{{name}: 0.0}}"
            )
    if getattr(text, "attn_logit_softcapping", None):
        return f"its logits of attention are capped at {text.attn_logit_softcapping:g} (attn_logit_softcapping)"
    if text.model_type == "gpt_oss":
        return "it has attention sinks"
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return "it adds biases to attention by distance (ALiBi)"
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        return f"it attends in chunks of {text.attention_chunk_size:,} tokens"
    width = head_width(text)
    if width and (width > WIDEST_HEAD or width % 8):
        return f"its heads are {width} wide, and the kernel takes multiples of 8 up to {WIDEST_HEAD}"
    value = getattr(text, "v_head_dim", None)
    if value and getattr(text, "qk_nope_head_dim", None):
        return f"its values are {value} wide, and queries and keys have another width (latent attention)"
    return ""


def head_width(text: Any) -> int | None:
    """Numbers in a head of attention; None where a configuration does not say."""
    heads = getattr(text, "num_attention_heads", None)
    if found := getattr(text, "head_dim", None):
        return int(found)
    return text.hidden_size // heads if heads and getattr(text, "hidden_size", None) else None


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Any = None, position_bias: Any = None, is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention within each document, as transformers calls it.

    Args:
        query: (1, H, T, D).
        key, value: (1, G, T, D), of which H is a multiple.
        attention_mask: not looked at; borders say more.
        sliding_window: keys that a query sees, its own among them.
        cu_seq_lens_q: borders (N + 1,) int32 from 0 to T; a document between two equal ones is empty.
        max_length_q: tokens of the longest document at most, the same number at every step.

    Returns:
        (1, T, H, D), and no weights.

    Raises:
        ModelError: there are no borders, or the model asks for what the kernel does not have.
    """
    if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise ModelError(
            f"attention {NAME}: {type(module).__name__} got no borders of documents (cu_seq_lens_q); it takes packs "
            "end to end, and anything else runs under instructft.models.kernels.varlen.plain(model)"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    for asked, what in (
        (bool(dropout), "dropout in attention"),
        (softcap is not None, "soft-capped logits"),
        (s_aux is not None, "attention sinks"),
        (position_bias is not None, "biases by position"),
        (not causal, "attention to later tokens"),
        (key.shape[2] != query.shape[2], "keys of other tokens than the queries'"),
        (value.shape[-1] != query.shape[-1], "values of another width than the queries"),
    ):
        if asked:
            raise ModelError(f"attention {NAME} cannot compute {what}; write model.attn_implementation=sdpa")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # transformers counts the query's own position in a window, the kernel only what lies before it
    left = -1 if sliding_window is None else sliding_window - 1
    kind = query.device.type
    # rotary positions and norms of queries and keys come out of autocast in float32, and no rule lowers them again
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, H or G, D)
    if kind == "cuda" and dtype in _HALF:
        return by_kernel(q, k, v, cu_seq_lens_q, max_length_q, scale, left)[None], None
    return by_document(q, k, v, cu_seq_lens_q, scale, left)[None], None


def by_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, most: int, scale: float, left: int
) -> torch.Tensor:
    """`by_document` by torch's own kernel, in 16 bits on CUDA, called as each release from `OLDEST_TORCH` on takes it.

    Args:
        most: tokens of a document at most.
    """
    # slices of one product for all three (GPT-2) are read where they are; the kernel wants each head in one piece
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if _ASKS_FOR_GROUPS else {}
    out: torch.Tensor = varlen_attn(
        q, k, v, borders, borders, most, most, scale=scale, window_size=(left, 0), **grouped
    )
    return out


# --------------------------------------------------------------------------------------------------------------------
# The same in plain arithmetic, document by document: one op in a compiled graph, as the kernel is
# --------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("instructft::attention_by_document", mutates_args=())
def by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, scale: float, left: int
) -> torch.Tensor:
    """Attention within documents: q (T, H, D), k and v (T, G, D), borders (N + 1,) -> (T, H, D).

    Args:
        left: keys seen before a query's own; -1: all.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for part, p, _, _, values in _documents(q, k, v, borders, scale, left):
        out[part] = (p @ values).transpose(0, 1).to(out.dtype)
    return out


@torch.library.custom_op("instructft::attention_by_document_backward", mutates_args=())
def _by_document_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    borders: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for part, p, queries, keys, values in _documents(q, k, v, borders, scale, left):
        g = grad[part].transpose(0, 1).to(p.dtype)  # (H, n, D)
        gp = g @ values.transpose(1, 2)
        gs = p * (gp - (gp * p).sum(-1, keepdim=True)) * scale  # (H, n, n)
        for whole, one in zip(found, (gs @ keys, gs.transpose(1, 2) @ queries, p.transpose(1, 2) @ g), strict=True):
            of_group = one.view(whole.shape[1], -1, *one.shape[1:]).sum(1)  # the heads that share a key
            whole[part] = of_group.transpose(0, 1).to(whole.dtype)
    return found[0], found[1], found[2]


def _documents(q: Any, k: Any, v: Any, borders: Any, scale: float, left: int) -> Iterator[tuple[Any, ...]]:
    """Each document's place, its weights of attention (H, n, n), and its queries, keys and values (H, n, D)."""
    wide = torch.float32 if q.dtype in _HALF else q.dtype  # as the kernel sums
    places = borders.tolist()
    if places[-1] != q.shape[0]:
        raise ModelError(f"attention {NAME}: the borders of documents end at {places[-1]} of {q.shape[0]} tokens")
    for start, end in itertools.pairwise(places):
        if end == start:  # borders are filled up to a fixed number with empty documents
            continue
        queries, keys, values = (x[start:end].transpose(0, 1).to(wide) for x in (q, k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[0], dim=0) for x in (keys, values))
        place = torch.arange(end - start, device=q.device)
        behind = place[:, None] - place
        hidden = (behind < 0) | ((behind > left) if left >= 0 else False)
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        yield slice(start, end), scores.softmax(-1), queries, keys, values


@by_document.register_fake
def _(q: Any, k: Any, v: Any, borders: Any, scale: float, left: int) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_by_document_backward.register_fake
def _(grad: Any, q: Any, k: Any, v: Any, borders: Any, scale: float, left: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.left = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return (*_by_document_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.left), None, None, None)


by_document.register_autograd(_backward, setup_context=_setup)


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
