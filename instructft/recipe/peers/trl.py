"""A configuration of `trl sft --config` as a recipe: script, model and training arguments, and what each means here."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from instructft.errors import DataError, UsageError
from instructft.recipe.peers.peer import Config, number

NAME = "TRL"
SIGNS = ("dataset_name", "use_peft", "assistant_only_loss", "completion_only_loss", "max_length", "dataset_train_split")
NEEDS = ("model_name_or_path",)

NONE = {
    "env": "set these in the shell",
    "ignore_bias_buffers": "a matter of old versions of DDP",
    "lora_task_type": "it is always CAUSAL_LM",
    "bnb_4bit_quant_type": "4bit is nf4",
    "use_bnb_nested_quant": "4bit always quantizes its scales",
    "bnb_4bit_quant_storage": "packed weights are stored in the type of the others",
    "eos_token": "the template says which token ends an answer",
    "pad_token": "padding is masked by its place, whatever its token",
}
FAMILIES: dict[str, str] = {}

# As TRL trains rows of plain texts: one after the other, without a template, and the tokenizer's EOS at the end.
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def translate(config: Config) -> None:
    """Take what means something to `trl sft`, and put what means the same here."""
    config.move("model_name_or_path", "model.name_or_path")
    if (revision := config.take("model_revision", "main")) != "main":
        config.put("model.revision", revision, "model_revision")
    dtype = config.take("dtype", config.take("torch_dtype"))
    if dtype and dtype != "auto":
        config.put("model.dtype", dtype, "dtype")
    config.attention(config.take("attn_implementation"))
    kind = _data(config)
    _loss(config, kind)
    _adapter(config)
    _training(config)


def _data(config: Config) -> str:
    """The rows; returns what they are: text, prompt-completion, messages, "plain pairs", or "" where nobody can say."""
    mixture, name = config.take("datasets"), config.take("dataset_name")
    train, test = config.take("dataset_train_split", "train"), config.take("dataset_test_split", "test")
    streaming = config.take("dataset_streaming", config.take("streaming", False))
    if mixture and name:
        config.lose("dataset_name", "datasets is read in its place, as TRL does", name)
    entries = []
    if mixture:
        for entry in mixture:
            given = {key: value for key, value in dict(entry).items() if value is not None}
            ours = config.source(
                given.pop("path", ""), given.pop("data_files", None), given.pop("name", None), "datasets"
            )
            if (split := given.pop("split", "train")) != "train":
                ours["split"] = split
            if share := given.pop("fraction", None):
                ours["weight"] = float(share)
            for key, value in given.items():
                config.lose(f"datasets.{key}", "all columns are read, and those that mean nothing are told", value)
            entries.append(ours)
    elif name:
        entries.append(config.source(str(name), None, config.take("dataset_config"), "dataset_name"))
        if train != "train":
            entries[0]["split"] = train
    else:
        raise UsageError("dataset_name: found none and no datasets, and a recipe needs rows")
    for entry in entries:
        if streaming:
            entry["streaming"] = True
    rows = _first_rows(entries[0])
    field = config.take("dataset_text_field", "text")
    if field != "text":
        for entry in entries:
            entry["columns"] = {"text": field}
    kind = _kind(rows, field)
    if kind == "text":
        for entry in entries:
            entry["format"] = "text"
    config.put("data.datasets", entries, "datasets" if mixture else "dataset_name", len(entries) if mixture else name)
    share = config.take("test_split_size")
    if share is not None:
        config.left["test_split_size"] = share
        config.held_out("test_split_size")
    elif str(config.left.get("eval_strategy", "no")) != "no" and not mixture:
        config.put("data.validation", [{**entries[0], "split": test}], "dataset_test_split", test)
    else:
        config.put("data.splits", {"validation": 0.0, "test": 0.0}, "eval_strategy", "no")
    return kind


def _first_rows(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The first rows where they lie on this machine."""
    from instructft.data import readers
    from instructft.data.files.locate import located

    if "path" not in entry:
        return []
    try:
        splits = located(entry["path"], "dataset_name")
        files = splits.get(entry.get("split", "train")) or next(iter(splits.values()))
        file = files[0]
        return list(islice(readers.rows(file.path, file.suffix, file.name), 20)) if file.path else []
    except (DataError, StopIteration):
        return []


def _kind(rows: list[dict[str, Any]], field: str) -> str:
    if not rows:
        return ""
    row = rows[0]
    if "messages" in row or "conversations" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt-completion" if isinstance(row["prompt"], list) else "plain pairs"
    return "text" if field in row else ""


def _loss(config: Config, kind: str) -> None:
    """Which tokens carry loss: in TRL that follows from the columns, unless the file says it."""
    completion, assistant = config.take("completion_only_loss"), config.take("assistant_only_loss", False)
    if assistant:
        config.put("data.train_on", "responses", "assistant_only_loss", True)
        if kind == "prompt-completion":
            config.put("data.train_on", "last_response", "assistant_only_loss", True)
    elif kind in ("prompt-completion", "plain pairs") and completion is None:
        config.put(
            "data.train_on", "responses", "completion_only_loss", "true by its default, for prompt and completion"
        )
    elif completion:
        config.put("data.train_on", "responses", "completion_only_loss", True)
    else:
        config.put("data.train_on", "everything", "assistant_only_loss", False)
        config.differs.append(
            "assistant_only_loss: false trains questions and templates too, in TRL and so here; write "
            "data.train_on: responses for answers alone"
            + ("" if kind else ". If the rows have prompt and completion, TRL trains the completion alone: then too")
        )
    template = config.take("chat_template_path")
    if template and str(template).endswith((".jinja", ".j2")):
        config.put("data.template", config.place(str(template)) or str(template), "chat_template_path")
    elif template:
        config.lose(
            "chat_template_path", "a template is a .jinja file here; save that of the other model as one", template
        )
        config.put("data.template", "tokenizer", "chat_template_path", template)
    elif kind == "plain pairs":
        config.files["plain.jinja"] = PLAIN
        config.put("data.template", "plain.jinja", "no template", "prompt and completion are plain texts")
    elif kind == "text":
        config.put("data.template", "auto", "no template", "texts without speakers")
    else:
        config.put("data.template", "tokenizer", "chat_template_path", "none: the model's own")
    length = config.take("max_length", 1024)
    config.put("data.max_length", length, "max_length", length)
    mode = config.take("truncation_mode", "keep_start")
    if mode != "keep_start":
        config.lose("truncation_mode", "the end of a row is cut, which keeps the question", mode)
    config.put("data.on_too_long", "truncate", "truncation_mode", mode)
    packing = bool(config.take("packing", False))
    config.put("data.packing", packing, "packing")
    if packing:
        config.differs.append("packing: no document is divided to fill a pack; one beyond max_length loses its end")
    if kind == "text" and not packing:
        config.differs.append("texts longer than max_length are divided here, and lose their end in TRL")


def _adapter(config: Config) -> None:
    if not config.take("use_peft", False):
        config.drop([key for key in config.left if key.startswith("lora_")], "use_peft is off")
        for key in ("load_in_4bit", "load_in_8bit", "use_dora", "use_rslora"):
            config.drop([key], "weights that are trained whole are not quantized, and have no adapter")
        return
    config.put("adapter.type", "lora", "use_peft", True)
    config.move("lora_r", "adapter.r", 16)
    config.move("lora_alpha", "adapter.alpha", 32)
    config.move("lora_dropout", "adapter.dropout", 0.05)
    if modules := config.take("lora_target_modules"):
        one = modules[0] if isinstance(modules, list) and len(modules) == 1 and modules[0] == "all-linear" else modules
        config.put("adapter.target_modules", one, "lora_target_modules")
    else:
        config.put("adapter.target_modules", ["q_proj", "v_proj"], "lora_target_modules", "none")
        config.differs.append(
            "lora_target_modules: PEFT's choice for Llama and its kin is written; all-linear, ours, trains more"
        )
    for theirs, ours in (("lora_target_parameters", "target_parameters"), ("lora_modules_to_save", "modules_to_save"),
                         ("use_dora", "use_dora"), ("use_rslora", "use_rslora")):  # fmt: skip
        if config.left.get(theirs) not in (None, False):
            config.move(theirs, f"adapter.{ours}")
    for width in ("4bit", "8bit"):
        if config.take(f"load_in_{width}", False):
            config.put("model.quantization", width, f"load_in_{width}", True)


def _training(config: Config) -> None:
    config.move("per_device_train_batch_size", "train.per_device_train_batch_size", 8)
    config.move("gradient_checkpointing", "train.gradient_checkpointing", True)
    rate = number(config.take("learning_rate", 2e-5))
    config.put("train.learning_rate", float(rate), "learning_rate")
    if (ratio := number(config.take("warmup_ratio"))) is not None:
        config.put("train.warmup_steps", ratio, "warmup_ratio")
    if config.left.get("bf16") is None and not config.left.get("fp16"):
        config.same.append(("bf16", "on by TRL's default; here the hardware decides"))
    if str(config.left.get("report_to", "none")) in ("none", "[]"):
        config.left.pop("report_to", None)
        config.same.append(("report_to", "none: TensorBoard's files are written into the run, without an account"))
    config.divided(config.take("deepspeed"), config.take("fsdp"))
    if config.take("push_to_hub", False):
        config.put("hub.push", "end", "push_to_hub", True)
    if repo := config.take("hub_model_id"):
        config.put("hub.repo_id", repo, "hub_model_id")
    if (private := config.take("hub_private_repo")) is not None:
        config.put("hub.private", bool(private), "hub_private_repo")
    if folder := config.take("output_dir"):
        config.put("output_dir", str(Path(folder)), "output_dir", folder)
