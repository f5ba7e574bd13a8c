"""The model card of a run: `README.md` in the run folder, and the same for the Hub, with the name it has there.

A card names no folder of this machine: of a base, a data file or a template that lies here only the last name.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.data.sources import SOURCES
from instructft.formatting import name_of, perplexity, spread, yaml_text
from instructft.redaction import bare_url, last_name, without_places, without_roots
from instructft.report.card_results import (
    evaluation_section,
    head_with_results,
    plain,
    read_evaluation,
    read_gate,
    with_results,
)
from instructft.report.gate_section import gate_on_card
from instructft.version import __version__
from instructft.weights.base_record import is_hub_id

if TYPE_CHECKING:
    import jinja2

    from instructft.recipe.schema import Recipe


_METRICS = {
    "start_loss": "loss before the first step",
    "train_loss": "training loss, mean over the run",
    "loss": "training loss, at the end",
    "eval_loss": "validation loss",
    "eval_perplexity": "validation perplexity",
    "eval_mean_token_accuracy": "validation, share of tokens guessed right",
}

COSTS = ("KL, nats a token", "top-1 equal", "held-out loss", "changes gone")  # of a dtype that a merge is stored in

TEMPLATE = Path(__file__).parent / "html" / "card.md.jinja"


PLAIN = "AutoModelForCausalLM"  # the class that loads a model of text alone


def write_card(run: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Write `README.md` from the recipe and the contents of `run.json`."""
    text = card(recipe, facts, read_evaluation(run), gate=read_gate(run))
    (run / "README.md").write_text(text, encoding="utf-8")


def card(
    recipe: Recipe,
    facts: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    merge: Mapping[str, Any] | None = None,
    licence: Mapping[str, str] | None = None,
    gate: Mapping[str, Any] | None = None,
) -> str:
    """The model card's text: metadata for the Hub, what was trained on what, how to use it, the recipe.

    Args:
        evaluation: what `instructft evaluate --json` wrote, of which the numbers go into a table.
        merge: how the run's adapter was merged, for the card of the merged model; `base` is what it was merged into.
        licence: of the base, where its own card is not at hand.
        gate: the verdict of `instructft gate`.
    """
    base = recipe.model.name_or_path
    public_base = base if base and _is_public(base) else None
    lora = recipe.adapter.type == "lora"
    known = _licence_of(base) or dict(licence or {})
    names = [e.name or e.hub or last_name(e.path or bare_url(e.url or "")) for e in recipe.data.datasets]
    warnings = [one for one in facts.get("warnings") or () if one["kind"] != "diverged"]
    return _render(
        with_results(_metadata(recipe, facts, public_base, known, bool(merge)), evaluation, recipe.name, names),
        name=recipe.name,
        lora=lora and not merge,
        model_class=facts.get("model_class", PLAIN),
        merge=merge,
        evaluation=evaluation_section(evaluation) + gate_on_card(gate),
        template_hash=(facts.get("template") or {}).get("sha256"),
        stored="" if merge else facts.get("stored", ""),
        generation=facts.get("generation"),
        warnings=warnings,
        recipe=recipe,
        facts=facts,
        start=public_base or (last_name(base) if base else "random weights"),
        sets=names,
        template=last_name(recipe.data.template),
        adapter=_adapter(recipe, facts) if lora else "",
        licence=known.get("license_name") or known.get("license"),
        data_licences=_data_licences(recipe),
        metrics=_figures(facts["metrics"]),
        diverged=[one["text"] for one in facts.get("warnings") or () if one["kind"] == "diverged"],
        title=" ".join(recipe.name.split()) or "recipe",
        resolved=yaml_text(without_places(recipe.told(), [Path(recipe.output_dir)])).strip(),
    )


def bare_card(
    name: str,
    base: str | None,
    lora: bool,
    merge: Mapping[str, Any] | None = None,
    licence: Mapping[str, str] | None = None,
) -> str:
    """A card for a model of which nothing is known but what its own files say.

    Args:
        base: as an adapter's configuration names it.
        merge: how it was merged, as `card` takes it.
        licence: of the base, where it is known.
    """
    tags = ["lora"] if lora else ["instructft", "sft", "merged"] if merge else []
    metadata = _head(lora, base if base and _is_public(base) else None, licence or {}, tags)
    return _render(metadata, name=name, lora=lora, model_class=PLAIN, merge=merge, evaluation="", recipe=None)


def _render(metadata: Mapping[str, Any], **values: Any) -> str:
    return _template().render(
        metadata=yaml_text(dict(metadata)).strip(), version=__version__, costs=COSTS, cost_cells=cost_cells, **values
    )


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(  # Markdown, in which nothing is escaped
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["plain"] = plain
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def cost_cells(row: Mapping[str, Any]) -> list[str]:
    """What a dtype and rounding cost a merge, as the cells of `COSTS`.

    >>> cost_cells({"kl": 2e-4, "top1": 0.991, "loss": 1.0182, "vanished": 0.5})
    ['2.0e-04', '99.1%', '1.0182', '50%']
    """
    if row["kl"] is None:
        return ["values do not fit", "", "", ""]
    loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
    return [f"{row['kl']:.1e}", f"{row['top1']:.1%}", loss, f"{row['vanished']:.0%}"]


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
        text = re.sub(r"\nor `instructft chat PATH`\.\n\n`instructft export PATH .*\n", "", text)
    text = re.sub("instructft (chat|export) PATH", rf"instructft \1 {repo_id}", text)
    evaluation = read_evaluation(run)
    for title, section in (("Evaluation", evaluation_section(evaluation)), ("Gate", gate_on_card(read_gate(run)))):
        if section and f"\n## {title}\n" not in text and "\n## Use\n" in text:
            text = text.replace("\n## Use\n", f"{section}\n## Use\n", 1)
    text = head_with_results(text, evaluation)
    return without_roots(text, [run, run.parent])


def _head(lora: bool, base: str | None, licence: Mapping[str, str], tags: list[str]) -> dict[str, Any]:
    """The card's head, as the Hub reads it: https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    head: dict[str, Any] = {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    head |= {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"} if base else {}
    return {**head, **licence, **({"tags": tags} if tags else {})}


def _metadata(
    recipe: Recipe, facts: Mapping[str, Any], base: str | None, licence: Mapping[str, str], merged: bool
) -> dict[str, Any]:
    """The head of a run's card: with data sets and what was measured."""
    lora = recipe.adapter.type == "lora" and not merged
    sets = recipe.data.datasets
    hub = [entry.hub or (SOURCES[entry.name].hub if entry.name else None) for entry in sets]
    metadata = _head(lora, base, licence, ["instructft", "sft", "trl", *(["lora"] * lora), *(["merged"] * merged)])
    if any(hub):
        metadata["datasets"] = [name for name in hub if name]
    words = {**_METRICS, **_of_answers(facts["metrics"])}
    found = {name: facts["metrics"].get(name) for name in words if name.startswith("eval_")}
    measured = [
        {"type": name.removeprefix("eval_"), "value": round(value, 6), "name": words[name]}
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    if measured:
        names = [e.name or e.hub or last_name(e.path or bare_url(e.url or "")) for e in sets]
        kind = next((name for name in hub if name), names[0])
        about = {"name": f"{', '.join(names)} (held out)", "type": kind, "split": "validation"}
        result = {"task": {"type": "text-generation"}, "dataset": about, "metrics": measured}
        metadata["model-index"] = [{"name": recipe.name, "results": [result]}]
    return metadata


def _data_licences(recipe: Recipe) -> list[str]:
    """Under which licence each data set stands: as known here, or as its card in the Hub's cache says."""
    from huggingface_hub import try_to_load_from_cache

    found = set()
    for entry in recipe.data.datasets:
        if entry.name:
            found.add(f"{entry.name}: {SOURCES[entry.name].licence}")
        elif entry.hub:
            file = try_to_load_from_cache(entry.hub, "README.md", repo_type="dataset", revision=entry.revision)
            known = read_licence(Path(file)) if isinstance(file, str) else {}
            said = known.get("license_name") or known.get("license") or "not known here; its own terms hold"
            found.add(f"{entry.hub}: {said}")
    return sorted(found)


def _is_public(base: str) -> bool:
    return is_hub_id(base) and not Path(base).exists()


def _licence_of(base: str | None) -> dict[str, str]:
    """The licence of a base as its own card gives it, where that card is at hand; nothing is fetched for it."""
    from huggingface_hub import try_to_load_from_cache

    if not base:
        return {}
    file: Any = Path(base).expanduser() / "README.md"
    if not file.is_file():
        file = try_to_load_from_cache(base, "README.md") if is_hub_id(base) else None
    return read_licence(Path(file)) if isinstance(file, str | Path) else {}


def read_licence(file: Path) -> dict[str, str]:
    """The fields of a model card's head that say its licence; {} where it has none, or is none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = file.read_text(encoding="utf-8")
        head = YAML(typ="safe", pure=True).load(text[4 : text.find("\n---", 4)]) if text.startswith("---\n") else {}
    except (OSError, ValueError, YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: head[key] for key in keys if isinstance(head, dict) and isinstance(head.get(key), str)}


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics of a run in words, and their values as they are printed."""
    found = {words: metrics[key] for key, words in _METRICS.items() if key in metrics}
    printed = {words: f"{value:.4f}" for words, value in found.items()}
    if "eval_perplexity" in metrics and metrics["eval_perplexity"] > 1e6:
        printed[_METRICS["eval_perplexity"]] = perplexity(metrics["eval_loss"])
    for key, words in _of_answers(metrics).items():
        ends = (metrics[f"{key}_low"], metrics[f"{key}_high"])
        printed[words] = spread(key.removeprefix("eval_"), metrics[key], *ends)
    return list(printed.items())


def _of_answers(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The figures of answers to held-out rows that have an interval, in words; of a user's own its function's name."""
    found = [key for key in metrics if f"{key}_low" in metrics and f"{key}_high" in metrics]
    rows = metrics.get("eval_answered", 0)
    return {key: f"{name_of(key.removeprefix('eval_'))}, {rows:,} held-out rows asked" for key in found}


def _adapter(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """What was trained, and over what."""
    adapter, found = recipe.adapter, facts.get("adapter", {})
    kind = "DoRA" if adapter.use_dora else "rsLoRA" if adapter.use_rslora else "LoRA"
    base = {"none": "", "8bit": " over a base in 8 bits", "4bit": " over a base in 4 bits (nf4)"}
    text = f"{kind}, rank {adapter.r}, alpha {adapter.alpha}{base[recipe.model.quantization]}"
    if adapter.stack:
        text += ", trained on top of another adapter, which stays as it was and is part of this one"
    elif begun := adapter.more.get("init_lora_weights"):
        text += f", begun by `{str(begun).lower()}`"
    if found:
        share = found["trainable"] / found["total"]
        text += f"; {found['trainable']:,} of {found['total']:,} parameters trained ({share:.2%})"
        text += ", every other weight compared bit by bit before and after" if found["base_unchanged"] else ""
    return text
