"""Small random checkpoints with a vision or audio tower, as they lie on the Hub, with tokenizer and processor files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
_PATCHES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_PATCHES |= {"image_size": 16, "patch_size": 8}
_QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
_QWEN |= {"out_hidden_size": 32}
_QWEN_3: dict[str, Any] = {**_QWEN, "num_position_embeddings": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
_GEMMA_4_SEES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_GEMMA_4_SEES |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 8, "position_embedding_size": 16}
_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
_LINEAR |= {"linear_value_head_dim": 16}
_THREE_AXES = {"mrope_section": [2, 3, 3], "rope_type": "default"}

# model_type -> sections of its config
SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", "sliding_window": 32},
        "vision_config": {"model_type": "siglip_vision_model", **_PATCHES, "vision_use_head": False},
    },
    "gemma4": {
        "text_config": {
            "model_type": "gemma4_text", "sliding_window": 32, "global_head_dim": 16, "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
        },
        "vision_config": _GEMMA_4_SEES,
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "mistral3": {
        "text_config": {"model_type": "ministral3"},
        "vision_config": {"model_type": "pixtral", **_PATCHES, "head_dim": 16},
    },
    "qwen3_5": {
        "text_config": {
            "model_type": "qwen3_5_text", **_LINEAR, "layer_types": ["linear_attention", "full_attention"],
        },
        "vision_config": _QWEN_3,
    },
    "qwen3_vl": {
        "text_config": {"model_type": "qwen3_vl_text", "rope_scaling": {**_THREE_AXES, "mrope_interleaved": True}},
        "vision_config": {**_QWEN_3, "deepstack_visual_indexes": [0]},
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", "rope_scaling": _THREE_AXES},
        "vision_config": {**_QWEN, "window_size": 32, "fullatt_block_indexes": [0]},
    },
    "llama4": {
        "text_config": {
            "model_type": "llama4_text", "num_local_experts": 2, "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 64,
        },
        "vision_config": {
            **_PATCHES, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
            "pixel_shuffle_ratio": 0.5,
        },
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **_PATCHES, "projection_dim": 32},
    },
}  # fmt: skip

_MORE: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 1},
    "mistral3": {"spatial_merge_size": 1},
    "llava": {"image_seq_length": 4},
}
_PLACES = (
    "image_token video_token audio_token boi_token eoi_token boa_token eoa_token vision_start_token vision_end_token"
)
FILES = {
    "preprocessor_config.json": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}},
    "processor_config.json": {
        "processor_class": "Gemma3Processor",
        "image_seq_length": 1,
        "chat_template": "an old one",
    },
}


def config_of(kind: str, rows: int, **special: Any) -> Any:
    """A config of this model type, small, with a vocabulary of `rows` tokens, the last ones for images and sounds."""
    from transformers import AutoConfig

    sections = {name: dict(fields) for name, fields in SECTIONS[kind].items()}
    sections["text_config"] = {**_TEXT, "vocab_size": rows, **special, **sections["text_config"]}
    if kind == "gemma4":
        sections["text_config"]["vocab_size_per_layer_input"] = rows
    places = {f"{name}_id": rows - 1 - n for n, name in enumerate(_PLACES.split())}
    places |= {f"{name}_index": places[f"{name}_id"] for name in _PLACES.split()}
    return AutoConfig.for_model(kind, **sections, **places, **_MORE.get(kind, {}))


def make(kind: str, folder: Path, dtype: str = "float32") -> Path:
    """A checkpoint of this model type, every tensor random and some of them far from small, with a tokenizer."""
    from transformers import AutoModelForImageTextToText

    from tests.helpers.quickstart import tokenizer as bundled

    tokenizer = bundled()
    end = tokenizer.eos_token_id
    config = config_of(kind, len(tokenizer), bos_token_id=0, eos_token_id=end, pad_token_id=end)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, held in FILES.items():
        (folder / name).write_text(json.dumps(held))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by their names on the disk."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found
