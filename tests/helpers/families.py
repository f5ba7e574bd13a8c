"""Small random models with the files, tokens and quirks of the published ones that the shipped recipes name.

A configuration is the published `config.json`, in the form in which it lies on the Hub, with small sizes. A tokenizer
is of the published kind, trained here on the bundled rows, with the published special tokens and settings.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Files = dict[str, bytes | str]

# How Llama 3 and Qwen3 cut text, from their tokenizer.json; they differ in the number of digits in a piece.
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@functools.cache
def _texts() -> list[str]:
    from tests.helpers.quickstart import rows

    return [text for row in rows() for text in (row["instruction"], row["input"], row["output"])]


def _bpe(first: Sequence[str], last: Sequence[str], *, cut: str = "", digits: bool = False, nfc: bool = False) -> Any:
    """A byte-level BPE; special tokens `first` have the lowest ids, `last` the highest."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if cut:
        steps.append(pre_tokenizers.Split(Regex(cut), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    if nfc:
        core.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(), trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in last])
    return core


def _metaspace() -> Any:
    """As Llama 2's and Mistral's: SentencePiece's spaces, single bytes where no piece fits, `<s>` in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = sorted(set("".join(_texts())) | set("#:\nABCDEFGHIJKLMNOPQRSTUVWXYZ_"))
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    # `max_token_length`: with no cut between words, a piece must not swallow whole sentences
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        initial_alphabet=alphabet,
        max_token_length=8,
        show_progress=False,
    )
    core.train_from_iterator(_texts(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    spec = json.loads(core.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are pieces, not special tokens
    return Tokenizer.from_str(json.dumps(spec))


def _bos_in_front(core: Any, bos: str) -> Any:
    from tokenizers import processors

    front = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), front])
    return core


def _published(core: Any, tokenizer: dict[str, Any] | None, *, pair: bool) -> Files:
    """`tokenizer.json`, `tokenizer_config.json` and, for older kinds, `vocab.json` with `merges.txt`."""
    spec = json.loads(core.to_str())
    found: Files = {"tokenizer.json": core.to_str()}
    if tokenizer is not None:
        added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in spec["added_tokens"]}
        found["tokenizer_config.json"] = json.dumps({"added_tokens_decoder": added, **tokenizer})
    if pair:
        merges = [" ".join(merge) for merge in spec["model"]["merges"]]
        vocabulary = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
        found |= {"vocab.json": json.dumps(vocabulary), "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}
    return found


def _weights(
    config: dict[str, Any], shard: str = "5GB", rename: Callable[[dict[str, Any]], Any] | None = None
) -> Files:
    """Random weights of this configuration in its dtype, as `*.safetensors`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    plain = {key: value for key, value in config.items() if key not in ("torch_dtype", "architectures")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    model = model.to(getattr(torch, config.get("torch_dtype", "float32")))
    with tempfile.TemporaryDirectory() as folder:
        if rename:
            save_file(rename(model.state_dict()), Path(folder, "model.safetensors"), metadata={"format": "pt"})
        else:
            model.save_pretrained(folder, max_shard_size=shard)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if "safetensors" in path.name}


def _files(config: dict[str, Any], generation: dict[str, Any], tokenizer: Files, licence: str, **weights: Any) -> Files:
    made: Files = {"config.json": json.dumps(config), "generation_config.json": json.dumps(generation)}
    return made | _weights(config, **weights) | tokenizer | {"README.md": f"---\nlicense: {licence}\n---\n"}


def gpt2() -> Files:
    """Keys without `transformer.`, the causal masks among the weights, a tokenizer_config.json with one line."""
    core = _bpe([], ["<|endoftext|>"])
    end = core.token_to_id("<|endoftext|>")
    config: dict[str, Any] = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
    }
    config |= {"n_ctx": 1024, "n_positions": 1024, "n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": end + 1}
    config |= {"bos_token_id": end, "eos_token_id": end, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    config["task_specific_params"] = {"text-generation": {"do_sample": True, "max_length": 50}}

    def as_published(weights: dict[str, Any]) -> dict[str, Any]:
        import torch

        kept = {k.removeprefix("transformer."): v.clone() for k, v in weights.items() if k != "lm_head.weight"}
        return kept | {f"h.{n}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for n in range(2)}

    ends = {"bos_token_id": end, "eos_token_id": end}
    tokenizer = _published(core, None, pair=True) | {"tokenizer_config.json": '{"model_max_length": 1024}'}
    return _files(config, ends, tokenizer, "mit", rename=as_published)


def pythia() -> Files:
    """GPT-NeoX: rotary over a quarter of a head, an embedding with rows in reserve, untied, float16 on the Hub."""
    core = _bpe(["<|endoftext|>", "<|padding|>"], [])
    config: dict[str, Any] = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu"}
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config |= {"max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000, "torch_dtype": "float16"}
    config |= {"tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": core.get_vocab_size() + 27}
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    about: dict[str, Any] = {**names, "add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return _files(config, ends, _published(core, about, pair=False), "apache-2.0")


def qwen3() -> Files:
    """Norms on queries and keys, heads wider than the model over them, a tied head, rows in reserve, no BOS."""
    import trl

    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
    core = _bpe([], ends, cut=_CUT.replace("DIGITS", ""), nfc=True)
    core.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    end = core.token_to_id("<|endoftext|>")
    config: dict[str, Any] = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "rope_theta": 1000000,
    }
    config |= {"hidden_size": 32, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"intermediate_size": 64, "num_hidden_layers": 2, "max_window_layers": 2, "use_sliding_window": False}
    config |= {"max_position_embeddings": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    config |= {"vocab_size": core.get_vocab_size() + 40, "bos_token_id": end, "eos_token_id": end}
    template = Path(str(trl.__file__)).with_name("chat_templates") / "qwen3.jinja"
    about: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    about |= {"bos_token": None, "add_bos_token": False, "model_max_length": 131072}
    about["chat_template"] = template.read_text(encoding="utf-8")
    generation = {"bos_token_id": end, "eos_token_id": end, "do_sample": False, "max_new_tokens": 2048}
    return _files(config, generation, _published(core, about, pair=True), "apache-2.0")


def smollm2() -> Files:
    """A small Llama with a tied head, whose vocabulary begins with ChatML's tokens; digits one by one."""
    core = _bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], [], digits=True)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rope_theta": 100000,
    }
    config |= {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    config |= {"torch_dtype": "bfloat16", "vocab_size": core.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 0}
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    about: dict[str, Any] = {
        **names,
        "add_prefix_space": False,
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": 8192,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return _files(config, ends, _published(core, about, pair=True), "apache-2.0")


def smollm2_instruct() -> Files:
    """The same with ChatML of its own, which puts a system message where a conversation has none."""
    template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return {**smollm2(), "chat_template.jinja": template}


def llama3(version: str) -> Files:
    """`<|begin_of_text|>` put in front by the tokenizer, no pad token; 3.2 1B ties its head, 70B lies in shards."""
    small = version == "3.2"
    spare = ["<|finetune_right_pad_id|>"] if small else ["<|reserved_special_token_2|>"]
    last = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    last += [*spare, "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    core = _bos_in_front(_bpe([], last, cut=_CUT.replace("DIGITS", "{1,3}")), "<|begin_of_text|>")
    ends = {
        "bos_token_id": core.token_to_id("<|begin_of_text|>"),
        "eos_token_id": core.token_to_id("<|end_of_text|>"),
    }
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rope_theta": 5e5,
    }
    config |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "torch_dtype": "bfloat16", "vocab_size": core.get_vocab_size(), **ends}
    config |= {"tie_word_embeddings": small, "max_position_embeddings": 131072 if small else 8192}
    if small:
        scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
        config |= {"head_dim": 16, "rope_scaling": scaling | {"original_max_position_embeddings": 8192}}
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    about |= {"eos_token": "<|end_of_text|>", "clean_up_tokenization_spaces": True}
    generation = {**ends, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    licence = "llama3.2" if small else "llama3"
    return _files(config, generation, _published(core, about, pair=False), licence, shard="5GB" if small else "200KB")


def sentencepiece(model_type: str) -> Files:
    """TinyLlama and Mistral 7B v0.1: spaces as SentencePiece has them, `<s>` in front, no pad token."""
    core = _metaspace()
    mistral = model_type == "mistral"
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    }
    config |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "vocab_size": core.get_vocab_size(), "bos_token_id": 1, "eos_token_id": 2}
    config |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16" if mistral else "float32"}
    config["max_position_embeddings"] = 32768 if mistral else 2048
    if mistral:
        config["sliding_window"] = 4096
    about: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    about |= {"add_bos_token": True, "add_eos_token": False, "legacy": mistral, "model_max_length": 10**30}
    generation = {"bos_token_id": 1, "eos_token_id": 2} | ({} if mistral else {"max_length": 2048, "pad_token_id": 0})
    return _files(config, generation, _published(core, about, pair=False), "apache-2.0")


MODELS: dict[str, Callable[[], Files]] = {
    "openai-community/gpt2": gpt2,
    "openai-community/gpt2-medium": gpt2,
    "EleutherAI/pythia-410m": pythia,
    "Qwen/Qwen3-0.6B-Base": qwen3,
    "HuggingFaceTB/SmolLM2-135M-Instruct": smollm2_instruct,
    "HuggingFaceTB/SmolLM2-360M": smollm2,
    "meta-llama/Llama-3.2-1B": lambda: llama3("3.2"),
    "meta-llama/Meta-Llama-3-70B": lambda: llama3("3"),
    "mistralai/Mistral-7B-v0.1": lambda: sentencepiece("mistral"),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": lambda: sentencepiece("llama"),
}


@functools.cache
def published(repo_id: str) -> Files:
    """The files of a model's repository on the Hub, small."""
    return MODELS[repo_id]()
