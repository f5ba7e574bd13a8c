"""The names that GPT-2's tensors have in the state dicts of different code, and the place that each stands for.

::

    transformer.h.3.attn.c_attn.weight   ─►  h.3.attn.qkv.w       nanoGPT, and GPT-2 of transformers
    trf_blocks.3.att.W_query.weight      ─►  h.3.attn.q.w         LLMs from scratch
    blocks.3.attn.query.weight           ─►  h.3.attn.q.w         minGPT at first
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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


def place_of(name: str) -> str | None:
    """The place of a tensor by its name, or None where it is unknown.

    >>> place_of("_orig_mod.transformer.h.3.attn.c_attn.weight"), place_of("trf_blocks.3.norm1.scale")
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


def is_causal_mask(name: str, tensor: torch.Tensor) -> bool:
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
