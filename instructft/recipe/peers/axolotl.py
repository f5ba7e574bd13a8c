"""axolotl's configuration as a recipe: its keys, and what each means here (docs.axolotl.ai, config reference)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructft.errors import UsageError
from instructft.recipe.peers.peer import TRUSTS, Config, number

NAME = "axolotl"
SIGNS = ("base_model", "micro_batch_size", "sequence_len", "sample_packing", "val_set_size", "num_epochs", "lora_r")
NEEDS = ("base_model",)

# `type:` of a data set -> (our format, columns, template, what differs)
_TYPES: dict[str, tuple[str, dict[str, str], str]] = {
    "alpaca": ("alpaca", {}, "alpaca"),
    "alpaca_chat.load_qa": ("question-answer", {}, "alpaca"),
    "gpteacher": ("dolly", {}, "alpaca"),
    "context_qa.load_v2": ("question-answer", {}, "alpaca"),
    "chat_template": ("messages", {}, ""),
    "sharegpt": ("sharegpt", {}, ""),
    "completion": ("text", {}, ""),
}
_FIELDS = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
_FIELDS |= {"field_system": "system", "field_messages": "messages", "field_tools": "tools"}
_OUR_TEMPLATES = {"tokenizer_default": "tokenizer", "chatml": "chatml", "alpaca": "alpaca"}

_LORA = {
    "lora_modules_to_save": "modules_to_save",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_init_lora_weights": "init_lora_weights",
    "loraplus_lr_ratio": "lora_plus_ratio",
}
_LIGER = "the loss of the head is fused here anyway; train.use_liger_kernel: true takes Liger's other kernels on a GPU"
_FAST = "kernels do not change what is learned; the ones that are proved are taken by themselves"
NONE = {
    "trust_remote_code": TRUSTS,
    "tokenizer_use_fast": "the tokenizer's own files decide",
    "tokenizer_legacy": "the tokenizer's own files decide",
    "resize_token_embeddings_to_32x": "the vocabulary grows by the tokens that are new, and no further",
    "bnb_config_kwargs": "4bit is nf4 with quantized scales (QLoRA)",
    "gpu_memory_limit": "`instructft check` says what a run needs, and check.max_memory_gib refuses more",
    "lora_on_cpu": "an adapter lies where its base does",
    "lora_mlp_kernel": _FAST,
    "lora_qkv_kernel": _FAST,
    "lora_o_kernel": _FAST,
    "xformers_attention": _FAST,
    "flash_optimum": _FAST,
    "s2_attention": "it changes what the model sees while it is trained; rows are trained as they are served",
    "low_cpu_mem_usage": "weights are always read so",
    "device_map": "a strategy of `instructft launch` divides a model that is too large for one device",
    "max_memory": "a strategy of `instructft launch` divides a model that is too large for one device",
    "unfrozen_parameters": "model.freeze names what stays as it is, the other way round",
    "dataset_exact_deduplication": "`instructft check` counts repeats; rows like held-out ones are left out",
    "dataset_keep_in_memory": "rows are mapped from a cache on disk",
    "push_dataset_to_hub": "rows stay on this machine",
    "hf_use_auth_token": "HF_TOKEN or the login is used wherever it is needed",
    "hub_strategy": "hub.push: end or checkpoints",
    "group_by_length": "rows of like length share a batch by default, steps hold rows of all lengths",
    "curriculum_sampling": "train.train_sampling_strategy: sequential keeps the order of the rows",
    "batch_flattening": "batches are divided into parts of like length, which leaves next to no padding",
    "eot_tokens": "the template says what ends a turn",
    "added_tokens_overrides": "model.new_tokens adds tokens; none is renamed",
    "plugins": _LIGER,
    "loss_watchdog_threshold": "train.loss_spike_limit and on_divergence watch the loss",
    "loss_watchdog_patience": "train.loss_spike_limit and on_divergence watch the loss",
    "eval_table_size": "samples: prompts whose answers are shown at evaluations",
    "eval_max_new_tokens": "samples: prompts whose answers are shown at evaluations",
    "do_causal_lm_eval": "`instructft evaluate` gives ROUGE-L, BLEU and exact match",
    "eval_causal_lm_metrics": "`instructft evaluate` gives ROUGE-L, BLEU and exact match",
    "profiler_steps": "no profile is taken",
    "save_first_step": "`instructft check --rehearse` tries all that a run does",
    "lr_quadratic_warmup": "train.lr_scheduler_type names the schedules there are",
    "cosine_constant_lr_ratio": "lr_scheduler_type: cosine_with_min_lr ends the cosine above zero",
    "optim_target_modules": "only GaLore and its kin read it, which are not made here",
    "sequence_parallel_degree": "a row is not divided among devices",
    "context_parallel_size": "a row is not divided among devices",
    "tensor_parallel_size": "a strategy of `instructft launch` divides a model (fsdp2, zero3)",
    "lr_groups": "all weights have one rate; adapter.lora_plus_ratio gives B its own",
    "loraplus_lr_embedding": "adapter.lora_plus_ratio alone is read",
    "float16": "weights that are trained whole stay in float32; train.fp16: true computes in float16",
    "fsdp_config": "`instructft launch --strategy fsdp2` brings its own",
    "fsdp_version": "`instructft launch --strategy fsdp2` brings its own",
    "ds_type": "the ending of a file says it",
}
FAMILIES = {
    "liger_": _LIGER,
    "cut_cross_entropy": _LIGER,
    "flash_attn_": _FAST,
    "sample_packing_": "packs are filled by best fit, which needs no setting",
    "sample_pack_": "packs are filled by best fit, which needs no setting",
    "relora": "no part of supervised fine-tuning here",
    "mlflow_": "set the environment variables of MLflow, and train.report_to: [mlflow]",
    "hf_mlflow": "set the environment variables of MLflow, and train.report_to: [mlflow]",
    "comet_": "set the environment variables of Comet, and train.report_to: [comet_ml]",
    "wandb_": "set the environment variables of Weights & Biases, and train.report_to: [wandb]",
    "image_": "images are not read",
    "kd_": "no teacher is read here",
    "qat": "weights are trained as they are",
    "ray_": "`instructft launch` starts the processes",
    "use_ray": "`instructft launch` starts the processes",
    **dict.fromkeys(("dpo", "orpo", "kto", "simpo", "grpo", "trl"), "supervised fine-tuning alone"),
}


def translate(config: Config) -> None:
    """Take what means something in axolotl, and put what means the same here."""
    for key in ("rl", "reward_model", "process_reward_model", "pretraining_dataset"):
        if config.left.get(key):
            raise UsageError(
                f"{key}: {config.left[key]}: this is no supervised fine-tuning, which is all that is done here"
            )
    config.move("base_model", "model.name_or_path")
    config.move("revision_of_model", "model.revision")
    if (tokenizer := config.take("tokenizer_config")) not in (None, config.draft.values["model"]["name_or_path"]):
        config.put("model.tokenizer", tokenizer, "tokenizer_config")
    config.move("overrides_of_model_config", "model.overrides")
    config.move("tokens", "model.new_tokens")
    special = config.take("special_tokens", {})
    for name, token in special.items():
        why = "padding is masked by its place, whatever its token" if name == "pad_token" else "the template says it"
        config.lose(f"special_tokens.{name}", why, token)
    _data(config)
    _adapter(config)
    _training(config)


def _data(config: Config) -> None:
    entries: list[dict[str, Any]] = []
    templates: set[str] = set()
    everything: set[str] = set()
    for number_, entry in enumerate(config.take("datasets", [])):
        entries.append(_entry(config, dict(entry), f"datasets.{number_}", templates, everything))
    if not entries:
        raise UsageError("datasets: found none, and a recipe needs rows")
    config.put("data.datasets", entries, "datasets", len(entries))
    tests = [_entry(config, dict(entry), "test_datasets", set(), set()) for entry in config.take("test_datasets", [])]
    if tests:
        config.put("data.validation", tests, "test_datasets", len(tests))
    _template(config, templates)
    if config.take("train_on_inputs", False):
        everything.add("train_on_inputs: true")
    if everything:
        config.put("data.train_on", "everything", *next(iter(everything)).split(": ", 1))
        if any(entry.get("format") == "messages" for entry in entries):
            config.differs.append(
                "train_on_inputs: of a conversation the text of every turn carries loss there, here its markers do too"
            )
    else:
        config.put("data.train_on", "responses", "train_on_inputs", False)
    config.move("sequence_len", "data.max_length", 512)
    long = str(config.take("excess_length_strategy", "drop"))
    config.put("data.on_too_long", {"raise": "error"}.get(long, long), "excess_length_strategy", long)
    config.put("data.packing", bool(config.take("sample_packing", False)), "sample_packing")
    if config.draft.values["data"]["packing"]:
        config.differs.append("sample_packing: packs are proved on the model before step 1, not assumed to be apart")
    if not tests:
        config.held_out("val_set_size")
    if system := config.take("default_system_message"):
        config.put("data.system_prompt", system, "default_system_message")


def _entry(
    config: Config, entry: dict[str, Any], where: str, templates: set[str], everything: set[str]
) -> dict[str, Any]:
    """One data set."""
    left = {key: value for key, value in entry.items() if value is not None}
    name = str(left.pop("path", ""))
    ours = config.source(name, left.pop("data_files", None), left.pop("name", None), where)
    if "ds_type" in left:
        config.same.append((f"{where}.ds_type", f"{left.pop('ds_type')}: the ending of a file says it"))
    for key in ("split", "revision"):
        if (value := left.pop(key, None)) and (
            (key == "split" and value != "train") or (key == "revision" and "hub" in ours)
        ):
            ours[key] = value
    kind = left.pop("type", "alpaca")
    columns: dict[str, str] = {}
    if isinstance(kind, Mapping):
        _custom(config, dict(kind), where, ours, columns)
        templates.add("instruction")
    else:
        fmt, columns, template = _TYPES.get(str(kind).split(":")[0], ("", {}, ""))
        columns = dict(columns)
        if fmt:
            ours["format"] = fmt
            templates.add(template or ("" if fmt == "text" else "tokenizer"))
        else:
            config.differs.append(f"{where}.type: {kind} is not known here: the rows are read by their columns")
    for key, column in _FIELDS.items():
        if (value := left.pop(key, None)) and value != column:
            columns[column] = value
    if ours.get("format") == "text" and (value := left.pop("field", None)):
        columns["text"] = value
    if ours.get("format") == "messages" and columns.get("messages") == "conversations":
        ours["format"] = "sharegpt"
        del columns["messages"]
    if columns:
        ours["columns"] = columns
    _speakers(config, left, where, everything)
    if template := left.pop("chat_template", None):
        config.left.setdefault("chat_template", template)
    for key, value in left.items():
        if value is not False:
            config.lose(f"{where}.{key}", "no entry of a data set has it here", value)
    return ours


def _custom(config: Config, kind: dict[str, Any], where: str, ours: dict[str, Any], columns: dict[str, str]) -> None:
    """A prompt of one's own: its columns are mapped, its text is a template's."""
    ours["format"] = "alpaca"
    for key, column in _FIELDS.items():
        if (value := kind.pop(key, None)) and value != column:
            columns[column] = value
    if system := kind.pop("system_prompt", None):
        config.put("data.system_prompt", system, f"{where}.type.system_prompt")
    for key in ("format", "no_input_format", "system_format"):
        if value := kind.pop(key, None):
            config.lose(
                f"{where}.type.{key}", "how a prompt is written is said by a template: data.template: FILE.jinja", value
            )
    for key, value in kind.items():
        config.lose(f"{where}.type.{key}", "not known here", value)


def _speakers(config: Config, left: dict[str, Any], where: str, everything: set[str]) -> None:
    """Who speaks in a turn, and whose turns carry loss."""
    from instructft.prompt.layouts.messages import CONTENT, FLAGS, ROLES, SPANS, SPEAKER

    mapping = dict(left.pop("message_property_mappings", {}))
    for ours, names in (("role", SPEAKER), ("content", CONTENT)):
        mapping.setdefault(ours, left.pop(f"message_field_{ours}", names[0]))
        if mapping[ours] not in names:
            config.lose(
                f"{where}.message_property_mappings.{ours}", f"turns are read by {', '.join(names)}", mapping[ours]
            )
    for role, names in (left.pop("roles", None) or {}).items():
        odd = [name for name in names if ROLES.get(str(name).lower()) != role]
        if odd:
            config.lose(f"{where}.roles.{role}", "roles are known by the names that data sets have; rename these", odd)
    trained = left.pop("roles_to_train", ["assistant"])
    if trained and any(ROLES.get(str(role).lower()) != "assistant" for role in trained):
        everything.add(f"roles_to_train: {trained}")
    ends = left.pop("train_on_eos", "turn")
    if ends not in ("turn", None):
        config.lose(f"{where}.train_on_eos", "the token that ends an answer is always trained, others never", ends)
    marks: dict[str, tuple[str, ...]] = {"message_field_training": FLAGS, "message_field_training_detail": SPANS}
    for key, known in marks.items():
        if (value := left.pop(key, None)) in known:
            config.same.append((f"{where}.{key}", f"{value} of a turn says so here too"))
        elif value:
            config.lose(f"{where}.{key}", f"read where it is called one of {', '.join(known)}", value)


def _template(config: Config, templates: set[str]) -> None:
    kind, text = config.take("chat_template"), config.take("chat_template_jinja")
    templates = templates - {""}
    if text and kind in (None, "jinja"):
        found = config.place(text) if len(str(text)) < 300 and "{" not in text else None
        if found is None:
            config.files["chat_template.jinja"] = str(text)
        config.put("data.template", found or "chat_template.jinja", "chat_template_jinja")
    elif kind in _OUR_TEMPLATES:
        config.put("data.template", _OUR_TEMPLATES[kind], "chat_template")
    elif kind and str(kind).startswith("tokenizer_default_fallback_"):
        config.put("data.template", "auto", "chat_template", kind)
        other = str(kind).removeprefix("tokenizer_default_fallback_")
        config.differs.append(f"chat_template: where the model has none of its own, auto is `instruction`, not {other}")
    elif kind:
        config.put("data.template", "tokenizer", "chat_template", kind)
        config.differs.append(
            f"chat_template: {kind} is axolotl's own text; the model's own template is taken. A base model has none: "
            "then save the other as a .jinja file and name it"
        )
    elif templates:
        config.put("data.template", sorted(templates)[0], "type")
        if "alpaca" in templates:
            config.differs.append(
                "type: alpaca is Stanford's text there and here; compare one row with `instructft inspect`"
            )
    if len(templates) > 1:
        config.differs.append(
            f"datasets: their types write prompts in {len(templates)} ways; a model has one template here"
        )


def _adapter(config: Config) -> None:
    kind = config.take("adapter")
    if kind not in (None, "lora", "qlora"):
        raise UsageError(f"adapter: found {kind}, and lora, qlora or none can be trained here")
    bits = {"4bit": config.take("load_in_4bit", False), "8bit": config.take("load_in_8bit", False)}
    if kind:
        config.put("adapter.type", "lora", "adapter", kind)
        config.move("lora_r", "adapter.r", 8)
        config.move("lora_alpha", "adapter.alpha", 16)
        config.move("lora_dropout", "adapter.dropout", 0.0)
        modules, linear = config.take("lora_target_modules"), config.take("lora_target_linear", False)
        if linear or modules in (None, "all-linear"):
            config.put("adapter.target_modules", "all-linear", "lora_target_linear", bool(linear))
            if modules:
                config.lose("lora_target_modules", "lora_target_linear has them all", modules)
        else:
            config.put("adapter.target_modules", modules, "lora_target_modules")
        for theirs, ours in _LORA.items():
            if config.left.get(theirs) not in (None, False):
                config.move(theirs, f"adapter.{ours}")
        if folder := config.take("lora_model_dir"):
            config.put("model.name_or_path", folder, "lora_model_dir")
        chosen = next((width for width, on in bits.items() if on), "4bit" if kind == "qlora" else "")
        if chosen:
            config.put("model.quantization", chosen, f"load_in_{chosen}", True)
    else:
        config.drop([key for key in config.left if key.startswith(("lora_", "peft_"))], "there is no adapter")
        for width, on in bits.items():
            if on:
                config.lose(f"load_in_{width}", "weights that are trained whole are not quantized", True)


def _training(config: Config) -> None:
    config.move("micro_batch_size", "train.per_device_train_batch_size", 1)
    config.move("gradient_accumulation_steps", "train.gradient_accumulation_steps", 1)
    config.move("eval_batch_size", "train.per_device_eval_batch_size")
    epochs = number(config.take("num_epochs", 1))
    config.put("train.num_train_epochs", float(epochs), "num_epochs", epochs)
    if (rate := number(config.take("learning_rate"))) is not None:
        config.put("train.learning_rate", float(rate), "learning_rate")
    config.move("optimizer", "train.optim", "adamw_torch_fused")
    least = config.take("cosine_min_lr_ratio")
    if least is None:
        config.move("lr_scheduler", "train.lr_scheduler_type", "cosine")
    else:
        config.take("lr_scheduler")
        config.put("train.lr_scheduler_type", "cosine_with_min_lr", "cosine_min_lr_ratio", least)
        config.put("train.lr_scheduler_kwargs", {"min_lr_rate": least}, "cosine_min_lr_ratio", least)
    if (ratio := number(config.take("warmup_ratio"))) is not None:
        config.put("train.warmup_steps", ratio, "warmup_ratio")
    else:
        config.move("warmup_steps", "train.warmup_steps", 0.03)
    for every, what in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        if times := config.take(every):
            if times == 1:
                config.put(f"train.{what}_strategy", "epoch", every, times)
            else:
                config.put(f"train.{what}_steps", round(1 / (times * float(epochs)), 6), every, times)
    checkpointing = config.take("gradient_checkpointing", False)
    config.put("train.gradient_checkpointing", bool(checkpointing), "gradient_checkpointing", checkpointing)
    if isinstance(checkpointing, str):
        config.differs.append(
            f"gradient_checkpointing: {checkpointing} is its own kind; here layers are computed twice"
        )
    half = config.take("bf16", config.take("bfloat16"))
    if half in ("auto", None):
        config.same.append(("bf16", "the hardware decides"))
    else:
        config.put("train.bf16", bool(half), "bf16", half)
    flags = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    on = [kind for key, kind in flags.items() if config.take(key)]
    config.attention(next(iter(on), config.take("attn_implementation", config.take("attention"))))
    config.divided(config.take("deepspeed"), config.take("fsdp") or config.left.get("fsdp_config"))
    if project := config.take("wandb_project"):
        config.put("train.report_to", ["tensorboard", "wandb"], "wandb_project", project)
        config.differs.append(f"wandb_project: set WANDB_PROJECT={project} in the environment; needs pip install wandb")
        config.move("wandb_name", "train.run_name")
    if repo := config.take("hub_model_id"):
        config.put("hub.repo_id", repo, "hub_model_id")
        config.put("hub.push", "end", "hub_model_id", repo)
    if folder := config.take("output_dir"):
        config.put("output_dir", str(Path(folder)), "output_dir", folder)
