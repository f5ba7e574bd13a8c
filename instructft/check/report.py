"""`instructft check`: the recipe, the data and the needs of a run in one report, before a GPU is spent."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from instructft.errors import DataError, ModelError, TemplateError, UsageError
from instructft.formatting import clock, memory_size

if TYPE_CHECKING:
    from rich.console import Console

    from instructft.recipe.schema import Recipe

SCHEMA = 1  # of the JSON report; keys are added, never renamed

# Field of the recipe's `check:` -> where the figure stands in the report. Each is the most that is allowed.
LIMITS: dict[str, tuple[str, ...]] = {
    "max_dropped_share": ("data", "worst", "dropped"),
    "max_refused_share": ("data", "worst", "refused"),
    "max_cut_share": ("data", "total", "cut", "share"),
    "max_duplicate_share": ("data", "total", "findings", "exact_duplicates+near_duplicates", "share"),
    "max_contradictions": ("data", "total", "findings", "contradictions", "rows"),
    "max_leaks": ("data", "total", "findings", "leaks", "rows"),
    "max_markers": ("data", "total", "findings", "markers_in_answers", "rows"),
    "max_memory_gib": ("estimate", "memory", "total"),
}


def check(
    recipe: Recipe,
    *,
    tokens_per_second: float | None = None,
    device: str | None = None,
    processes: int = 1,
    strategy: str = "ddp",
    card: str | None = None,
    measured: Callable[[str], Any] | None = None,
    rehearsed: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """The report as plain dicts and lists; nothing is trained, and no weight is loaded unless asked.

    Args:
        tokens_per_second: of all processes together; default: what the last run of this recipe did.
        device: "cpu" or "cuda"; default: the one that training would take here.
        processes: that train together.
        strategy: ddp, fsdp2, zero2 or zero3.
        card: a name of `instructft.models.several_devices.CARDS`: what the run would take there, on paper.
        measured: find out by real steps here what fits and how fast it is; told in one line of each try.
        rehearsed: load the model, and try all that a run does on one short batch; told in one line of each finding.

    Raises:
        UsageError: recipe or data are not right, as `instructft.train` would say.
    """
    import torch

    import instructft.training.trainer  # noqa: F401 - what training imports counts in its memory
    from instructft.adapters import quantization
    from instructft.check.audit import audit
    from instructft.data.prepare import prepare
    from instructft.models.attention import check_attention
    from instructft.models.branches import why_not
    from instructft.models.memory import estimate, resident
    from instructft.models.several_devices import on_paper
    from instructft.models.starting_point import starting_point
    from instructft.models.tokenizer import date_in_prompts, load_tokenizer
    from instructft.recipe.installed import check_against_installed
    from instructft.training.arguments import (
        COPIES_ARE_WHOLE,
        as_decided,
        decide_checkpointing,
        follow_model,
        remarks,
        training_arguments,
    )

    if recipe.train["float32_copies"] and strategy != "ddp":
        raise UsageError(COPIES_ARE_WHOLE)

    here = device is None or device == quantization.device(recipe).partition(":")[0]
    check_against_installed(recipe, quantization.device(recipe) if here else None)
    if here:
        quantization.check(recipe)
    tokenizer = load_tokenizer(recipe)
    start = starting_point(recipe, tokenizer)
    if here:
        check_attention(recipe, start.config)
        quantization.check(recipe, start.config)
    recipe, left_open = follow_model(recipe, start.config)
    base = resident()  # before the audit reads all rows, which training does not keep
    report: dict[str, Any] = {"schema": SCHEMA, "recipe": recipe.name, "data": audit(recipe, tokenizer)}
    report |= {"training": None, "estimate": None, "measured": None, "rehearsal": None, "limits": [], "problems": []}
    report |= {"left_open": dict(left_open), "remarks": []}
    try:
        data = prepare(recipe, tokenizer, lambda: why_not(recipe, start.config))
    except (DataError, TemplateError) as error:  # the audit stands, and says why
        report["problems"].append(str(error))
    else:
        recipe = as_decided(recipe, data.packed, data.per_pack)
        try:
            args, precision = training_arguments(recipe, data, SimpleNamespace(num_processes=processes))
        except (ValueError, TypeError) as error:
            raise UsageError(f"train: {error}") from error
        if here and card is None and processes == 1:
            recipe, why = decide_checkpointing(recipe, start, data, args, None)
            if why:
                report["left_open"]["checkpointing"] = why
                args.gradient_checkpointing = True
        open_here = not args.fp16 and recipe.train.get("bf16") is None and not recipe.train["float32_copies"]
        if card and not torch.cuda.is_available() and open_here:
            args.bf16, precision = True, "bfloat16 autocast, as a run would take there"
        packs = len(data.splits["train"])
        fill = data.tokens["train"] / (packs * recipe.data.max_length)
        report["training"] = {
            "rows": dict(data.rows),
            "dropped": dict(data.dropped),
            "tokens": data.tokens["train"],
            "supervised_tokens": data.supervised_tokens["train"],
            "hidden": data.hidden.facts(),
            "template_date": date_in_prompts(recipe, tokenizer),
            "packing": {"packs": packs, "capacity": recipe.data.max_length, "fill": fill}
            if recipe.data.packing
            else None,
        }
        asked: dict[str, Any] = {"device": device, "processes": processes, "tokens_per_second": tokens_per_second}
        asked["strategy"] = strategy
        report["estimate"] = estimate(recipe, start, data, args, base=base, **asked)
        report["estimate"]["precision"] = precision
        report["remarks"] = remarks(recipe, args, start.config, report["estimate"]["schedule"]["steps"], processes)
        if card:
            paper = on_paper(report["estimate"], strategy, card, element=2 if args.bf16 or args.fp16 else 4)
            report["estimate"]["paper"] = paper
        if measured:
            from instructft.check.measure import measure

            accumulation = args.gradient_accumulation_steps
            report["measured"] = measure(recipe, accumulation, args.device.type, measured)
            if (best := report["measured"]["best"]) and tokens_per_second is None:
                speed = best["tokens_per_second"]
                seconds = report["estimate"]["schedule"]["total_tokens"] / speed
                report["estimate"]["time"] = {"tokens_per_second": speed, "source": "measured", "seconds": seconds}
        if rehearsed:
            from instructft.check.rehearsal import rehearsal

            try:
                report["rehearsal"] = rehearsal(recipe, tokenizer, start, data, rehearsed)
            except ModelError as error:
                report["problems"].append(str(error))
    report["limits"] = limits(recipe, report)
    report["ok"] = not report["problems"] and all(limit["kept"] for limit in report["limits"])
    return report


def limits(recipe: Recipe, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each limit that the recipe's `check:` sets, with what was found and what is allowed."""
    found = []
    for name, path in LIMITS.items():
        allowed = getattr(recipe.check, name)
        if allowed is None or report[path[0]] is None:
            continue
        value = _at(report, path)
        if name == "max_memory_gib":
            own = report["measured"]["tries"][0] if report["measured"] else {"fits": False}
            value = (own["memory"] if own["fits"] else value) / (1 << 30)
        found.append({"key": f"check.{name}", "found": value, "allowed": allowed, "kept": value <= allowed})
    return found


def _at(report: dict[str, Any], path: tuple[str, ...]) -> float:
    """The figure at a path; `one+other` in it adds two."""
    head, *rest = path
    if not rest:
        return float(report[head]) if isinstance(report[head], float) else int(report[head])
    return sum(_at(report[name], tuple(rest)) for name in head.split("+"))


def run(recipe: Recipe, as_json: bool, **options: Any) -> bool:
    """Check and print; False when a limit is passed or the run could not start."""
    from rich.console import Console

    for asked, told in (("measure", "measured"), ("rehearse", "rehearsed")):
        if options.pop(asked, False):
            options[told] = functools.partial(print, file=sys.stderr, flush=True)
    report = check(recipe, **options)
    if as_json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        show(report, Console(highlight=False))
    return bool(report["ok"])


# --------------------------------------------------------------------------------------------------------------------
# For people
# --------------------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report; made for a width of 80 columns, and readable on less."""
    sets = report["data"]["datasets"]
    for account in sets:
        _show_data(account, f"{account['name']} ({account['format']})", console)
        _show_findings(account["findings"], console)
    if len(sets) > 1:
        _show_data(report["data"]["total"], f"all {len(sets)} data sets", console)
    if unmatched := report["data"].get("exclude"):
        console.print(f"  exclude  {_plain(unmatched)}")
    if report["estimate"]:
        _show_needs(report, console)
    if report["rehearsal"]:
        _show_rehearsal(report["rehearsal"], console)
    for remark in report["remarks"]:
        console.print(f"[yellow]note[/]      {_plain(remark)}")
    for problem in report["problems"]:
        console.print(f"[bold red]unusable[/]  {_plain(problem)}")
    for limit in report["limits"]:
        mark = "[green]kept[/]  " if limit["kept"] else "[bold red]passed[/]"
        console.print(f"{mark}  {limit['key']}: found {limit['found']:.4g}, allowed {limit['allowed']:.4g}")


def _grid(console: Console, title: str, lines: list[tuple[str, str]]) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(f"  {name}", _plain(text))
    console.print(f"[bold]{_plain(title)}[/]")
    console.print(table)
    console.print()


def _show_data(account: dict[str, Any], title: str, console: Console) -> None:
    rows, lengths, dropped, cut = account["rows"], account["lengths"], account["dropped"], account["cut"]
    from instructft.data.tokenize import said_of

    splits = " · ".join(f"{name} {count:,}" for name, count in account["splits"].items() if count)
    lines = [
        ("rows", f"{rows:,} ({splits}), {account['turns']:,} turns"),
        ("tokens", f"{account['tokens']:,}, {account['supervised_share']:.1%} with loss"),
        ("length", ", ".join(f"{name} {value:,}" for name, value in lengths.items()) + " tokens before cutting"),
        ("cut", f"{cut['rows']:,} rows ({cut['share']:.1%}) lose {cut['tokens']:,} tokens{_where(cut)}"),
        ("dropped", f"{dropped['rows']:,} rows ({dropped['share']:.1%})"),
    ]
    if account["excluded"]:
        lines.insert(1, ("excluded", f"{account['excluded']:,} rows, by data.exclude; they are in no figure here"))
    for reason, finding in dropped["reasons"].items():
        lines.append(("", f"{finding['rows']:,} {said_of(reason)}{_where(finding)}"))
    _grid(console, title, lines)


def _show_findings(findings: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    from instructft.check.audit import FINDINGS

    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    table.add_column("look at", overflow="fold")
    for name, finding in findings.items():
        if finding["rows"]:
            notes = [f"{e['row']}" + (f" ({e['note']})" if e["note"] else "") for e in finding["examples"]]
            table.add_row(f"{finding['rows']:,}", FINDINGS[name], _plain(", ".join(notes)))
    console.print(table if table.row_count else "  nothing odd was found")
    console.print()


def _show_needs(report: dict[str, Any], console: Console) -> None:
    from instructft.data.account import said_of_hidden
    from instructft.models.tokenizer import said_of_date

    needs, training = report["estimate"], report["training"]
    counts, schedule, time, batch = needs["parameters"], needs["schedule"], needs["time"], needs["batch"]
    packing = training["packing"]
    what = "packs" if packing else "rows"
    lines = [("parameters", f"{counts['all']:,}, {counts['trainable']:,} of them trained")]
    if packing:
        lines.append(
            ("packing", f"{packing['packs']:,} packs of {packing['capacity']:,} tokens, {packing['fill']:.1%} full")
        )
    taken = {k: n for k, n in training["dropped"].items() if k in ("near_duplicate_of_held_out", "left_out_by_weight")}
    if taken:
        lines.append(("not trained", ", ".join(f"{n:,} {k.replace('_', ' ')}" for k, n in taken.items())))
    lines += said_of_hidden(training["hidden"])
    if training["template_date"]:
        lines.append(("date", said_of_date(training["template_date"])))
    step = f"{schedule['rows_per_step']:,} {what}, about {schedule['tokens_per_step']:,} tokens"
    if schedule["gradient_accumulation_steps"] > 1 or schedule["processes"] > 1:
        step += f" ({schedule['gradient_accumulation_steps']} micro-batches × {schedule['processes']} processes)"
    lines += [
        ("steps", f"{schedule['steps']:,}, {schedule['epochs']:.3g} epochs, {schedule['total_tokens']:,} tokens"),
        ("step", step),
        ("time", _time(time)),
    ]
    lines += report["left_open"].items()
    if paper := needs.get("paper"):
        lines.append(("on paper", _on_paper(paper, schedule["processes"])))
    _grid(console, "the run", lines)
    memory = needs["memory"]
    lines = [(name, f"{memory_size(size):>10}") for name, size in memory.items() if size and name != "total"]
    taking_turns = sum(size for name, size in memory.items() if name != "total") > memory["total"]
    turns = "   (gradients and activations take turns)" if taking_turns else ""
    lines.append(("total", f"{memory_size(memory['total']):>10}{turns}"))
    title = f"memory of one {needs['device']}, {batch['rows']} {what} of {batch['width']:,} tokens"
    _grid(console, f"{title}, {needs['precision']}", lines)
    if report["measured"]:
        _show_measured(report["measured"], memory["total"], console)
    for part, exact in needs["exact"].items():
        if not exact:
            console.print(f"  {part}: by a rule of thumb, this kind is not known here\n", style="dim")
    if needs["device"] != "cpu":
        host = needs["host_memory"]
        each, first, total = (memory_size(host[key]) for key in ("process", "first", "total"))
        more = f", {first} the first to save" if host["first"] > host["process"] else ""
        console.print(f"  host memory: {each} a process{more}, {total} in all\n")


def _on_paper(paper: dict[str, Any], devices: int) -> str:
    speed = paper["tokens_per_second_per_device"]
    return (
        f"{clock(paper['seconds'])} on {devices} {paper['card'].upper()}: a step of {paper['step_seconds']:.3g} s, "
        f"{speed:,.0f} tokens/s each; {paper['computing_seconds']:.3g} s of computing, while "
        f"{memory_size(paper['bytes_between_devices'])} go to the others in {paper['communicating_seconds']:.3g} s"
    )


def _show_measured(found: dict[str, Any], estimated: int, console: Console) -> None:
    from instructft.check.measure import in_words, keys

    lines = [("", in_words(one)) for one in found["tries"]]
    if found["tries"][0]["fits"]:
        lines.append(("", f"the first is {found['tries'][0]['memory'] / estimated:.0%} of what was estimated"))
    best = found["best"]
    lines.append(("fastest", keys(best) if best else "nothing fits: it takes a smaller model, or more memory"))
    _grid(console, f"measured on this {found['device']}, on the longest rows", lines)


def _show_rehearsal(found: dict[str, Any], console: Console) -> None:
    head = {"fused": "fused, as the model's own logits", "logits": "the model's own logits"}.get(found["head"], "")
    lines = [
        ("head", head),
        ("precision", found["precision"]),
        *(("said", line) for line in found["said"] or ["all is right: head, gradients, answers, what is saved"]),
        ("time", f"{found['seconds']:.1f} s, beside {found['loading_seconds']:.1f} s of loading"),
    ]
    _grid(console, "rehearsed on one short batch", lines)


def _time(time: dict[str, Any]) -> str:
    if time["seconds"] is None:
        return "unknown: no run of this recipe yet. Measure: --measure, or give --tokens-per-second"
    source = {"given": "as given", "measured": "as measured"}.get(time["source"], f"as in {time['source']}")
    return f"{clock(time['seconds'])} at {time['tokens_per_second']:,.0f} tokens/s, {source}"


def _where(finding: dict[str, Any]) -> str:
    rows = [str(example["row"]) for example in finding.get("examples", ())]
    return f": row {', '.join(rows)}" + (", …" if finding["rows"] > len(rows) else "") if rows else ""


def _plain(text: str) -> str:
    """Text as it stands: no markup, and nothing that would move a terminal's cursor."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))
