"""A tiny random model of every language model of transformers: of width 64, two layers or one of each kind.

    model = build("qwen3_moe", tokens=1500, end=0)

Every key of a family's configuration that `SMALL` names is made small, `SPECIAL` says what a family wants beside or
against that. Weights are three times those of a fresh model, so that attention matters, and the same each time.
"""

# ruff: noqa: C408  (a configuration reads as its keywords)
from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from instructft.weights.model_class import auto_class

# Models that see or hear, of those that only their own class loads: the ones that people train.
SEEING = (
    "aria", "aya_vision", "chameleon", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni",
    "deepseek_vl", "deepseek_vl_hybrid", "ernie4_5_vl_moe", "exaone4_5", "fast_vlm", "fun_asr_nano", "glm46v", "glm4v",
    "glm4v_moe", "glm5_next", "glm_ocr", "glmasr", "glmga", "granite_docling", "granite_speech", "hunyuan_vl",
    "hyperclovax_vision_v2", "idefics2", "idefics3", "inkling2", "internvl", "janus", "kimi_k25", "lfm2_vl", "lfm3_vl",
    "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6",
    "minicpmv4_7", "minimax_m3_vl", "mistral3", "mistral4", "mistral_large4", "molmo2", "nemotron_h_omni", "ovis2",
    "paddleocr_vl", "paligemma", "perception_lm", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_audio",
    "qwen2_vl", "qwen3_asr", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "step3p7",
    "video_llama_3", "video_llava", "vipllava", "voxtral",
)  # fmt: skip
FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SEEING})
# Others that see or hear: older ones that answer about a picture alone, and those whose parts no rule here makes small.
OTHERS = sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES} - {*FAMILIES})
LARGEST = 26_000_000  # weights; what is larger is not small

# What every configuration gets of these keys, where it has them.
SMALL: dict[str, Any] = dict(
    # width
    hidden_size=64, d_model=64, n_embd=64, dim=64, embedding_size=64, word_embed_proj_dim=64, attention_hidden_size=64,
    intermediate_size=96, ffn_dim=96, n_inner=None, d_ff=96, ffn_hidden_size=96, decoder_ffn_dim=96, encoder_ffn_dim=96,
    input_embedding_size=64, output_embedding_size=64,
    # depth
    num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, decoder_layers=2, encoder_layers=2, num_blocks=2,
    num_nextn_predict_layers=0,
    # heads
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4, encoder_attention_heads=4,
    num_key_value_heads=2, head_dim=16, dim_head=16, rotary_dim=16, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=16, qk_head_dim=16, index_n_heads=2, index_head_dim=16, index_topk=64,
    linear_head_dim=16, linear_num_heads=4, attention_head_size=16, emb_dim=64,
    # experts
    moe_intermediate_size=32, n_routed_experts=4, num_experts=4, num_local_experts=4, num_experts_per_tok=2, n_group=2,
    topk_group=1, shared_expert_intermediate_size=32, first_k_dense_replace=1, moe_num_experts=4,
    # positions and windows
    max_position_embeddings=512, n_positions=512, max_seq_len=512, seq_length=512, n_ctx=512, sliding_window=16,
    global_attn_every_n_layers=1, context_length=512,
    # dropout
    attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, hidden_dropout=0.0, dropout=0.0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, resid_dropout=0.0,
    residual_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
    decoder_layerdrop=0.0, dropout_p=0.0, ffn_dropout=0.0, attn_dropout=0.0, embedding_dropout=0.0, mlp_dropout=0.0,
    summary_first_dropout=0.0, classifier_dropout=0.0,
    # states
    mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2,
    mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, state_size=8, mamba_chunk_size=32, mamba_d_conv=4,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    # so that a decoder is one
    is_decoder=True,
)  # fmt: skip
# The same of a section for pictures or sounds.
TOWER: dict[str, Any] = dict(
    hidden_size=32, embed_dim=32, d_model=32, intermediate_size=64, encoder_ffn_dim=64, ffn_dim=64, num_hidden_layers=1,
    num_layers=1, depth=1, encoder_layers=1, num_attention_heads=2, num_key_value_heads=2, num_heads=2, head_dim=16,
    encoder_attention_heads=2, attention_heads=2, image_size=16, patch_size=8, out_hidden_size=64, projection_dim=64,
    output_hidden_size=64, num_position_embeddings=16, position_embedding_size=16, num_global_layers=1,
    vision_output_dim=64, base_channels=32, codebook_size=64,
    projector_input_dim=64, projector_output_dim=64, output_dim=64,
    attention_dropout=0.0, hidden_dropout_prob=0.0, dropout=0.0,
)  # fmt: skip
ALTERNATING: dict[str, Any] = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
LINEAR: dict[str, Any] = dict(layer_types=["linear_attention", "full_attention"])
THREE_AXES: dict[str, Any] = dict(
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
)
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": ALTERNATING | dict(num_dense_layers=1),
    "axk1": dict(head_dim=8),
    "emu3": dict(vocabulary_map={"<image>": 1480, "<|extra_200|>": 1481, "<|visual token 000000|>": 1482}),
    "qwen2_vl.text_config": THREE_AXES, "qwen2_5_vl.text_config": THREE_AXES,
    "glm4v.text_config": THREE_AXES, "glm46v.text_config": THREE_AXES, "glm_ocr.text_config": THREE_AXES,
    "glmga.text_config": THREE_AXES, "paddleocr_vl.text_config": THREE_AXES, "cosmos3_edge.text_config": THREE_AXES,
    "fun_asr_nano.adaptor_config": dict(hidden_size=64, intermediate_size=16),
    "inkling2.vision_config": dict(text_hidden_size=64),
    "step3p7.text_config": dict(sliding_window=16), "qwen2_5_omni_thinker.text_config": THREE_AXES,
    "chameleon": dict(vocabulary_map={"<image>": 1480}), "molmo2.adapter_config": dict(vision_feature_layer=[0]),
    "hunyuan_vl.text_config": dict(
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2, 2])
    ),
    "deepseek_ocr2.text_config": dict(mlp_layer_types=["dense", "sparse"]),
    "glm5_next.text_config": dict(qk_rope_head_dim=0),
    "qwen2_5_omni_thinker": dict(vision_start_token_id=1480, vision_end_token_id=1481),
    "qwen3_omni_moe_thinker": dict(vision_start_token_id=1480, vision_end_token_id=1481),
    "glm4v_moe.text_config": dict(rope_parameters=THREE_AXES["rope_parameters"] | dict(mrope_section=[1, 1, 2])),
    "ernie4_5_vl_moe.text_config": dict(
        moe_intermediate_size=[32, 32], moe_k=2,
        rope_parameters=THREE_AXES["rope_parameters"] | dict(mrope_section=[3, 3, 2])
    ),
    "bamba": dict(attn_layer_indices=[1]),
    "beam": dict(mlp_layer_types=["dense", "sparse"]),
    "bigbird_pegasus": dict(attention_type="original_full"), "big_bird": dict(attention_type="original_full"),
    "cohere2": ALTERNATING, "cwm": ALTERNATING,
    "dbrx": dict(
        ffn_config=dict(
            ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2, hidden_size=64, ffn_act_fn={"name": "silu"}
        ),
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
    ),
    "blt": dict(
        encoder_hash_byte_group_vocab=100,
        **{
            name: dict(
                hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2, intermediate_size=96,
                max_position_embeddings=512, hidden_size_global=64, head_dim=16,
                vocab_size=2048,
            )
            for name in ("patcher_config", "encoder_config", "decoder_config", "global_config")
        },
    ),
    "dots3_note.vision_config": dict(per_layer_config={}, adapter_in_dim=32, adapter_out_dim=64),
    "dots3_note.audio_config": dict(adapter_input_size=32, adapter_out_dim=64),
    "dots1": dict(
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1
    ),
    "deepseek_v3": dict(head_dim=8),
    "ernie4_5_moe": dict(moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1),
    "exaone4": ALTERNATING, "exaone_moe": ALTERNATING,
    "falcon": dict(new_decoder_architecture=False, multi_query=True, alibi=False),
    "falcon_mamba": dict(time_step_rank=4), "mamba": dict(time_step_rank=4),
    "gemma2": dict(query_pre_attn_scalar=16),
    "gemma3_text": ALTERNATING | dict(query_pre_attn_scalar=16),
    "gemma3n_text": ALTERNATING | dict(num_kv_shared_layers=0, laurel_rank=8, activation_sparsity_pattern=[0.0, 0.0]),
    "gemma4_text": ALTERNATING,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=16),
    "gpt_oss": ALTERNATING,
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], shared_intermediate_size=32),
    "granitemoeshared": dict(shared_intermediate_size=32),
    "hunyuan_v1_moe": dict(moe_topk=2, num_shared_expert=1),
    "jamba": dict(
        num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False, mamba_dt_rank=4,
    ),
    "jetmoe": dict(kv_channels=16),
    "laguna": ALTERNATING,
    "lfm2": dict(layer_types=["conv", "full_attention"], conv_L_cache=3, block_ff_dim=96, block_multiple_of=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], conv_L_cache=3, num_dense_layers=1),
    "llama4_text": dict(
        attention_chunk_size=32, intermediate_size_mlp=96, interleave_moe_layer_step=2, no_rope_layers=[1, 0]
    ),
    "longcat_flash": dict(head_dim=8, num_layers=1, expert_ffn_hidden_size=32, zero_expert_num=2, moe_topk=2),
    "mamba2": dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=32),
    "mellum": ALTERNATING,
    "minimax": LINEAR | dict(block_size=16),
    "ministral": ALTERNATING,
    "mpt": dict(attn_config=dict(attn_impl="eager"), expansion_ratio=2),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "moe"]),
    "olmo3": ALTERNATING, "olmo_hybrid": LINEAR,
    "qwen3_5_moe_text": LINEAR, "qwen3_5_text": LINEAR, "qwen3_next": LINEAR,
    "recurrent_gemma": dict(
        num_hidden_layers=3, block_types=["recurrent", "recurrent", "attention"],
        attention_window_size=512, lru_width=64,
    ),
    "vaultgemma": dict(query_pre_attn_scalar=16),
    "youtu": dict(head_dim=8),
    "reformer": dict(
        axial_pos_embds=False, attn_layers=["local", "lsh"], feed_forward_size=96,
        local_attention_probs_dropout_prob=0.0,
    ),
    "cohere_compass_text": dict(
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        }
    ),
    "xlstm": dict(qk_dim_factor=1.0),
    "kimi_linear": dict(num_expert_group=1, num_experts_per_token=2),
    "bailing_hybrid": dict(num_expert_group=2, num_experts_per_token=2),
    "qwen4_exp_text": dict(
        indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=4,
        hc_lowrank=8,
    ),
    "dots3_note_text": dict(per_layer_config={}, shared_experts_intermediate_size=32),
    "xlm": dict(causal=True), "xmod": dict(default_language="en_XX"), "zaya": dict(num_experts_per_tok=1),
    "zamba": dict(
        num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, attention_hidden_size=128,
        attention_head_dim=32, use_mamba_kernels=False, n_mamba_heads=2, mamba_d_state=8, mamba_dt_rank=4,
    ),
    "zamba2": dict(
        num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=16, mamba_ngroups=1,
        n_mamba_heads=8, mamba_headdim=16, use_shared_attention_adapter=False, num_mem_blocks=1, adapter_rank=4,
        chunk_size=32, attention_hidden_size=128, attention_head_dim=32, kv_channels=32, use_mem_rope=True,
    ),
}  # fmt: skip
_KEPT = ("q_lora_rank", "sliding_window", "n_group", "topk_group")  # None stays None: another architecture


def configuration(family: str, tokens: int, end: int, **more: Any) -> Any:
    """The tiny configuration of a family with so many tokens, of which `end` ends a text; `more` overrides any key."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    keys = set(vars(default)) | set(inspect.signature(kind.__init__).parameters)
    keys |= {key for base in kind.__mro__ for key in getattr(base, "__annotations__", {})}
    chosen = {}
    for key, value in SMALL.items():
        if key not in keys or key in getattr(kind, "attribute_map", {}):
            continue
        old = _value(default, key)
        if key == "num_key_value_heads" and old == _value(default, "num_attention_heads"):
            value = 4  # every head its own keys, as the family has it
        if key in _KEPT and old is None:
            continue
        chosen[key] = value
    kinds = list(dict.fromkeys(_value(default, "layer_types") or ()))
    if len(kinds) > 1 and not isinstance(getattr(kind, "layer_types", None), property):  # a layer of each
        chosen |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
        if {"layers_block_type", "block_types"} & SPECIAL.get(family, {}).keys():
            del chosen["layer_types"]
    chosen |= {"vocab_size": tokens, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    if "vocab_size_per_layer_input" in keys:
        chosen |= {"vocab_size_per_layer_input": tokens, "hidden_size_per_layer_input": 16}
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(default, name, None)
        if name in SPECIAL.get(family, {}):
            continue
        if "text" in name and getattr(inner, "model_type", None) in CONFIG_MAPPING:
            special = SPECIAL.get(f"{family}.{name}", {})
            chosen[name] = configuration(inner.model_type, tokens, end, **special)
        elif hasattr(inner, "to_dict"):
            chosen[name] = _tower(inner) | SPECIAL.get(f"{family}.{name}", {})
    places = [key for key in keys if re.search(r"_token_(id|index)$", key) and key not in chosen]
    chosen |= {key: tokens - 1 - n for n, key in enumerate(sorted(places)) if isinstance(_value(default, key), int)}
    return kind(**chosen | SPECIAL.get(family, {}) | more)


def _tower(inner: Any) -> dict[str, Any]:
    """A section for pictures or sounds, small."""
    fields = inner.to_dict()
    small = fields | {key: value for key, value in TOWER.items() if isinstance(fields.get(key), int | float)}
    if isinstance(kinds := fields.get("layer_types"), list) and isinstance(
        depth := small.get("num_hidden_layers"), int
    ):
        small["layer_types"] = kinds[-depth:]
    return small


def _value(config: Any, key: str) -> Any:
    """What a configuration says; None where its layers differ in that, or it has no such key."""
    try:
        return getattr(config, key, None)
    except Exception:
        return None


def build(family: str, tokens: int, end: int = 0, scale: float = 3.0, **more: Any) -> Any:
    """The model in float32, its weights the same each time.

    Raises:
        ValueError: it is not small with the configuration that is known here.
    """
    config = configuration(family, tokens, end, **more)
    kind = auto_class(config)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{family} has {size:,} weights with the configuration that is known here")
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    states = ("a_log", "conv", "dt_", "time_")  # of these the scale is part of what they mean
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not any(part in name.lower() for part in states):
                weight.mul_(scale)
    return model.eval()
