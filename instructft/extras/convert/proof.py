"""Proves a conversion: GPT-2 written out in plain tensor arithmetic over the file's own tensors, and the folder loaded.

The reference below reads the source tensors where they lie, with q, k and v joined or apart, and shares no code with
transformers. It is computed in float64, a matrix at a time, and once more in float32: how far the two are apart is what
float32 costs on these weights. The folder, loaded in float32 as anybody loads it, may be ten times as far from the
float64 logits, and never more than a ten-thousandth of the largest one.

What no proof over a file of tensors can see is what it does not hold: the MLP's activation and the number of heads.
Both sides take the same; where they come from is printed and kept in `convert.json`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import ModelError
from instructft.extras.convert.layouts import Layout
from instructft.formatting import first_line

if TYPE_CHECKING:
    import torch

MARGIN = 10  # times float32's own error
FLOOR, CEILING = 1e-6, 1e-4  # of the largest logit
PLACES = 64  # of a row at which logits are compared; each depends on all tokens before it
SEED = 0


def reference(layout: Layout, n_head: int, activation: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The final hidden states of GPT-2 over the source tensors: ids (T,) to (T, n_embd).

    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
    """
    import torch

    def get(place: str) -> torch.Tensor | None:
        tensor = layout.tensors.get(place)
        return None if tensor is None else tensor.to(dtype)

    def linear(x: torch.Tensor, place: str) -> torch.Tensor:
        weight, bias = layout.tensors[f"{place}.w"].to(dtype), get(f"{place}.b")
        y = torch.einsum("ti,oi->to" if layout.linear else "ti,io->to", x, weight)
        return y if bias is None else y + bias

    def norm(x: torch.Tensor, place: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layout.tensors[f"{place}.w"].to(dtype)
        bias = get(f"{place}.b")
        return y if bias is None else y + bias

    length, size = len(ids), layout.n_embd // n_head
    unseen = torch.ones(length, length, dtype=torch.bool).triu(1)  # (T, T): what lies ahead
    x = layout.tensors["wte.w"][ids].to(dtype) + layout.tensors["wpe.w"][:length].to(dtype)  # (T, C)
    for i in range(layout.n_layer):
        here = norm(x, f"h.{i}.ln_1")
        if f"h.{i}.attn.qkv.w" in layout.tensors:
            q, k, v = linear(here, f"h.{i}.attn.qkv").split(layout.n_embd, dim=-1)
        else:
            q, k, v = (linear(here, f"h.{i}.attn.{part}") for part in "qkv")
        mixed = []
        for head in range(n_head):
            own = slice(head * size, (head + 1) * size)
            scores = (q[:, own] @ k[:, own].T / math.sqrt(size)).masked_fill(unseen, -math.inf)  # (T, T)
            mixed.append(scores.softmax(-1) @ v[:, own])
        x = x + linear(torch.cat(mixed, dim=-1), f"h.{i}.attn.proj")
        x = x + linear(_activate(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.fc"), activation), f"h.{i}.mlp.proj")
    return norm(x, "ln_f")


def _activate(x: torch.Tensor, name: str) -> torch.Tensor:
    import torch

    if name == "relu":
        return x.clamp(min=0)
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def prove(layout: Layout, folder: Path, n_head: int, activation: str, vocabulary: int) -> dict[str, Any]:
    """Compare the model in `folder` with the tensors that it was made from, on random ids of several lengths.

    Args:
        vocabulary: tokens that the converted model has; the source's logits beyond are left out.

    Returns:
        `difference` and `tolerance` in logits, `rounding` (float32's own), `scale` (the largest logit), `lengths`.

    Raises:
        ModelError: they differ, or the folder does not load whole.
    """
    import torch

    model = _load(folder)
    rows = model.get_input_embeddings().weight
    if not torch.equal(rows, layout.tensors["wte.w"][:vocabulary].float()):
        raise ModelError("the converted model has other token embeddings than the source; nothing was kept")
    head = layout.tensors["wte.w" if layout.tied else "head.w"][:vocabulary]
    random = torch.Generator().manual_seed(SEED)
    lengths = sorted({1, min(2, layout.positions), min(33, layout.positions), layout.positions})
    found = rounding = scale = 0.0
    with torch.inference_mode():
        for length in lengths:
            ids = torch.randint(vocabulary, (length,), generator=random)
            places = torch.linspace(0, length - 1, min(PLACES, length)).round().long()
            true = reference(layout, n_head, activation, ids, torch.float64)[places] @ head.double().T  # (P, V)
            rough = reference(layout, n_head, activation, ids, torch.float32)[places] @ head.float().T
            ours = model(input_ids=ids[None], use_cache=False, logits_to_keep=places).logits[0]
            scale = max(scale, float(true.abs().max()))
            rounding = max(rounding, float((rough - true).abs().max()))
            worst = float((ours - true).abs().max())
            found = worst if math.isnan(worst) else max(found, worst)
    tolerance = min(CEILING * scale, max(MARGIN * rounding, FLOOR * scale))
    if not found <= tolerance:  # not a number is no proof either
        raise ModelError(
            f"the converted model is not the source: a logit differs by {found:.3g}, allowed is {tolerance:.3g} "
            f"(the largest logit is {scale:.3g}); nothing was kept"
        )
    return {
        "difference": found,
        "tolerance": tolerance,
        "rounding": rounding,
        "scale": scale,
        "lengths": lengths,
        "seed": SEED,
        "precision": "float32, against float64",
    }


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = first_line(error)
        raise ModelError(f"the converted model does not load: {first}; nothing was kept") from error
    if bad := [str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]:
        raise ModelError(f"the converted model does not load whole: {', '.join(bad[:3])} ({len(bad)} in all)")
    return model.eval()
