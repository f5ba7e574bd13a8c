"""The model card of a run: `README.md` in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft import __version__
from instructft.sources import SOURCES

if TYPE_CHECKING:
    from instructft.recipe import Recipe


_METRICS = {
    "train_loss": "training loss, mean over the run",
    "loss": "training loss, at the end",
    "eval_loss": "validation loss",
    "eval_perplexity": "validation perplexity",
    "eval_mean_token_accuracy": "validation, share of tokens guessed right",
}


_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")"""
_LOAD_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("PATH")"""


def write_card(run: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Write `README.md` from the recipe and the contents of `run.json`."""
    (run / "README.md").write_text(card(recipe, facts), encoding="utf-8")


def card(recipe: Recipe, facts: dict[str, Any]) -> str:
    """The model card's text: metadata for the Hub, what was trained on what, how to use it, the recipe."""
    import yaml

    base = recipe.model.name_or_path
    public_base = base if base and not Path(base).expanduser().exists() else None
    hub = [entry.hub or (SOURCES[entry.name].hub if entry.name else None) for entry in recipe.data.datasets]
    lora = recipe.adapter.type == "lora"
    metadata: dict[str, Any] = {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    if public_base:
        metadata["base_model"] = public_base
        metadata["base_model_relation"] = "adapter" if lora else "finetune"
    if any(hub):
        metadata["datasets"] = [name for name in hub if name]
    metadata["tags"] = ["instructft", "sft", "trl", *(["lora"] if lora else [])]
    data, metrics = facts["data"], facts["metrics"]
    names = [e.name or e.hub or Path(e.path or e.url or "").name for e in recipe.data.datasets]
    licences = sorted({f"{e.name}: {SOURCES[e.name].licence}" for e in recipe.data.datasets if e.name})
    start = public_base or (Path(base).name if base else "random weights")
    shown = [name for name in _METRICS if name in metrics]
    table = "\n".join(f"| {_METRICS[name]} | {metrics[name]:.4f} |" for name in shown)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {recipe.name}

A chat model{", as a LoRA adapter," if lora else ","} fine-tuned from {start} on {", ".join(names)} with
instructft {__version__} ({data["rows"]["train"]:,} rows, {facts["train"]["steps"]:,} steps).

- Template: `{recipe.data.template}`, saved as the tokenizer's chat template.
- Loss on: `{recipe.data.train_on}` ({data["supervised_tokens"]:,} of {data["tokens"]:,} training tokens).
{_adapter(recipe, facts) if lora else ""}{"".join(f"- Data licence: {licence}" + chr(10) for licence in licences)}
| metric | value |
| --- | --- |
{table}

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
{recipe.to_yaml().strip()}
```
"""


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
