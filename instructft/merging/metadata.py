"""What goes along with merged weights: configuration, tokenizer, recipe, `run.json` and the model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints.as_saved import sums
from instructft.errors import InstructftError, TemplateError
from instructft.hub.files import TOKENIZER
from instructft.recipe.load import load_run_recipe
from instructft.recipe.schema import Recipe
from instructft.redaction import last_name
from instructft.report.card_results import read_evaluation
from instructft.report.model_card import bare_card, card, read_licence
from instructft.weights import remote_code
from instructft.weights.model_class import PROCESSOR
from instructft.weights.older_readers import add_older_names, for_older_readers
from instructft.weights.tensor_io import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from instructft.adapters.adapter_folder import AdapterFolder


def places(adapter: Path) -> list[Path]:
    """The folders that an adapter's metadata lies in: its own, and its run's when it is a checkpoint."""
    resolved = adapter.resolve()
    return [adapter, *([resolved.parent] if resolved.name.startswith("checkpoint-") else [])]


def find(name: str, folders: list[Path]) -> Path | None:
    """The first of `folders` that holds a file of this name, with it."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def copy_metadata(adapter: Path, base: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation configuration and recipe; the base's where the adapter has none."""
    own = places(adapter)
    tokenizer = own if find("tokenizer_config.json", own) or find("tokenizer.json", own) else [base]
    for name in sorted(TOKENIZER):
        if source := find(name, tokenizer):
            shutil.copyfile(source, target / name)
    templates = "additional_chat_templates"  # those that are not the default
    if source := next((p / templates for p in tokenizer if (p / templates).is_dir()), None):
        shutil.copytree(source, target / templates)
    for name, folders in (
        ("generation_config.json", [*own, base]),
        ("recipe.yaml", own),
        *((name, [base]) for name in sorted(PROCESSOR)),
    ):
        if source := find(name, folders):
            shutil.copyfile(source, target / name)
    for_older_readers(target)


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
    section[names["vocab_size"]] = text.vocab_size  # some embeddings have rows beyond it; it grows where tokens came
    if (own := getattr(text, "vocab_size_per_layer_input", None)) is not None:  # of Gemma 3n and 4; grows along
        section["vocab_size_per_layer_input"] = own
    if "vocab_size" in raw:
        raw["vocab_size"] = section[names["vocab_size"]]
    if untied:
        raw["tie_word_embeddings"] = section[names["tie_word_embeddings"]] = False
    for name, value in _special_tokens(target, model).items():
        section[name] = value
    add_older_names(raw)
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
    try:
        fit_special_tokens(model, tokenizer)
    except TemplateError:  # somebody else's, which no run here would train: the base's own stay
        return {}
    text = model.config.get_text_config()
    return {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def write_metadata(target: Path, adapter: AdapterFolder, merge: Mapping[str, Any]) -> None:
    """Write `run.json` (the run's, where there is one, with what the merge did) and the model card."""
    source = find("run.json", places(adapter.folder))
    try:
        facts = json.loads(source.read_text(encoding="utf-8")) if source else {}
    except ValueError:
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    whole = {**facts, "merge": merge, "files": sums(target)}
    write_text(target / "run.json", json.dumps(whole, indent=2, default=str) + "\n")
    write_text(target / "README.md", merged_card(target.name.split(".partial-")[0], adapter, facts, merge))


def merged_card(name: str, adapter: AdapterFolder, facts: Mapping[str, Any], merge: Mapping[str, Any]) -> str:
    """The merged model's card: with what the run was, where its recipe and `run.json` tell, and how it was merged."""
    own, base = places(adapter.folder), adapter.base.name_or_path
    merge = {**merge, "base": last_name(base) if Path(base).expanduser().exists() else base}
    written = find("README.md", own)
    licence = read_licence(written) if written else {}
    recipe = run_recipe(adapter.folder)
    if recipe is None or not {"data", "train", "metrics"} <= set(facts):
        return bare_card(name, base, False, merge, licence)
    source = find("evaluation.json", own)
    return card(recipe, facts, read_evaluation(source.parent) if source else None, merge, licence)


def run_recipe(adapter: Path) -> Recipe | None:
    """The recipe of an adapter's run; None where there is none that can be read."""
    source = find("recipe.yaml", places(adapter))
    try:
        return load_run_recipe(source.parent) if source else None
    except InstructftError:
        return None
