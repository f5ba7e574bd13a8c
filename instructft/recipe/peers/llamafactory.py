"""LLaMA-Factory's configuration as a recipe: its arguments, `dataset_info.json`, and what each means here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instructft.errors import UsageError
from instructft.recipe.peers.peer import TRUSTS, Config, number

NAME = "LLaMA-Factory"
SIGNS = ("stage", "finetuning_type", "cutoff_len", "template", "dataset", "lora_rank", "lora_target", "do_train")
NEEDS = ("model_name_or_path",)

_OUR_TEMPLATES = {"alpaca": "alpaca", "chatml": "chatml"}
_FAMILIES_OF_OTHERS = "supervised fine-tuning alone is done here"
NONE = {
    "trust_remote_code": TRUSTS,
    "use_fast_tokenizer": "the tokenizer's own files decide",
    "split_special_tokens": "texts of rows never make special tokens",
    "resize_vocab": "the vocabulary grows by the tokens that are new",
    "add_special_tokens": "model.new_tokens adds tokens, as text; a template brings its special ones",
    "cache_dir": "HF_HOME says where downloads lie",
    "use_unsloth": "kernels that are proved on the model are taken by themselves",
    "use_unsloth_gc": "train.gradient_checkpointing computes layers twice",
    "use_reentrant_gc": "train.gradient_checkpointing_kwargs: {use_reentrant: …}",
    "shift_attn": "it changes what the model sees while it is trained; rows are trained as they are served",
    "mixture_of_depths": "the model is trained as it is",
    "upcast_layernorm": "weights that are trained are float32",
    "upcast_lmhead_output": "the loss is computed in float32",
    "low_cpu_mem_usage": "weights are always read so",
    "moe_aux_loss_coef": "train.router_aux_loss_coef",
    "quantization_method": "bitsandbytes is what quantizes here",
    "quantization_type": "4bit is nf4",
    "double_quantization": "4bit always quantizes its scales",
    "enable_liger_kernel": "the loss of the head is fused here anyway; train.use_liger_kernel: true takes the others",
    "create_new_adapter": "an adapter that is named is trained further",
    "pissa_iter": "adapter.init_lora_weights: pissa_niter_16",
    "pissa_convert": "`instructft merge` merges what PiSSA left",
    "loraplus_lr_embedding": "adapter.lora_plus_ratio alone is read",
    "buffer_size": "a stream shuffles by a buffer of its own",
    "preprocessing_batch_size": "rows are tokenized in batches of a size that is measured",
    "ignore_pad_token_for_loss": "padding never carries loss",
    "eval_on_each_dataset": "each set of data.validation gets its loss by itself",
    "eval_num_beams": "answers are greedy or sampled",
    "tokenized_path": "`instructft prepare` caches rows by their contents",
    "tool_format": "the template says how tools are written",
    "media_dir": "images, sound and video are not read",
    "predict_with_generate": "`instructft evaluate` answers held-out rows",
    "compute_accuracy": "train logs mean_token_accuracy by itself",
    "disable_shuffling": "train.train_sampling_strategy: sequential keeps the order of the rows",
    "use_llama_pro": "the model is trained as it is",
    "use_dft_loss": "train.loss_type names the losses there are",
    "use_asft_loss": "train.loss_type names the losses there are",
    "use_eaft_loss": "train.loss_type names the losses there are",
    "use_adam_mini": "train.optim names the optimizers there are",
    "use_muon": "train.optim names the optimizers there are",
    "print_param_status": "`instructft check` counts them",
    "include_effective_tokens_per_second": "tokens a second are always logged",
    "infer_backend": "`instructft chat` and `generate` answer",
    "infer_dtype": "`instructft chat` and `generate` answer",
    "hf_hub_token": "HF_TOKEN or the login is used wherever it is needed",
}  # fmt: skip
FAMILIES = {
    **dict.fromkeys(("pref_", "dpo_", "kto_", "simpo_", "ppo_", "ref_model", "reward_model"), _FAMILIES_OF_OTHERS),
    **dict.fromkeys(("use_galore", "galore_", "use_apollo", "apollo_", "use_badam", "badam_"),
                    "train.optim names the optimizers there are, with train.optim_args"),
    **dict.fromkeys(("use_swanlab", "swanlab_"), "train.report_to: [swanlab], with its environment variables"),
    **dict.fromkeys(("image_", "video_", "audio_", "crop_", "use_audio"), "images, sound and video are not read"),
    **dict.fromkeys(("vllm_", "sglang_", "use_kv_cache"), "`instructft chat` and `generate` answer"),
    **dict.fromkeys(("freeze_",), "model.freeze names what stays as it is, by regular expressions"),
    **dict.fromkeys(("oft_", "module_dropout"), "an adapter is LoRA here"),
    **dict.fromkeys(("ray_", "use_ray", "master_"), "`instructft launch` starts the processes"),
    **dict.fromkeys(("export_",), "`instructft merge` writes the merged model, `push` uploads it"),
    **dict.fromkeys(("fp8_",), "train.fp8: true needs no more"),
    **dict.fromkeys(("use_kt", "kt_", "use_mca", "use_hyper", "hyper_"), "no such backend is used"),
}  # fmt: skip


def translate(config: Config) -> None:
    """Take what means something in LLaMA-Factory, and put what means the same here."""
    stage = str(config.take("stage", "sft"))
    if stage not in ("sft", "pt"):
        raise UsageError(f"stage: found {stage}, and supervised fine-tuning (sft) is all that is done here")
    config.same.append(("stage", f"{stage}: `instructft train` does it"))
    config.move("model_name_or_path", "model.name_or_path")
    if (revision := config.take("model_revision", "main")) != "main":
        config.put("model.revision", revision, "model_revision")
    if tokens := config.take("add_tokens"):
        config.put("model.new_tokens", _listed(tokens), "add_tokens")
    if scaling := config.take("rope_scaling"):
        config.lose("rope_scaling", "model.overrides: {rope_parameters: …} says it in the model's own words", scaling)
    _data(config)
    _method(config)
    _training(config)


def _listed(value: Any) -> list[str]:
    return [str(part).strip() for part in (value.split(",") if isinstance(value, str) else value)]


def _data(config: Config) -> None:
    folder = str(config.take("dataset_dir", "data"))
    found = config.place(f"{folder}/dataset_info.json")
    known = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    if config.left.get("dataset") is None:
        raise UsageError("dataset: found none, and a recipe needs rows")
    entries = [_entry(config, name, known, found, folder) for name in _listed(config.take("dataset"))]
    if (most := config.take("max_samples")) is not None:
        for entry in entries:
            entry["rows"] = int(most)
        config.draft.reasons |= {f"data.datasets.{i}.rows": f"max_samples: {most}" for i in range(len(entries))}
    mixing, shares = config.take("mix_strategy", "concat"), config.take("interleave_probs")
    if mixing != "concat" and shares:
        for entry, share in zip(entries, _listed(shares), strict=False):
            entry["weight"] = float(share)
        config.differs.append(f"mix_strategy: {mixing}: rows are drawn by weight without any being seen twice an epoch")
    if config.take("streaming", False):
        for entry in entries:
            entry["streaming"] = True
    config.put("data.datasets", entries, "dataset", ",".join(entry.get("label", "") for entry in entries))
    if held := config.take("eval_dataset"):
        config.put(
            "data.validation", [_entry(config, n, known, found, folder) for n in _listed(held)], "eval_dataset", held
        )
        config.take("val_size")
    else:
        config.held_out("val_size")
    _template(config)
    length = config.move("cutoff_len", "data.max_length", 2048)
    config.differs.append(
        f"cutoff_len: a row beyond {length} tokens loses its end; there prompt and answer share the cut"
    )
    if config.take("train_on_prompt", False):
        config.put("data.train_on", "everything", "train_on_prompt", True)
    elif config.take("mask_history", False):
        config.put("data.train_on", "last_response", "mask_history", True)
    else:
        config.put("data.train_on", "responses", "train_on_prompt", False)
    config.drop(["mask_history"], "data.train_on has one value")
    packing, neat = config.take("packing", False), config.take("neat_packing", False)
    config.put("data.packing", bool(packing or neat), "neat_packing" if neat else "packing", bool(packing or neat))
    if packing and not neat:
        config.differs.append(
            "packing: without neat_packing documents of a pack see each other there; here they never do"
        )


def _entry(config: Config, name: str, known: dict[str, Any], info: str | None, folder: str) -> dict[str, Any]:
    """A data set by its name in `dataset_info.json`."""
    about = known.get(name)
    if about is None:
        guess = config.place(f"{folder}/{name}.json") or f"{folder}/{name}.json"
        where = f"{info} does not say what {name} is" if info else f"no {folder}/dataset_info.json says what {name} is"
        config.differs.append(f"dataset: {where}; {guess} is a guess: put the file (path) or the Hub id (hub) there")
        return {"path": guess, "label": name}
    if about.get("ranking"):
        raise UsageError(
            f"dataset: {name} compares answers (ranking: true); supervised fine-tuning is all that is done here"
        )
    if hub := about.get("hf_hub_url"):
        entry: dict[str, Any] = config.source(str(hub), None, about.get("subset"), "dataset")
    elif file := about.get("file_name"):
        entry = {"path": config.place(f"{folder}/{file}") or f"{folder}/{file}"}
    else:
        raise UsageError(f"dataset: {name} is neither on the Hub nor a file (hf_hub_url, file_name) in {info}")
    entry["label"] = name
    if (split := about.get("split", "train")) != "train":
        entry["split"] = split
    if count := about.get("num_samples"):
        entry["rows"] = count
    turns = about.get("formatting", "alpaca") in ("sharegpt", "openai")
    entry["format"] = "sharegpt" if turns else "alpaca"
    columns = _columns(config, name, about, turns)
    if not turns and (not about.get("columns") or "query" in about["columns"]):
        config.differs.append(
            f"{name}: a query stands under its prompt on the next line there, here after an empty line"
        )
    if turns and columns.get("conversations") == "messages":
        entry["format"] = "messages"
        del columns["conversations"]
    if columns:
        entry["columns"] = columns
    for key in ("folder", "ms_hub_url", "om_hub_url", "script_url"):
        if about.get(key):
            config.lose(f"{name}.{key}", "not read here", about[key])
    return entry


def _columns(config: Config, name: str, about: dict[str, Any], turns: bool) -> dict[str, str]:
    """Our column -> the file's, where they differ."""
    from instructft.prompt.layouts.messages import CONTENT, ROLES, SPEAKER

    given = dict(about.get("columns") or {})
    usual = (
        {"messages": "conversations"} if turns else {"prompt": "instruction", "query": "input", "response": "output"}
    )
    usual |= {"history": "history", "system": "system", "tools": "tools"}
    columns = {}
    for theirs, ours in usual.items():
        if (column := given.pop(theirs, ours)) != ours:
            columns[ours] = column
    for key, column in given.items():
        config.lose(f"{name}.columns.{key}", "not read here", column)
    for tag, value in (about.get("tags") or {}).items():
        fits = {"role_tag": SPEAKER, "content_tag": CONTENT}.get(tag)
        role = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}.get(tag)
        if (fits and value not in fits) or (role and ROLES.get(str(value).lower()) != role):
            config.lose(f"{name}.tags.{tag}", "turns are read by the names that data sets have; rename this", value)
    return columns


def _template(config: Config) -> None:
    kind = config.take("template")
    if (thinking := config.take("enable_thinking")) is not None:
        config.put("data.template_options", {"enable_thinking": bool(thinking)}, "enable_thinking", thinking)
    if system := config.take("default_system"):
        config.put("data.system_prompt", system, "default_system")
    if kind in _OUR_TEMPLATES:
        config.put("data.template", _OUR_TEMPLATES[kind], "template", kind)
    elif kind == "default":
        config.put("data.template", "human-assistant", "template", kind)
        config.differs.append(
            "template: default writes Human: and Assistant: with other line breaks than human-assistant"
        )
    elif kind:
        config.put("data.template", "tokenizer", "template", kind)
        config.differs.append(
            f"template: {kind} is LLaMA-Factory's own text; the model's own template is taken. A base model has none: "
            "then write chatml or name a .jinja file. Compare one row with `instructft inspect`"
        )
    else:
        config.put("data.template", "auto", "template", "none")
    if kind and kind != "default":
        config.differs.append(
            "template: what it writes behind the token that ends an answer, a line break in most, carries loss there "
            "and none here"
        )


def _method(config: Config) -> None:
    kind = str(config.take("finetuning_type", "lora"))
    if kind not in ("lora", "full"):
        way = "model.freeze names what stays as it is" if kind == "freeze" else "an adapter is LoRA here"
        raise UsageError(f"finetuning_type: found {kind}, and lora or full can be trained here; {way}")
    if kind == "full":
        config.put("adapter.type", "none", "finetuning_type", kind)
        config.drop([key for key in config.left if key.startswith("lora_")], "all weights are trained")
    else:
        config.put("adapter.type", "lora", "finetuning_type", kind)
        rank = config.move("lora_rank", "adapter.r", 8)
        config.move("lora_alpha", "adapter.alpha", 2 * int(rank))
        config.move("lora_dropout", "adapter.dropout", 0.0)
        target = str(config.take("lora_target", "all"))
        config.put(
            "adapter.target_modules", "all-linear" if target == "all" else _listed(target), "lora_target", target
        )
        for theirs, ours in (
            ("use_dora", "use_dora"),
            ("use_rslora", "use_rslora"),
            ("loraplus_lr_ratio", "lora_plus_ratio"),
        ):
            if config.left.get(theirs) not in (None, False):
                config.move(theirs, f"adapter.{ours}")
        if config.take("pissa_init", False):
            config.put("adapter.init_lora_weights", "pissa", "pissa_init", True)
        if extra := config.take("additional_target"):
            config.put("adapter.modules_to_save", _listed(extra), "additional_target", extra)
        if folder := config.take("adapter_name_or_path"):
            config.put("model.name_or_path", _listed(folder)[0], "adapter_name_or_path", folder)
    if bits := config.take("quantization_bit"):
        if kind == "lora" and int(bits) in (4, 8):
            config.put("model.quantization", f"{bits}bit", "quantization_bit", bits)
        else:
            config.lose("quantization_bit", "4 or 8 bits, under an adapter", bits)


def _training(config: Config) -> None:
    config.move("per_device_train_batch_size", "train.per_device_train_batch_size", 8)
    config.move("learning_rate", "train.learning_rate", 5e-5)
    for key in ("learning_rate", "num_train_epochs"):
        if config.draft.values["train"].get(key) is not None:
            config.draft.values["train"][key] = number(config.draft.values["train"][key])
    if (ratio := number(config.take("warmup_ratio"))) is not None:
        config.put("train.warmup_steps", ratio, "warmup_ratio")
    off = config.take("disable_gradient_checkpointing", False)
    config.put("train.gradient_checkpointing", not off, "disable_gradient_checkpointing", bool(off))
    if config.take("pure_bf16", False):
        config.put("model.dtype", "bfloat16", "pure_bf16", True)
    kernel = str(config.take("flash_attn", "auto"))
    config.attention({"fa2": "flash_attention_2", "disabled": "eager", "auto": None}.get(kernel, kernel))
    config.divided(config.take("deepspeed"), config.take("fsdp"))
    if patience := config.take("early_stopping_steps"):
        config.put("train.early_stopping_patience", patience, "early_stopping_steps")
    if folder := config.take("output_dir"):
        config.put("output_dir", str(Path(folder)), "output_dir", folder)
