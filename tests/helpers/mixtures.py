"""Small random mixtures of experts, most of whose weights are experts, as they are in the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 320, "vocab_size": 1490, "tie_word_embeddings": True, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MIXTURES: dict[str, dict[str, Any]] = {
    # experts alone in the file, in one parameter in memory
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # as one parameter (E, in, out), with gate and up interleaved
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 320, "head_dim": 8},
    # with a dense layer and shared experts under names that PEFT takes for the experts'
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 320, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, **LATENT,
    },
}  # fmt: skip


def make_mixture(folder: Path, kind: str, **more: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, initializer_range=0.1, **{**SIZES, **MIXTURES[kind], **more})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
