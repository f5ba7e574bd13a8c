"""Finds GPT-2 in a state dict: which tensor is which, how its matrices lie, how many of everything there are.

::

    transformer.h.3.attn.c_attn.weight   ─►  h.3.attn.qkv.w       nanoGPT, and GPT-2 of transformers
    trf_blocks.3.att.W_query.weight      ─►  h.3.attn.q.w         LLMs from scratch
    blocks.3.attn.query.weight           ─►  h.3.attn.q.w         minGPT at first

nanoGPT and transformers share their names, but not how a matrix lies: `nn.Linear` holds (out, in), `Conv1D` holds
(in, out). The matrices that are not square tell which, for the square ones too, and all of them have to agree.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError
from instructft.extras.convert.state_dict import Checkpoint

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("gelu", "gelu_new", "relu")
SHOWN = 5  # names in a message

# place -> its names, without prefix and without `.weight`
_TOP = {
    "wte": "wte|tok_emb|token_emb|token_embedding|token_embedding_table|tok_embedding|embed_tokens",
    "wpe": "wpe|pos_emb|position_emb|position_embedding|position_embedding_table|pos_embedding|embed_positions",
    "ln_f": "ln_f|final_norm|norm_f|ln_final|final_layer_norm|norm",
    "head": "lm_head|out_head|head|output_head",
}
_BLOCKS = "h|blocks|layers|trf_blocks|transformer_blocks"
_ATTENTION, _MLP = "attn|att|attention|self_attn|sa|mha", "mlp|ff|ffn|feed_forward|ffwd"
_BLOCK = {
    "ln_1": "ln_1|ln1|norm1|norm_1|attn_norm|ln_attn|input_layernorm",
    "ln_2": "ln_2|ln2|norm2|norm_2|mlp_norm|ln_mlp|ffn_norm|ff_norm|post_attention_layernorm",
    "attn.qkv": rf"(?:{_ATTENTION})\.(?:c_attn|qkv|qkv_proj|W_qkv|in_proj)",
    "attn.q": rf"(?:{_ATTENTION})\.(?:W_query|W_q|wq|q|query|q_proj|q_attn)",
    "attn.k": rf"(?:{_ATTENTION})\.(?:W_key|W_k|wk|k|key|k_proj|k_attn)",
    "attn.v": rf"(?:{_ATTENTION})\.(?:W_value|W_v|wv|v|value|v_proj|v_attn)",
    "attn.proj": rf"(?:{_ATTENTION})\.(?:c_proj|out_proj|proj|o_proj|W_o|wo)",
    "mlp.fc": rf"(?:{_MLP})\.(?:c_fc|fc1|fc_in|layers\.0|net\.0|0|up_proj|linear1)",
    "mlp.proj": rf"(?:{_MLP})\.(?:c_proj|fc2|fc_out|layers\.2|net\.2|2|down_proj|linear2)",
}
_LEAF = {"weight": "w", "scale": "w", "gamma": "w", "bias": "b", "shift": "b", "beta": "b"}
_PREFIX = re.compile(r"^(?:module|transformer|model|gpt)\.")  # of a wrapper or of an outer module
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MASK = re.compile(r"(?:^|\.)(?:bias|masked_bias|mask|causal_mask|attn_mask|tril)$")


@dataclass(frozen=True)
class Layout:
    """A state dict understood. Places of layer i begin with `h.i.`; `.w` is a weight, `.b` a bias.

    Args:
        tensors: place -> tensor, as it lies in the file.
        sources: place -> its name in the file.
        dropped: name in the file -> why it is not needed.
        linear: matrices are (out, in), as in `nn.Linear`; else (in, out), as in `Conv1D`.
        tied: the output head is the token embedding.
        rows: of the token embedding, padding included.
        n_inner: width of the MLP.
        activation: of the MLP, as transformers names it, with the reason.
        dtype: the widest of its tensors.
    """

    tensors: Mapping[str, torch.Tensor]
    sources: Mapping[str, str]
    dropped: Mapping[str, str]
    linear: bool
    tied: bool
    rows: int
    positions: int
    n_layer: int
    n_embd: int
    n_inner: int
    activation: str
    activation_why: str
    dtype: torch.dtype


def read_layout(checkpoint: Checkpoint) -> Layout:
    """Find the parts of a GPT-2 in a checkpoint.

    >>> read_layout(read_file(Path("ckpt.pt"))).linear
    True

    Raises:
        UsageError: tensors are unknown, missing, of a wrong shape or not finite, or the file contradicts itself; all
            of one kind are named together.
    """
    import torch

    file = checkpoint.file
    tensors, sources, dropped = _places(checkpoint)
    layers = 1 + max((int(place.split(".")[1]) for place in tensors if place.startswith("h.")), default=-1)
    _refuse_missing(file, tensors, layers)
    _refuse_unusable(file, tensors, sources)
    n_embd, linear = tensors["wte.w"].shape[-1], _orientation(file, tensors, sources)
    n_inner = tensors["h.0.mlp.fc.w"].shape[0 if linear else 1]
    if tensors["wpe.w"].dim() == 3 and len(tensors["wpe.w"]) == 1:  # (1, T, C) in minGPT's first layout
        tensors["wpe.w"] = tensors["wpe.w"][0]
    _refuse_shapes(file, tensors, sources, linear, n_embd, n_inner)
    tied = "head.w" not in tensors or torch.equal(tensors["head.w"], tensors["wte.w"])
    if tied and "head.w" in tensors:
        dropped[sources["head.w"]] = "equal to the token embedding, to which it is tied"
    if "head.b" in tensors:
        if bool(tensors["head.b"].any()):
            raise UsageError(f"{file}: {sources['head.b']} is not zero, and GPT-2's output head has no bias")
        dropped[sources["head.b"]] = "all zero, and GPT-2's output head has no bias"
    found = {
        "n_layer": layers,
        "n_embd": n_embd,
        "block_size": tensors["wpe.w"].shape[0],
        "vocab_size": tensors["wte.w"].shape[0],
    }
    _refuse_contradiction(checkpoint, found, tensors)
    activation, why = _activation(checkpoint, linear, dropped)
    return Layout(
        tensors=tensors,
        sources=sources,
        dropped=dropped,
        linear=linear,
        tied=tied,
        rows=found["vocab_size"],
        positions=found["block_size"],
        n_layer=layers,
        n_embd=n_embd,
        n_inner=n_inner,
        activation=activation,
        activation_why=why,
        dtype=functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values())),
    )


def _places(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    sources: dict[str, str] = {}
    dropped: dict[str, str] = {}
    unknown = []
    for name, tensor in checkpoint.tensors.items():
        place = _place_of(name)
        if place is None:
            if _is_causal_mask(name, tensor):
                dropped[name] = "a mask, which GPT-2 of transformers makes itself"
            else:
                unknown.append(f"{name} {tuple(tensor.shape)}")
        elif place in tensors:
            raise UsageError(f"{checkpoint.file} holds the same twice: {sources[place]} and {name}; leave one out")
        else:
            tensors[place], sources[place] = tensor, name
    if unknown:
        raise UsageError(
            f"{checkpoint.file} holds tensors that GPT-2 does not have: {_some(unknown)}. Known are the layouts of "
            "nanoGPT, minGPT, LLMs from scratch and GPT-2 of transformers"
        )
    return tensors, sources, dropped


def _place_of(name: str) -> str | None:
    """The place of a tensor by its name, or None where it is unknown.

    >>> _place_of("_orig_mod.transformer.h.3.attn.c_attn.weight"), _place_of("trf_blocks.3.norm1.scale")
    ('h.3.attn.qkv.w', 'h.3.ln_1.w')
    """
    bare = _WRAPPER.sub("", name)
    while _PREFIX.match(bare):
        bare = _PREFIX.sub("", bare)
    stem, _, leaf = bare.rpartition(".")
    if bare in _TOP["wpe"].split("|"):  # minGPT once held its positions as a bare parameter
        return "wpe.w"
    if leaf not in _LEAF:
        return None
    for place, names in _TOP.items():
        if re.fullmatch(names, stem):
            return f"{place}.{_LEAF[leaf]}"
    if inside := re.fullmatch(rf"(?:{_BLOCKS})\.(\d+)\.(.+)", stem):
        for place, names in _BLOCK.items():
            if re.fullmatch(names, inside[2]):
                return f"h.{int(inside[1])}.{place}.{_LEAF[leaf]}"
    return None


def _is_causal_mask(name: str, tensor: torch.Tensor) -> bool:
    """A plain causal mask, or the number that once filled it; one with a window would make another model."""
    import torch

    if not _MASK.search(name):
        return False
    if tensor.numel() == 1:
        return name.endswith("masked_bias")
    if tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.numel() != tensor.shape[-1] ** 2:
        return False
    seen, lower = tensor.reshape(tensor.shape[-2:]) != 0, torch.ones(tensor.shape[-2:], dtype=torch.bool).tril()
    return torch.equal(seen, lower) or torch.equal(seen, ~lower)  # what may be seen, or what may not


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _refuse_missing(file: Any, tensors: Mapping[str, torch.Tensor], layers: int) -> None:
    """Every weight is there, and a bias is there in each layer or in none."""
    if not layers:
        raise UsageError(f"{file} holds no layers: found {_some(list(tensors)) or 'nothing'}, expected h.0 and on")
    attention = ["attn.q", "attn.k", "attn.v"]
    fused = any(place.endswith("attn.qkv.w") for place in tensors)
    if fused and any(f".{part}." in place for place in tensors for part in attention):
        raise UsageError(f"{file} holds q, k and v both joined and apart; expected one of the two")
    parts = ["ln_1", "ln_2", "attn.proj", "mlp.fc", "mlp.proj", *(["attn.qkv"] if fused else attention)]
    wanted = ["wte.w", "wpe.w", "ln_f.w", *(f"h.{i}.{part}.w" for i in range(layers) for part in parts)]
    for part in parts:
        if any(place.endswith(f".{part}.b") for place in tensors):
            wanted += [f"h.{i}.{part}.b" for i in range(layers)]
    if missing := [place for place in wanted if place not in tensors]:
        raise UsageError(
            f"{file} is not a whole GPT-2: missing are {_some(missing)} (.w weight, .b bias; {len(missing)} in all, "
            f"{layers} layers)"
        )


# --------------------------------------------------------------------------------------------------------------------
# Shapes and values
# --------------------------------------------------------------------------------------------------------------------


def _orientation(file: Any, tensors: Mapping[str, torch.Tensor], sources: Mapping[str, str]) -> bool:
    """Whether matrices are (out, in). The first layer's tell; `_refuse_shapes` then holds all others to it."""
    width = tensors["wte.w"].shape[-1]
    for place, out in (("h.0.attn.qkv.w", 3 * width), ("h.0.mlp.fc.w", None)):
        shape = tuple(tensors[place].shape) if place in tensors else ()
        if len(shape) != 2 or shape[0] == shape[1]:
            continue
        if shape[1] == width and out in (None, shape[0]):
            return True
        if shape[0] == width and out in (None, shape[1]):
            return False
        raise UsageError(
            f"{file}: {sources[place]} is {shape}, expected {out or 'its MLP width'} × {width}, either way round: "
            f"embeddings are {width} wide"
        )
    return True  # all are square: q, k and v apart, and an MLP as wide as the model; such code uses nn.Linear


def _refuse_shapes(
    file: Any, tensors: Mapping[str, torch.Tensor], sources: Mapping[str, str], linear: bool, width: int, inner: int
) -> None:
    outs = {"attn.qkv": 3 * width, "mlp.fc": inner}
    wrong = []
    for place, tensor in tensors.items():
        kind, leaf = re.sub(r"^h\.\d+\.", "", place)[:-2], place[-1]
        out = outs.get(kind, width)
        if kind in ("wte", "wpe", "head"):
            rows = tensors["wpe.w" if kind == "wpe" else "wte.w"].shape[0]
            expected: tuple[int, ...] = (rows, width) if leaf == "w" else (rows,)
        elif leaf == "b" or kind.startswith("ln_"):
            expected = (out,)
        else:
            into = inner if kind == "mlp.proj" else width
            expected = (out, into) if linear else (into, out)
        if tuple(tensor.shape) != expected:
            wrong.append(f"{sources[place]} {tuple(tensor.shape)}, expected {expected}")
    if wrong:
        raise UsageError(f"{file}: wrong shapes: {'; '.join(wrong[:SHOWN])} ({len(wrong)} in all)")


def _refuse_unusable(file: Any, tensors: Mapping[str, torch.Tensor], sources: Mapping[str, str]) -> None:
    import torch

    for place, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
            raise UsageError(f"{file}: {sources[place]} is {tensor.dtype}, expected {', '.join(_DTYPES)}")
    if bad := [sources[place] for place, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise UsageError(f"{file} is broken: infinite values or NaN in {_some(bad)}")


def _refuse_contradiction(
    checkpoint: Checkpoint, found: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> None:
    said = checkpoint.settings
    wrong = [f"{key} {said[key]}, its tensors {found[key]}" for key in found if key in said and said[key] != found[key]]
    if said.get("bias") is True and not any(place.endswith(".mlp.fc.b") for place in tensors):
        wrong.append("bias True, its tensors have none")
    if wrong:
        raise UsageError(f"{checkpoint.file} contradicts itself: {checkpoint.settings_place} says {'; '.join(wrong)}")


def _activation(checkpoint: Checkpoint, linear: bool, dropped: Mapping[str, str]) -> tuple[str, str]:
    """The MLP's activation. No tensor tells it: it follows from whose code writes such a file.

    nanoGPT has the exact GELU since May 2023, and had the tanh one before; its `bias` setting is of February 2023.
    """
    said, names = checkpoint.settings, checkpoint.tensors
    if "activation" in said:
        if said["activation"] not in ACTIVATIONS:
            raise UsageError(f"{checkpoint.file}: activation {said['activation']}, expected {', '.join(ACTIVATIONS)}")
        return str(said["activation"]), f"from {checkpoint.settings_place}"
    if any("trf_blocks." in name for name in names):
        return "gelu_new", "the tanh GELU of LLMs from scratch"
    if not linear:
        return "gelu_new", "the tanh GELU of OpenAI and transformers, whose weights lie as these do"
    if any(re.search(r"\.mlp\.c_fc\.", name) for name in names):
        if any(why.startswith("a mask") for why in dropped.values()):
            return "gelu_new", "the tanh GELU of minGPT, build-nanogpt and nanoGPT before May 2023, which save masks"
        if said and "bias" not in said:
            return "gelu_new", "the tanh GELU of build-nanogpt and early nanoGPT, which have no setting `bias`"
        return "gelu", "the exact GELU of nanoGPT since May 2023"
    return "gelu", "the exact GELU, torch's default"
