"""The model card of a run: `README.md` in the run folder, and the same for the Hub, with the name it has there.

A card names no folder of this machine: of a base, a data file or a template that lies here only the last name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.data.sources import SOURCES
from instructft.formatting import FORMS, name_of, yaml_text
from instructft.redaction import last_name, without_places, without_roots
from instructft.version import __version__
from instructft.weights.base_record import is_hub_id

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe


_METRICS = {
    "train_loss": "training loss, mean over the run",
    "loss": "training loss, at the end",
    "eval_loss": "validation loss",
    "eval_perplexity": "validation perplexity",
    "eval_mean_token_accuracy": "validation, share of tokens guessed right",
}

EVALUATION = "evaluation.json"  # in the run folder, as `instructft evaluate --json` writes it

_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")"""
_LOAD_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("PATH")"""


def write_card(run: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Write `README.md` from the recipe and the contents of `run.json`."""
    (run / "README.md").write_text(card(recipe, facts, read_evaluation(run)), encoding="utf-8")


def card(recipe: Recipe, facts: dict[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """The model card's text: metadata for the Hub, what was trained on what, how to use it, the recipe.

    Args:
        evaluation: what `instructft evaluate --json` wrote, of which the numbers go into a table.
    """
    base = recipe.model.name_or_path
    public_base = base if base and is_hub_id(base) and not Path(base).exists() else None
    lora = recipe.adapter.type == "lora"
    metadata = _metadata(recipe, facts, public_base)
    data, metrics = facts["data"], facts["metrics"]
    names = [e.name or e.hub or last_name(e.path or e.url or "") for e in recipe.data.datasets]
    licences = sorted({f"{e.name}: {SOURCES[e.name].licence}" for e in recipe.data.datasets if e.name})
    start = public_base or (last_name(base) if base else "random weights")
    shown = [name for name in _METRICS if name in metrics]
    table = "\n".join(f"| {_METRICS[name]} | {metrics[name]:.4f} |" for name in shown)
    known = metadata.get("license_name") or metadata.get("license") or "not known here; its own terms hold"
    title = " ".join(recipe.name.split()) or "recipe"
    resolved = without_places(recipe.to_dict(), [Path(recipe.output_dir)])
    return f"""---
{_yaml(metadata)}
---

# {recipe.name}

A chat model{", as a LoRA adapter," if lora else ","} fine-tuned from {start} on {", ".join(names)} with
instructft {__version__} ({data["rows"]["train"]:,} rows, {facts["train"]["steps"]:,} steps).

- Template: `{last_name(recipe.data.template)}`, saved as the tokenizer's chat template.
- Loss on: `{recipe.data.train_on}` ({data["supervised_tokens"]:,} of {data["tokens"]:,} training tokens).
{_adapter(recipe, facts) if lora else ""}{f"- Licence of the base: {known}." + chr(10) if base else ""}{
        "".join(f"- Data licence: {licence}" + chr(10) for licence in licences)
    }
| metric | value |
| --- | --- |
{table}
{_evaluation(evaluation)}
## Use

```python
{_LOAD_ADAPTER if lora else _LOAD}
tokenizer = AutoTokenizer.from_pretrained("PATH")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0], skip_special_tokens=True))
```

or `instructft chat PATH`.

## Recipe

```yaml
# {title}: the recipe as it was resolved, every default spelled out
{yaml_text(resolved).strip()}
```
"""


def for_the_hub(text: str, repo_id: str, place: str, run: Path) -> str:
    """A card as it leaves: with the repository's name where it says PATH, and the evaluation that was made since.

    Args:
        place: the folder in the repository, `instruct`; "" is its root.
        run: the folder that the card lies in, whose path it must not name.

    >>> for_the_hub('AutoTokenizer.from_pretrained("PATH")', "ada/support", "instruct", Path("runs/support"))
    'AutoTokenizer.from_pretrained("ada/support", subfolder="instruct")'
    """
    inside = f', subfolder="{place}"' if place else ""
    text = text.replace('from_pretrained("PATH")', f'from_pretrained("{repo_id}"{inside})')
    if place:  # the commands take a repository, and no folder in one
        text = text.replace("\nor `instructft chat PATH`.\n", "")
    text = text.replace("instructft chat PATH", f"instructft chat {repo_id}")
    if "\n## Evaluation\n" not in text and "\n## Use\n" in text and (section := _evaluation(read_evaluation(run))):
        text = text.replace("\n## Use\n", f"{section}\n## Use\n", 1)
    return without_roots(text, [run, run.parent])


def bare_card(name: str, base: str | None, lora: bool) -> str:
    """A card for a model of which nothing is known but what its own files say.

    Args:
        base: as an adapter's configuration names it.
    """
    metadata: dict[str, Any] = {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    if base and is_hub_id(base) and not Path(base).exists():
        metadata |= {"base_model": base, "base_model_relation": "adapter"}
    metadata["tags"] = ["lora"] if lora else []
    return f"""---
{_yaml({key: value for key, value in metadata.items() if value})}
---

# {name}

{"A LoRA adapter" if lora else "A model"}, uploaded by instructft {__version__}.

## Use

```python
{_LOAD_ADAPTER if lora else _LOAD}
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """The contents of `evaluation.json` in a run folder; None where there is none that can be read."""
    try:
        found = json.loads((run / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("tuned"), dict) else None


def _metadata(recipe: Recipe, facts: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The card's head, as the Hub reads it: https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    lora = recipe.adapter.type == "lora"
    sets = recipe.data.datasets
    hub = [entry.hub or (SOURCES[entry.name].hub if entry.name else None) for entry in sets]
    metadata: dict[str, Any] = {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    if base:
        metadata["base_model"] = base
        metadata["base_model_relation"] = "adapter" if lora else "finetune"
    metadata |= _licence(recipe.model.name_or_path)
    if any(hub):
        metadata["datasets"] = [name for name in hub if name]
    metadata["tags"] = ["instructft", "sft", "trl", *(["lora"] if lora else [])]
    found = {name: facts["metrics"].get(name) for name in _METRICS if name.startswith("eval_")}
    measured = [
        {"type": name.removeprefix("eval_"), "value": round(value, 6), "name": _METRICS[name]}
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    if measured:
        names = [e.name or e.hub or last_name(e.path or e.url or "") for e in sets]
        kind = next((name for name in hub if name), names[0])
        about = {"name": f"{', '.join(names)} (held out)", "type": kind, "split": "validation"}
        result = {"task": {"type": "text-generation"}, "dataset": about, "metrics": measured}
        metadata["model-index"] = [{"name": recipe.name, "results": [result]}]
    return metadata


def _licence(base: str | None) -> dict[str, Any]:
    """The licence of a base as its own card gives it, where that card is at hand; nothing is fetched for it."""
    import yaml
    from huggingface_hub import try_to_load_from_cache

    if not base:
        return {}
    file: Any = Path(base).expanduser() / "README.md"
    if not file.is_file():
        file = try_to_load_from_cache(base, "README.md") if is_hub_id(base) else None
    try:
        text = Path(file).read_text(encoding="utf-8") if isinstance(file, str | Path) else ""
        head = yaml.safe_load(text[4 : text.find("\n---", 4)]) if text.startswith("---\n") else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: head[key] for key in keys if isinstance(head, dict) and isinstance(head.get(key), str)}


def _evaluation(results: Mapping[str, Any] | None) -> str:
    """A section with what `instructft evaluate` found, base and tuned side by side; "" where there is nothing."""
    names = [name for name in ("base", "tuned") if results and isinstance(results.get(name), dict)]
    if not results or not names:
        return ""
    rows = []
    for figure, form in FORMS.items():
        values = [results[name].get(figure) for name in names]
        if all(isinstance(value, int | float) for value in values):
            rows.append(f"| {name_of(figure)} | " + " | ".join(map(form.format, values)) + " |")
    count = len(results["tuned"].get("rows") or ())
    head = f"| {count} held-out rows | {' | '.join(names)} |" if count else f"| | {' | '.join(names)} |"
    return "\n".join(["", "## Evaluation", "", head, "| --- |" + " ---: |" * len(names), *rows, ""])


def _yaml(metadata: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True).strip()


def _adapter(recipe: Recipe, facts: dict[str, Any]) -> str:
    """The list entry that says what was trained, and over what."""
    adapter, found = recipe.adapter, facts.get("adapter", {})
    kind = "DoRA" if adapter.use_dora else "rsLoRA" if adapter.use_rslora else "LoRA"
    base = {"none": "", "8bit": " over a base in 8 bits", "4bit": " over a base in 4 bits (nf4)"}
    text = f"- Adapter: {kind}, rank {adapter.r}, alpha {adapter.alpha}{base[recipe.model.quantization]}"
    if found:
        share = found["trainable"] / found["total"]
        text += f"; {found['trainable']:,} of {found['total']:,} parameters trained ({share:.2%})"
        text += ", every other weight compared bit by bit before and after" if found["base_unchanged"] else ""
    return f"{text}.\n"
