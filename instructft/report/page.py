"""`report.html`: a run on one self-contained page, for somebody who was not there.

What was trained on what, how it went, what became of the data, one row with its mask, the answers before and after,
and how to load what came out. The page is `html/report.html.jinja`; it holds no script, loads nothing, and names no
folder of this machine. Text of data and models is shown, never obeyed.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.formatting import name_of, perplexity, typed, yaml_text
from instructft.redaction import bare_url, last_name, without_places, without_roots
from instructft.report.curves import Chart, bars, chart, finite, number, read_metrics, series_of
from instructft.report.judged import PAGES, cut_short, judged, spread, template
from instructft.report.logs import read_log
from instructft.report.model_card import PLAIN

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from instructft.data.prepare import Prepared
    from instructft.data.streaming import Streamed
    from instructft.recipe.schema import Recipe

PAGE = PAGES / "report.html.jinja"

_CURVES = (  # title, unit, (name, key in metrics.jsonl, marked with dots)
    ("Loss", "nats per supervised token", (("training", "loss", False), ("validation", "eval_loss", True))),
    ("Learning rate", "", (("learning rate", "learning_rate", False),)),
    ("Speed", "tokens per second", (("training", "tokens_per_second", False),)),
    (
        "Tokens guessed right",
        "share of supervised tokens",
        (("training", "mean_token_accuracy", False), ("validation", "eval_mean_token_accuracy", True)),
    ),
)
_WORDS = {
    "start_loss": "loss before the first step",
    "train_loss": "training loss, mean over the run",
    "loss": "training loss, at the end",
    "eval_loss": "validation loss",
    "eval_perplexity": "validation perplexity",
    "mean_token_accuracy": "training, share of tokens guessed right",
    "eval_mean_token_accuracy": "validation, share of tokens guessed right",
    "entropy": "training, entropy of the predictions (nats)",
    "eval_entropy": "validation, entropy of the predictions (nats)",
    "eval_exact_match": "validation, share of answers that match exactly",
    "eval_token_f1": "validation, F1 of the words of answers",
    "eval_rougeL": "validation, ROUGE-L of answers",
    "eval_stops": "validation, share of answers that end by themselves",
    "eval_answered": "validation, rows that were answered",
    "grad_norm": "gradient norm, at the end",
    "learning_rate": "learning rate, at the end",
}


def draw_report(
    run: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Prepared | Streamed | None = None,
) -> Path | None:
    """`write_report` that loses no finished run: a page that cannot be drawn is said on stderr, and None comes back."""
    try:
        return write_report(run, recipe, facts, tokenizer, data)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        print(f"report.html was not drawn ({why}); the run is whole all the same", file=sys.stderr)
        return None


def write_report(
    run: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Prepared | Streamed | None = None,
) -> Path:
    """Write `report.html` into a run folder, from what lies there and the contents of `run.json`.

    Args:
        tokenizer: with `data`, shows a training row token by token.
        data: with it the page has the lengths of the rows, and one row.

    Example::

        write_report(Path("runs/quickstart"), recipe, facts)
        # PosixPath('runs/quickstart/report.html')
    """
    text = page(run, recipe, facts, tokenizer, data)
    partial = run / "report.html.partial"
    partial.write_text(text, encoding="utf-8")
    return partial.replace(run / "report.html")


def page(
    run: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Prepared | Streamed | None = None,
) -> str:
    """The text of `report.html`."""
    records = read_metrics(run)
    folders = [run, run.parent, Path(recipe.output_dir)]
    resolved = without_places(recipe.to_dict(), folders)
    text = template(PAGE).render(
        name=recipe.name,
        start=starting_point(recipe),
        sets=[
            last_name(entry.name or entry.hub or entry.path or bare_url(entry.url or ""))
            for entry in recipe.data.datasets
        ],
        lora=recipe.adapter.type == "lora",
        recipe=recipe,
        template=last_name(recipe.data.template),
        facts=facts,
        charts=list(_charts(records)),
        samples=before_and_after(run),
        **judged(run),
        lengths=lengths(recipe, data),
        row=training_row(recipe, tokenizer, data),
        metrics={
            key: (_WORDS.get(key, key), value)
            for key, value in _in_order(_powers(facts["metrics"])).items()
            if not any(key.endswith(end) and key.removesuffix(end) in facts["metrics"] for end in ("_low", "_high"))
        },
        notes=notes(facts, records),
        left_out=left_out(facts["data"]),
        load=loading(recipe, facts.get("model_class", PLAIN), (facts.get("base") or {}).get("name_or_path")),
        resolved=yaml_text(resolved).strip(),
    )
    return without_roots(text, folders)


def _charts(records: list[dict[str, Any]]) -> Iterable[Chart]:
    for title, unit, lines in _CURVES:
        zero = lines[0][1] in ("learning_rate", "tokens_per_second")
        series = [series_of(records, key, name, dots=dots, from_zero=zero) for name, key, dots in lines]
        if drawn := chart(title, series, unit):
            yield drawn
    for key in answer_figures(records):
        rows = {record["eval_answered"] for record in records if "eval_answered" in record}
        unit = f"answers to {' or '.join(f'{count:,}' for count in sorted(rows))} held-out rows; band: 95% interval"
        name = name_of(key.removeprefix("eval_"))
        if drawn := chart(name[:1].upper() + name[1:], [series_of(records, key, name, dots=True)], unit):
            yield drawn


def answer_figures(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys in `metrics.jsonl` that are figures of answers to held-out rows.

    >>> answer_figures([{"step": 10, "eval_loss": 1.0, "eval_stops": 0.5, "eval_stops_low": 0.3, "eval_answered": 32}])
    ['eval_stops']
    """
    found = {key: None for record in records if "eval_answered" in record for key in record if f"{key}_low" in record}
    return list(found)


def _powers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, with perplexities above a million in words: what a float holds of them ends at e^709."""
    huge = {
        name: perplexity(metrics[loss])
        for name, value in metrics.items()
        if name.endswith("_perplexity") and value > 1e6 and (loss := name.replace("_perplexity", "_loss")) in metrics
    }
    return {**metrics, **huge}


def _in_order(metrics: Mapping[str, Any]) -> dict[str, Any]:
    first = {key: metrics[key] for key in _WORDS if key in metrics}
    return {**first, **{key: value for key, value in sorted(metrics.items()) if key not in first}}


ROW_TOKENS = 600  # of the training row that is shown
BARS = 24  # of the histogram, at most
MUCH = 0.1  # share of the rows that were dropped: beyond it a reader is told first
SAMPLES = 30  # prompts whose answers are shown


def notes(facts: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a reader should know before trusting the numbers: warnings (a divergence first), resumes, cut rows."""
    train, data, metrics = facts["train"], facts["data"], facts["metrics"]
    found = [f"Step {warning['step']:,}: {warning['text']}." for warning in facts.get("warnings") or ()]
    start, end = metrics.get("start_loss"), metrics.get("eval_loss")
    if finite(start) and finite(end) and end >= start:
        found.append(
            f"Nothing was learned: the validation loss is {end:.4f} at the end, and was {start:.4f} before step 1."
        )
    if left_out(data)["dropped"] > MUCH:
        reasons = ", ".join(f"{rows:,} {reason.replace('_', ' ')}" for reason, rows in data["dropped"].items())
        found.append(f"{left_out(data)['dropped']:.0%} of the rows were dropped: {reasons}.")
    if resumed := train.get("resumed"):
        steps = " and ".join(f"{entry['step']:,}" for entry in resumed)
        equal = "" if all(entry.get("exact", True) for entry in resumed) else ", on a GPU: equal but for rounding"
        found.append(f"The run was interrupted and resumed from step {steps}{equal}.")
        changed = sorted({key for entry in resumed for key in (*entry["changed"], *entry["versions"])})
        found += [f"Changed when it was resumed: {', '.join(changed)}."] if changed else []
    for spike in (train.get("loss_spikes") or [])[:5]:
        done = "the step was left out" if spike["skipped"] else "the step was taken"
        usual = f"where {number(spike['median'])} was usual"
        found.append(f"Step {spike['step']:,} had a loss of {number(spike['loss'])}, {usual}; {done}.")
    if more := len((train.get("loss_spikes") or [])[5:]):
        found.append(f"{more} more steps had a loss far above what was usual; run.json lists them.")
    if train.get("rows_at_once"):
        found.append(f"Memory ran out, and smaller batches were taken: {train['rows_at_once']} rows at once.")
    if cut := data.get("cut", {}).get("rows"):
        share = f"{cut / max(data['rows']['train'], 1):.1%} of the training rows"
        found.append(f"{cut:,} rows were longer than max_length and lost their end (as many as {share}).")
    evaluated = [(r["eval_loss"], r["step"]) for r in records if finite(r.get("eval_loss"))]
    if evaluated and evaluated[-1][0] > 1.02 * min(evaluated)[0]:
        best, step = min(evaluated)
        last = evaluated[-1][0]
        found.append(f"Validation loss was lowest at step {step:,} ({best:.4f}) and rose to {last:.4f} by the end.")
    if data.get("alike"):
        found.append(
            "The trained rows are all nearly the same as held-out ones, whose loss says nothing of other rows."
        )
    if not data["rows"].get("validation"):
        found.append("No rows were held out for validation: nothing here says how it does on text it has not seen.")
    if wrong := sorted(key for key, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)):
        found.append(f"Not a number: {', '.join(wrong)}.")
    if "adapter" in facts and not facts["adapter"].get("base_unchanged", True):
        found.append("Weights of the base changed although only the adapter was to be trained.")
    return found


def left_out(data: Mapping[str, Any]) -> dict[str, float]:
    """The shares of all rows that were dropped, and of the training rows that were cut."""
    dropped = sum(data["dropped"].values())
    cut = data.get("cut", {}).get("rows", 0)
    every = sum(data["rows"].values()) + dropped
    return {"dropped": dropped / max(every, 1), "cut": cut / max(data["rows"]["train"], 1)}


def before_and_after(run: Path) -> dict[str, Any]:
    """The answers of `samples.jsonl` at the first and at the last step that a prompt was answered.

    Returns:
        `first` and `last` step, `prompts` (prompt, before, after, between: (step, answer) of the steps in between),
        and `left_out`, prompts for which there was no room.
    """
    by_prompt: dict[str, list[tuple[int, str, bool]]] = {}
    for record in read_log(run / "samples.jsonl", "prompt", "response"):
        answer = (int(record["step"]), cut_short(record["response"]), record.get("finish_reason") == "stop")
        by_prompt.setdefault(str(record["prompt"]), []).append(answer)
    chosen = list(by_prompt.items())[:SAMPLES]
    prompts = [
        {"prompt": cut_short(prompt), "before": answers[0], "after": answers[-1], "between": spread(answers[1:-1], 6)}
        for prompt, answers in chosen
    ]
    steps = [answer[0] for _, answers in chosen for answer in answers]
    return {
        "prompts": prompts,
        "first": min(steps, default=0),
        "last": max(steps, default=0),
        "left_out": len(by_prompt) - len(chosen),
    }


def lengths(recipe: Recipe, data: Prepared | Streamed | None) -> dict[str, Any] | None:
    """A histogram of the training rows' lengths (of documents, where rows are packed) and their quantiles."""
    from datasets import Dataset

    from instructft.formatting import quantiles

    rows = data.splits["train"] if data is not None else None
    if not isinstance(rows, Dataset):  # a stream is read once, by training
        return None
    tables = rows.with_format("arrow").iter(batch_size=4096)
    if recipe.data.packing:
        parts = [_documents(table) for table in tables]
    else:
        parts = [table.column("input_ids").combine_chunks().value_lengths().to_numpy() for table in tables]
    found = np.concatenate(parts)
    width = -(-(int(found.max()) + 1) // BARS)  # bars of one width: the same number of lengths in each
    edges = list(range(0, int(found.max()) + width + 1, width))
    counts, _ = np.histogram(found, bins=edges)
    what = "Tokens in a document" if recipe.data.packing else "Tokens in a row"
    drawn = bars(f"{what}, training", edges, counts.tolist(), "tokens")
    return {"drawn": drawn, "quantiles": quantiles(found), "max_length": recipe.data.max_length}


def _documents(packs: pa.Table) -> np.ndarray:
    """The tokens of each document of some packs, with those of its branches."""
    lengths: np.ndarray = packs.column("seq_lengths").combine_chunks().flatten().to_numpy()
    if "seq_starts" not in packs.column_names:
        return lengths
    starts = packs.column("seq_starts").combine_chunks().flatten().to_numpy()
    return np.add.reduceat(lengths, np.flatnonzero(starts == 0))


def training_row(recipe: Recipe, tokenizer: Any, data: Prepared | Streamed | None) -> Any:
    """The row that the run showed at its start, cut to what a page can hold; None where it is not known."""
    from instructft.prompt.token_view import show

    if tokenizer is None or data is None or not data.example:
        return None
    example = {name: list(values)[:ROW_TOKENS] for name, values in data.example.items()}
    return show(example, tokenizer)


def loading(recipe: Recipe, kind: str = PLAIN, base: str | None = None) -> dict[str, str]:
    """Title -> commands or code that load what the run left.

    Args:
        kind: the Auto class that its config names.
        base: of an adapter; the recipe may name an adapter in its place, which it was trained on or further from.
    """
    output = Path(recipe.output_dir)
    path = last_name(recipe.output_dir) if output.is_absolute() or ".." in output.parts else recipe.output_dir
    lora = recipe.adapter.type == "lora"
    below = last_name(base) if base else starting_point(recipe)
    imports = [f"from transformers import {kind}, AutoTokenizer"]
    load = f"{kind}.from_pretrained({path!r})"
    if lora and kind == PLAIN:
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        load = f"AutoPeftModelForCausalLM.from_pretrained({path!r})"
    elif lora:
        imports = ["from peft import PeftModel", *imports]
        load = f"PeftModel.from_pretrained({kind}.from_pretrained({below!r}), {path!r})"
    lines = [
        *imports,
        "",
        f"model = {load}",
        f"tokenizer = AutoTokenizer.from_pretrained({path!r})",
        "prompt = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "answer = model.generate(**prompt, max_new_tokens=100)[0, prompt['input_ids'].shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    serve = f"vllm serve {typed(path)}"
    if lora:
        rank = next(size for size in (16, 32, 64, 128, 256, 320, 512, 1 << 30) if size >= rank_of(recipe))
        serve = (
            f"vllm serve {typed(below)} --enable-lora --max-lora-rank {rank} "
            f"--lora-modules tuned={typed(path)} \\\n"
            f"  --chat-template {typed(path + '/chat_template.jinja')}\n"
            f"# or without adapters: instructft merge {typed(path)} MERGED && vllm serve MERGED"
        )
    return {"Talk to it": f"instructft chat {typed(path)}", "Python": "\n".join(lines), "vLLM": serve}


def rank_of(recipe: Recipe) -> int:
    """Of the adapter that the run leaves: more than the recipe's where others are in it (`adapters.frozen_pairs`)."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads((Path(recipe.output_dir) / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    return recipe.adapter.r


def starting_point(recipe: Recipe) -> str:
    """What the run began from, without a folder of this machine: `openai-community/gpt2`, or `random weights`."""
    return last_name(recipe.model.name_or_path) if recipe.model.name_or_path else "random weights"
