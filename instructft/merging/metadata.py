"""What goes along with merged weights: configuration, tokenizer, recipe, `run.json` and the model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from instructft.report.model_card import _LOAD, _LOAD_ADAPTER
from instructft.version import __version__
from instructft.weights import remote_code
from instructft.weights.tensor_io import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from instructft.adapters.adapter_folder import AdapterFolder

# Files of a tokenizer and of a run that a later command reads, where they are there.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def places(adapter: Path) -> list[Path]:
    """The folders that an adapter's papers lie in: its own, and its run's when it is a checkpoint."""
    resolved = adapter.resolve()
    return [adapter, *([resolved.parent] if resolved.name.startswith("checkpoint-") else [])]


def find(name: str, folders: list[Path]) -> Path | None:
    """The first of `folders` that holds a file of this name, with it."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def copy_papers(adapter: Path, base: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation configuration and recipe; the base's where the adapter has none."""
    own = places(adapter)
    tokenizer = own if find("tokenizer_config.json", own) or find("tokenizer.json", own) else [base]
    for name in _TOKENIZER:
        if source := find(name, tokenizer):
            shutil.copyfile(source, target / name)
    for extra in ("additional_chat_templates",):  # templates beside the default one
        if source_folder := next((p / extra for p in tokenizer if (p / extra).is_dir()), None):
            shutil.copytree(source_folder, target / extra)
    for name, folders in (("generation_config.json", [*own, base]), ("recipe.yaml", own)):
        if source := find(name, folders):
            shutil.copyfile(source, target / name)


def config_text(base: Path, target: Path, model: PreTrainedModel, dtype: str, untied: bool) -> str:
    """The base's `config.json` with what the merge changed: vocabulary, special tokens, dtype, what is tied."""
    raw = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for name in ("quantization_config", "_name_or_path", "torch_dtype"):
        raw.pop(name, None)
    raw.setdefault("architectures", [type(model).__name__])
    text = model.config.get_text_config()
    # a model of several parts keeps the sizes of its text part in a section of its own
    section = raw if text is model.config else raw.setdefault("text_config", {})
    names = {name: text.attribute_map.get(name, name) for name in ("vocab_size", "tie_word_embeddings")}
    raw["dtype"] = dtype
    if section is not raw and "dtype" in section:
        section["dtype"] = dtype
    section[names["vocab_size"]] = model.get_input_embeddings().weight.shape[0]
    if "vocab_size" in raw:
        raw["vocab_size"] = section[names["vocab_size"]]
    if untied:
        raw["tie_word_embeddings"] = section[names["tie_word_embeddings"]] = False
    for name, value in _special_tokens(target, model).items():
        section[name] = value
    return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"


def _special_tokens(target: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Where the merged model stops and how it pads, as trained; nothing for an adapter without a chat template."""
    from transformers import AutoTokenizer

    from instructft.models.load import fit_special_tokens

    if not (target / "tokenizer_config.json").is_file():
        return {}
    tokenizer = AutoTokenizer.from_pretrained(target, **remote_code.flag())
    if not isinstance(tokenizer.chat_template, str) or tokenizer.pad_token is None:
        return {}
    fit_special_tokens(model, tokenizer)
    text = model.config.get_text_config()
    return {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def run_facts(adapter: Path, merge: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `run.json`: the run's, where there is one, with what the merge did."""
    source = find("run.json", places(adapter))
    try:
        facts = json.loads(source.read_text(encoding="utf-8")) if source else {}
    except ValueError:
        facts = {}
    return {**(facts if isinstance(facts, dict) else {}), "merge": dict(merge)}


def write_papers(target: Path, adapter: AdapterFolder, merge: Mapping[str, Any]) -> None:
    """Write `run.json` and the model card."""
    facts = run_facts(adapter.folder, merge)
    write_text(target / "run.json", json.dumps(facts, indent=2, default=str) + "\n")
    write_text(target / "README.md", card(target, adapter, merge))


def card(target: Path, adapter: AdapterFolder, merge: Mapping[str, Any]) -> str:
    """The model card: the run's own card, where there is one, with how the merge was made and proved."""
    name = adapter.base.name_or_path
    own = find("README.md", places(adapter.folder))
    head, body = _split(own.read_text(encoding="utf-8")) if own and find("recipe.yaml", [target]) else ({}, "")
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", **head}
    if not Path(name).expanduser().exists():
        head["base_model"], head["base_model_relation"] = name, "finetune"
    if head.get("library_name") == "peft":
        head["library_name"] = "transformers"
    tags = [tag for tag in head.get("tags", ["instructft", "sft"]) if tag not in ("lora", "adapter", "peft")]
    head["tags"] = [*tags, "merged"]
    title = "" if body else f"# {target.name.split('.partial-')[0]}\n"
    # the run's card speaks of an adapter
    body = body.replace(_LOAD_ADAPTER, _LOAD).replace("A chat model, as a LoRA adapter, fine", "A chat model, fine")
    section = f"""## Merge

A LoRA adapter merged into {Path(name).name if Path(name).expanduser().exists() else name} by
`instructft merge` {__version__}, in {merge["dtype"]}.

{proof_in_words(merge)}
"""
    before, use, after = (body.strip() or title).partition("\n## Use\n")  # the long recipe stays last
    metadata = yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()
    text = f"---\n{metadata}\n---\n\n{before.strip()}\n\n{section}{use}{after}"
    return text.rstrip() + "\n"


def proof_in_words(merge: Mapping[str, Any]) -> str:
    """How the merge was proved, for a model card."""
    proof = merge.get("proof")
    if proof is None:
        return "The merge was **not verified** (`--no-verify`)."
    lines = [
        "| merged model against adapter on its base | |",
        "| --- | ---: |",
        f"| shown to both | {proof['texts']} × {proof['source']} |",
        f"| largest difference of a logit | {proof['difference']:.2e} |",
        f"| allowed ({merge['dtype']}) | {proof['tolerance']:.2e} |",
        f"| largest change of a logit by the adapter | {proof['effect']:.2e} |",
        f"| {proof['compared']}, tokens equal | {proof['equal_tokens']} of {proof['tokens']} |",
    ]
    if proof.get("weights"):
        lines.append(
            f"| merged weights compared with PEFT's merge | {proof['weights']['tensors']} tensors, equal to rounding |"
        )
    if quantized := merge.get("quantized"):
        lines.append(
            f"| largest difference to the adapter on its {quantized['quantization']} base | "
            f"{quantized['difference']:.2e} |"
        )
    return "\n".join(lines)


def _split(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    if text.startswith("---\n") and (end := text.find("\n---\n", 4)) > 0:
        try:
            head = yaml.safe_load(text[4:end])
        except yaml.YAMLError:
            head = None
        return (head if isinstance(head, dict) else {}), text[end + 5 :]
    return {}, text
