"""`instructft compare`: two or more runs side by side, in the terminal and on one self-contained page.

Their curves on one axis, what differs in their recipes and nothing else, figures with intervals, and their answers to
the same prompts. What cannot be compared is said: losses of other rows, or of tokens that are cut otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from instructft.errors import UsageError
from instructft.formatting import FORMS, clock, name_of, nearest, plain_table, short
from instructft.recipe.yaml_reader import read_document
from instructft.redaction import bare_url, without_places, without_roots
from instructft.report.card_results import read_evaluation, read_gate
from instructft.report.curves import LINES, Chart, chart, finite, read_metrics, series_of
from instructft.report.judged import EVALUATED, PAGES, cut_short, spread, template
from instructft.report.page import SAMPLES, before_and_after
from instructft.report.runs import (
    Run,
    loss,
    printable,
    read_facts,
    read_run,
    strict,
    when,
    whole,
    wide_console,
)
from instructft.version import __version__
from instructft.whole_file import write_whole

PAGE = PAGES / "compare.html.jinja"
_CURVES = (
    ("Training loss", "nats per supervised token", "loss"),
    ("Validation loss", "nats per supervised token", "eval_loss"),
    ("Learning rate", "", "learning_rate"),
    ("Speed", "tokens per second", "tokens_per_second"),
)
_OF_NO_MATTER = {"output_dir"}  # of a recipe: two runs always differ in it
_ABSENT = "not there"  # a key that another version wrote, or a longer list has
Differences = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Side:
    """One of the runs, with all that is compared.

    Args:
        name: told apart from the others.
        recipe: dotted key -> value; None where it cannot be read.
        evaluation: what `instructft evaluate --json` found of it, `tuned`.
    """

    name: str
    run: Run
    folder: Path
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    evaluation: Mapping[str, Any]
    gate: Mapping[str, Any]


def compare_runs(
    runs: Sequence[str], html: Path | None = None, *, as_json: bool = False, differences: Differences | None = None
) -> None:
    """Print what two or more runs have in common and what not; with `html`, write the page too.

    Args:
        differences: of the rows of two evaluations, as `instructft.evaluation.confidence.differences` tells them.

    Raises:
        UsageError: fewer than two runs, more than a page holds, or a folder that is no run.
    """
    sides = read_sides(runs)
    found = {
        "runs": [strict(asdict(side.run)) for side in sides],
        "overview": overview(sides),
        "recipe": recipe_differences(sides),
        "made with": other_differences(sides),
        "figures": figures(sides, differences),
        "notes": notes(sides),
    }
    if html is not None:
        if html.is_dir():
            raise UsageError(f"--html: {html} is a folder; name a file")
        html.parent.mkdir(parents=True, exist_ok=True)
        write_whole(html, page(sides, found))
    if as_json:
        print(json.dumps(strict(found), indent=2, ensure_ascii=False, default=str))
        return
    _print(sides, found)
    if html is not None:
        print(f"\nThe page: {html}")


def read_sides(runs: Sequence[str]) -> list[Side]:
    """The runs that are named, each read whole."""
    if len(runs) < 2:
        raise UsageError(f"compare takes two runs or more; found {len(runs)} (`instructft runs` lists them)")
    if len(runs) > len(LINES):
        raise UsageError(f"compare shows {len(LINES)} runs at most; found {len(runs)} (`instructft runs` lists more)")
    sides = []
    paths = [Path(name).expanduser() for name in runs]
    if twice := sorted({str(path) for path in paths if [p.resolve() for p in paths].count(path.resolve()) > 1}):
        raise UsageError(f"{twice[0]} is named twice")
    for path, name in zip(paths, _apart(paths), strict=True):
        if not path.is_dir():
            near = nearest(path.name, (p.name for p in path.absolute().parent.glob("*") if p.is_dir()))
            raise UsageError(f"there is no run folder {path}{near}")
        facts, _ = read_facts(path)
        if not facts and not (path / "recipe.yaml").is_file() and not (path / "metrics.jsonl").is_file():
            raise UsageError(f"{path} holds no run: there is no run.json, recipe.yaml or metrics.jsonl in it")
        evaluation = (read_evaluation(path) or {}).get("tuned", {})
        sides.append(Side(name, read_run(path), path, facts, _recipe(path), evaluation, read_gate(path) or {}))
    return sides


def _apart(paths: Sequence[Path]) -> list[str]:
    """The last names of folders, with as much of the way before them as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = next(n for n in range(1, 100) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def _recipe(folder: Path) -> dict[str, Any] | None:
    """The keys of `recipe.yaml`, dotted; lists of plain values stay whole."""
    document = read_document(folder / "recipe.yaml")
    if document.problems or not isinstance(document.values, dict):
        return None
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        inner: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, Mapping) else []
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            inner = list(enumerate(value))
        for name, one in inner:
            walk(one, f"{key}.{name}" if key else str(name))
        if not inner:
            flat[key] = value

    walk(document.values, "")
    return {key: value for key, value in flat.items() if key not in _OF_NO_MATTER}


# --------------------------------------------------------------------------------------------------------------------
# What is compared
# --------------------------------------------------------------------------------------------------------------------


def overview(sides: Sequence[Side]) -> dict[str, list[str]]:
    """What -> a text for each run: how it ended, what it learned, how fast."""

    def train(side: Side, key: str) -> Any:
        found = side.facts.get("train", {}).get(key)
        return found if finite(found) else None

    seconds = [train(side, "seconds") for side in sides]
    speeds = [train(side, "tokens_per_second") for side in sides]
    rows = {
        "state": [side.run.state for side in sides],
        "ended": [when(side.run.when) for side in sides],
        "model": [side.run.model or "" for side in sides],
        "data": [side.run.data or "" for side in sides],
        "training rows": [whole(side.run.rows) for side in sides],
        "steps": [whole(side.run.steps) for side in sides],
        "time": ["" if found is None else clock(found) for found in seconds],
        "tokens a second": ["" if found is None else f"{found:,.0f}" for found in speeds],
        "loss before step 1": [loss(side.run.start_loss) for side in sides],
        "training loss": [loss(side.run.loss) for side in sides],
        "validation loss": [loss(side.run.eval_loss) for side in sides],
        "warnings": [str(side.run.warnings or "none") for side in sides],
    }
    return {what: texts for what, texts in rows.items() if any(texts)}


def recipe_differences(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Dotted recipe key -> its value in each run, where these are not all the same."""
    known = [side.recipe for side in sides if side.recipe is not None]
    found = {}
    for key in {key: None for recipe in known for key in recipe}:
        if any(recipe.get(key, _ABSENT) != known[0].get(key, _ABSENT) for recipe in known):
            found[key] = ["unknown" if s.recipe is None else s.recipe.get(key, _ABSENT) for s in sides]
    return found


def other_differences(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """What is no recipe key and differs all the same: versions, device, the rows themselves."""
    found: dict[str, list[Any]] = {}
    for section, keys in (("versions", None), ("hardware", None), ("data", ("fingerprint",)), ("base", None)):
        parts = [part if isinstance(part := side.facts.get(section), Mapping) else {} for side in sides]
        for key in {key: None for part in parts for key in part if keys is None or key in keys}:
            values = [part.get(key) for part, side in zip(parts, sides, strict=True)]
            known = [value for value, side in zip(values, sides, strict=True) if side.facts]
            if any(value != known[0] for value in known):
                found[f"{section}.{key}"] = values
    return found


def figures(sides: Sequence[Side], differences: Differences | None = None) -> dict[str, list[dict[str, Any]]]:
    """Figure -> for each run `value`, `interval`, and against the first run `difference` and whether it is `noise`."""
    rows = [_rows(side) for side in sides]
    same = [bool(ours) and _asked(ours) == _asked(rows[0]) for ours in rows]
    against = [
        differences(ours, rows[0]) if differences and at and same[at] and _comparable(ours, rows[0]) else {}
        for at, ours in enumerate(rows)
    ]
    found = {}
    for name in FORMS:
        values = [side.evaluation.get(name) for side in sides]
        if any(finite(value) for value in values):
            intervals = [(side.evaluation.get("intervals") or {}).get(name) for side in sides]
            found[name] = [
                {"value": value, "interval": interval, **({"against_first": other[name]} if name in other else {})}
                for value, interval, other in zip(values, intervals, against, strict=True)
            ]
    return found


def _rows(side: Side) -> list[dict[str, Any]]:
    found = side.evaluation.get("rows")
    kept = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return [row for row in kept if {"prompt", "reference", "prediction"} <= row.keys()]


def _asked(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(row["prompt"], row["reference"]) for row in rows]


def _comparable(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether both have the same sums of every row; one may have been written by another version."""
    return bool(ours) and ours[0].keys() == theirs[0].keys()


def notes(sides: Sequence[Side]) -> list[str]:
    """What a reader must know before comparing: runs that are not whole, other rows, other tokens, and warnings."""
    found = [f"{side.name}: {side.run.state}." for side in sides if side.run.state != "finished"]
    found += [
        f"{side.name}: recipe.yaml cannot be read; its keys are not compared." for side in sides if side.recipe is None
    ]
    prints = {side.facts.get("data", {}).get("fingerprint") for side in sides if side.facts.get("data")}
    if len(prints) > 1:
        found.append(
            "The runs were trained, and judged while they trained, on other rows or other tokens: their losses do not "
            "compare as they stand. `instructft evaluate RUN --data FILE` asks all of them the same."
        )
    asked = [_asked(rows) for side in sides if (rows := _rows(side))]
    if any(one != asked[0] for one in asked):
        found.append("They were evaluated on different rows: their figures do not compare as they stand.")
    missing = [side.name for side in sides if not side.evaluation]
    if missing:
        found.append(
            f"Not evaluated: {', '.join(missing)}. Figures need `instructft evaluate RUN --json RUN/evaluation.json`."
        )
    for side in sides:
        warnings = side.facts.get("warnings")
        for warning in warnings if isinstance(warnings, list) else ():
            if isinstance(warning, Mapping):
                found.append(f"{side.name}, step {warning.get('step')}: {warning.get('text')}.")
    return found


def answers(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The prompts of `samples.jsonl` with the last answer of each run; those that all of them have come first."""
    said = [{row["prompt"]: row["after"] for row in before_and_after(side.folder)["prompts"]} for side in sides]
    prompts = {prompt: sum(prompt in one for one in said) for known in said for prompt in known}
    ordered = sorted(prompts, key=lambda prompt: -prompts[prompt])[:SAMPLES]
    return [{"prompt": prompt, "answers": [one.get(prompt) for one in said]} for prompt in ordered]


def evaluated_rows(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Rows that all evaluated runs were asked, those first on which they differ: right here, wrong there."""
    known = [(at, {(row["prompt"], row["reference"]): row["prediction"] for row in _rows(side)})
             for at, side in enumerate(sides) if _rows(side)]  # fmt: skip
    if len(known) < 2:
        return []
    shared = [key for key in known[0][1] if all(key in rows for _, rows in known)]
    right = {key: {rows[key].strip() == key[1].strip() for _, rows in known} for key in shared}
    apart, alike = [key for key in shared if len(right[key]) > 1], [key for key in shared if len(right[key]) == 1]
    chosen = spread(apart, EVALUATED)
    chosen += spread(alike, EVALUATED - len(chosen))
    by_side = dict(known)
    return [
        {
            "prompt": cut_short(prompt),
            "reference": cut_short(reference),
            "answers": [
                cut_short(by_side[at][prompt, reference]) if at in by_side else None for at in range(len(sides))
            ],
        }
        for prompt, reference in chosen
    ]


def curves(sides: Sequence[Side]) -> list[Chart]:
    """The curves of all runs, one chart for each kind, a run in the same colour in all of them."""
    logged = [read_metrics(side.folder) for side in sides]
    found = []
    for title, unit, key in _CURVES:
        zero = key in ("learning_rate", "tokens_per_second")
        series = [
            series_of(records, key, side.name, dots=key == "eval_loss", from_zero=zero, colour=at)
            for at, (side, records) in enumerate(zip(sides, logged, strict=True))
        ]
        if drawn := chart(title, series, unit):
            found.append(drawn)
    return found


# --------------------------------------------------------------------------------------------------------------------
# As it is shown
# --------------------------------------------------------------------------------------------------------------------


def page(sides: Sequence[Side], found: Mapping[str, Any]) -> str:
    """The text of the page; it names no folder of this machine."""
    folders = [folder for side in sides for folder in (side.folder, side.folder.parent)]
    told = {
        key: [written(_as_told(without_places(value, folders, key.rpartition(".")[2]))) for value in values]
        for key, values in {**found["recipe"], **found["made with"]}.items()
    }
    text = template(PAGE).render(
        names=[side.name for side in sides],
        overview=found["overview"],
        notes=found["notes"],
        charts=curves(sides),
        recipe=told,
        figures={name_of(name): [_figure(name, one) for one in row] for name, row in found["figures"].items()},
        gates=gates(sides),
        answers=answers(sides),
        rows=evaluated_rows(sides),
        version=__version__,
    )
    return without_roots(text, folders)


def gates(sides: Sequence[Side]) -> dict[str, list[str]]:
    """What the gate said of each run, and of each suite."""
    if not any(side.gate for side in sides):
        return {}
    words = {True: "passed", False: "not passed"}
    found = {"the gate": [words.get(side.gate.get("passed"), "") for side in sides]}  # type: ignore[arg-type]
    for at, side in enumerate(sides):
        rest = side.gate.get("rest")
        suites, lost = (rest.get("suites"), rest.get("lost") or ()) if isinstance(rest, Mapping) else (None, ())
        for name, suite in suites.items() if isinstance(suites, Mapping) else ():
            if isinstance(suite, Mapping) and finite(suite.get("after")):
                cells = found.setdefault(str(name), [""] * len(sides))
                cells[at] = f"{suite['after']:.1%}" + (", down" if name in lost else "")
    return found


def written(value: Any) -> str:
    """A value of a recipe as its YAML has it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _as_told(value: Any) -> Any:
    return bare_url(value) if isinstance(value, str) and "://" in value else value


def _figure(name: str, one: Mapping[str, Any]) -> tuple[str, str]:
    """A figure, and beside it its interval, or its difference from the first run."""
    if not finite(one["value"]):
        return "", ""
    form = FORMS[name]
    if other := one.get("against_first"):
        span = " to ".join(form.replace("{:", "{:+").format(value) for value in other["interval"] or ())
        noise = {True: ", noise", False: "", None: ""}[other["noise"]]
        return form.format(one["value"]), f"against the first: {span}{noise}" if span else ""
    span = " to ".join(form.format(value) for value in one["interval"] or ())
    return form.format(one["value"]), span


def _print(sides: Sequence[Side], found: Mapping[str, Any]) -> None:
    from rich.text import Text

    console = wide_console()
    names = [printable(side.name) for side in sides]

    def table(title: str, rows: Mapping[str, Sequence[str]]) -> None:
        if not rows:
            return
        drawn = plain_table(title, *names, left=1 + len(names))
        for what, texts in rows.items():
            drawn.add_row(Text(printable(what)), *(Text(printable(short(text, 200))) for text in texts))
        console.print(drawn)
        console.print()

    table("", found["overview"])
    table("recipe", {key: [written(value) for value in values] for key, values in found["recipe"].items()})
    if not found["recipe"]:
        console.print("The recipes differ in nothing but output_dir.\n")
    table("made with", {key: [written(value) for value in values] for key, values in found["made with"].items()})
    shown = {name_of(name): [_figure(name, one) for one in row] for name, row in found["figures"].items()}
    table("figures, 95% intervals", {
        name: [f"{value}  ({span})" if span else value for value, span in row] for name, row in shown.items()
    })  # fmt: skip
    table("gate", gates(sides))
    for note in found["notes"]:
        console.print(Text(printable(note)), soft_wrap=False)
